"""The batches of both stages: which rows, in which order, at which token budget, with which labels."""

import copy
import itertools
import math
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from PIL.Image import Image as PilImage
from tokenizers import normalizers
from torch.utils.data import Sampler
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils import logging
from trl import prepare_multimodal_messages

from ..processing_delta_llava import open_image
from .images import num_cores


logger = logging.get_logger(__name__)

# transformers tracks a template's spans in one place for all threads, and `datasets` reads shards in several
template_lock = threading.Lock()
ROWS_WORTH_PROCESSES = 10_000  # fewer rows are measured before processes have started
# A noncharacter, which Unicode reserves for a program's internal use
BREAK = "\ufdd0"


def skip_breaks(processor: ProcessorMixin) -> ProcessorMixin:
    """A copy of a processor whose tokenizer skips every `BREAK`, as [`break_special_tokens`] writes them."""
    processor = copy.deepcopy(processor)
    backend = processor.tokenizer.backend_tokenizer
    skip = normalizers.Replace(BREAK, "")
    backend.normalizer = normalizers.Sequence([skip, backend.normalizer] if backend.normalizer else [skip])
    return processor


def break_special_tokens(messages: list[dict], processor: ProcessorMixin) -> list[dict]:
    """
    Write a `BREAK` into every special token that a text of a chat spells out, so that it is encoded as plain text by a
    processor of [`skip_breaks`]. The contents of the chat are lists of parts.

    Raises:
        `ValueError`: The tokenizer finds its special token all the same.
    """
    special, spelt = _special_tokens(processor.tokenizer)

    def broken(match: re.Match) -> str:
        text = f"{match[0][:1]}{BREAK}{match[0][1:]}"
        if special[match[0]] in processor.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids:
            raise ValueError(
                f"{name_row({'messages': messages})} spells out {match[0]!r}, which this tokenizer can only encode as "
                "its special token: delete it from the text."
            )
        return text

    def break_part(part: dict) -> dict:
        return part if part["text"] is None else {**part, "text": spelt.sub(broken, part["text"])}

    return [{**message, "content": list(map(break_part, message["content"]))} for message in messages]


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], re.Pattern]:
    """Ids of the special tokens, and a pattern that finds them in a text."""
    added = tokenizer.added_tokens_decoder
    special = {token.content: token_id for token_id, token in added.items() if token.special}
    return special, re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")


def cut_positions(
    conversations: list[list[dict]], processor: ProcessorMixin, chat_template: str | None = None
) -> list[list[tuple[int, int, int]]]:
    """
    Where conversations, chats whose contents are lists of parts, may be cut: after each of their answers.

    Takes a processor of [`skip_breaks`] and the chat template of the [`Collator`]. Returns for each conversation the
    messages, tokens (an image counts as one) and images up to each cut. The last cut is the whole conversation; it is
    the only one if the template does not separate the answers.
    """
    with template_lock:
        tokens = processor.tokenizer.apply_chat_template(
            [break_special_tokens(messages, processor) for messages in conversations],
            chat_template=chat_template or processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    return list(map(_cut_positions, conversations, tokens["assistant_masks"]))


def _cut_positions(messages: list[dict], assistant_mask: list[int]) -> list[tuple[int, int, int]]:
    mask, num_tokens = [*assistant_mask, 0], len(assistant_mask)
    ends = [position + 1 for position in range(num_tokens) if mask[position] and not mask[position + 1]]
    images = list(
        itertools.accumulate(sum(part["type"] == "image" for part in message["content"]) for message in messages)
    )
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(ends) != len(answers):
        return [(len(messages), num_tokens, images[-1])]
    # The template would write its end after any answer that came last
    tail = num_tokens - ends[-1]
    return [(index + 1, end + tail, images[index]) for index, end in zip(answers, ends, strict=True)]


def last_fitting_cut(
    cuts: list[tuple[int, int, int]],
    messages: list[dict],
    loss: list[bool] | None,
    num_visual_tokens: int,
    max_length: int | None,
) -> tuple[int, int, int] | None:
    """
    The last of a conversation's [`cut_positions`] that leaves an answer to learn and at most `max_length` tokens
    (`None`: any number), with `num_visual_tokens` for each image; `None` if there is none. `loss` says which messages
    count.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    first = next((index for index in answers if loss is None or loss[index]), -1)
    fitting = (
        cut for cut in cuts if cut[0] > first and cut[1] + cut[2] * (num_visual_tokens - 1) <= (max_length or math.inf)
    )
    return max(fitting, default=None)


def fit_rows(
    dataset: Dataset,
    processor: ProcessorMixin,
    num_visual_tokens: int,
    max_length: int | None,
    chat_template: str | None = None,
) -> Dataset:
    """
    Measure every row, and cut those that are too long where no answer is broken.

    A row longer than `max_length` is cut after its last whole answer that fits. A row whose first answer (among those
    to be learnt) does not fit is left out. A warning counts both.

    Args:
        dataset (`Dataset`): Rows as [`~delta_llava.train.data.load_llava_json`] returns them.
        processor ([`DeltaLlavaProcessor`]), chat_template (`str`, *optional*): As the [`Collator`] has them.
        num_visual_tokens (`int`): Tokens of one image: the largest budget to be trained.
        max_length (`int`, *optional*): Most tokens of a row; `None` for any number.

    Returns:
        `Dataset`: The rows that fit, with three more columns, by which [`BudgetedRows`] cuts and [`BudgetSampler`]
        groups: `num_messages`, `num_tokens` (an image counts as one) and `num_images`.

    Raises:
        `ValueError`: No row fits.
    """
    names = ("num_messages", "num_tokens", "num_images", "is_cut")
    literal = skip_breaks(processor)

    def measure(conversations, losses=None):
        rows = []
        for cuts, messages, loss in zip(
            cut_positions(conversations, literal, chat_template),
            conversations,
            losses or [None] * len(conversations),
            strict=True,
        ):
            cut = last_fitting_cut(cuts, messages, loss, num_visual_tokens, max_length)
            rows.append((*(cut or (0, 0, 0)), cut != cuts[-1]))
        return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))

    template, tokenizer = chat_template or processor.chat_template, processor.tokenizer.backend_tokenizer.to_str()
    measured = dataset.map(
        measure,
        batched=True,
        input_columns=[name for name in ("messages", "loss") if name in dataset.column_names],
        remove_columns=dataset.column_names,
        features=Features({name: Value("int32") for name in names}),
        num_proc=num_cores() if len(dataset) >= ROWS_WORTH_PROCESSES else None,
        # By hand: the fingerprint of a tokenizer changes as it is used, so the cache would never be found
        new_fingerprint=Hasher.hash(
            [Path(__file__).read_text(), dataset._fingerprint, tokenizer, template, num_visual_tokens, max_length]
        ),
        desc="Counting tokens",
    )
    columns = measured.with_format("numpy")[:]
    kept, is_cut = columns["num_messages"] > 0, columns["is_cut"] > 0
    if not kept.any():
        raise ValueError(
            f"All {len(dataset)} rows are longer than max_length={max_length} at {num_visual_tokens} visual tokens an "
            "image. Raise max_length or lower num_visual_tokens."
        )
    if is_cut.any():
        first = int(is_cut.argmax())
        name = name_row(dataset.select_columns("messages")[first])
        logger.warning(
            f"{is_cut.sum()} of {len(dataset)} rows are longer than max_length={max_length} at {num_visual_tokens} "
            f"visual tokens an image: {(is_cut & kept).sum()} are cut after their last whole answer that fits, and "
            f"{(~kept).sum()}, whose first answer does not fit, are left out. The first: {name}."
        )
    rows = concatenate_datasets([dataset, measured.remove_columns("is_cut")], axis=1)
    return rows if kept.all() else rows.select(kept.nonzero()[0])


class BudgetSampler(Sampler[tuple[int, int]]):
    """
    Shuffles the rows anew in each epoch, and draws one token budget for every batch.

    Order and budgets depend on seed, epoch and position alone: a resumed run, which skips batches, repeats them, and
    all processes draw the same budget at the same step, so that none waits for another's longer sequences. (Without
    groups, processes that share the last, partial batch of an epoch may differ.)

    Args:
        dataset (`Dataset`):
            Rows as [`fit_rows`] returns them.
        batch_size (`int`):
            Rows that share a budget: those of one micro-step in all processes.
        num_visual_tokens (`list`):
            Budgets to draw from with equal probability. `"auto"` may be among them; no image then gets more than the
            largest of the others.
        seed (`int`):
            Seed of the order and of the draws.
        group (`bool`, *optional*, defaults to `False`):
            Whether the rows of a batch have similar lengths and, as in LLaVA-1.5, all have images or none does. Then
            all processes have images at a step or none has, which fully sharded training depends on. The last batch of
            each kind is filled with rows of that kind, which occur twice in that epoch. Where a kind has too few rows
            for that, both kinds share batches, and `num_mixed` counts its rows. The longest batch comes first, so that
            a lack of memory shows at once.
        epoch (`Callable`, *optional*):
            Returns the epoch. (`set_epoch` does not reach a sampler when several processes resume.)

    Yields:
        `tuple[int, int | str]`: A row's index and its `num_visual_tokens`.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        num_visual_tokens: list[int | str],
        seed: int,
        group: bool = False,
        epoch: Callable[[], int] = lambda: 0,
    ):
        self.batch_size = batch_size
        self.num_visual_tokens = num_visual_tokens
        self.seed = seed
        self.epoch = epoch
        self.num_rows = len(dataset)
        self.kinds = None
        self.num_mixed = 0
        if group:
            columns = dataset.select_columns(["num_tokens", "num_images"]).with_format("torch")[:]
            num_tokens, num_images = columns["num_tokens"], columns["num_images"]
            largest = max(budget for budget in num_visual_tokens if budget != "auto")
            self.lengths = num_tokens + num_images * (largest - 1)
            kinds = [kind.nonzero()[:, 0] for kind in (num_images > 0, num_images == 0) if kind.any()]
            few = [kind for kind in kinds if -len(kind) % batch_size > len(kind)]
            if few and len(kinds) == 2:
                self.num_mixed = min(map(len, few))
                kinds = [torch.arange(self.num_rows)]
            self.kinds = kinds

    def __len__(self) -> int:
        return self.num_rows + self.num_repeated

    @property
    def num_repeated(self) -> int:
        """Number of rows that occur twice in an epoch to fill the last batch of their kind."""
        return sum(self._num_repeated(len(kind)) for kind in self.kinds or ())

    def _num_repeated(self, num_rows: int) -> int:
        # No row occurs more than twice: the only batch of too few rows stays partial
        missing = -num_rows % self.batch_size
        return missing if missing <= num_rows else 0

    def __iter__(self) -> Iterator[tuple[int, int | str]]:
        epoch = self.epoch()
        order = random.Random(f"order {self.seed} {epoch}")
        draws = random.Random(f"num_visual_tokens {self.seed} {epoch}")
        if self.kinds is None:
            indices = list(range(self.num_rows))
            order.shuffle(indices)
        else:
            indices = itertools.chain.from_iterable(self._grouped_batches(order))
        for position, index in enumerate(indices):
            if position % self.batch_size == 0:
                num_visual_tokens = draws.choice(self.num_visual_tokens)
            yield index, num_visual_tokens

    def _grouped_batches(self, order: random.Random) -> list[list[int]]:
        batches = []
        for kind in self.kinds:
            generator = torch.Generator().manual_seed(order.getrandbits(63))
            lengths = self.lengths[kind].tolist()
            grouped = kind[get_length_grouped_indices(lengths, self.batch_size, generator=generator)]
            repeated = self._num_repeated(len(kind))
            batches += torch.cat([grouped, grouped[len(grouped) - repeated :]]).split(self.batch_size)
        batches = [batch.tolist() for batch in batches]
        order.shuffle(batches)
        longest = max(range(len(batches)), key=lambda position: self.lengths[batches[position]].max())
        batches[0], batches[longest] = batches[longest], batches[0]
        return batches


class BudgetedRows(torch.utils.data.Dataset):
    """
    A dataset of [`fit_rows`], indexed by what [`BudgetSampler`] yields.

    Rows are cut to the length that fits, and include their `num_visual_tokens`. An image that can no longer be read is
    a `ValueError` that names row and file.
    """

    def __init__(self, dataset: Dataset):
        # `decode_images` opens the images, as everywhere
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int | str]) -> dict[str, Any]:
        index, num_visual_tokens = key
        row = self.dataset[index].to_pylist()[0]
        num_messages = row["num_messages"]
        return {
            "images": decode_images(row, row["num_images"]),
            "messages": row["messages"][:num_messages],
            "num_visual_tokens": num_visual_tokens,
            **({"loss": row["loss"][:num_messages]} if "loss" in row else {}),
        }


def decode_images(row: dict[str, Any], num_images: int | None = None) -> list[PilImage]:
    """Open the images of a row, or the first of them; a `ValueError` names row and file of one that cannot be read."""
    decoded = []
    for image in row["images"][:num_images]:
        try:
            decoded.append(open_image(image["path"] if image["bytes"] is None else image["bytes"]))
        except ValueError as error:
            name = image["path"] or "of its own"
            raise ValueError(f"{name_row(row)}: image {name} cannot be read: {error.__cause__}") from error
    return decoded


def name_row(row: dict[str, Any]) -> str:
    """How errors name a row: by the start of its text."""
    texts = [part["text"] for message in row["messages"] for part in message["content"] if part["text"]]
    return f"The row {' '.join(texts)[:80]!r}…"


@dataclass
class Collator:
    """
    Turns rows into a batch: chat template, images and labels, at the budget that the sampler drew for the batch.

    TRL's vision collator takes no budget, cuts image tokens when it truncates, and silently accepts a row without
    labels.

    Args:
        processor ([`DeltaLlavaProcessor`]):
            The tokens in the `{% generation %}` spans of its chat template are the labels; all others are `-100`.
            Special tokens that a text spells out are encoded as text.
        max_length (`int`, *optional*):
            Most tokens of a row, which [`fit_rows`] and [`~delta_llava.train.stream.stream_rows`] ensure.
        chat_template (`str`, *optional*, defaults to the processor's):
            Template to use instead.

    Returns:
        `BatchFeature`: `input_ids`, `attention_mask` and `labels`, int64 (num_rows, length), padded on the right; and
        if the batch has images, `pixel_values`, float (num_images, 3, height, width), and `num_visual_tokens`, int64
        (num_images,).

    Raises:
        `ValueError`: A row has no label, is longer than `max_length`, or turns off the loss of an answer that the
            template does not separate from others.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    chat_template: str | None = None

    def __post_init__(self):
        self.processor = skip_breaks(self.processor)

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        # The first row's: with several processes, rows from an epoch's start may fill its last batch
        num_visual_tokens = rows[0]["num_visual_tokens"]
        batch = self.processor.apply_chat_template(
            [
                prepare_multimodal_messages(break_special_tokens(row["messages"], self.processor), images=row["images"])
                for row in rows
            ],
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
        is_label = batch.pop("assistant_masks").bool()
        for row, row_is_label in zip(rows, is_label, strict=True):
            if not all(row.get("loss", ())):
                row_is_label &= self._keeps_loss(row, row_is_label)
        batch["labels"] = batch["input_ids"].masked_fill(~is_label, -100)

        lengths = batch["attention_mask"].sum(dim=1)
        if self.max_length is not None and (lengths > self.max_length).any():
            position = int(lengths.argmax())
            raise ValueError(
                f"{name_row(rows[position])} is {lengths[position]} tokens long at {num_visual_tokens} visual tokens "
                f"an image, but max_length={self.max_length}."
            )
        all_masked = (batch["labels"] == -100).all(dim=1)
        if all_masked.any():
            raise ValueError(
                f"{name_row(rows[int(all_masked.nonzero()[0])])} has nothing to learn: all its labels are masked, "
                "because the chat template marks no answer by {% generation %}."
            )
        return batch

    def _keeps_loss(self, row: dict[str, Any], is_label: torch.Tensor) -> torch.Tensor:
        """For each token, bool (length,), whether its answer, or the last answer before it, counts."""
        answers = zip(row["messages"], row["loss"], strict=True)
        keeps = torch.tensor([True, *(keeps for message, keeps in answers if message["role"] == "assistant")])
        starts = is_label & ~torch.cat([is_label.new_zeros(1), is_label[:-1]])
        if starts.sum() != len(keeps) - 1:
            raise ValueError(
                f"{name_row(row)} turns off the loss of an answer, but the chat template marks {int(starts.sum())} "
                f"spans by {{% generation %}} for its {len(keeps) - 1} answers."
            )
        return keeps[starts.cumsum(dim=0)]
