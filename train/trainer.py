"""What both training stages share: arguments, the checks of a recipe, and TRL's trainer with a budget per batch."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import sort_checkpoints
from trl import SFTConfig, SFTTrainer

from ..configuration_delta_llava import DeltaLlavaConfig, query_grid_size
from .batches import BudgetedRows, BudgetSampler


@dataclass
class ScriptArguments:
    """
    Arguments of a training stage beside those of TRL's `SFTConfig`.

    Args:
        model_name_or_path (`str`):
            Delta-LLaVA to start from: what `delta_llava.hub.assemble` or an earlier stage has written.
        json_path (`str`):
            LLaVA's JSON file.
        image_folder (`str`):
            Folder that the images of `json_path` lie in.
        num_visual_tokens (`list[int]`, *optional*, defaults to the `visual_token_budgets` of the model):
            Token budgets to train. Of several, each batch draws one, for one checkpoint that serves all of them.
        skip_bad_records (`bool`, *optional*, defaults to `False`):
            Train without the bad records instead of stopping at them.
        attn_implementation (`str`, *optional*):
            Attention of tower and language model, such as `"flash_attention_2"`. By default transformers' choice.
    """

    model_name_or_path: str = field(
        metadata={"help": "Delta-LLaVA to start from: an assembled one or a stage's result."}
    )
    json_path: str = field(metadata={"help": "LLaVA's JSON file."})
    image_folder: str = field(metadata={"help": "Folder that the images of the JSON file lie in."})
    num_visual_tokens: list[int] | None = field(
        default=None,
        metadata={"help": "Token budgets to train. Of several, each batch draws one. Default: those of the model."},
    )
    skip_bad_records: bool = field(
        default=False, metadata={"help": "Train without the bad records instead of stopping at them."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of tower and language model, such as flash_attention_2."}
    )

    def __post_init__(self):
        # `num_visual_tokens: 144` in a recipe
        if isinstance(self.num_visual_tokens, int):
            self.num_visual_tokens = [self.num_visual_tokens]


def check_recipe(script_args: ScriptArguments, training_args: SFTConfig) -> tuple[DeltaLlavaConfig, str | None]:
    """
    Check what can be checked of a recipe before data and weights are loaded.

    Args:
        script_args (`ScriptArguments`), training_args (`SFTConfig`):
            The recipe.

    Returns:
        `tuple[DeltaLlavaConfig, str | None]`: The model's configuration with the budgets that are to be trained, and
        the checkpoint to resume from, if that was asked for.

    Raises:
        `ValueError`: The model's patch grid does not allow a budget, no complete checkpoint is there to resume from, or
            an option cannot be had with images.
    """
    if training_args.packing or training_args.padding_free or training_args.train_sampling_strategy != "random":
        raise ValueError(
            f"packing={training_args.packing}, padding_free={training_args.padding_free} and train_sampling_strategy="
            f"{training_args.train_sampling_strategy} must be left at False, False and 'random': batches of images are "
            "padded, and shuffled together with their budgets."
        )
    config = DeltaLlavaConfig.from_pretrained(script_args.model_name_or_path)
    budgets = sorted(set(script_args.num_visual_tokens or config.visual_token_budgets))
    for budget in budgets:
        query_grid_size(budget, config.patch_grid_size)
    config.visual_token_budgets = budgets
    if config.num_visual_tokens not in budgets:
        config.num_visual_tokens = max((budget for budget in budgets if budget <= 144), default=budgets[0])
    return config, _checkpoint_to_resume(training_args)


def _checkpoint_to_resume(training_args: SFTConfig) -> str | None:
    asked = str(training_args.resume_from_checkpoint)
    if asked.lower() in ("none", "false"):
        return None
    if asked.lower() not in ("latest", "true"):
        if not _is_complete(Path(asked), training_args.world_size):
            raise ValueError(
                f"resume_from_checkpoint={asked} is not a complete checkpoint of {training_args.world_size} processes. "
                f"Name another, or 'latest' for the newest complete one in {training_args.output_dir}."
            )
        return asked
    for checkpoint in reversed(sort_checkpoints(training_args.output_dir, use_mtime=True)):
        if _is_complete(Path(checkpoint), training_args.world_size):
            return checkpoint
    raise ValueError(
        f"resume_from_checkpoint={asked}, but {training_args.output_dir} holds no complete checkpoint of "
        f"{training_args.world_size} processes. Leave resume_from_checkpoint out to start from the beginning."
    )


def _is_complete(checkpoint: Path, world_size: int) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes the state last, each process its own RNG."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return len(list(checkpoint.glob("rng_state*.pth"))) == world_size


class DeltaLlavaTrainer(SFTTrainer):
    """
    TRL's `SFTTrainer` whose batches each have a token budget, drawn from `model.config.visual_token_budgets`.

    Takes the arguments of `SFTTrainer`; `data_collator` is a [`~delta_llava.train.data.Collator`].
    """

    def get_train_dataloader(self) -> DataLoader:
        """Like the Trainer's, but rows come in the order and with the budgets of a [`BudgetSampler`]."""
        sampler = BudgetSampler(
            num_rows=len(self.train_dataset),
            batch_size=self._train_batch_size * self.accelerator.num_processes,
            num_visual_tokens=self.model.config.visual_token_budgets,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            trainer=self,
        )
        dataloader = DataLoader(
            BudgetedRows(self.train_dataset),
            batch_size=self._train_batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            drop_last=self.args.dataloader_drop_last,
        )
        return self.accelerator.prepare(dataloader)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Like the Trainer's; what is no checkpoint of its own is in Hub layout, without its pickled arguments."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:
            Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink()

    def create_model_card(self, *args, **kwargs):
        """Nothing: TRL's card describes a text model, and `model_card.md` is what ours are made from."""
