"""Rows that are streamed from shards instead of loaded: their records, images and batches."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Features, Image, IterableDataset, Json, List, Value, load_dataset, load_dataset_builder
from torch.utils.data import get_worker_info
from transformers import ProcessorMixin
from transformers.utils import logging

from ..records import BadRecord, parse_record
from .batches import cut_positions, decode_images, last_fitting_cut, name_row, skip_breaks
from .data import ROW_FEATURES, sample_record, undecoded_samples
from .images import SUFFIXES


logger = logging.get_logger(__name__)

# A sample's images in WebDataset's tar files: `KEY.jpg`, or `KEY.0.jpg`, `KEY.1.jpg` and so on
TAR_IMAGES = [*(suffix[1:] for suffix in SUFFIXES), *(f"{n}{suffix}" for n in range(10) for suffix in SUFFIXES)]
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
) -> IterableDataset:
    """
    Stream records and their images from shards.

    Conversations longer than `max_length` are cut as [`~delta_llava.train.batches.fit_rows`] does; a warning reports
    the first.

    Args:
        source (`str`):
            Hub repository or folder of Parquet files or of WebDataset's tar files. A sample is a record of one of the
            forms that [`~delta_llava.train.data.load_llava_json`] lists, or has one as `json`, and has its images in
            image columns, in a column of lists of images, or in a tar file as `KEY.jpg` or `KEY.0.jpg`, `KEY.1.jpg` …
            (or another of `images.SUFFIXES`), in the order of their places.
        split (`str`):
            Such as `"train"`.
        processor ([`DeltaLlavaProcessor`]), num_visual_tokens (`int`), max_length (`int`), chat_template (`str`):
            As [`~delta_llava.train.batches.fit_rows`] takes them.
        require_images (`bool`, *optional*, defaults to `False`):
            Whether a record must have an image, one question and one answer, as stage 1 takes it.
        skip_bad_records (`bool`, *optional*, defaults to `False`):
            Leave out records that are bad or whose first answer is too long, each with a warning, instead of stopping.
        dataset_config (`str`, *optional*):
            Configuration of a data set that has several.

    Returns:
        `IterableDataset`: Rows of `STREAMED_FEATURES`, whose images are not decoded yet.

    Raises:
        `ValueError`: The samples hold no records; while streaming: a record is bad.
    """
    features = None
    if load_dataset_builder(source, dataset_config).name == "webdataset":
        # By default, the features of the first five samples, and other columns of later samples would be lost
        features = Features({"__key__": Value("string"), "json": Json(), **dict.fromkeys(TAR_IMAGES, Image())})
    stream = load_dataset(source, dataset_config, split=split, streaming=True, features=features)
    stream, columns = undecoded_samples(stream, source)
    literal = skip_breaks(processor)

    def to_row(sample):
        record = sample_record(sample, columns)
        chat = parse_record(record, require_images)
        if files := [image for image in chat.images if isinstance(image, str)]:
            raise BadRecord(f"image {files[0]} is a file, but a stream has to carry its images")
        (cuts,) = cut_positions([chat.messages], literal, chat_template)
        cut = last_fitting_cut(cuts, chat.messages, chat.loss, num_visual_tokens, max_length)
        if cut is None:
            raise BadRecord(f"its first answer ends after max_length={max_length}")
        if cut != cuts[-1]:
            logger.warning_once(f"Rows longer than max_length={max_length} are cut after their last whole answer.")
        num_messages, _, num_images = cut
        return {
            "images": chat.images[:num_images],
            "messages": chat.messages[:num_messages],
            "loss": chat.loss[:num_messages],
            "notes": chat.notes,
            "id": str(record["id"]) if record.get("id") is not None else None,
        }

    def to_rows(batch):  # of one sample, which gives no row if it is left out
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


@dataclass(eq=False)
class StreamedBatches(torch.utils.data.IterableDataset):
    """
    Endless batches of streamed rows, each with a token budget: the stream starts again in a new order.

    As in [`~delta_llava.train.batches.BudgetSampler`], the draws depend on seed and position alone, and are the same in
    all processes.

    Args:
        rows (`IterableDataset`): What [`stream_rows`] returns, this process's part of it.
        batch_size (`int`): Rows of a batch, which share a budget.
        num_visual_tokens (`list`): Budgets to draw from; `"auto"` may be among them.
        seed (`int`): Seed of the order and of the draws.
        skip_bad_records (`bool`): Leave out rows with an unreadable image, with a warning, instead of stopping.
        images_only (`bool`): Refuse rows without images, as fully sharded training must: it needs images in all
            processes at a step, or in none.

    Yields:
        `list[dict]`: Rows as [`~delta_llava.train.batches.BudgetedRows`] returns them.

    Raises:
        `ValueError`: While streaming: an image cannot be read, a row has none where it must, or no row is good.
    """

    rows: IterableDataset
    batch_size: int
    num_visual_tokens: list[int | str]
    seed: int
    skip_bad_records: bool
    images_only: bool

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
            # Not by `set_epoch`, which all workers share although one may be an epoch ahead
            for row in self.rows.shuffle(self.seed + epoch):
                if self.images_only and not row["images"]:
                    raise ValueError(
                        f"{name_row(row)} has no image. FSDP and ZeRO-3 wait forever when some processes have images "
                        "at a step and others have none: train such a stream by DDP or ZeRO-2, or from a JSON file, "
                        "whose rows can be grouped."
                    )
                try:
                    row = {**row, "images": decode_images(row)}
                except ValueError as error:
                    _report(str(error), self.skip_bad_records, error)
                    continue
                num_rows += 1
                yield row
            if num_rows == 0:
                raise ValueError("The stream ended without one good row.")


def _report(message: str, is_left_out: bool, error: Exception):
    if not is_left_out:
        raise ValueError(f"{message}. Fix it, or leave such records out with --skip_bad_records.") from error
    logger.warning(f"{message}. It is left out.")
