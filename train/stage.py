"""What both stages share: the rows and the model that a recipe names, the dry run, training and the result."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import ProcessorMixin
from transformers.utils import logging
from trl import ModelConfig, get_quantization_config

from ..configuration_delta_llava import DeltaLlavaConfig
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from ..processing_delta_llava import DeltaLlavaProcessor
from .batches import Collator, fit_rows
from .data import has_configurations, load_llava_json
from .history import History, check_output_dir
from .preflight import report
from .recipe import Recipe, check_recipe, parse_recipe
from .runs import checkpoint_to_resume, configured_run, sole_run
from .stream import stream_rows
from .trainer import DeltaLlavaTrainer


logger = logging.get_logger(__name__)


def run_stage(
    stage: str,
    arguments: list[str] | None,
    prepare_processor: Callable[[Recipe, ProcessorMixin], str | None],
    prepare_model: Callable[[Recipe, DeltaLlavaForConditionalGeneration, ProcessorMixin], LoraConfig | None],
):
    """
    Run a stage, or only report on it in a dry run.

    Args:
        stage (`str`): `pretrain` or `finetune`.
        arguments (`list[str]`, *optional*, defaults to the command line): `--config FILE` and more.
        prepare_processor (`Callable`): Changes the processor that the result is saved with, and returns the chat
            template to train on, or `None` for the processor's.
        prepare_model (`Callable`): Freezes what is not trained, and returns the adapters to add, or `None`.
    """
    recipe = parse_recipe(arguments)
    script_args, training_args, model_args = recipe.script, recipe.training, recipe.model
    with nullcontext() if script_args.dry_run else sole_run(training_args):
        is_stage_1 = stage == "pretrain"
        config = check_recipe(recipe, is_stage_1)
        check_output_dir(training_args.output_dir)
        checkpoint = checkpoint_to_resume(training_args)

        processor = DeltaLlavaProcessor.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision
        )
        processor.adopt_budgets(config)
        collator = Collator(processor, training_args.max_length, prepare_processor(recipe, processor))
        rows, held_out = load_rows(recipe, collator, config, is_stage_1)
        run = configured_run(stage, recipe, config.visual_token_budgets, rows, checkpoint)

        model = load_model(recipe, config)
        adapters = prepare_model(recipe, model, processor)
        if script_args.dry_run:
            return report(recipe, model, rows, collator, adapters)

        num_rows = None if script_args.stream else len(rows)
        history = History(stage, run, num_rows, model_args.model_name_or_path, model_args.model_revision)
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
            history=history,
            peft_config=adapters,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        history.finish(trainer)


def load_rows(
    recipe: Recipe, collator: Collator, config: DeltaLlavaConfig, is_stage_1: bool = False
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """
    The rows to train on and the rows held out, as the recipe names them and [`DeltaLlavaTrainer`] takes them.

    `collator` will make their batches, for the budgets in `config`. In stage 1 every record must have an image, one
    question and one answer.

    Raises:
        `ValueError`: A record is bad, no row fits into `max_length`, there are fewer rows than are to be held out, or
            none of `eval_json_path` has an image.
    """
    script_args, training_args = recipe.script, recipe.training
    fitting = {
        "processor": collator.processor,
        "num_visual_tokens": max(config.visual_token_budgets),
        "max_length": collator.max_length,
        "chat_template": collator.chat_template,
    }
    num_eval_rows, config_name = script_args.num_eval_rows, script_args.dataset_config
    checking = {"require_images": is_stage_1, "skip_bad_records": script_args.skip_bad_records}

    def load(json_path: str, config_name: str | None, split: str, bad_records: str) -> Dataset:
        # One process of a machine checks and measures; the others find its results in the cache
        with training_args.main_process_first(local=True, desc="loading the data"):
            dataset = load_llava_json(
                json_path,
                script_args.image_folder,
                Path(training_args.output_dir, bad_records),
                with_notes=True,
                follow_links=script_args.follow_links,
                dataset_config=config_name,
                split=split,
                **checking,
            )
            return fit_rows(dataset, **fitting)

    held_out = None
    if eval_json_path := script_args.eval_json_path:
        eval_config = config_name if has_configurations(Path(eval_json_path)) else None
        held_out = load(eval_json_path, eval_config, "validation", "bad_eval_records.jsonl")
        has_image = held_out.with_format("numpy")["num_images"][:] > 0
        if not has_image.all():
            logger.warning(
                f"{(~has_image).sum()} of the {len(held_out)} rows in {eval_json_path} have no image and are left out "
                "of validation: their loss is the same at every budget."
            )
            held_out = held_out.select(np.flatnonzero(has_image))
        if not len(held_out):
            raise ValueError(f"eval_json_path={eval_json_path} has no row with an image.")
    if script_args.stream:
        streaming = {**fitting, **checking, "dataset_config": config_name}
        rows = stream_rows(script_args.stream, "train", **streaming)
        if not num_eval_rows:
            return rows, held_out
        stream = stream_rows(script_args.stream, "validation", **streaming).remove_columns("id")
        held_out = list(stream.filter(lambda row: row["images"]).take(num_eval_rows))
        if len(held_out) < num_eval_rows:
            raise ValueError(
                f"num_eval_rows={num_eval_rows}, but the split validation of {script_args.stream} has {len(held_out)} "
                "rows with images."
            )
        return rows, fit_rows(Dataset.from_list(held_out, features=stream.features), **fitting)

    dataset = load(script_args.json_path, config_name, "train", "bad_records.jsonl")
    if not num_eval_rows:
        return dataset, held_out
    # The loss of rows without images is the same at every budget
    candidates = np.flatnonzero(dataset.with_format("numpy")["num_images"][:])
    if num_eval_rows >= len(candidates):
        raise ValueError(f"num_eval_rows={num_eval_rows} leaves none of the {len(candidates)} rows with images.")
    held_out = np.random.default_rng(training_args.seed).choice(candidates, num_eval_rows, replace=False)
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), held_out)), dataset.select(np.sort(held_out))


def load_model(recipe: Recipe, config: DeltaLlavaConfig) -> DeltaLlavaForConditionalGeneration:
    """
    The model to train, with the configuration that [`check_recipe`] returns; on `meta` in a dry run.

    It has the dtype that mixed precision computes in, which `bf16` and `fp16` decide, and is quantized if asked.
    """
    training_args, model_args = recipe.training, recipe.model
    dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    if recipe.script.dry_run:
        with torch.device("meta"):
            return DeltaLlavaForConditionalGeneration(config).to(dtype)
    model_args.dtype = dtype  # quantized weights compute in it
    return DeltaLlavaForConditionalGeneration.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        config=config,
        dtype=dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
    )


def lora_config(model: DeltaLlavaForConditionalGeneration, model_args: ModelConfig) -> LoraConfig:
    """
    Adapters on linear layers of the language model, those that `lora_target_modules` names or all; the projector is
    trained in full and saved with them.

    Raises:
        `ValueError`: The language model has no layer of a name that `lora_target_modules` lists.
    """
    linear = {
        name.rpartition(".")[2]
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    targets = model_args.lora_target_modules
    if isinstance(targets, str):  # what TRL makes of a list of one
        targets = None if targets == "all-linear" else [targets]
    targets = set(targets or linear)
    if unknown := targets - linear:
        raise ValueError(
            f"lora_target_modules names {sorted(unknown)}, but the language model's linear layers are {sorted(linear)}."
        )
    return LoraConfig(
        revision=model_args.model_revision,  # of the base model, for whoever loads the adapter
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        # The tower has layers of the same names, which get no adapters
        target_modules=rf"model\.language_model\..*\.({'|'.join(sorted(targets))})",
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=["multi_modal_projector", *(model_args.lora_modules_to_save or ())],
        task_type="CAUSAL_LM",
    )
