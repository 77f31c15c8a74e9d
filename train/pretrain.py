r"""
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
token budgets: `--num_visual_tokens 1 4 16 36 64 144`. After an interruption: `--resume_from_checkpoint latest`.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import ModelConfig, SFTConfig

from ..processing_delta_llava import DeltaLlavaProcessor
from .batches import Collator
from .preflight import report
from .recipe import ScriptArguments, check_recipe, load_model, load_rows, parse_recipe
from .record import Record
from .runs import configured_run, sole_run
from .trainer import DeltaLlavaTrainer


PLAIN_TEMPLATE = Path(__file__).parents[1] / "templates" / "plain.jinja"


def main(arguments: list[str] | None = None):
    script_args, training_args, model_args, recipe = parse_recipe(arguments)
    with nullcontext() if script_args.dry_run else sole_run(training_args):
        train(script_args, training_args, model_args, recipe)


def train(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig, recipe: dict[str, Any]):
    """The stage, once its arguments are read."""
    config, checkpoint = check_recipe(script_args, training_args, model_args, recipe)
    for name in ("use_peft", "chat_template_path"):
        if recipe.get(name):
            raise ValueError(f"{name} has no place in stage 1, which trains the projector alone, on bare captions.")

    ################
    # Dataset
    ################
    processor = DeltaLlavaProcessor.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
    )
    processor.adopt_budgets(config)
    # The template is this stage's alone: the checkpoint keeps the one for conversations
    template = PLAIN_TEMPLATE.read_text(encoding="utf-8")
    collator = Collator(processor, training_args.max_length, template)
    rows, held_out = load_rows(script_args, training_args, processor, config, template, is_stage_1=True)

    run = configured_run(
        "pretrain", recipe, script_args, training_args, model_args, config.visual_token_budgets, rows, checkpoint
    )

    ################
    # Model
    ################
    # Trained weights in float32: in 16 bits, AdamW's small steps would be rounded away
    model = load_model(script_args, training_args, model_args, config)
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    if script_args.dry_run:
        return report(training_args, model_args, model, rows, collator)

    ################
    # Training
    ################
    num_rows = None if script_args.stream else len(rows)
    record = Record("pretrain", run, num_rows, model_args.model_name_or_path, model_args.model_revision)
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
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    record.finish(trainer)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # else its threads may abort a process whose work is done
