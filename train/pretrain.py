"""
Stage 1: teach the projector to speak to the language model, on images and their captions. Tower and LLM are frozen.

One GPU, or one CPU with `bf16: false` in the recipe:

```
python -m delta_llava.train.pretrain \
    --config train/recipes/vicuna-7b/pretrain.yaml \
    --model_name_or_path checkpoints/delta-llava-vicuna-7b \
    --json_path LLaVA-Pretrain/blip_laion_cc_sbu_558k.json \
    --image_folder LLaVA-Pretrain \
    --output_dir runs/vicuna-7b-pretrain
```

Several GPUs: `accelerate launch -m delta_llava.train.pretrain` with the same arguments. One checkpoint for several token
budgets: `--num_visual_tokens 1 4 16 36 144`. After an interruption: `--resume_from_checkpoint latest`.
"""

from pathlib import Path

from trl import ModelConfig, SFTConfig, TrlParser

from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from ..processing_delta_llava import DeltaLlavaProcessor
from .data import BudgetedRows, Collator, load_llava_json
from .trainer import DeltaLlavaTrainer, ScriptArguments, check_recipe


PLAIN_TEMPLATE = Path(__file__).parents[1] / "templates" / "plain.jinja"


def main(arguments: list[str] | None = None):
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    config, checkpoint = check_recipe(script_args, training_args, model_args)

    ################
    # Dataset
    ################
    processor = DeltaLlavaProcessor.from_pretrained(
        model_args.model_name_or_path, num_visual_tokens=config.num_visual_tokens
    )
    dataset = load_llava_json(
        script_args.json_path,
        script_args.image_folder,
        bad_records_path=Path(training_args.output_dir) / "bad_records.jsonl",
        skip_bad_records=script_args.skip_bad_records,
        require_images=True,
    )
    # The template is this stage's alone: the checkpoint keeps the one for conversations
    collator = Collator(processor, training_args.max_length, PLAIN_TEMPLATE.read_text(encoding="utf-8"))
    collator([BudgetedRows(dataset)[0, max(config.visual_token_budgets)]])  # the template's faults show here

    ################
    # Model
    ################
    model = DeltaLlavaForConditionalGeneration.from_pretrained(
        model_args.model_name_or_path,
        config=config,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
    )
    dtype = model.dtype
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)

    ################
    # Training
    ################
    trainer = DeltaLlavaTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=dataset,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.model.to(dtype)  # the trained weights were float32
    trainer.save_model()


if __name__ == "__main__":
    main()
