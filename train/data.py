"""Loads records and images as a `datasets.Dataset`, after checking each of them once."""

import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets.config
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Audio,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    Video,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from filelock import FileLock
from tqdm.auto import tqdm
from transformers.utils import logging

from .. import records as records_module
from ..records import FORMS, BadRecord, Chat, parse_record, read_records, short
from .images import check_images, checking_code, decode_image, image_name, locate_images, read_table


logger = logging.get_logger(__name__)

FEATURES = Features(
    {
        "images": List(Image()),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
    }
)
_REMARK = {"kind": Value("string"), "reason": Value("string")}
# With the other columns that training reads, as in `records.Chat`
ROW_FEATURES = Features({**FEATURES, "loss": List(Value("bool")), "notes": List(_REMARK)})
# What the cache keeps: a row for every readable record (`id` as JSON)
RECORD_FEATURES = Features({"index": Value("int64"), "id": Value("string"), **ROW_FEATURES})

_ROWS_PER_BATCH = 1000
_BYTES_PER_BATCH = 2**26


@dataclass
class CheckedRecords:
    """
    What [`check_llava_json`] found in records and their images.

    Args:
        file (`Path`):
            `records-*.arrow` of the cache (`RECORD_FEATURES`); bad records are in the `.jsonl` next to it.
        records (`pyarrow.Table`):
            That file, memory-mapped: the readable records, including those with bad images.
        num_bad_records (`int`):
            Number of records that are bad, by themselves or because of an image.
        num_images (`int`):
            Number of images that `records` carry, plus that of distinct image files.
        num_decoded (`int`):
            Number of image files that had to be decoded, because they were new or had changed.
        seconds (`float`):
            Time spent decoding them.
        bad_rows (`dict[int, BadRecord]`):
            The fault of every row of `records` that has a bad image, in ascending order.
        image_notes (`list[tuple[int, str, dict[str, str]]]`):
            Notes on images: a row of `records` that has the image, the image, `kind` and `reason`.
    """

    file: Path
    records: pa.Table
    num_bad_records: int
    num_images: int
    num_decoded: int
    seconds: float
    bad_rows: dict[int, BadRecord]
    image_notes: list[tuple[int, str, dict[str, str]]]

    @property
    def num_records(self) -> int:
        """Number of records that were read."""
        return len(self.records) + self.num_bad_records - len(self.bad_rows)

    def bad_records(self) -> Iterator[dict[str, Any]]:
        """Yield `{index, id, file, kind, reason}` of every bad record, in the file's order."""
        by_image = (
            {"index": row["index"], "id": row["id"], **_fault_line(fault)}
            for row, fault in zip(self._rows(self.bad_rows), self.bad_rows.values(), strict=True)
        )
        with open(self.file.with_suffix(".jsonl"), encoding="utf-8") as by_itself:
            yield from heapq.merge(map(json.loads, by_itself), by_image, key=lambda line: line["index"])

    def notes(self) -> Iterator[dict[str, Any]]:
        """Yield `{index, id, file, kind, reason}` of every harmless oddity: of records, and once for each image."""
        for row in self._rows(pc.indices_nonzero(pc.list_value_length(self.records["notes"]))):
            for note in row.pop("notes"):
                yield {**row, "file": None, **note}
        rows = self._rows([row for row, _, _ in self.image_notes])
        for row, (_, file, note) in zip(rows, self.image_notes, strict=True):
            del row["notes"]
            yield {**row, "file": file, **note}

    def dataset(self, with_notes: bool = False) -> Dataset:
        """The good records, as [`load_llava_json`] returns them, with a column `notes` if asked."""
        all_learnt = pc.all(pc.list_flatten(self.records["loss"])).as_py() is not False
        columns = [*FEATURES, *([] if all_learnt else ["loss"]), *(["notes"] if with_notes else [])]
        dataset = Dataset.from_file(str(self.file)).select_columns(columns)
        if self.bad_rows:
            dataset = dataset.select([row for row in range(len(dataset)) if row not in self.bad_rows])
        return dataset

    def _rows(self, positions: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield `{index, id, notes}` of some rows."""
        found = self.records.select(["index", "id", "notes"]).take(pa.array(positions, pa.uint64()))
        for batch in found.to_batches(_ROWS_PER_BATCH):
            for row in batch.to_pylist():
                yield {**row, "id": json.loads(row["id"])}


def _fault_line(fault: BadRecord) -> dict[str, str | None]:
    return {"file": fault.file, "kind": fault.kind, "reason": str(fault)}


def load_llava_json(
    json_path: str | Path,
    image_folder: str | Path | None = None,
    bad_records_path: str | Path = "bad_records.jsonl",
    skip_bad_records: bool = False,
    with_notes: bool = False,
    **options,
) -> Dataset:
    """
    Read training data: LLaVA's JSON list of `{id?, image?, conversations: [{from: human|gpt, value}]}` with its image
    folder, or one of the other common forms.

    Every record is checked, and every image is decoded once, before anything is returned: see [`check_llava_json`].

    A record has its turns in one of these forms:

    - `conversations`, LLaVA's and ShareGPT's: `{from, value}`. Each image has one `<image>` at its place in a human
      turn; the only image of a turn comes before its text, as LLaVA trains.
    - `messages`, OpenAI's and TRL's: `{role, content}`, whose content is a text, or parts `{type: text, text}`,
      `{type: image}` (`image`, `url`, `path` or `base64` may name the image) and `{type: image_url, image_url}`. Where
      all contents are texts without `<image>`, images come before the first question, as in TRL.
    - `prompt` and `completion`, TRL's: texts or lists of messages. Answers in the prompt are not learnt.
    - `texts`, The Cauldron's: `{user, assistant}`, after the images.

    Questions and answers alternate; a turn from the system, or the key `system` of the record, may come first. An
    answer with `loss`, `weight` or `train` of 0 or `false` is not learnt. `image` or `images` is a path or a list of
    paths inside the folder, a `data:` URL, or a value of an image column of `datasets`. Other keys are ignored and
    noted; those that carry meaning that cannot be trained (`video`, `tools`, …) make a record bad.

    Args:
        json_path (`str` or `Path`), image_folder (`str` or `Path`, *optional*), **options:
            As for [`check_llava_json`].
        bad_records_path (`str` or `Path`, *optional*, defaults to `"bad_records.jsonl"`):
            Where to list all bad records, one JSON object a line with `index`, `id`, `file`, `kind` and `reason`.
            If there are none, the file of an earlier call is removed.
        skip_bad_records (`bool`, *optional*, defaults to `False`):
            Leave bad records out, with a warning that counts them, instead of raising.
        with_notes (`bool`, *optional*, defaults to `False`):
            Add a column `notes`, as in [`~delta_llava.records.Chat`].

    Returns:
        `datasets.Dataset`: One row for each good record, in the file's order, memory-mapped. `images` holds images that
        are decoded when the row is read (`[]` for a text-only record), `messages` is a chat whose contents are lists of
        `{"type": "image", "text": None}` and `{"type": "text", "text": …}`. If a record turns a loss off, there is
        another column, `loss`: for each message, whether it counts.

    Raises:
        `ValueError`: The file cannot be read, a record is bad and `skip_bad_records` is off, or no record is good.
        `FileNotFoundError`: The file or the folder does not exist.
        `RuntimeError`: A process that decodes images was killed.
    """
    found = check_llava_json(json_path, image_folder, **options)
    write_bad_records(found, bad_records_path)
    if found.num_bad_records:
        examples = "\n".join(
            f"  record {line['index']} (id {line['id']!r}): {line['reason']}" for line in islice(found.bad_records(), 3)
        )
        message = (
            f"{found.num_bad_records} of the {found.num_records} records in {json_path} are bad. The first:\n"
            f"{examples}\nAll are listed in {bad_records_path}; `python -m delta_llava.train.check_data` says how to "
            "fix them."
        )
        if found.num_bad_records == found.num_records:
            raise ValueError(f"{message} No record is left to train on.")
        if not skip_bad_records:
            raise ValueError(f"{message} Or leave them out with --skip_bad_records.")
        logger.warning(f"{message} They are left out.")
    return found.dataset(with_notes)


def write_bad_records(found: CheckedRecords, path: str | Path):
    """Write the bad records as JSON lines, or remove the file of an earlier check if there are none."""
    path = Path(path)
    if not found.num_bad_records:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in found.bad_records())


def check_llava_json(
    json_path: str | Path,
    image_folder: str | Path | None = None,
    require_images: bool = False,
    num_proc: int | None = None,
    follow_links: bool = False,
    dataset_config: str | None = None,
    split: str = "train",
) -> CheckedRecords:
    """
    Check every record of training data, and decode every image once.

    Results are kept in the cache of `datasets`: records by the content of the file, images by their size and time of
    change. A second check of the same data only looks at the latter, and any file over the same folder finds the images
    that are known.

    Args:
        json_path (`str` or `Path`):
            A JSON list, JSON lines, a Parquet file, a folder that `datasets` has saved or can load, or the name of a
            data set on the Hub. (Data that carries its images is copied to the cache of `datasets`.)
        image_folder (`str` or `Path`, *optional*):
            Folder that every image file lies in. A path that leaves it, by `..` or through a link, is refused.
            Its files are opened by [`~delta_llava.processing_delta_llava.open_image`].
        require_images (`bool`, *optional*, defaults to `False`):
            Whether every record must have an image, one question and one answer, as stage 1 takes it.
        num_proc (`int`, *optional*, defaults to the cores that this process may use):
            Number of processes that decode images.
        follow_links (`bool`, *optional*, defaults to `False`):
            Whether links may lead out of the folder, as where COCO is linked in, or in a snapshot of the Hub.
        dataset_config (`str`, *optional*), split (`str`, *optional*, defaults to `"train"`):
            Configuration and split of a data set that has several.

    Returns:
        [`CheckedRecords`]: What was found.

    Raises:
        `ValueError`: The file cannot be read, or holds no records.
        `FileNotFoundError`: The file or the folder does not exist.
        `RuntimeError`: A process that decodes images was killed.
    """
    if image_folder is not None and not Path(image_folder).is_dir():
        raise FileNotFoundError(f"image_folder={image_folder} is not a folder: name the folder of the images.")
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc={num_proc} must be at least 1; without it, all cores are used.")
    content, read = _open_records(json_path, dataset_config, split)
    root = None if image_folder is None else os.path.realpath(image_folder)
    cache = Path(datasets.config.HF_DATASETS_CACHE, "delta_llava")
    cache.mkdir(parents=True, exist_ok=True)

    # Another version of the code may find other faults
    images_key = _digest(checking_code(), str(root))
    code = [Path(file).read_text(encoding="utf-8") for file in (__file__, records_module.__file__)]
    file = cache / f"records-{_digest(*code, images_key, content, str(require_images))}.arrow"
    if not file.is_file():  # a cache of read-only files serves too
        _cache_records(read, root, partial(parse_record, require_images=require_images), file)
    records = read_table(file)
    with open(file.with_suffix(".jsonl"), encoding="utf-8") as lines:
        num_unreadable = sum(1 for _ in lines)

    image_paths = pc.unique(_image_paths(records).drop_null()).to_pylist()
    stats, lost = locate_images(image_paths, root, follow_links)
    faults = {path: BadRecord(fault["reason"], fault["kind"], image_name(path, root)) for path, fault in lost.items()}
    images, num_decoded, seconds = check_images(cache / f"images-{images_key}.arrow", stats, num_proc)
    notes = {}
    remarkable = pc.or_(images["fault"].is_valid(), pc.greater(pc.list_value_length(images["notes"]), 0))
    for image in images.filter(remarkable).to_pylist():
        if image["fault"]:
            faults[image["path"]] = _unreadable(image_name(image["path"], root), image["fault"])
        else:
            notes[image["path"]] = image["notes"]

    bad_rows, image_notes = {}, []
    for row, path in _rows_with_images(records, faults):
        bad_rows.setdefault(row, faults[path])
    for row, path in _rows_with_images(records, notes):
        image_notes += [(row, image_name(path, root), note) for note in notes.pop(path, [])]
    return CheckedRecords(
        file=file,
        records=records,
        num_bad_records=num_unreadable + len(bad_rows),
        num_images=len(image_paths) + _image_paths(records).null_count,
        num_decoded=num_decoded,
        seconds=seconds,
        bad_rows=bad_rows,
        image_notes=image_notes,
    )


def _unreadable(name: str, fault: dict[str, str]) -> BadRecord:
    return BadRecord(f"image {name} cannot be read: {fault['reason']}", fault["kind"], name)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _image_paths(records: pa.Table) -> pa.ChunkedArray:
    """The path of each image, or null if the table itself holds it."""
    images = pc.list_flatten(records["images"])
    is_file = pc.is_null(pc.struct_field(images, "bytes"))
    return pc.if_else(is_file, pc.struct_field(images, "path"), pa.scalar(None, pa.string()))


def _rows_with_images(records: pa.Table, paths: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield row and path for each occurrence of one of these images in the records, in their order."""
    found = pc.is_in(_image_paths(records), value_set=pa.array(paths, pa.string()))
    rows = pc.list_parent_indices(records["images"]).filter(found)
    yield from zip(rows.to_pylist(), _image_paths(records).filter(found).to_pylist(), strict=True)


def _open_records(
    json_path: str | Path, dataset_config: str | None, split: str
) -> tuple[str, Callable[[], Iterator[Any]]]:
    """Return a digest of the data, and a function that yields its records."""
    path = Path(json_path)
    if dataset_config and not has_configurations(path):
        raise ValueError(f"dataset_config={dataset_config} has no effect on {json_path}: leave it out.")
    if is_json_file(path):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), partial(read_records, path)
    dataset = _open_dataset(json_path, dataset_config, split)
    files = [Path(file["filename"]) for file in dataset.cache_files]
    states = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _digest(split, *map(str, files), str(states)), partial(_dataset_records, dataset, json_path)


def is_json_file(path: Path) -> bool:
    """
    Whether a path is a file other than Parquet, which then has to be JSON.

    Raises:
        `FileNotFoundError`: There is no such file or folder, and the name is not that of a data set on the Hub.
    """
    if not path.exists() and (
        path.is_absolute() or len(path.parts) != 2 or path.suffix in (".json", ".jsonl", ".parquet")
    ):
        raise FileNotFoundError(
            f"json_path={path} is not a file: name a JSON or Parquet file, a folder, or a data set on the Hub."
        )
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) != b"PAR1"


def has_configurations(path: Path) -> bool:
    """Whether `datasets` loads this path by configurations: neither a file nor a folder that it has saved."""
    saved = (path / "state.json", path / "dataset_dict.json")
    return not path.is_file() and not any(file.is_file() for file in saved)


def _open_dataset(name: str | Path, config: str | None, split: str) -> Dataset:
    path = Path(name)
    try:
        if path.is_file():
            return load_dataset("parquet", data_files=str(path), split="train", keep_in_memory=False)
        if has_configurations(path):
            return load_dataset(str(name), config, split=split, keep_in_memory=False)
        dataset = load_from_disk(str(path), keep_in_memory=False)
        if isinstance(dataset, DatasetDict) and split not in dataset:
            raise ValueError(f"it has the splits {sorted(dataset)}, but {split!r} is needed")
        return dataset[split] if isinstance(dataset, DatasetDict) else dataset
    except (DatasetsError, ValueError, OSError) as error:
        raise ValueError(
            f"json_path={name} cannot be read by datasets with dataset_config={config} and split={split}: {error}"
        ) from error


def _dataset_records(dataset: Dataset, name: str | Path) -> Iterator[Any]:
    samples, columns = undecoded_samples(dataset.to_iterable_dataset(), name)
    for sample in samples:
        yield sample_record(sample, columns)


def undecoded_samples(samples: IterableDataset, source: Any) -> tuple[IterableDataset, list[str]]:
    """
    The samples of a data set of records, with only JSON decoded, and its columns of images or lists of images.

    Raises:
        `ValueError`: No column can hold turns.
    """
    features = samples.features or {}
    if not {*FORMS, "json"} & set(features):
        raise ValueError(
            f"The samples of {source} have the columns {sorted(features)}, but one of {list(FORMS)} (or json, a whole "
            "record) and, for records about images, a column of images are needed."
        )
    columns = [
        name
        for name, feature in features.items()
        if isinstance(feature.feature if isinstance(feature, List) else feature, Image)
    ]
    # Not `decode(False)`, which would leave JSON undecoded too
    return samples.cast(Features({name: _undecoded(feature) for name, feature in features.items()})), columns


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    return replace(feature, decode=False) if isinstance(feature, Audio | Image | Video) else feature


def sample_record(sample: dict[str, Any], columns: list[str]) -> Any:
    """The record in a sample of a data set, with the undecoded images of its `columns` as `images`."""
    record = sample["json"] if "json" in sample else sample
    if not columns or not isinstance(record, dict):
        return record
    values = [sample[name] for name in columns]
    images = [image for value in values for image in (value if isinstance(value, list) else [value]) if image]
    # Names of images do not matter: the images are in the sample
    return {
        **{key: value for key, value in record.items() if key not in ("image", "images", *columns)},
        "images": images,
    }


def _cache_records(read: Callable[[], Iterator[Any]], root: str | None, parse: Callable[[Any], Chat], file: Path):
    # The lock spares the other processes the work. On a file system without locks, the last one replaces equal files.
    with FileLock(file.with_suffix(".lock")), TemporaryDirectory(dir=file.parent) as unfinished:
        if file.is_file():
            return
        _write_records(read, root, parse, Path(unfinished))
        for new_file in (file.with_suffix(".jsonl"), file):  # each replaced at once, the one that is looked for last
            Path(unfinished, f"records{new_file.suffix}").replace(new_file)


def _write_records(read: Callable[[], Iterator[Any]], root: str | None, parse: Callable[[Any], Chat], folder: Path):
    schema, rows, num_bytes = RECORD_FEATURES.arrow_schema, [], 0
    with (
        pa.ipc.new_stream(str(folder / "records.arrow"), schema) as writer,
        open(folder / "records.jsonl", "w", encoding="utf-8") as bad_records,
        TemporaryDirectory() as scratch,
    ):
        for index, record in enumerate(tqdm(read(), desc="Reading records", unit=" records")):
            record_id = record.get("id") if isinstance(record, dict) else None
            try:
                chat = parse(record)
                images, notes = [], list(chat.notes)
                for number, image in enumerate(chat.images):
                    if isinstance(image, str):
                        if root is None:
                            raise BadRecord(f"image {image} is a file, but no image_folder is named", "missing", image)
                        images.append({"path": os.path.join(root, image)})
                    else:
                        images.append(image)
                        notes += _check_embedded_image(image, number, scratch)
            except BadRecord as error:
                if not isinstance(record_id, str | int | float | None):
                    record_id = short(record_id)
                bad_records.write(json.dumps({"index": index, "id": record_id, **_fault_line(error)}) + "\n")
                continue
            row = {"messages": chat.messages, "loss": chat.loss, "images": images, "notes": notes}
            rows.append({"index": index, "id": json.dumps(record_id), **row})
            num_bytes += sum(len(image.get("bytes", "")) for image in images)
            if len(rows) == _ROWS_PER_BATCH or num_bytes > _BYTES_PER_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
                rows, num_bytes = [], 0
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))


def _check_embedded_image(image: dict[str, Any], number: int, scratch: str) -> list[dict[str, str]]:
    """Write an image that a record carries to a file and check it like any other; return the notes on it."""
    name = image["path"] or f"number {number}"
    suffix = os.path.splitext(name)[1].lower()
    file = Path(scratch, f"image{suffix if suffix in PIL.Image.registered_extensions() else ''}")
    file.write_bytes(image["bytes"])
    found = decode_image(str(file))
    if found["fault"]:
        raise _unreadable(name, found["fault"])
    return [{**note, "reason": f"image {name}: {note['reason']}"} for note in found["notes"]]
