"""The batches that both stages train on: which rows, in which order, at which token budget, with which labels."""

import copy
import itertools
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import (
    Dataset,
    Features,
    Image,
    IterableDataset,
    Json,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.fingerprint import Hasher
from PIL.Image import Image as PilImage
from tokenizers import normalizers
from torch.utils.data import Sampler, get_worker_info
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils import logging
from trl import prepare_multimodal_messages

from ..processing_delta_llava import open_image
from ..records import BadRecord, parse_record
from .data import ROW_FEATURES, sample_record, undecoded_samples
from .images import num_cores


logger = logging.get_logger(__name__)

# A sample's images in WebDataset's tar files: `KEY.jpg`, or `KEY.0.jpg`, `KEY.1.jpg` and so on
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TAR_IMAGES = [f"{number}{suffix}" for number in ("", *(f"{n}." for n in range(10))) for suffix in IMAGE_SUFFIXES]
# transformers follows the spans of a template in one place for all threads, and `datasets` reads shards in several
template_lock = threading.Lock()
ROWS_WORTH_PROCESSES = 10_000  # they take longer to start than fewer rows take to measure
# A character that Unicode keeps for a program's own use
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
    Write a `BREAK` into every special token that a text spells out, so that it is encoded as the text that it is.

    Args:
        messages (`list[dict]`): A chat whose contents are lists of parts.
        processor ([`DeltaLlavaProcessor`]): What [`skip_breaks`] returns.

    Raises:
        `ValueError`: The tokenizer finds its token in there even so.
    """
    special, spelt = _special_tokens(processor.tokenizer)

    def broken(match: re.Match) -> str:
        text = f"{match[0][:1]}{BREAK}{match[0][1:]}"
        if special[match[0]] in processor.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids:
            raise ValueError(
                f"{_name({'messages': messages})} spells out {match[0]!r}, which this tokenizer can encode as its "
                "special token alone: delete it from the text."
            )
        return text

    def break_part(part: dict) -> dict:
        return part if part["text"] is None else {**part, "text": spelt.sub(broken, part["text"])}

    return [{**message, "content": list(map(break_part, message["content"]))} for message in messages]


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], re.Pattern]:
    """Ids of the special tokens, and what finds them in a text."""
    added = tokenizer.added_tokens_decoder
    special = {token.content: token_id for token_id, token in added.items() if token.special}
    return special, re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")


def places_to_cut(
    conversations: list[list[dict]], processor: ProcessorMixin, chat_template: str | None = None
) -> list[list[tuple[int, int, int]]]:
    """
    Where conversations may end: behind each of their answers.

    Args:
        conversations (`list[list[dict]]`): Chats whose contents are lists of parts.
        processor ([`DeltaLlavaProcessor`]): What [`skip_breaks`] returns.
        chat_template (`str`, *optional*): As the [`Collator`] has it.

    Returns:
        `list[list[tuple[int, int, int]]]`: Of each conversation, messages, tokens (an image counts as one) and images
        up to each place. The last is the whole conversation, and the only one where a template does not keep the
        answers apart.
    """
    with template_lock:
        tokens = processor.tokenizer.apply_chat_template(
            [break_special_tokens(messages, processor) for messages in conversations],
            chat_template=chat_template or processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    return list(map(_places, conversations, tokens["assistant_masks"]))


def _places(messages: list[dict], assistant_mask: list[int]) -> list[tuple[int, int, int]]:
    mask, num_tokens = [*assistant_mask, 0], len(assistant_mask)
    ends = [position + 1 for position in range(num_tokens) if mask[position] and not mask[position + 1]]
    images = list(
        itertools.accumulate(sum(part["type"] == "image" for part in message["content"]) for message in messages)
    )
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(ends) != len(answers):
        return [(len(messages), num_tokens, images[-1])]
    # What the template writes behind the last answer, it would write behind any that came last
    tail = num_tokens - ends[-1]
    return [(index + 1, end + tail, images[index]) for index, end in zip(answers, ends, strict=True)]


def fit(
    places: list[tuple[int, int, int]],
    messages: list[dict],
    loss: list[bool] | None,
    num_visual_tokens: int,
    max_length: int | None,
) -> tuple[int, int, int] | None:
    """
    The last place to cut at that leaves an answer to learn and no more than `max_length` tokens, or `None`.

    Args:
        places (`list[tuple[int, int, int]]`): A conversation's, as [`places_to_cut`] returns them.
        messages (`list[dict]`), loss (`list[bool]`, *optional*): The conversation, and which of its messages count.
        num_visual_tokens (`int`): Tokens of one image.
        max_length (`int`, *optional*): Tokens that a row may have; `None` for any number.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    first = next((index for index in answers if loss is None or loss[index]), -1)
    fitting = [
        place
        for place in places
        if place[0] > first and (not max_length or place[1] + place[2] * (num_visual_tokens - 1) <= max_length)
    ]
    return fitting[-1] if fitting else None


def fit_rows(
    dataset: Dataset,
    processor: ProcessorMixin,
    num_visual_tokens: int,
    max_length: int | None,
    chat_template: str | None = None,
) -> Dataset:
    """
    Measure every row, so that none needs to be cut where it must not be.

    A row longer than `max_length` is cut after its last whole answer that fits; one whose first answer (that is to be
    learnt) does not fit is left out. A warning counts both.

    Args:
        dataset (`Dataset`): Rows as [`~delta_llava.train.data.load_llava_json`] returns them.
        processor ([`DeltaLlavaProcessor`]), chat_template (`str`, *optional*): As the [`Collator`] has them.
        num_visual_tokens (`int`): Tokens of one image: the largest budget that is to be trained.
        max_length (`int`, *optional*): Tokens that a row may have; `None` for any number.

    Returns:
        `Dataset`: The rows that fit, with three more columns, by which [`BudgetedRows`] cuts and [`BudgetSampler`]
        groups: `num_messages`, `num_tokens` (an image counts as one) and `num_images`.

    Raises:
        `ValueError`: No row fits.
    """
    columns = ("num_messages", "num_tokens", "num_images", "is_cut")

    literal = skip_breaks(processor)

    def measure(conversations, losses=None):
        rows = []
        all_places = places_to_cut(conversations, literal, chat_template)
        losses = losses or [None] * len(conversations)
        for places, messages, loss in zip(all_places, conversations, losses, strict=True):
            place = fit(places, messages, loss, num_visual_tokens, max_length)
            rows.append((*(place or (0, 0, 0)), place != places[-1]))
        return {name: [row[position] for row in rows] for position, name in enumerate(columns)}

    template, tokenizer = chat_template or processor.chat_template, processor.tokenizer.backend_tokenizer.to_str()
    measured = dataset.map(
        measure,
        batched=True,
        input_columns=[name for name in ("messages", "loss") if name in dataset.column_names],
        remove_columns=dataset.column_names,
        features=Features({name: Value("int32") for name in columns}),
        num_proc=num_cores() if len(dataset) >= ROWS_WORTH_PROCESSES else None,
        # By hand, because a tokenizer's own fingerprint changes with its use, and the cache would never be found again
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
        name = _name(dataset.select_columns("messages")[first])
        logger.warning(
            f"{is_cut.sum()} of {len(dataset)} rows are longer than max_length={max_length} at {num_visual_tokens} "
            f"visual tokens an image: {(is_cut & kept).sum()} are cut after their last whole answer that fits, and "
            f"{(~kept).sum()}, whose first answer does not fit, are left out. The first: {name}."
        )
    rows = concatenate_datasets([dataset, measured.remove_columns("is_cut")], axis=1)
    return rows if kept.all() else rows.select(kept.nonzero()[0])


class BudgetSampler(Sampler[tuple[int, int]]):
    """
    Puts the rows in a new order in each epoch, and draws one token budget for every batch.

    Order and budgets follow from seed, epoch and position alone: a resumed run, which skips batches, repeats them, and
    all processes draw the same budget at the same step, so that none waits for another's longer sequences. (Without
    groups, processes that share an epoch's last, partial batch may differ.)

    Args:
        dataset (`Dataset`):
            Rows as [`fit_rows`] returns them.
        batch_size (`int`):
            Rows that share a budget: those of one micro-step over all processes.
        num_visual_tokens (`list`):
            Budgets to draw from, each as likely as the others, and maybe `"auto"`, which no image makes more of than
            the largest of them.
        seed (`int`):
            Seed of the order and of the draws.
        group (`bool`, *optional*, defaults to `False`):
            Whether the rows of a batch are of about the same length and, as in LLaVA-1.5, all with images or all
            without. So all processes have images at a step or none has, which fully sharded training depends on. What
            is missing to a kind's last batch is filled up with rows of that kind, which occur twice in that epoch.
            Where a kind has too few rows to do so, both kinds share batches, and `num_mixed` counts its rows. The
            longest batch comes first: if the memory does not suffice, it shows at once.
        epoch (`Callable`, *optional*):
            Tells the epoch. (`set_epoch` does not reach a sampler when several processes resume.)

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
            few = [kind for kind in kinds if self._num_missing(len(kind)) > len(kind)]
            if few and len(kinds) == 2:
                self.num_mixed = min(map(len, few))
                kinds = [torch.arange(self.num_rows)]
            self.kinds = kinds

    def __len__(self) -> int:
        if self.kinds is None:
            return self.num_rows
        return self.num_rows + self.num_repeated

    @property
    def num_repeated(self) -> int:
        """Number of rows that occur twice in an epoch, to fill the last batch of their kind."""
        return sum(self._num_repeated(len(kind)) for kind in self.kinds or ())

    def _num_missing(self, num_rows: int) -> int:
        return -num_rows % self.batch_size

    def _num_repeated(self, num_rows: int) -> int:
        # No row occurs more than twice: of too few, the only batch stays partial
        missing = self._num_missing(num_rows)
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
    A dataset of [`fit_rows`] read by what [`BudgetSampler`] yields.

    Rows end where they were found to fit, and also tell their `num_visual_tokens`. An image that cannot be read any
    more is a `ValueError` that names row and file.
    """

    def __init__(self, dataset: Dataset):
        # Opened below, as everywhere
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int | str]) -> dict[str, Any]:
        index, num_visual_tokens = key
        row = self.dataset[index].to_pylist()[0]
        num_messages = row["num_messages"]
        return {
            "images": _decode(row, row["images"][: row["num_images"]]),
            "messages": row["messages"][:num_messages],
            "num_visual_tokens": num_visual_tokens,
            **({"loss": row["loss"][:num_messages]} if "loss" in row else {}),
        }


def _decode(row: dict[str, Any], images: list[dict]) -> list[PilImage]:
    decoded = []
    for image in images:
        try:
            decoded.append(open_image(image["path"] if image["bytes"] is None else image["bytes"]))
        except ValueError as error:
            name = image["path"] or "of its own"
            raise ValueError(f"{_name(row)}: image {name} cannot be read: {error.__cause__}") from error
    return decoded


STREAMED_FEATURES = Features({**ROW_FEATURES, "images": List(Image(decode=False)), "id": Value("string")})


def stream_rows(
    source: str,
    split: str,
    processor: ProcessorMixin,
    num_visual_tokens: int,
    max_length: int | None,
    chat_template: str | None = None,
    require_images: bool = False,
    skip_bad_records: bool = False,
    dataset_config: str | None = None,
    one_answer: bool = False,
) -> IterableDataset:
    """
    Stream records and their images from shards.

    Conversations longer than `max_length` are cut as [`fit_rows`] does; a warning tells of the first.

    Args:
        source (`str`):
            Hub repository or folder of Parquet files or of WebDataset's tar files. A sample is a record of one of the
            forms that [`~delta_llava.train.data.load_llava_json`] lists, or has one as `json`, and has its images in
            image columns, in a column of lists of images, or in a tar file as `KEY.jpg` or `KEY.0.jpg`, `KEY.1.jpg` …
            (any of `IMAGE_SUFFIXES`), in the order of their places.
        split (`str`):
            Such as `"train"`.
        processor ([`DeltaLlavaProcessor`]), num_visual_tokens (`int`), max_length (`int`), chat_template (`str`):
            As [`fit_rows`] takes them.
        require_images (`bool`, *optional*, defaults to `False`):
            Whether a record without an image is bad.
        skip_bad_records (`bool`, *optional*, defaults to `False`):
            Leave out records that are bad or whose first answer is too long, each with a warning, instead of stopping.
        dataset_config (`str`, *optional*):
            Configuration of a data set that has several.
        one_answer (`bool`, *optional*, defaults to `False`):
            Whether a record must be one question and one answer, all that stage 1 learns of it.

    Returns:
        `IterableDataset`: Rows of `STREAMED_FEATURES`, whose images are not decoded yet.

    Raises:
        `ValueError`: The samples hold no records; while streaming: a record is bad.
    """
    features = None
    if load_dataset_builder(source, dataset_config).name == "webdataset":
        # Else they would be those of the first five samples, and what later ones have beside would be lost
        features = Features({"__key__": Value("string"), "json": Json(), **dict.fromkeys(TAR_IMAGES, Image())})
    stream = load_dataset(source, dataset_config, split=split, streaming=True, features=features)
    stream, columns = undecoded_samples(stream, source)
    literal = skip_breaks(processor)

    def to_row(sample):
        record = sample_record(sample, columns)
        chat = parse_record(record, require_images, one_answer)
        if files := [image for image in chat.images if isinstance(image, str)]:
            raise BadRecord(f"image {files[0]} is a file, but a stream has to carry its images")
        (places,) = places_to_cut([chat.messages], literal, chat_template)
        place = fit(places, chat.messages, chat.loss, num_visual_tokens, max_length)
        if place is None:
            raise BadRecord(f"its first answer lies beyond max_length={max_length}")
        if place != places[-1]:
            logger.warning_once(f"Rows longer than max_length={max_length} are cut after their last whole answer.")
        num_messages, _, num_images = place
        return {
            "images": chat.images[:num_images],
            "messages": chat.messages[:num_messages],
            "loss": chat.loss[:num_messages],
            "notes": chat.notes,
            "id": str(record["id"]) if record.get("id") is not None else None,
        }

    def to_rows(batch):  # a batch of one, of which no row may be left
        sample = {name: values[0] for name, values in batch.items()}
        try:
            row = to_row(sample)
        except BadRecord as error:
            name = sample["__key__"] if "__key__" in sample else sample.get("id")
            _report(f"Record {name!r} of {source}: {error}", skip_bad_records, error)
            return {name: [] for name in STREAMED_FEATURES}
        return {name: [value] for name, value in row.items()}

    return stream.map(
        to_rows, batched=True, batch_size=1, remove_columns=stream.column_names, features=STREAMED_FEATURES
    )


class StreamedBatches(torch.utils.data.IterableDataset):
    """
    Batches of streamed rows, each with a token budget, without an end: the stream starts again in a new order.

    As with [`BudgetSampler`], the draws follow from seed and position alone, and are the same in all processes.

    Args:
        rows (`IterableDataset`): What [`stream_rows`] returns, this process's part of it.
        batch_size (`int`): Rows of a batch, which share a budget.
        num_visual_tokens (`list`): Budgets to draw from, `"auto"` maybe among them.
        seed (`int`): Seed of the order and of the draws.
        skip_bad_records (`bool`): Leave out rows with an unreadable image, with a warning, instead of stopping.
        images_only (`bool`): Refuse rows without images, as fully sharded training must: it needs images in all
            processes at a step or in none.
        buffer_size (`int`, *optional*, defaults to 1000): Rows among which the next one is chosen.

    Yields:
        `list[dict]`: Rows as [`BudgetedRows`] gives them.

    Raises:
        `ValueError`: While streaming: an image cannot be read, a row has none where it must, or no row is good.
    """

    def __init__(
        self,
        rows: IterableDataset,
        batch_size: int,
        num_visual_tokens: list[int | str],
        seed: int,
        skip_bad_records: bool,
        images_only: bool,
        buffer_size: int = 1000,
    ):
        self.rows = rows
        self.buffer_size = buffer_size
        self.batch_size = batch_size
        self.num_visual_tokens = num_visual_tokens
        self.seed = seed
        self.skip_bad_records = skip_bad_records
        self.images_only = images_only

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        worker = get_worker_info()
        # A DataLoader takes batches from its workers in turn
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = self._decoded_rows()
        for position in itertools.count(first, step):
            draw = random.Random(f"num_visual_tokens {self.seed} {position}")
            num_visual_tokens = draw.choice(self.num_visual_tokens)
            yield [{**row, "num_visual_tokens": num_visual_tokens} for row in itertools.islice(rows, self.batch_size)]

    def _decoded_rows(self) -> Iterator[dict[str, Any]]:
        for epoch in itertools.count():
            num_rows = 0
            # Not by `set_epoch`, which all workers share, though one may be an epoch ahead
            for row in self.rows.shuffle(self.seed + epoch, buffer_size=self.buffer_size):
                if self.images_only and not row["images"]:
                    raise ValueError(
                        f"{_name(row)} has no image. FSDP and ZeRO-3 wait for ever when some processes have images at "
                        "a step and others have none: train such a stream by DDP or ZeRO-2, or from a JSON file, whose "
                        "rows can be grouped."
                    )
                try:
                    row = {**row, "images": _decode(row, row["images"])}
                except ValueError as error:
                    _report(str(error), self.skip_bad_records, error)
                    continue
                num_rows += 1
                yield row
            if num_rows == 0:
                raise ValueError("The stream has ended without one good row.")


def _report(message: str, is_left_out: bool, error: Exception):
    if not is_left_out:
        raise ValueError(f"{message}. Mend it, or leave such records out with --skip_bad_records.") from error
    logger.warning(f"{message}. It is left out.")


@dataclass
class Collator:
    """
    Makes a batch of rows: chat template, images and labels, at the budget that the sampler drew for the batch.

    TRL's vision collator has no place for a budget, cuts image tokens when it truncates, and lets a row without labels
    pass in silence.

    Args:
        processor ([`DeltaLlavaProcessor`]):
            Its chat template has `{% generation %}` spans: their tokens are the labels, all else is `-100`. Special
            tokens that a text spells out are encoded as text.
        max_length (`int`, *optional*):
            Tokens that a row may have at most; [`fit_rows`] and [`stream_rows`] see to it.
        chat_template (`str`, *optional*, defaults to the processor's):
            Template to use in its stead.

    Returns:
        `BatchFeature`: `input_ids`, `attention_mask` and `labels`, int64 (num_rows, length), padded on the right; and
        if the batch has images, `pixel_values`, float (num_images, 3, height, width), and `num_visual_tokens`, int64
        (num_images,).

    Raises:
        `ValueError`: A row has no label, or is longer than `max_length`, or turns off the loss of an answer that the
            template does not keep apart.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    chat_template: str | None = None

    def __post_init__(self):
        self.processor = skip_breaks(self.processor)

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        # The first row's: rows of the epoch's start may fill up its last batch, when several processes train
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
                f"{_name(rows[position])} is {lengths[position]} tokens long at {num_visual_tokens} visual tokens an "
                f"image, but max_length={self.max_length}."
            )
        all_masked = (batch["labels"] == -100).all(dim=1)
        if all_masked.any():
            raise ValueError(
                f"{_name(rows[int(all_masked.nonzero()[0])])} has nothing to learn: all its labels are masked, because "
                "the chat template marks no answer by {% generation %}."
            )
        return batch

    def _keeps_loss(self, row: dict[str, Any], is_label: torch.Tensor) -> torch.Tensor:
        """Of each token, bool (length,), whether the answer that it belongs to, or the last one before it, counts."""
        answers = zip(row["messages"], row["loss"], strict=True)
        keeps = torch.tensor([True, *(keeps for message, keeps in answers if message["role"] == "assistant")])
        starts = is_label & ~torch.cat([is_label.new_zeros(1), is_label[:-1]])
        if starts.sum() != len(keeps) - 1:
            raise ValueError(
                f"{_name(row)} turns off the loss of an answer, but the chat template marks {int(starts.sum())} spans "
                f"by {{% generation %}} for its {len(keeps) - 1} answers."
            )
        return keeps[starts.cumsum(dim=0)]


def _name(row: dict[str, Any]) -> str:
    texts = [part["text"] for message in row["messages"] for part in message["content"] if part["text"]]
    return f"The row {' '.join(texts)[:80]!r}…"
