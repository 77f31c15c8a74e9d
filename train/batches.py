"""The batches that both stages train on: which rows, in which order, at which token budget, with which labels."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import BatchFeature, ProcessorMixin, Trainer
from trl import prepare_multimodal_messages


class BudgetSampler(Sampler[tuple[int, int]]):
    """
    Shuffles the rows anew in each epoch and draws one token budget for every batch.

    Order and budgets follow from seed, epoch and position alone: a resumed run, which skips batches, repeats them, and
    all processes draw the same budget at the same step, so that none waits for another's longer sequences.

    Args:
        num_rows (`int`):
            Number of rows of the dataset.
        batch_size (`int`):
            Rows that share a budget: those of one micro-step over all processes.
        num_visual_tokens (`list[int]`):
            Budgets to draw from, each as likely as the others.
        seed (`int`):
            Seed of the order and of the draws.
        trainer ([`~transformers.Trainer`]):
            Its state tells the epoch. (`set_epoch` does not reach a sampler when several processes resume.)

    Yields:
        `tuple[int, int]`: A row's index and its `num_visual_tokens`.
    """

    def __init__(self, num_rows: int, batch_size: int, num_visual_tokens: list[int], seed: int, trainer: Trainer):
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.num_visual_tokens = num_visual_tokens
        self.seed = seed
        self.trainer = trainer

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = int(self.trainer.state.epoch or 0)
        order = list(range(self.num_rows))
        random.Random(f"order {self.seed} {epoch}").shuffle(order)
        draws = random.Random(f"num_visual_tokens {self.seed} {epoch}")
        for position, index in enumerate(order):
            if position % self.batch_size == 0:
                num_visual_tokens = draws.choice(self.num_visual_tokens)
            yield index, num_visual_tokens


class BudgetedRows(torch.utils.data.Dataset):
    """A dataset read by what [`BudgetSampler`] yields: its rows also tell their `index` and `num_visual_tokens`."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, num_visual_tokens = key
        return {**self.dataset[index], "index": index, "num_visual_tokens": num_visual_tokens}


@dataclass
class Collator:
    """
    Makes a batch of rows: chat template, images and labels, at the budget that the sampler drew for the batch.

    TRL's vision collator has no place for a budget, cuts image tokens when it truncates, and lets a row without labels
    pass in silence.

    Args:
        processor ([`DeltaLlavaProcessor`]):
            Its chat template has `{% generation %}` spans: their tokens are the labels, all else is `-100`.
        max_length (`int`, *optional*):
            Longer rows are cut at their end, though never within image tokens. `None` cuts nothing.
        chat_template (`str`, *optional*, defaults to the processor's):
            Template to use in its stead.

    Returns:
        `BatchFeature`: `input_ids`, `attention_mask` and `labels`, int64 (num_rows, length), padded on the right; and
        if the batch has images, `pixel_values`, float (num_images, 3, height, width), and `num_visual_tokens`, int64
        (num_images,).

    Raises:
        `ValueError`: A row has no label, or `max_length` would cut its image tokens.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    chat_template: str | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        # The first row's: rows of the epoch's start may fill up its last batch, when several processes train
        num_visual_tokens = rows[0]["num_visual_tokens"]
        batch = self.processor.apply_chat_template(
            [prepare_multimodal_messages(row["messages"], images=row["images"]) for row in rows],
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "num_visual_tokens": num_visual_tokens,
                "padding": True,
                "padding_side": "right",
                "add_special_tokens": False,  # the chat template writes them
            },
        )
        batch["labels"] = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)

        cut_image_tokens = batch["input_ids"][:, self.max_length :] == self.processor.image_token_id
        if self.max_length is not None and cut_image_tokens.any():
            position = int(cut_image_tokens.any(dim=1).nonzero()[0])
            raise ValueError(
                f"{_name(rows[position])} has image tokens beyond max_length={self.max_length}: at {num_visual_tokens} "
                f"visual tokens an image it is {batch['attention_mask'][position].sum()} tokens long. Raise "
                "max_length, lower num_visual_tokens or leave the record out."
            )
        for key in ("input_ids", "attention_mask", "labels"):
            batch[key] = batch[key][:, : self.max_length]

        all_masked = (batch["labels"] == -100).all(dim=1)
        if all_masked.any():
            raise ValueError(
                f"{_name(rows[int(all_masked.nonzero()[0])])} has nothing to learn: all its labels are masked. Either "
                f"its answer lies beyond max_length={self.max_length}, or the chat template marks none by "
                "{% generation %}."
            )
        return batch


def _name(row: dict[str, Any]) -> str:
    texts = [part["text"] for message in row["messages"] for part in message["content"] if part["text"]]
    return f"Row {row['index']} of the training data ({' '.join(texts)[:80]!r}…)"
