"""Records and images as a `datasets.Dataset`: every record and image is checked, and checked only once."""

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
# What training reads beside `FEATURES`, as `records.Chat` has it
ROW_FEATURES = Features({**FEATURES, "loss": List(Value("bool")), "notes": List(_REMARK)})
# What the cache keeps: a row for every record that can be read (`id` is its JSON)
RECORD_FEATURES = Features({"index": Value("int64"), "id": Value("string"), **ROW_FEATURES})

_ROWS_PER_BATCH = 1000
_BYTES_PER_BATCH = 2**26


@dataclass
class Check:
    """
    What was found in records and their images.

    Args:
        folder (`Path`):
            Folder of the cache with `records.arrow` (of `RECORD_FEATURES`) and `bad_records.jsonl`.
        records (`pyarrow.Table`):
            The memory-mapped `records.arrow`: the records that can be read, whatever their images are.
        num_bad_records (`int`):
            Number of records that are bad, by themselves or by an image.
        num_images (`int`):
            Number of images that `records` carry, and of different ones that they name.
        num_decoded (`int`):
            How many of the latter had to be decoded, because they were new or had changed.
        seconds (`float`):
            Time that decoding them took.
        bad_rows (`dict[int, BadRecord]`):
            The fault of every row of `records` that has a bad image, ascending.
        image_notes (`list[tuple[int, str, dict[str, str]]]`):
            Notes on images: a row of `records` that has the image, the image, `kind` and `reason`.
    """

    folder: Path
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
            {
                "index": name["index"],
                "id": name["id"],
                "file": fault.file,
                "kind": fault.kind,
                "reason": str(fault),
            }
            for name, fault in zip(self._names(self.bad_rows), self.bad_rows.values(), strict=True)
        )
        with open(self.folder / "bad_records.jsonl", encoding="utf-8") as by_itself:
            yield from heapq.merge(map(json.loads, by_itself), by_image, key=lambda line: line["index"])

    def notes(self) -> Iterator[dict[str, Any]]:
        """Yield `{index, id, file, kind, reason}` of what is harmless: of records, and once for each image."""
        for name in self._names(pc.indices_nonzero(pc.list_value_length(self.records["notes"]))):
            for note in name.pop("notes"):
                yield {**name, "file": None, **note}
        names = self._names([row for row, _, _ in self.image_notes])
        for name, (_, file, note) in zip(names, self.image_notes, strict=True):
            del name["notes"]
            yield {**name, "file": file, **note}

    def dataset(self, with_notes: bool = False) -> Dataset:
        """The good records, as [`load_llava_json`] returns them, and if asked with their `notes`."""
        all_learnt = pc.all(pc.list_flatten(self.records["loss"])).as_py() is not False
        columns = [*FEATURES, *([] if all_learnt else ["loss"]), *(["notes"] if with_notes else [])]
        dataset = Dataset.from_file(str(self.folder / "records.arrow")).select_columns(columns)
        if self.bad_rows:
            dataset = dataset.select([row for row in range(len(dataset)) if row not in self.bad_rows])
        return dataset

    def _names(self, rows: Iterable[int]) -> Iterator[dict[str, Any]]:
        named = self.records.select(["index", "id", "notes"]).take(pa.array(rows, pa.uint64()))
        for batch in named.to_batches(_ROWS_PER_BATCH):
            for name in batch.to_pylist():
                yield {**name, "id": json.loads(name["id"])}


def load_llava_json(
    json_path: str | Path,
    image_folder: str | Path | None = None,
    bad_records_path: str | Path = "bad_records.jsonl",
    skip_bad_records: bool = False,
    require_images: bool = False,
    num_proc: int | None = None,
    follow_links: bool = False,
    dataset_config: str | None = None,
    split: str = "train",
    one_answer: bool = False,
) -> Dataset:
    """
    Read training data: LLaVA's JSON list of `{id?, image?, conversations: [{from: human|gpt, value}]}` and its folder
    of images, or what else people have.

    Every record is checked, and every image is decoded once, before anything is returned: see [`check_llava_json`].

    A record has its turns in one of these forms:

    - `conversations`, LLaVA's and ShareGPT's: `{from, value}`. Each image has one `<image>` at its place in a human
      turn; the one image of a turn comes before its text, as LLaVA trains.
    - `messages`, OpenAI's and TRL's: `{role, content}`, whose content is a text, or parts `{type: text, text}`,
      `{type: image}` (`image`, `url`, `path` or `base64` may name the image) and `{type: image_url, image_url}`. Where
      all contents are texts without `<image>`, images come before the first question, as TRL has it.
    - `prompt` and `completion`, TRL's: texts or lists of messages. Answers in the prompt are not learnt.
    - `texts`, The Cauldron's: `{user, assistant}`, after the images.

    Questions and answers alternate; a turn from the system, or the key `system` of the record, may come first. An
    answer with `loss`, `weight` or `train` of 0 or `false` is not learnt. `image` or `images` is a path or a list of
    paths inside the folder, a `data:` URL, or what an image column of `datasets` holds. Other keys are ignored, and
    noted; those that mean what cannot be trained (`video`, `tools`, …) make a record bad.

    Args:
        json_path (`str` or `Path`):
            A JSON list, JSON lines, a Parquet file, a folder that `datasets` has saved or can load, or the name of a
            data set on the Hub. (What carries its images is copied to the cache of `datasets`.)
        image_folder (`str` or `Path`, *optional*):
            Folder that every image file lies in. A path that leaves it, by `..` or through a link too, is refused.
            Its files are opened by [`~delta_llava.processing_delta_llava.open_image`].
        bad_records_path (`str` or `Path`, *optional*, defaults to `"bad_records.jsonl"`):
            Where all bad records are listed, one JSON object a line with `index`, `id`, `file`, `kind` and `reason`.
            When there are none, the file of an earlier call is removed.
        skip_bad_records (`bool`, *optional*, defaults to `False`):
            Leave bad records out, with a warning that counts them, instead of raising.
        require_images (`bool`, *optional*, defaults to `False`):
            Whether a record without an image is bad, as it is where the projector alone is trained.
        num_proc (`int`, *optional*, defaults to the cores that this process may use):
            Number of processes that decode images.
        follow_links (`bool`, *optional*, defaults to `False`):
            Whether links may lead out of the folder, as where COCO is linked in, or in a snapshot of the Hub.
        dataset_config (`str`, *optional*), split (`str`, *optional*, defaults to `"train"`):
            Configuration and split of a data set that has several.
        one_answer (`bool`, *optional*, defaults to `False`):
            Whether a record must be one question and one answer, all that stage 1 learns of it.

    Returns:
        `datasets.Dataset`: One row for each good record, in the file's order, memory-mapped. `images` holds images that
        are decoded when the row is read (`[]` for a text-only record), `messages` is a chat whose contents are lists of
        `{"type": "image", "text": None}` and `{"type": "text", "text": …}`. If a record turns a loss off, there is a
        third column, `loss`: of each message, whether it counts.

    Raises:
        `ValueError`: The file cannot be read, a record is bad and `skip_bad_records` is off, or no record is good.
        `FileNotFoundError`: The file or the folder does not exist.
        `RuntimeError`: A process that decodes images was killed.
    """
    check = check_llava_json(
        json_path,
        image_folder,
        require_images=require_images,
        num_proc=num_proc,
        follow_links=follow_links,
        dataset_config=dataset_config,
        split=split,
        one_answer=one_answer,
    )
    stop_at_bad_records(check, json_path, bad_records_path, skip_bad_records)
    return check.dataset()


def stop_at_bad_records(
    check: Check, json_path: str | Path, bad_records_path: str | Path, skip_bad_records: bool = False
):
    """List the bad records of a check, and raise a `ValueError` if there are any, or warn if they may be left out."""
    write_bad_records(check, bad_records_path)
    if not check.num_bad_records:
        return
    examples = "\n".join(
        f"  record {line['index']} (id {line['id']!r}): {line['reason']}" for line in islice(check.bad_records(), 3)
    )
    message = (
        f"{check.num_bad_records} of the {check.num_records} records in {json_path} are bad. The first:\n"
        f"{examples}\nAll are listed in {bad_records_path}, and `python -m delta_llava.train.check_data` says how to "
        "fix them."
    )
    if check.num_bad_records == check.num_records:
        raise ValueError(f"{message} No record is left to train on.")
    if not skip_bad_records:
        raise ValueError(f"{message} Or leave them out with --skip_bad_records.")
    logger.warning(f"{message} They are left out.")


def write_bad_records(check: Check, path: str | Path):
    """Write the bad records of a check as JSON lines, or remove the file of an earlier check if there are none."""
    path = Path(path)
    if not check.num_bad_records:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in check.bad_records())


def check_llava_json(
    json_path: str | Path,
    image_folder: str | Path | None = None,
    require_images: bool = False,
    num_proc: int | None = None,
    follow_links: bool = False,
    dataset_config: str | None = None,
    split: str = "train",
    one_answer: bool = False,
) -> Check:
    """
    Check every record of training data, and decode every image once.

    What was found is kept in the cache of `datasets`: records by the content of the file, images by their size and
    time of change. A second check of the same data looks only at the latter, and any file over the same folder finds
    the images that are known.

    Args:
        json_path (`str` or `Path`), image_folder (`str` or `Path`), require_images (`bool`), num_proc (`int`),
        follow_links (`bool`), dataset_config (`str`), split (`str`), one_answer (`bool`):
            See [`load_llava_json`].

    Returns:
        [`Check`]: What was found.

    Raises:
        `ValueError`: The file cannot be read, or holds no records.
        `FileNotFoundError`: The file or the folder does not exist.
        `RuntimeError`: A process that decodes images was killed.
    """
    if image_folder is not None and not Path(image_folder).is_dir():
        raise FileNotFoundError(f"image_folder={image_folder} is not a folder: name the folder that the images lie in.")
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc={num_proc} must be at least 1; without it, all cores are used.")
    content, read = _open_records(json_path, dataset_config, split)
    root = None if image_folder is None else os.path.realpath(image_folder)
    cache = Path(datasets.config.HF_DATASETS_CACHE, "delta_llava")
    cache.mkdir(parents=True, exist_ok=True)

    # Another version of the code may find other faults
    images_key = _digest(checking_code(), str(root))
    code = [Path(file).read_text(encoding="utf-8") for file in (__file__, records_module.__file__)]
    records_key = _digest(*code, images_key, content, str(require_images), str(one_answer))

    folder = cache / f"records-{records_key}"
    if not folder.is_dir():
        parse = partial(parse_record, require_images=require_images, one_answer=one_answer)
        _cache_records(read, root, parse, folder)
    records = read_table(folder / "records.arrow")
    with open(folder / "bad_records.jsonl", encoding="utf-8") as file:
        num_unreadable = sum(1 for _ in file)

    image_paths = pc.unique(_image_paths(records).drop_null()).to_pylist()
    stats, lost = locate_images(image_paths, root, follow_links)
    faults = {path: BadRecord(fault["reason"], fault["kind"], image_name(path, root)) for path, fault in lost.items()}
    images, num_decoded, seconds = check_images(cache / f"images-{images_key}.arrow", stats, num_proc)
    notes = {}
    remarkable = pc.or_(images["fault"].is_valid(), pc.greater(pc.list_value_length(images["notes"]), 0))
    for image in images.filter(remarkable).to_pylist():
        name = image_name(image["path"], root)
        if image["fault"]:
            reason = f"image {name} cannot be read: {image['fault']['reason']}"
            faults[image["path"]] = BadRecord(reason, image["fault"]["kind"], name)
        else:
            notes[image["path"]] = image["notes"]

    bad_rows, image_notes = {}, []
    for row, path in _rows_with_images(records, faults):
        bad_rows.setdefault(row, faults[path])
    for row, path in _rows_with_images(records, notes):
        image_notes += [(row, image_name(path, root), note) for note in notes.pop(path, [])]
    return Check(
        folder=folder,
        records=records,
        num_bad_records=num_unreadable + len(bad_rows),
        num_images=len(image_paths) + _image_paths(records).null_count,
        num_decoded=num_decoded,
        seconds=seconds,
        bad_rows=bad_rows,
        image_notes=image_notes,
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _image_paths(records: pa.Table) -> pa.ChunkedArray:
    """The path of each image, or null for one that is in the table itself."""
    images = pc.list_flatten(records["images"])
    is_file = pc.is_null(pc.struct_field(images, "bytes"))
    return pc.if_else(is_file, pc.struct_field(images, "path"), pa.scalar(None, pa.string()))


def _rows_with_images(records: pa.Table, paths: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield row and path for every one of the images that a record has, in the order of the records."""
    found = pc.is_in(_image_paths(records), value_set=pa.array(paths, pa.string()))
    rows = pc.list_parent_indices(records["images"]).filter(found)
    yield from zip(rows.to_pylist(), _image_paths(records).filter(found).to_pylist(), strict=True)


def _open_records(
    json_path: str | Path, dataset_config: str | None, split: str
) -> tuple[str, Callable[[], Iterator[Any]]]:
    """Return a digest of what lies there, and what yields its records."""
    path = Path(json_path)
    if dataset_config and not has_configurations(path):
        raise ValueError(f"dataset_config={dataset_config} is of no use for {json_path}: leave it out.")
    if is_json_file(path):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), partial(read_records, path)
    dataset = _open_dataset(json_path, dataset_config, split)
    files = [Path(file["filename"]) for file in dataset.cache_files]
    states = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _digest(split, *map(str, files), str(states)), partial(_dataset_records, dataset, json_path)


def is_json_file(path: Path) -> bool:
    """
    Whether a path is a file that is not Parquet, and so has to be JSON.

    Raises:
        `FileNotFoundError`: There is nothing of that name, and it is not one of a data set on the Hub either.
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
    """Whether `datasets` loads what is there by configurations, as it does neither a file nor what it has saved."""
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
    The samples of a data set of records with nothing decoded but JSON, and the columns of images or of lists of them.

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
    # Not by `decode(False)`, which would leave JSON undecoded too
    return samples.cast(Features({name: _undecoded(feature) for name, feature in features.items()})), columns


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    return replace(feature, decode=False) if isinstance(feature, Audio | Image | Video) else feature


def sample_record(sample: dict[str, Any], columns: list[str]) -> Any:
    """The record that a sample of a data set is, with the images of its `columns`, not decoded, as `images`."""
    record = sample["json"] if "json" in sample else sample
    if not columns or not isinstance(record, dict):
        return record
    values = [sample[name] for name in columns]
    images = [image for value in values for image in (value if isinstance(value, list) else [value]) if image]
    # Which images it names does not matter: they have come with it
    return {
        **{key: value for key, value in record.items() if key not in ("image", "images", *columns)},
        "images": images,
    }


def _cache_records(read: Callable[[], Iterator[Any]], root: str | None, parse: Callable[[Any], Chat], folder: Path):
    # The lock spares the other processes of a start the work. Where the file system has none, whoever is first wins.
    with FileLock(f"{folder}.lock"), TemporaryDirectory(dir=folder.parent) as unfinished:
        if folder.is_dir():
            return
        new_folder = Path(unfinished, "records")
        new_folder.mkdir()
        _write_records(read, root, parse, new_folder)
        try:
            new_folder.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _write_records(read: Callable[[], Iterator[Any]], root: str | None, parse: Callable[[Any], Chat], folder: Path):
    schema, rows, num_bytes = RECORD_FEATURES.arrow_schema, [], 0
    with (
        pa.ipc.new_stream(str(folder / "records.arrow"), schema) as writer,
        open(folder / "bad_records.jsonl", "w", encoding="utf-8") as bad_records,
        TemporaryDirectory() as scratch,
    ):
        for index, record in enumerate(tqdm(read(), desc="Reading records", unit=" records")):
            record_id = record.get("id") if isinstance(record, dict) else None
            try:
                chat = parse(record)
                images, notes = [], list(chat.notes)
                for number, image in enumerate(chat.images):
                    if isinstance(image, str):
                        images.append({"path": _path_in_folder(image, root)})
                    else:
                        images.append(image)
                        notes += _check_embedded_image(image, number, scratch)
            except BadRecord as error:
                if not isinstance(record_id, str | int | float | None):
                    record_id = short(record_id)
                line = {"index": index, "id": record_id, "file": error.file, "kind": error.kind, "reason": str(error)}
                bad_records.write(json.dumps(line) + "\n")
                continue
            row = {"messages": chat.messages, "loss": chat.loss, "images": images, "notes": notes}
            rows.append({"index": index, "id": json.dumps(record_id), **row})
            num_bytes += sum(len(image.get("bytes", "")) for image in images)
            if len(rows) == _ROWS_PER_BATCH or num_bytes > _BYTES_PER_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
                rows, num_bytes = [], 0
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))


def _path_in_folder(name: str, root: str | None) -> str:
    if root is None:
        raise BadRecord(f"image {name} is a file, but no image_folder is named that it lies in", "missing", name)
    return os.path.join(root, name)


def _check_embedded_image(image: dict[str, Any], number: int, scratch: str) -> list[dict[str, str]]:
    """Check an image that a record carries as a file is checked, in a file; return what is noted about it."""
    name = image["path"] or f"number {number}"
    suffix = os.path.splitext(name)[1].lower()
    file = Path(scratch, f"image{suffix if suffix in PIL.Image.registered_extensions() else ''}")
    file.write_bytes(image["bytes"])
    found = decode_image(str(file))
    if fault := found["fault"]:
        raise BadRecord(f"image {name} cannot be read: {fault['reason']}", fault["kind"], name)
    return [{**note, "reason": f"image {name}: {note['reason']}"} for note in found["notes"]]
