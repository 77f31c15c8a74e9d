"""
Stage 2: teach the projector and the language model to follow instructions about images. The tower is frozen.

```
accelerate launch -m delta_llava.train.finetune \
    --config train/recipes/vicuna-7b/finetune.yaml \
    --model_name_or_path runs/vicuna-7b-pretrain \
    --json_path LLaVA-Tuning/llava_v1_5_mix665k.json \
    --image_folder LLaVA-Tuning \
    --output_dir runs/vicuna-7b-finetune
```

On one device `python -m delta_llava.train.finetune` does. One checkpoint for several token budgets:
`--num_visual_tokens 1 4 16 36 144`. After an interruption: `--resume_from_checkpoint latest`.
"""

from pathlib import Path

import torch
from transformers import LlavaImageProcessor
from trl import SFTConfig, TrlParser

from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from ..processing_delta_llava import DeltaLlavaProcessor
from .batches import BudgetedRows, Collator
from .data import load_llava_json
from .trainer import DeltaLlavaTrainer, ScriptArguments, check_recipe


def main(arguments: list[str] | None = None):
    parser = TrlParser((ScriptArguments, SFTConfig))
    script_args, training_args = parser.parse_args_and_config(arguments)
    config, checkpoint = check_recipe(script_args, training_args)
    training_args.assistant_only_loss = True  # as the collator does; TRL then checks the template's end of turn

    ################
    # Dataset
    ################
    processor = DeltaLlavaProcessor.from_pretrained(
        script_args.model_name_or_path, num_visual_tokens=config.num_visual_tokens
    )
    # Square padding as in LLaVA-1.5: what a centre crop cuts away cannot be asked about
    image_size = config.vision_config.image_size
    processor.image_processor = LlavaImageProcessor(
        do_pad=True,
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=processor.image_processor.image_mean,
        image_std=processor.image_processor.image_std,
    )
    dataset = load_llava_json(
        script_args.json_path,
        script_args.image_folder,
        bad_records_path=Path(training_args.output_dir) / "bad_records.jsonl",
        skip_bad_records=script_args.skip_bad_records,
    )
    collator = Collator(processor, training_args.max_length)
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
    model.model.vision_tower.requires_grad_(False)
    for part in (model.model.multi_modal_projector, model.model.language_model, model.lm_head):
        part.float()

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
