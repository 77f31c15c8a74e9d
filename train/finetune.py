r"""
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
`--num_visual_tokens 1 4 16 36 64 144`. After an interruption: `--resume_from_checkpoint latest`.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import ModelConfig, SFTConfig

from ..llava import pad_to_square
from ..processing_delta_llava import DeltaLlavaProcessor
from ..turns import stop_at_end_of_turn
from .batches import Collator
from .preflight import report
from .recipe import ScriptArguments, check_recipe, load_model, load_rows, lora_config, parse_recipe
from .record import Record
from .runs import configured_run, sole_run
from .trainer import DeltaLlavaTrainer


def main(arguments: list[str] | None = None):
    script_args, training_args, model_args, recipe = parse_recipe(arguments)
    with nullcontext() if script_args.dry_run else sole_run(training_args):
        train(script_args, training_args, model_args, recipe)


def train(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig, recipe: dict[str, Any]):
    """The stage, once its arguments are read."""
    config, checkpoint = check_recipe(script_args, training_args, model_args, recipe)
    training_args.assistant_only_loss = True  # as the collator does; TRL then checks the template's end of turn

    ################
    # Dataset
    ################
    processor = DeltaLlavaProcessor.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
    )
    processor.adopt_budgets(config)
    if training_args.chat_template_path:
        processor.chat_template = Path(training_args.chat_template_path).read_text(encoding="utf-8")
    processor.image_processor = pad_to_square(processor.image_processor)
    collator = Collator(processor, training_args.max_length)
    rows, held_out = load_rows(script_args, training_args, processor, config)

    run = configured_run(
        "finetune", recipe, script_args, training_args, model_args, config.visual_token_budgets, rows, checkpoint
    )

    ################
    # Model
    ################
    # Trained weights in float32: in 16 bits, AdamW's small steps would be rounded away
    model = load_model(script_args, training_args, model_args, config)
    stop_at_end_of_turn(model.generation_config, processor.tokenizer, processor.chat_template)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.float()
    adapters = lora_config(model, model_args) if model_args.use_peft else None
    if adapters is None:
        model.model.language_model.float()
        model.lm_head.float()
    if script_args.dry_run:
        return report(training_args, model_args, model, rows, collator, adapters)

    ################
    # Training
    ################
    num_rows = None if script_args.stream else len(rows)
    record = Record("finetune", run, num_rows, model_args.model_name_or_path, model_args.model_revision)
    trainer = DeltaLlavaTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=processor,
        num_visual_tokens=script_args.num_visual_tokens,
        projector_learning_rate=script_args.projector_learning_rate,
        branch_learning_rate=script_args.branch_learning_rate,
        skip_bad_records=script_args.skip_bad_records,
        record=record,
        peft_config=adapters,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    record.finish(trainer)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # else its threads may abort a process whose work is done
