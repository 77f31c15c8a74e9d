"""
What all runs of a process share, computed once: what the frozen tower makes of a picture, and the tokens of a row.

Nothing that is measured changes: the tower and the package's own collator compute it, and FLOPs are counted of the
tower as it runs.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..cascade import repeats
from ..train.batches import BudgetedRows, Collator, fit_rows
from ..train.data import load_llava_json
from ..train.trainer import DeltaLlavaTrainer
from .meteor import NO_TOKEN
from .methods import ALL_PATCHES


_PICTURES = {}  # by class of model, layers and digest of the pixels: query features, memory features, attention of CLS
_ROWS = {}  # by scenes, stage and class of processor


@contextmanager
def remembered_tower(model: PreTrainedModel) -> Iterator[None]:
    """
    In this context, the tower of a model of the study encodes only pictures that no model of its class has encoded.
    """
    run_tower = model.model._run_vision_tower
    source = type(model), model.config.query_feature_layer, *model.config.memory_feature_layers

    def look_up(pixel_values: torch.Tensor, **kwargs):
        keys = [(*source, hashlib.blake2b(picture.numpy()).digest()) for picture in pixel_values]
        missing = {key: index for index, key in enumerate(keys) if key not in _PICTURES}
        if missing:
            outputs, *features = run_tower(pixel_values[list(missing.values())], **kwargs)
            if outputs.attentions is not None:
                features.append(outputs.attentions[-1][:, :, :1].clone())  # of the CLS token alone, which is all read
            _PICTURES.update(zip(missing, zip(*features, strict=True), strict=True))
        queries, memory, *attention = map(torch.stack, zip(*(_PICTURES[key] for key in keys), strict=True))
        return BaseModelOutputWithPooling(attentions=tuple(attention) or None), queries, memory

    model.model._run_vision_tower = look_up
    try:
        yield
    finally:
        del model.model._run_vision_tower


def widen(batch: dict[str, torch.Tensor], image_token_id: int, num_visual_tokens: int) -> dict[str, torch.Tensor]:
    """A batch of one image a row at this budget, as processor and collator make it, from the same at one token."""
    of_rows = repeats(batch["input_ids"], image_token_id, 1, num_visual_tokens)
    wide = {
        name: torch.stack([row.repeat_interleave(times) for row, times in zip(batch[name], of_rows, strict=True)])
        for name in ("input_ids", "attention_mask", "labels")
        if name in batch
    }
    return {**batch, **wide, "num_visual_tokens": torch.full((len(of_rows),), num_visual_tokens)}


class Rows(torch.utils.data.Dataset):
    """
    Rows to train on, each read, tokenized and preprocessed by the [`~delta_llava.train.batches.Collator`] once.

    Indexed by what [`~delta_llava.train.batches.BudgetSampler`] yields.
    """

    def __init__(self, scenes: Path, stage: str, processor: ProcessorMixin, max_length: int, template: str | None):
        rows = load_llava_json(scenes / f"{stage}.json", scenes / "images")
        self.dataset = fit_rows(rows, processor, ALL_PATCHES, max_length, template)  # cut alike for all
        self.budgeted = BudgetedRows(self.dataset)
        self.collator = Collator(processor, max_length, template)
        self.known = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        index, num_visual_tokens = key
        if index not in self.known:
            self.known[index] = self.collator([self.budgeted[index, 1]])
        return widen(self.known[index], self.collator.processor.image_token_id, num_visual_tokens)

    def collate(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What the collator returns for all of these rows."""
        padding = {"input_ids": self.collator.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        batch = {name: torch.cat([row[name] for row in rows]) for name in ("pixel_values", "num_visual_tokens")}
        for name, value in {**padding, "instruction_ids": NO_TOKEN}.items():
            if name in rows[0]:
                side = "right" if name in padding else "left"
                parts = [row[name][0] for row in rows]
                batch[name] = pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)
        return batch


def rows_of(scenes: Path, stage: str, processor: ProcessorMixin, max_length: int, template: str | None) -> Rows:
    """The [`Rows`] of a stage, which are the same for all processors of a class."""
    key = scenes, stage, type(processor)
    if key not in _ROWS:
        _ROWS[key] = Rows(scenes, stage, processor, max_length, template)
    return _ROWS[key]


class StudyTrainer(DeltaLlavaTrainer):
    """
    The package's trainer on rows that other runs of the process have read.

    Args:
        rows ([`Rows`]): To train on.
        **kwargs: As [`~delta_llava.train.trainer.DeltaLlavaTrainer`] takes them.
    """

    def __init__(self, rows: Rows, **kwargs):
        self.rows = rows
        super().__init__(train_dataset=rows.dataset, data_collator=rows.collate, **kwargs)

    def _dataloader(self, dataset: torch.utils.data.Dataset, num_workers: int, **kwargs):
        return super()._dataloader(self.rows, num_workers, **kwargs)

    def train(self, **kwargs):
        """The package's, with a tower that encodes only pictures that are new to the process."""
        with remembered_tower(self.model):
            return super().train(**kwargs)
