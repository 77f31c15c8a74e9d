"""What a recipe says: the arguments of both stages, and the checks of them."""

import sys
import warnings
from dataclasses import MISSING, asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.hf_argparser import HfArg
from transformers.utils import logging
from trl import ModelConfig, SFTConfig, TrlParser

from ..configuration_delta_llava import DeltaLlavaConfig, default_visual_tokens, query_grid_size


logger = logging.get_logger(__name__)

# TRL's options that would have no effect here, and why
_WITHOUT_EFFECT = {
    "rows are LLaVA's records, which are read, cut and batched here": (
        "dataset_text_field dataset_kwargs dataset_num_proc shuffle_dataset truncation_mode packing_strategy "
        "eval_packing completion_only_loss remove_unused_columns label_names length_column_name "
        "dataloader_multiprocessing_context dataloader_in_order"
    ),
    "the checkpoint and this package's classes decide it": (
        "eos_token pad_token model_init_kwargs trust_remote_code use_cache lora_task_type"
    ),
    "each budget has a loss, there is no other metric, and the last step gives the result; any checkpoint-N is a model "
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
# Options that only take effect with another one
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
    """Arguments of a training stage, in addition to those of TRL's `SFTConfig` and `ModelConfig`."""

    json_path: str | None = HfArg(
        default=None,
        help="Training data: LLaVA's JSON list, JSON lines, a Parquet file, a folder or a data set of the Hub. See "
        "delta_llava.train.data.load_llava_json.",
    )
    image_folder: str | None = HfArg(
        default=None, help="Folder of the images that json_path and eval_json_path name, unless they carry them."
    )
    stream: str | None = HfArg(
        default=None,
        help="Instead of both: a repository of the Hub, or a folder of Parquet files or WebDataset's tar files, to "
        "stream records and images from. max_steps then says how long to train.",
    )
    dataset_config: str | None = HfArg(
        default=None, help="Configuration of a data set that has several; its split train is read."
    )
    eval_json_path: str | None = HfArg(
        default=None,
        help="Rows for the validation loss of each budget, of any kind that json_path may be; of a data set, its split "
        "validation. eval_strategy and eval_steps say when it is computed.",
    )
    num_eval_rows: int = HfArg(
        default=0,
        help="Instead of eval_json_path: rows with images to hold out of training; of a stream, the first ones of its "
        "split validation.",
    )
    num_visual_tokens: list[str] | None = HfArg(  # noqa: RUF009
        default=None,
        help="Token budgets to train. Of several, each batch draws one, for one checkpoint that serves all of them. "
        "'auto' is one more to draw: each image of the batch then gets the budget that its size asks for, of the "
        "others up to the default. Default: the visual_token_budgets of the model.",
    )
    skip_bad_records: bool = HfArg(default=False, help="Train without the bad records instead of stopping at them.")
    follow_links: bool = HfArg(default=False, help="Allow links that lead out of image_folder.")
    projector_learning_rate: float | None = HfArg(
        default=None,
        help="Peak learning rate of the projector, where the language model is trained too. Default: learning_rate.",
    )
    branch_learning_rate: float | None = HfArg(
        default=None,
        help="Peak learning rate of a residual projector's branch: all of it but LLaVA-1.5's MLP. Default: "
        "projector_learning_rate.",
    )
    allow_changes: bool = HfArg(
        default=False,
        help="Resume with other data, budgets, batches, rates or other settings than the checkpoint was trained with. "
        "The published recipe names each change.",
    )
    dry_run: bool = HfArg(
        default=False,
        help="Check everything, print what the run would cost and one sample with its labels, and train nothing. Give "
        "it on the command line.",
    )

    def __post_init__(self):
        # `num_visual_tokens: 144` in a recipe
        if isinstance(self.num_visual_tokens, (int, str)):
            self.num_visual_tokens = [self.num_visual_tokens]
        self.num_visual_tokens = [
            int(budget) if str(budget).isdecimal() else budget for budget in self.num_visual_tokens or ()
        ]


@dataclass
class Recipe:
    """
    The arguments of a stage.

    Args:
        script (`ScriptArguments`), training (`SFTConfig`), model (`ModelConfig`): All values.
        named (`dict[str, Any]`): Only the arguments that were given, ready to be published: the last name of each path,
            and nothing that is secret or concerns this run alone.
    """

    script: ScriptArguments
    training: SFTConfig
    model: ModelConfig
    named: dict[str, Any]

    def values(self) -> dict[str, Any]:
        """All values by name."""
        return {**self.training.to_dict(), **asdict(self.model), **asdict(self.script)}


def parse_recipe(arguments: list[str] | None = None) -> Recipe:
    """Parse a recipe (`--config FILE`) and the command line, which takes precedence; a dry run needs no GPU."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if any(argument.startswith("--dry_run") for argument in arguments) and not torch.accelerator.is_available():
        arguments += ["--use_cpu", "true"]  # otherwise bf16 would be refused
    given = (argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--"))
    named = {name.replace("-", "_").removeprefix("no_") for name in given}
    if "--config" in arguments[:-1]:
        named |= set(yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text(encoding="utf-8")) or ())
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig), allow_abbrev=False)
    with warnings.catch_warnings():
        # TRL sets the name that transformers deprecates in 5.23, and no earlier release knows the new one
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        recipe = Recipe(*parser.parse_args_and_config(arguments), named={})
    values = recipe.values()
    private = {"hub_token", "push_to_hub_token", "resume_from_checkpoint", "run_name", "allow_changes"}
    recipe.named = {name: _readable(values[name]) for name in sorted(named & values.keys() - private)}
    return recipe


def _readable(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {name: _readable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(item) for item in value]
    if isinstance(value, str) and "/" in value:
        path = Path(value)
        # ORG/NAME is a repository of the Hub
        return path.name if path.is_absolute() or len(path.parts) > 2 or path.exists() else value
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def check_recipe(recipe: Recipe, is_stage_1: bool = False) -> DeltaLlavaConfig:
    """
    Check whatever can be checked of a recipe before data and weights are loaded. (Stage 1 has no adapters.)

    Returns the model's configuration, with the budgets to be trained; the recipe's `num_visual_tokens` become the
    budgets to draw.

    Raises:
        `ValueError`: The model's patch grid does not allow a budget, or options are missing, exclude each other, have
            no effect, or are impossible with images.
    """
    script_args, training_args, model_args = recipe.script, recipe.training, recipe.model
    _check_options(recipe)
    for name in ("use_peft", "chat_template_path"):
        if is_stage_1 and recipe.named.get(name):
            raise ValueError(f"{name} has no place in stage 1, which trains the projector alone, on bare captions.")
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
        raise ValueError("stream needs max_steps: the length of a stream is unknown.")
    if script_args.stream and strategy == "group_by_length":
        logger.warning("train_sampling_strategy=group_by_length has no effect: the rows of a stream keep their order.")
    if script_args.eval_json_path and script_args.num_eval_rows:
        raise ValueError(
            f"eval_json_path={script_args.eval_json_path} and num_eval_rows={script_args.num_eval_rows}: name one."
        )
    if bool(script_args.eval_json_path or script_args.num_eval_rows) != (training_args.eval_strategy != "no"):
        raise ValueError(
            f"eval_json_path={script_args.eval_json_path}, num_eval_rows={script_args.num_eval_rows} and eval_strategy="
            f"{training_args.eval_strategy.value}: one of the first two says which rows are validated on, the last "
            "when; give both or neither."
        )
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise ValueError("load_in_4bit and load_in_8bit need use_peft: quantized weights cannot be trained.")
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
    return config


def _check_options(recipe: Recipe):
    training_args, model_args, named = recipe.training, recipe.model, recipe.named
    defaults = {
        option.name: option.default_factory() if option.default is MISSING else option.default
        for option in (*fields(SFTConfig), *fields(ModelConfig))
        if option.name in named
    }
    changed = {name: named[name] for name, default in defaults.items() if named[name] != _readable(default)}
    for reason, options in _WITHOUT_EFFECT.items():
        for name in options.split():
            if name in changed:
                raise ValueError(f"{name}={named[name]} would have no effect: {reason}. Leave it out.")
    for whole, options in _PARTS.items():
        is_on = training_args.eval_strategy != "no" if whole == "eval_strategy" else getattr(model_args, whole)
        for name in options.split():
            if name in changed and not is_on:
                raise ValueError(f"{name}={named[name]} has no effect without {whole}: give both or neither.")
    dtype = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    if named.get("dtype", dtype) != dtype:
        raise ValueError(f"dtype={named['dtype']}, but bf16 and fp16 decide it: {dtype}. Leave dtype out.")
    if named.get("assistant_only_loss") is False or named.get("do_train") is False:
        raise ValueError("A run trains, and only on answers: leave do_train=False and assistant_only_loss=False out.")
    if training_args.save_strategy == "best" or training_args.lr_scheduler_type == "reduce_lr_on_plateau":
        raise ValueError(
            f"save_strategy={training_args.save_strategy.value} and lr_scheduler_type="
            f"{training_args.lr_scheduler_type.value}: 'best' and 'reduce_lr_on_plateau' need one metric, but each "
            "budget has a loss of its own."
        )
    template = training_args.chat_template_path
    if template and not (template.endswith((".jinja", ".j2")) and Path(template).is_file()):
        raise ValueError(f"chat_template_path={template} must be a file .jinja or .j2.")
