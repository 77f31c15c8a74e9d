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

Several GPUs: `accelerate launch -m delta_llava.train.pretrain` with the same arguments. One checkpoint for several
token budgets: `--num_visual_tokens 1 4 16 36 144`. After an interruption: `--resume_from_checkpoint latest`.
"""

from pathlib import Path

import torch
from trl import SFTConfig, TrlParser

from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from ..processing_delta_llava import DeltaLlavaProcessor
from .batches import BudgetedRows, Collator
from .data import load_llava_json
from .trainer import DeltaLlavaTrainer, ScriptArguments, check_recipe


PLAIN_TEMPLATE = Path(__file__).parents[1] / "templates" / "plain.jinja"


def main(arguments: list[str] | None = None):
    parser = TrlParser((ScriptArguments, SFTConfig))
    script_args, training_args = parser.parse_args_and_config(arguments)
    config, checkpoint = check_recipe(script_args, training_args)

    ################
    # Dataset
    ################
    processor = DeltaLlavaProcessor.from_pretrained(
        script_args.model_name_or_path, num_visual_tokens=config.num_visual_tokens
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
    collator([BudgetedRows(dataset)[0, max(config.visual_token_budgets)]])  # shows a fault of template or max_length

    ################
    # Model
    ################
    # Frozen weights in the dtype that mixed precision computes in, trained ones in float32: in 16 bits, AdamW's small
    # steps would be rounded away
    dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    model = DeltaLlavaForConditionalGeneration.from_pretrained(
        script_args.model_name_or_path,
        config=config,
        dtype=dtype,
        attn_implementation=script_args.attn_implementation,
    )
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
    trainer.model.to(dtype)  # the trained weights too
    trainer.save_model()


if __name__ == "__main__":
    main()
