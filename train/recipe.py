"""What a recipe says: the arguments of both stages, the checks of them, and the rows and the model that they name."""

import sys
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import ProcessorMixin
from transformers.utils import logging
from trl import ModelConfig, SFTConfig, TrlParser, get_quantization_config

from ..configuration_delta_llava import DeltaLlavaConfig, default_visual_tokens, query_grid_size
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from .batches import fit_rows, stream_rows
from .data import check_llava_json, has_configurations, stop_at_bad_records
from .record import check_output_dir
from .runs import checkpoint_to_resume


logger = logging.get_logger(__name__)

# Options of TRL's that nothing here would heed, and why
_WITHOUT_EFFECT = {
    "rows are LLaVA's records, read, cut and batched here": (
        "dataset_text_field dataset_kwargs dataset_num_proc shuffle_dataset truncation_mode packing_strategy "
        "eval_packing completion_only_loss remove_unused_columns label_names length_column_name "
        "dataloader_multiprocessing_context dataloader_in_order"
    ),
    "the checkpoint and this package's own classes decide it": (
        "eos_token pad_token model_init_kwargs trust_remote_code use_cache lora_task_type"
    ),
    "each budget has a loss, there is no other metric, and the result is the last step's; any checkpoint-N is a model, "
    "too, or an adapter that merge_adapter takes": (
        "load_best_model_at_end metric_for_best_model greater_is_better prediction_loss_only include_for_metrics "
        "batch_eval_metrics eval_do_concat_batches eval_use_gather_object eval_accumulation_steps bf16_full_eval "
        "fp16_full_eval do_predict"
    ),
    "SIGTERM ends a run after a checkpoint anyway": "enable_jit_checkpoint restore_callback_states_from_checkpoint",
    "there are no such kernels for this model": "use_liger_kernel liger_kernel_config",
    "a result is published by `python -m delta_llava.hub.push --checkpoint OUTPUT_DIR --repo_id ORG/NAME`": (
        "push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision"
    ),
}
# Options that only another one gives a meaning
_PARTS = {
    "use_peft": (
        "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save use_rslora "
        "use_dora"
    ),
    "load_in_4bit": "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
    "eval_strategy": "do_eval eval_steps eval_delay eval_on_start",
}


@dataclass
class ScriptArguments:
    """
    Arguments of a training stage beside those of TRL's `SFTConfig` and `ModelConfig`.

    Args:
        json_path (`str`, *optional*):
            LLaVA's JSON file, or what else [`~delta_llava.train.data.load_llava_json`] reads.
        image_folder (`str`, *optional*):
            Folder that the images of `json_path` lie in, unless it carries them.
        stream (`str`, *optional*):
            Instead of both: Hub repository, or folder of Parquet files or WebDataset's tar files, to stream records and
            images from. Then `max_steps` tells how long to train.
        dataset_config (`str`, *optional*):
            Configuration of a data set that has several, whose split `train` is read.
        eval_json_path (`str`, *optional*):
            Rows for the validation loss, of any kind that `json_path` may be, over the same `image_folder`; of a data
            set, its split `validation`.
        num_visual_tokens (`list`, *optional*, defaults to the `visual_token_budgets` of the model):
            Token budgets to train. Of several, each batch draws one, for one checkpoint that serves all of them.
            `"auto"` is one more to draw: then each image of the batch gets the budget that its size asks for, of the
            other ones up to the default.
        skip_bad_records (`bool`, *optional*, defaults to `False`):
            Train without the bad records instead of stopping at them.
        follow_links (`bool`, *optional*, defaults to `False`):
            Allow links that lead out of `image_folder`.
        projector_learning_rate (`float`, *optional*, defaults to `learning_rate`):
            Peak learning rate of the projector, where the language model is trained beside it.
        branch_learning_rate (`float`, *optional*, defaults to `projector_learning_rate`):
            Peak learning rate of a `residual` projector's branch and gate: of all of it but LLaVA-1.5's MLP.
        num_eval_rows (`int`, *optional*, defaults to 0):
            Instead: rows with images held out of training, or of a stream, the first ones of its split `validation`.
            `eval_strategy` and `eval_steps` say when the validation loss is computed.
        allow_changes (`bool`, *optional*, defaults to `False`):
            Go on from a checkpoint with other data, budgets, batches, rates or other settings than it was trained with.
            The record of the result names the change.
        dry_run (`bool`, *optional*, defaults to `False`):
            Check everything, tell what the run would cost, show one sample with its labels, and train nothing. To be
            given on the command line.
    """

    json_path: str | None = field(
        default=None, metadata={"help": "JSON list or lines, Parquet file, folder or data set of the Hub."}
    )
    image_folder: str | None = field(default=None, metadata={"help": "Folder of the JSON file's images."})
    stream: str | None = field(
        default=None, metadata={"help": "Instead of both: Hub repository or folder of shards to stream."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set that has several."})
    eval_json_path: str | None = field(
        default=None, metadata={"help": "Rows for the validation loss of each budget; of a data set, its validation."}
    )
    num_visual_tokens: list[str] | None = field(
        default=None,
        metadata={
            "help": "Token budgets to train, 'auto' among them. Of several, each batch draws one. Default: the model's."
        },
    )
    skip_bad_records: bool = field(
        default=False, metadata={"help": "Train without the bad records instead of stopping at them."}
    )
    follow_links: bool = field(default=False, metadata={"help": "Allow links that lead out of image_folder."})
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the projector. Default: learning_rate."}
    )
    branch_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of a residual projector but its MLP. Default: projector_learning_rate."},
    )
    num_eval_rows: int = field(
        default=0, metadata={"help": "Instead, rows with images held out for the validation loss of each budget."}
    )
    allow_changes: bool = field(
        default=False, metadata={"help": "Resume with other settings than the checkpoint was trained with."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Check everything, tell the costs, train nothing."})

    def __post_init__(self):
        # `num_visual_tokens: 144` in a recipe
        if isinstance(self.num_visual_tokens, (int, str)):
            self.num_visual_tokens = [self.num_visual_tokens]
        self.num_visual_tokens = [
            int(budget) if str(budget).isdecimal() else budget for budget in self.num_visual_tokens or ()
        ]


def parse_recipe(
    arguments: list[str] | None = None,
) -> tuple[ScriptArguments, SFTConfig, ModelConfig, dict[str, Any]]:
    """
    Parse a recipe (`--config FILE`) and the command line, which wins; a dry run needs no GPU.

    Returns:
        `tuple[ScriptArguments, SFTConfig, ModelConfig, dict[str, Any]]`: The arguments, and those that were named, as
        anyone may read them: of a path, the last name, and nothing that is secret or concerns this run alone.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if any(argument.startswith("--dry_run") for argument in arguments) and not torch.accelerator.is_available():
        arguments += ["--use_cpu", "true"]  # else bf16 would be refused
    said = (argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--"))
    named = {name.replace("-", "_").removeprefix("no_") for name in said}
    if "--config" in arguments[:-1]:
        named |= set(yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text(encoding="utf-8")) or ())
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig), allow_abbrev=False)
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    values = {**training_args.to_dict(), **asdict(model_args), **asdict(script_args)}
    private = {"hub_token", "push_to_hub_token", "resume_from_checkpoint", "run_name", "allow_changes"}
    recipe = {name: _readable(values[name]) for name in sorted(named & values.keys() - private)}
    return script_args, training_args, model_args, recipe


def _readable(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {name: _readable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(item) for item in value]
    if isinstance(value, str) and "/" in value:
        path = Path(value)
        # A repository of the Hub is named ORG/NAME
        return path.name if path.is_absolute() or len(path.parts) > 2 or path.exists() else value
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def check_recipe(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig, recipe: dict[str, Any]
) -> tuple[DeltaLlavaConfig, str | None]:
    """
    Check what can be checked of a recipe before data and weights are loaded.

    Args:
        script_args (`ScriptArguments`), training_args (`SFTConfig`), model_args (`ModelConfig`), recipe (`dict`):
            What [`parse_recipe`] returns.

    Returns:
        `tuple[DeltaLlavaConfig, str | None]`: The model's configuration with the budgets that are to be trained, and
        the checkpoint to resume from, if that was asked for. `script_args.num_visual_tokens` is then what batches draw.

    Raises:
        `ValueError`: The model's patch grid does not allow a budget, no complete checkpoint is there to resume from,
            `output_dir` holds what a run would replace, or options are missing, exclude each other, would have no
            effect or cannot be had with images.
    """
    _check_options(training_args, model_args, recipe)
    strategy = training_args.train_sampling_strategy
    if training_args.packing or training_args.padding_free or training_args.pad_to_multiple_of:
        raise ValueError(
            f"packing={training_args.packing}, padding_free={training_args.padding_free} and pad_to_multiple_of="
            f"{training_args.pad_to_multiple_of} must be left out: batches of images are padded to their longest row."
        )
    if strategy not in ("random", "group_by_length"):
        raise ValueError(f"train_sampling_strategy={strategy} must be 'random' or 'group_by_length'.")
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: name what delta_llava.hub.assemble or stage 1 has written.")
    model = Path(model_args.model_name_or_path)
    if not model.is_dir() and (model.is_absolute() or len(model.parts) > 2):  # as no repository of the Hub is named
        raise ValueError(
            f"model_name_or_path={model} is not a folder: name what delta_llava.hub.assemble or stage 1 has written."
        )
    if model.is_dir() and model.resolve() == Path(training_args.output_dir).resolve():
        raise ValueError(f"output_dir={training_args.output_dir} holds the model to start from: name another folder.")
    if bool(script_args.stream) == bool(script_args.json_path) or (
        script_args.stream and script_args.image_folder and not script_args.eval_json_path
    ):
        raise ValueError(
            f"json_path={script_args.json_path}, image_folder={script_args.image_folder} and stream="
            f"{script_args.stream}: name the first two, or the last alone."
        )
    if script_args.stream and training_args.max_steps <= 0:
        raise ValueError("stream needs max_steps: a stream does not tell how many rows it has.")
    if script_args.stream and strategy == "group_by_length":
        logger.warning("Streamed rows come as they come: train_sampling_strategy=group_by_length has no effect.")
    if script_args.eval_json_path and script_args.num_eval_rows:
        raise ValueError(
            f"eval_json_path={script_args.eval_json_path} and num_eval_rows={script_args.num_eval_rows}: name one."
        )
    if bool(script_args.eval_json_path or script_args.num_eval_rows) != (training_args.eval_strategy != "no"):
        raise ValueError(
            f"eval_json_path={script_args.eval_json_path}, num_eval_rows={script_args.num_eval_rows} and eval_strategy="
            f"{training_args.eval_strategy.value}: one of the first two says what the validation loss is computed of, "
            "the last when; give both or neither."
        )
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise ValueError("load_in_4bit and load_in_8bit need use_peft: quantized weights cannot be trained themselves.")
    config = DeltaLlavaConfig.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    if script_args.branch_learning_rate is not None and config.projector_variant != "residual":
        raise ValueError(
            f"branch_learning_rate={script_args.branch_learning_rate} needs a model with projector_variant='residual',"
            f" but that of {model} is {config.projector_variant!r}: use projector_learning_rate."
        )
    auto = ["auto"] if "auto" in script_args.num_visual_tokens else []
    budgets = [budget for budget in script_args.num_visual_tokens if budget != "auto"] or config.visual_token_budgets
    for budget in budgets:
        query_grid_size(budget, config.patch_grid_size)
    config.visual_token_budgets = budgets = sorted(set(budgets))
    if config.num_visual_tokens not in budgets:
        config.num_visual_tokens = default_visual_tokens(budgets)
    if auto and budgets[0] == config.num_visual_tokens:
        raise ValueError(
            f"num_visual_tokens={[*budgets, *auto]}: 'auto' would be {budgets[0]} for every image, the default and the"
            " smallest of these. Name smaller ones, or leave it out."
        )
    script_args.num_visual_tokens = [*budgets, *auto]
    check_output_dir(training_args.output_dir)
    return config, checkpoint_to_resume(training_args)


def _check_options(training_args: SFTConfig, model_args: ModelConfig, recipe: dict[str, Any]):
    defaults = {
        option.name: option.default_factory() if option.default is MISSING else option.default
        for option in (*fields(SFTConfig), *fields(ModelConfig))
        if option.name in recipe
    }
    named = {name: recipe[name] for name, default in defaults.items() if recipe[name] != _readable(default)}
    for reason, options in _WITHOUT_EFFECT.items():
        for name in options.split():
            if name in named:
                raise ValueError(f"{name}={named[name]} would have no effect: {reason}. Leave it out.")
    for whole, options in _PARTS.items():
        is_on = training_args.eval_strategy != "no" if whole == "eval_strategy" else getattr(model_args, whole)
        for name in options.split():
            if name in named and not is_on:
                raise ValueError(f"{name}={named[name]} has no effect without {whole}: give both or neither.")
    dtype = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    if recipe.get("dtype", dtype) != dtype:
        raise ValueError(f"dtype={recipe['dtype']}, but bf16 and fp16 decide it: {dtype}. Leave dtype out.")
    if recipe.get("assistant_only_loss") is False or recipe.get("do_train") is False:
        raise ValueError("A run trains, and on answers alone: leave do_train=False and assistant_only_loss=False out.")
    if training_args.save_strategy == "best" or training_args.lr_scheduler_type == "reduce_lr_on_plateau":
        raise ValueError(
            f"save_strategy={training_args.save_strategy.value} and lr_scheduler_type="
            f"{training_args.lr_scheduler_type.value}: 'best' and 'reduce_lr_on_plateau' need one metric, but each "
            "budget has a loss of its own."
        )
    template = training_args.chat_template_path
    if template and not (template.endswith((".jinja", ".j2")) and Path(template).is_file()):
        raise ValueError(f"chat_template_path={template} must be a file .jinja or .j2.")


def load_rows(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    processor: ProcessorMixin,
    config: DeltaLlavaConfig,
    chat_template: str | None = None,
    is_stage_1: bool = False,
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """
    Rows to train on and rows held out, as the recipe names them.

    Args:
        script_args (`ScriptArguments`), training_args (`SFTConfig`): The recipe.
        processor ([`DeltaLlavaProcessor`]), chat_template (`str`, *optional*): As the collator has them.
        config ([`DeltaLlavaConfig`]): With the budgets that are to be trained.
        is_stage_1 (`bool`, *optional*, defaults to `False`): Whether every record must have an image, one question and
            one answer.

    Returns:
        `tuple[Dataset | IterableDataset, Dataset | None]`: What [`DeltaLlavaTrainer`] takes.

    Raises:
        `ValueError`: A record is bad, no row fits into `max_length`, fewer rows are there than are to be held out, or
            none of `eval_json_path` has an image.
    """
    fitting = {
        "processor": processor,
        "num_visual_tokens": max(config.visual_token_budgets),
        "max_length": training_args.max_length,
        "chat_template": chat_template,
    }
    num_eval_rows, output_dir = script_args.num_eval_rows, Path(training_args.output_dir)
    config_name, skip_bad_records = script_args.dataset_config, script_args.skip_bad_records

    def load(json_path: str, config_name: str | None, split: str, report: str) -> Dataset:
        # One process of a machine checks and measures, and the others then find what it has cached
        with training_args.main_process_first(local=True, desc="loading the data"):
            check = check_llava_json(
                json_path,
                script_args.image_folder,
                require_images=is_stage_1,
                one_answer=is_stage_1,
                follow_links=script_args.follow_links,
                dataset_config=config_name,
                split=split,
            )
            stop_at_bad_records(check, json_path, output_dir / report, skip_bad_records)
            return fit_rows(check.dataset(with_notes=True), **fitting)

    held_out = None
    if eval_json_path := script_args.eval_json_path:
        eval_config = config_name if has_configurations(Path(eval_json_path)) else None
        held_out = load(eval_json_path, eval_config, "validation", "bad_eval_records.jsonl")
        has_image = held_out.with_format("numpy")["num_images"][:] > 0
        if not has_image.all():
            logger.warning(
                f"{(~has_image).sum()} of the {len(held_out)} rows in {eval_json_path} have no image and are left out "
                "of validation: they would say the same at every budget."
            )
            held_out = held_out.select(np.flatnonzero(has_image))
        if not len(held_out):
            raise ValueError(f"eval_json_path={eval_json_path} has no row with an image.")
    if script_args.stream:
        reading = {
            "require_images": is_stage_1,
            "one_answer": is_stage_1,
            "skip_bad_records": skip_bad_records,
            "dataset_config": config_name,
        }
        rows = stream_rows(script_args.stream, "train", **fitting, **reading)
        if not num_eval_rows:
            return rows, held_out
        held_out = stream_rows(script_args.stream, "validation", **fitting, **reading).remove_columns("id")
        features = held_out.features
        held_out = held_out.filter(lambda row: row["images"]).take(num_eval_rows)
        held_out = list(held_out)
        if len(held_out) < num_eval_rows:
            raise ValueError(
                f"num_eval_rows={num_eval_rows}, but the split validation of {script_args.stream} has {len(held_out)} "
                "rows with images."
            )
        return rows, fit_rows(Dataset.from_list(held_out, features=features), **fitting)

    dataset = load(script_args.json_path, config_name, "train", "bad_records.jsonl")
    if not num_eval_rows:
        return dataset, held_out
    # Rows without images would say the same at every budget
    candidates = np.flatnonzero(dataset.with_format("numpy")["num_images"][:])
    if num_eval_rows >= len(candidates):
        raise ValueError(f"num_eval_rows={num_eval_rows} leaves nothing of the {len(candidates)} rows with images.")
    held_out = np.random.default_rng(training_args.seed).choice(candidates, num_eval_rows, replace=False)
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), held_out)), dataset.select(np.sort(held_out))


def load_model(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig, config: DeltaLlavaConfig
) -> DeltaLlavaForConditionalGeneration:
    """
    The model to train, in the dtype that mixed precision computes in and quantized if asked; on `meta` in a dry run.

    Args:
        script_args (`ScriptArguments`), training_args (`SFTConfig`), model_args (`ModelConfig`): The recipe, whose
            `bf16` and `fp16` decide the dtype.
        config ([`DeltaLlavaConfig`]): What [`check_recipe`] returns.
    """
    dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    if script_args.dry_run:
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
    Adapters on the linear layers of the language model, with the projector trained in full and saved beside them.

    Args:
        model ([`DeltaLlavaForConditionalGeneration`]): The model to adapt.
        model_args (`ModelConfig`): `lora_target_modules` names layers of the language model; by default all.

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
        revision=model_args.model_revision,  # of the base model, for who loads the adapter
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        # The tower has layers of the same names, which stay as they are
        target_modules=rf"model\.language_model\..*\.({'|'.join(sorted(targets))})",
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=["multi_modal_projector", *(model_args.lora_modules_to_save or ())],
        task_type="CAUSAL_LM",
    )
