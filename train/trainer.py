"""TRL's trainer with a token budget for each batch and checkpoints that an early end leaves whole."""

import os
import pickle
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from peft import PeftModel
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging
from trl import SFTTrainer

from ..modeling_delta_llava import DeltaProjector
from .batches import BudgetedRows, BudgetSampler
from .history import RESULT, History
from .runs import begin_checkpoint, finish_checkpoint, latest_checkpoint
from .stream import StreamedBatches


logger = logging.get_logger(__name__)


class SaveOnSigterm(TrainerCallback):
    """
    Ends training after a checkpoint on SIGTERM, which schedulers send before they take the machine away.

    transformers' `enable_jit_checkpoint` may save in the middle of a step, after which a resumed run does not repeat
    the uninterrupted one, and lets the script continue as if training were complete.
    """

    def __init__(self):
        self.received = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.earlier_handler = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum, frame):
        self.received = True

    def on_step_end(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():
            # All processes must save at the same step, but the signal may reach them at different times
            received = torch.tensor(int(self.received), device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = bool(received)
        if self.received:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may be no time for it

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.earlier_handler)


def leave_process_group(worker_id: int):
    """For a loader's worker: a SIGTERM to the whole group must not end it before the trainer completes its step."""
    os.setpgid(0, 0)


class DeltaLlavaTrainer(SFTTrainer):
    """
    TRL's `SFTTrainer` with a token budget for each batch.

    Validation loss is logged for each of `model.config.visual_token_budgets` (`eval_144_loss`). A loss that is not
    finite ends the run before anything is learnt from it (with DeepSpeed, which steps within the backward pass, before
    anything is saved). A checkpoint that cannot be written ends the run, too; either error names the last complete
    one. SIGTERM ends the run after a checkpoint, with exit status 143. `save_total_limit` only deletes checkpoints of
    this run.

    Args:
        model ([`DeltaLlavaForConditionalGeneration`]): The model, whose trained weights are in float32.
        train_dataset (`Dataset` or `IterableDataset`): What [`~delta_llava.train.batches.fit_rows`] or
            [`~delta_llava.train.stream.stream_rows`] returns.
        eval_dataset (`Dataset`, *optional*): What [`~delta_llava.train.batches.fit_rows`] returns.
        num_visual_tokens (`list`, *optional*, defaults to `model.config.visual_token_budgets`): What each batch draws
            from; `"auto"` may be among them.
        projector_learning_rate (`float`, *optional*, defaults to `args.learning_rate`): Peak rate of the projector.
        branch_learning_rate (`float`, *optional*, defaults to that of the projector): Peak rate of all of a `residual`
            projector but LLaVA-1.5's MLP: of the branch that is added to the tokens of that MLP.
        skip_bad_records (`bool`, *optional*, defaults to `False`): Leave out streamed rows with an unreadable image.
        history ([`~delta_llava.train.history.History`], *optional*): That of the run, for its result and checkpoints.
            Without one, `save_strategy` must be `"no"`.
        **kwargs: Further arguments of `SFTTrainer`; `data_collator` is a [`~delta_llava.train.batches.Collator`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eval_dataset: Dataset | None = None,
        num_visual_tokens: list[int | str] | None = None,
        projector_learning_rate: float | None = None,
        branch_learning_rate: float | None = None,
        skip_bad_records: bool = False,
        history: History | None = None,
        **kwargs,
    ):
        if history is None and kwargs["args"].save_strategy != "no":
            raise ValueError(f"save_strategy={kwargs['args'].save_strategy.value} needs a history, or must be 'no'.")
        self.projector_learning_rate = projector_learning_rate
        self.branch_learning_rate = branch_learning_rate
        self.skip_bad_records = skip_bad_records
        self.history = history
        self.save_dtype = model.dtype
        budgets = model.config.visual_token_budgets
        self.num_visual_tokens = num_visual_tokens or budgets
        eval_datasets = None if eval_dataset is None else {str(budget): eval_dataset for budget in budgets}
        super().__init__(model=model, eval_dataset=eval_datasets, **kwargs)
        # The Trainer would delete every checkpoint-*, whoever wrote it
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        if history is not None:
            self.model.config.visual_token_budgets = history.run["budgets"]  # with those before a change
            self.processing_class.adopt_budgets(self.model.config)
            self.add_callback(history)
        # TRL trains adapters of quantized models in bfloat16, where AdamW's small steps would be rounded away
        for weight in self.model.parameters():
            if weight.requires_grad and self.args.deepspeed_plugin is None:
                weight.data = weight.data.float()
        self.signal = SaveOnSigterm()
        self.add_callback(self.signal)

    def get_train_dataloader(self) -> DataLoader:
        """Like the Trainer's, but rows come in the order and with the budgets of a [`BudgetSampler`]."""
        budgets = self.num_visual_tokens
        if self._is_fully_sharded() and "auto" in budgets:
            raise ValueError(
                f"num_visual_tokens={budgets}: FSDP and ZeRO-3 wait forever when the images of some processes have"
                " more budgets at a step than those of others. Leave 'auto' out, or train by DDP or ZeRO-2."
            )
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        if isinstance(self.train_dataset, IterableDataset):
            rows = split_dataset_by_node(self.train_dataset, self.args.process_index, self.args.world_size)
            batches = StreamedBatches(
                rows,
                self._train_batch_size,
                budgets,
                seed,
                skip_bad_records=self.skip_bad_records,
                images_only=self._is_fully_sharded(),
            )
            # A worker without a shard would end at once
            num_workers = min(self.args.dataloader_num_workers, rows.num_shards)
            dataloader = self._dataloader(batches, num_workers, batch_size=None)
            # Each process already has its part of the stream: nothing is left to divide
            return prepare_data_loader(
                dataloader,
                self.args.device,
                num_processes=1,
                process_index=0,
                put_on_device=True,
                dispatch_batches=False,
            )

        group = self.args.train_sampling_strategy == "group_by_length"
        sampler = BudgetSampler(
            self.train_dataset,
            batch_size=self._train_batch_size * self.accelerator.num_processes,
            num_visual_tokens=budgets,
            seed=seed,
            group=group,
            epoch=lambda: int(self.state.epoch or 0),
        )
        if self._is_fully_sharded() and (not group or sampler.num_mixed):
            num_images = self.train_dataset.with_format("numpy")["num_images"][:]
            if (num_images == 0).any():
                raise ValueError(
                    f"{(num_images == 0).sum()} of {len(num_images)} rows have no image. FSDP and ZeRO-3 wait forever "
                    "when some processes have images at a step and others have none: set "
                    "train_sampling_strategy=group_by_length, with rows of either kind for at least half of a batch of "
                    f"{sampler.batch_size}, leave one kind out, or train by DDP or ZeRO-2."
                )
        dataloader = self._dataloader(
            BudgetedRows(self.train_dataset),
            self.args.dataloader_num_workers,
            batch_size=self._train_batch_size,
            sampler=sampler,
            drop_last=self.args.dataloader_drop_last,
        )
        return self.accelerator.prepare(dataloader)

    def get_eval_dataloader(self, eval_dataset: str | None = None) -> DataLoader:
        """Like the Trainer's, for the held-out rows at the budget that names the data set."""
        rows = self.eval_dataset[eval_dataset]
        dataloader = self._dataloader(
            BudgetedRows(rows),
            self.args.dataloader_num_workers,
            batch_size=self.args.per_device_eval_batch_size,
            sampler=[(index, int(eval_dataset)) for index in range(len(rows))],
        )
        return self.accelerator.prepare(dataloader)

    def _dataloader(self, dataset: torch.utils.data.Dataset, num_workers: int, **kwargs) -> DataLoader:
        return DataLoader(
            dataset,
            collate_fn=self.data_collator,
            num_workers=num_workers,
            worker_init_fn=leave_process_group,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            persistent_workers=self.args.dataloader_persistent_workers and num_workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if num_workers > 0 else None,
            **kwargs,
        )

    def _is_fully_sharded(self) -> bool:
        plugin = self.args.deepspeed_plugin
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Like the Trainer's, with separate parameter groups for the projector and branch rates."""
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        rates = {}
        if self.projector_learning_rate is not None:
            named = model.named_parameters()
            rates |= {weight: self.projector_learning_rate for name, weight in named if "multi_modal_projector" in name}
        if self.branch_learning_rate is not None:
            for projector in (module for module in model.modules() if isinstance(module, DeltaProjector)):
                branch = set(projector.parameters()) - set(projector.mlp.parameters())
                rates |= dict.fromkeys(branch, self.branch_learning_rate)
        for group in list(optimizer.param_groups):
            for rate in sorted({rates[weight] for weight in group["params"] if weight in rates}):
                own = [weight for weight in group["params"] if rates.get(weight) == rate]
                group["params"] = [weight for weight in group["params"] if rates.get(weight) != rate]
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Like the Trainer's; exits with status 143 when a SIGTERM has ended training early."""
        try:
            if resume_from_checkpoint and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                state = TrainerState.load_from_json(Path(resume_from_checkpoint, TRAINER_STATE_NAME))
                *_, num_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
                if state.global_step >= num_steps:
                    # The Trainer would train one more step
                    logger.warning(f"{resume_from_checkpoint} is that of the last step: nothing is left to train.")
                    return self._restore_end(resume_from_checkpoint, state)
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except pickle.UnpicklingError:
            # Without torch's message, which advises to trust the file
            raise ValueError(
                f"{resume_from_checkpoint} holds pickled objects that no run writes: do not load it in any other way, "
                "and find out where it comes from."
            ) from None
        if self.signal.received and self.state.global_step < self.state.max_steps:
            step, steps = self.state.global_step, self.state.max_steps
            logger.warning(f"SIGTERM has ended training at step {step} of {steps}. {self._how_to_resume()}")
            raise SystemExit(128 + signal.SIGTERM)
        return output

    def _restore_end(self, checkpoint: str, state: TrainerState):
        """Load weights and log from the checkpoint of the last step, after which the run was killed."""
        self._load_from_checkpoint(checkpoint)
        state.is_world_process_zero = self.is_world_process_zero()
        state.log_history.append({"train_runtime": 0.0, "step": state.global_step})
        self.state = state
        self.history.on_train_begin(self.args, state, self.control)
        self.history.on_train_end(self.args, state, self.control)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Like the Trainer's; a loss that is not finite is a `FloatingPointError`, in all processes at once."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.gather(loss.detach()).isfinite().all():
            raise FloatingPointError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}. Lower learning_rate (with "
                f"--allow_changes), or look for anomalies in the data of this step. {self._how_to_resume()}"
            )
        return loss

    def _save_checkpoint(self, model, trial):
        # ZeRO-3 keeps its weights elsewhere: there, only losses are checked
        trained = (weight for weight in self.model.parameters() if weight.requires_grad)
        local = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained)
        finite = torch.tensor([all(weight.isfinite().all() for weight in local)], device=self.args.device)
        if not self.accelerator.gather(finite).all():
            raise FloatingPointError(
                f"At step {self.state.global_step}, trained weights are no longer finite; nothing is saved. Lower "
                f"learning_rate (with --allow_changes). {self._how_to_resume()}"
            )
        checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        with self._write_errors_name(f"checkpoint of step {self.state.global_step}"):
            if self.args.should_save:
                begin_checkpoint(checkpoint, self.history.run)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                model = self.accelerator.unwrap_model(self.model)
                if isinstance(model, PeftModel):
                    _save_trained_config(model, checkpoint)
                self.history.write_checkpoint(self, checkpoint)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                finish_checkpoint(checkpoint, self.history.run, self.save_total_limit)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        # The states restore the checkpoint's rates and weight decay, which --allow_changes may have changed
        groups = [{name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, new in zip(self.optimizer.param_groups, groups, strict=True):
            peak = group.get("initial_lr")
            group.update(new, lr=group["lr"] * (new["initial_lr"] / peak if peak else 1))
        if "base_lrs" in (state := self.lr_scheduler.state_dict()):
            rates = {"base_lrs": "initial_lr", "_last_lr": "lr"}
            state |= {name: [group[key] for group in self.optimizer.param_groups] for name, key in rates.items()}
            self.lr_scheduler.load_state_dict(state)

    @contextmanager
    def _write_errors_name(self, target: str):
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # that of torch.save
                raise
            free = shutil.disk_usage(self.args.output_dir).free / 2**30
            raise OSError(
                f"The {target} could not be written to {self.args.output_dir}, where {free:.1f} GiB are free: {error}. "
                f"{self._how_to_resume()}"
            ) from error

    def _how_to_resume(self) -> str:
        checkpoint = latest_checkpoint(self.args.output_dir)
        if checkpoint is None:
            return "There is no complete checkpoint yet."
        return f"The last complete checkpoint is {checkpoint}: --resume_from_checkpoint latest continues from it."

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Save the result in the Hub's layout, or the adapter; in a checkpoint, do as the Trainer does."""
        if _internal_call:
            return super().save_model(output_dir, _internal_call)
        state_dict = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            with self._write_errors_name("result"):
                self._save_result(Path(output_dir or self.args.output_dir), state_dict)

    def _save_result(self, output_dir: Path, state_dict: dict[str, torch.Tensor]):
        model = self.accelerator.unwrap_model(self.model)
        # An earlier run's result must not mix with this one
        for file in [file for pattern in RESULT for file in output_dir.glob(pattern)]:
            file.unlink()
        if isinstance(model, PeftModel):
            model.create_or_update_model_card = lambda folder: None  # peft's is an empty template
            model.save_pretrained(output_dir, state_dict=state_dict)
            _save_trained_config(model, output_dir)
        else:
            state_dict = {
                name: weight.to("cpu", self.save_dtype) if weight.is_floating_point() else weight
                for name, weight in state_dict.items()
            }
            # Under ZeRO-3, transformers would otherwise undo its renaming of weights
            model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)
        self.processing_class.save_pretrained(output_dir)

    def create_model_card(self, *args, **kwargs):
        """Do nothing: TRL's card describes a text model; ours are made from `model_card.md`."""


def _save_trained_config(model: PeftModel, folder: Path):
    # Says which budgets were trained. As config.json, it would make transformers take the folder for a whole model.
    model.get_base_model().config.to_json_file(folder / "trained_config.json")
