"""LLaVA's JSON and image folder as a `datasets.Dataset`: every record and image is checked, and checked only once."""

import hashlib
import heapq
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import datasets.config
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, List, Value
from filelock import FileLock
from tqdm.auto import tqdm
from transformers.utils import logging

from .images import check_images, checking_code, image_name, locate_images, read_table


logger = logging.get_logger(__name__)

IMAGE_MARKER = "<image>"
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
FEATURES = Features(
    {
        "images": List(Image()),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
    }
)
# What the cache keeps: a row for every record that can be read (`id` is its JSON, `marker_moved` a note)
RECORD_FEATURES = Features(
    {"index": Value("int64"), "id": Value("string"), "marker_moved": Value("bool"), **FEATURES},
)

_SPACE = re.compile(r"[ \t\n\r]*")
_CHARACTERS_PER_READ = 2**20
_MAX_CHARACTERS_PER_RECORD = 2**26  # what is longer is a fault, most likely of a quotation mark
_ROWS_PER_BATCH = 1000


class BadRecord(ValueError):
    """
    A record that cannot be trained on.

    Args:
        reason (`str`):
            What is wrong with it.
        kind (`str`, *optional*, defaults to `"record"`):
            The kind of fault, one of the keys of `delta_llava.train.check_data.FAULTS`.
        file (`str`, *optional*):
            The image that is to blame, as the record names it.
    """

    def __init__(self, reason: str, kind: str = "record", file: str | None = None):
        super().__init__(reason)
        self.kind = kind
        self.file = file


@dataclass
class Check:
    """
    What was found in a JSON file and its images.

    Args:
        folder (`Path`):
            Folder of the cache with `records.arrow` (of `RECORD_FEATURES`) and `bad_records.jsonl`.
        records (`pyarrow.Table`):
            The memory-mapped `records.arrow`: the records that can be read, whatever their images are.
        num_bad_records (`int`):
            Number of records that are bad, by themselves or by an image.
        num_images (`int`):
            Number of different images that `records` name.
        num_decoded (`int`):
            How many of them had to be decoded, because they were new or had changed.
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
        """Number of records of the JSON file."""
        return len(self.records) + self.num_bad_records - len(self.bad_rows)

    def bad_records(self) -> Iterator[dict[str, Any]]:
        """Yield `{index, id, file, kind, reason}` of every bad record, in the file's order."""
        by_image = (
            {**name, "file": fault.file, "kind": fault.kind, "reason": str(fault)}
            for name, fault in zip(self._names(self.bad_rows), self.bad_rows.values(), strict=True)
        )
        with open(self.folder / "bad_records.jsonl", encoding="utf-8") as by_itself:
            yield from heapq.merge(map(json.loads, by_itself), by_image, key=lambda line: line["index"])

    def notes(self) -> Iterator[dict[str, Any]]:
        """Yield `{index, id, file, kind, reason}` of what is harmless: once per record, or once per image."""
        note = {"file": None, "kind": "marker_moved", "reason": f"{IMAGE_MARKER} stands behind the question's text"}
        for name in self._names(pc.indices_nonzero(self.records["marker_moved"])):
            yield {**name, **note}
        names = self._names([row for row, _, _ in self.image_notes])
        for name, (_, file, note) in zip(names, self.image_notes, strict=True):
            yield {**name, "file": file, **note}

    def dataset(self) -> Dataset:
        """The good records, as [`load_llava_json`] returns them."""
        dataset = Dataset.from_file(str(self.folder / "records.arrow")).select_columns(list(FEATURES))
        if self.bad_rows:
            dataset = dataset.select([row for row in range(len(dataset)) if row not in self.bad_rows])
        return dataset

    def _names(self, rows: Iterable[int]) -> Iterator[dict[str, Any]]:
        named = self.records.select(["index", "id"]).take(pa.array(rows, pa.uint64()))
        for batch in named.to_batches(_ROWS_PER_BATCH):
            for name in batch.to_pylist():
                yield {"index": name["index"], "id": json.loads(name["id"])}


def load_llava_json(
    json_path: str | Path,
    image_folder: str | Path,
    bad_records_path: str | Path = "bad_records.jsonl",
    skip_bad_records: bool = False,
    require_images: bool = False,
    num_proc: int | None = None,
    follow_links: bool = False,
) -> Dataset:
    """
    Read LLaVA's training data: a JSON list of `{id, image?, conversations: [{from: human|gpt, value}]}` and a folder.

    Every record is checked, and every image is decoded once, before anything is returned: see [`check_llava_json`].

    Args:
        json_path (`str` or `Path`):
            JSON file. `image` is a path inside the folder or a list of paths, and each of them has one `<image>` at
            its place in a human turn; the one image of a turn comes before its text, as LLaVA trains. A first turn
            `from: system` is allowed.
        image_folder (`str` or `Path`):
            Folder that every image lies in. A path that leaves it, by `..` or through a link too, is refused. Its files
            are opened by [`~delta_llava.processing_delta_llava.open_image`].
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

    Returns:
        `datasets.Dataset`: One row per good record, in the file's order, memory-mapped. `images` holds images that are
        decoded when the row is read (`[]` for a text-only record), `messages` is a chat whose contents are lists of
        `{"type": "image", "text": None}` and `{"type": "text", "text": …}`.

    Raises:
        `ValueError`: The file is no JSON list, a record is bad and `skip_bad_records` is off, or no record is good.
        `FileNotFoundError`: The file or the folder does not exist.
        `RuntimeError`: A process that decodes images was killed.
    """
    check = check_llava_json(json_path, image_folder, require_images, num_proc, follow_links)
    write_bad_records(check, bad_records_path)
    if check.num_bad_records:
        examples = "\n".join(
            f"  record {line['index']} (id {line['id']!r}): {line['reason']}" for line in islice(check.bad_records(), 3)
        )
        message = (
            f"{check.num_bad_records} of the {check.num_records} records in {json_path} are bad. The first:\n"
            f"{examples}\nAll are listed in {bad_records_path}, and `python -m delta_llava.train.check_data` tells how "
            "to mend them."
        )
        if check.num_bad_records == check.num_records:
            raise ValueError(f"{message} No record is left to train on.")
        if not skip_bad_records:
            raise ValueError(f"{message} Or leave them out with --skip_bad_records.")
        logger.warning(f"{message} They are left out.")
    return check.dataset()


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
    image_folder: str | Path,
    require_images: bool = False,
    num_proc: int | None = None,
    follow_links: bool = False,
) -> Check:
    """
    Check every record of LLaVA's training data, and decode every image once.

    What was found is kept in the cache of `datasets`: records by the content of the JSON file, images by their size and
    time of change. A second check of the same data looks only at the latter, and any JSON file over the same folder
    finds the images that are known.

    Args:
        json_path (`str` or `Path`), image_folder (`str` or `Path`), require_images (`bool`), num_proc (`int`),
        follow_links (`bool`):
            See [`load_llava_json`].

    Returns:
        [`Check`]: What was found.

    Raises:
        `ValueError`: The file is no JSON list of records.
        `FileNotFoundError`: The file or the folder does not exist.
        `RuntimeError`: A process that decodes images was killed.
    """
    json_path, image_folder = Path(json_path), Path(image_folder)
    if not json_path.is_file():
        raise FileNotFoundError(f"json_path={json_path} is not a file: name LLaVA's JSON file.")
    if not image_folder.is_dir():
        raise FileNotFoundError(f"image_folder={image_folder} is not a folder: name the folder that the images lie in.")
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc={num_proc} must be at least 1; without it, all cores are used.")
    root = os.path.realpath(image_folder)
    cache = Path(datasets.config.HF_DATASETS_CACHE, "delta_llava")
    cache.mkdir(parents=True, exist_ok=True)

    # Another version of the code may find other faults
    with json_path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    images_key = _digest(checking_code(), root)
    records_key = _digest(Path(__file__).read_text(encoding="utf-8"), images_key, content, str(require_images))

    folder = cache / f"records-{records_key}"
    if not folder.is_dir():
        _cache_records(json_path, root, require_images, folder)
    records = read_table(folder / "records.arrow")
    with open(folder / "bad_records.jsonl", encoding="utf-8") as file:
        num_unreadable = sum(1 for _ in file)

    image_paths = pc.unique(_image_paths(records)).to_pylist()
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
        num_images=len(image_paths),
        num_decoded=num_decoded,
        seconds=seconds,
        bad_rows=bad_rows,
        image_notes=image_notes,
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _image_paths(records: pa.Table) -> pa.ChunkedArray:
    return pc.struct_field(pc.list_flatten(records["images"]), "path")


def _rows_with_images(records: pa.Table, paths: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield row and path for every one of the images that a record has, in the order of the records."""
    found = pc.is_in(_image_paths(records), value_set=pa.array(paths, pa.string()))
    rows = pc.list_parent_indices(records["images"]).filter(found)
    yield from zip(rows.to_pylist(), _image_paths(records).filter(found).to_pylist(), strict=True)


def read_records(json_path: str | Path) -> Iterator[Any]:
    """
    Yield the records of a JSON list one by one, so that the file never lies in memory as a whole.

    Args:
        json_path (`str` or `Path`):
            JSON file in UTF-8.

    Yields:
        The records, of whatever type they are.

    Raises:
        `ValueError`: The file is not JSON, maybe after many a good record, or it is no list, or an empty one.
    """
    found = None
    try:
        with open(json_path, encoding="utf-8", newline="") as file:
            text = file.read(_CHARACTERS_PER_READ)
            start = _SPACE.match(text).end()
            if not text.startswith("[", start):
                found = type(json.loads(text + file.read())).__name__
            elif text.startswith("]", _SPACE.match(text, start + 1).end()):
                found = "an empty list"
            else:
                yield from _decode_list(file, text, start + 1)
    except ValueError as error:
        raise ValueError(f"{json_path} is not JSON ({error}). A JSON list of records in UTF-8 is needed.") from error
    if found:
        raise ValueError(f"{json_path} holds {found}, where a JSON list of records is needed.")


def _decode_list(file: TextIO, text: str, position: int) -> Iterator[Any]:
    # The standard library's decoder on a moving window: ijson is made for this, but its C parser turns half a surrogate
    # pair into "?" without a word
    decoder, index, delimiter = json.JSONDecoder(), 0, ","
    while delimiter == ",":
        try:
            record, end = decoder.raw_decode(text, _SPACE.match(text, position).end())
            end = _SPACE.match(text, end).end()
            fault = "the file ends before the list does" if end == len(text) else None
        except json.JSONDecodeError as error:
            fault = f"{error.msg} at {text[error.pos : error.pos + 40]!r}"
        if fault:  # or the record goes on in what is not yet read
            length = len(text) - position
            more = file.read(max(length, _CHARACTERS_PER_READ)) if length < _MAX_CHARACTERS_PER_RECORD else ""
            if not more:
                raise ValueError(f"record {index}: {fault}")
            text, position = text[position:] + more, 0
            continue
        delimiter = text[end]
        if delimiter not in ",]":
            raise ValueError(
                f"record {index} is followed by {text[end : end + 40]!r}, not by a comma or the list's end"
            )
        yield record
        index, position = index + 1, end + 1
    if extra := (text[position:] + file.read()).strip():
        raise ValueError(f"the list is followed by {extra[:40]!r}")


def parse_record(record: Any, require_images: bool = False) -> tuple[list[str], list[dict]]:
    """
    Check one record of LLaVA's training data and turn it into a chat. No file is looked at.

    Args:
        record (`dict`):
            `{id, image?, conversations: [{from: human|gpt, value}]}`, as described for [`load_llava_json`].
        require_images (`bool`, *optional*, defaults to `False`):
            Whether a record without an image is bad.

    Returns:
        `tuple[list[str], list[dict]]`: The images as the record names them, and the messages, whose contents are lists
        of `{"type": "image", "text": None}` and `{"type": "text", "text": …}`.

    Raises:
        [`BadRecord`]: The record cannot be trained on; its `kind` and its text say why.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"the record is a {type(record).__name__}, not an object with id and conversations")
    if not isinstance(record.get("id"), str | int):
        raise BadRecord(f"id is {record.get('id')!r}, not a string or a number")

    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise BadRecord(f"image is {record['image']!r}, not a path or a list of paths")
    if require_images and not images:
        raise BadRecord("the record has no image, and this stage trains the projector alone", "no_image")
    for image in images:
        if not _is_utf8(image):
            raise BadRecord(f"image {image!r} holds half of a surrogate pair, which UTF-8 cannot write", "text", image)

    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord("conversations is not a list of {from, value} objects", "turns")
    speakers = [turn.get("from") for turn in turns]
    dialogue = speakers[1:] if speakers[:1] == ["system"] else speakers
    if not dialogue or dialogue != ["human", "gpt"] * (len(dialogue) // 2):
        raise BadRecord(f"the turns are from {speakers}: they must alternate, human first and gpt last", "turns")

    messages, num_markers = [], 0
    for number, turn in enumerate(turns):
        value = turn.get("value")
        if not isinstance(value, str) or not value.strip():
            raise BadRecord(f"turn {number} has the value {value!r}, not a text", "turns")
        if not _is_utf8(value):
            raise BadRecord(f"turn {number} holds half of a surrogate pair, which UTF-8 cannot write", "text")
        first, *others = value.strip().split(IMAGE_MARKER)
        if others and turn["from"] != "human":
            reason = f"turn {number} from {turn['from']} contains {IMAGE_MARKER}: only human turns may"
            raise BadRecord(reason, "marker_in_answer")
        num_markers += len(others)
        if len(others) == 1:
            # As LLaVA trains: the one image of a turn comes before its text
            first, others = "", [f"{first}{others[0]}".strip()]
        content = [{"type": "text", "text": first}] if first else []
        for text in others:
            content.append({"type": "image", "text": None})
            # LLaVA writes "<image>\n"; the chat template brings this line break itself
            if text := text.removeprefix("\n"):
                content.append({"type": "text", "text": text})
        messages.append({"role": ROLES[turn["from"]], "content": content})
    if num_markers != len(images):
        raise BadRecord(
            f"the conversation has {num_markers} {IMAGE_MARKER} and the record {len(images)} images",
            "marker_missing" if num_markers < len(images) else "marker_surplus",
        )
    return images, messages


def _is_utf8(text: str) -> bool:
    return text == text.encode(errors="ignore").decode()


def _moves_marker(turn: dict[str, str]) -> bool:
    return turn["value"].count(IMAGE_MARKER) == 1 and not turn["value"].lstrip().startswith(IMAGE_MARKER)


def _cache_records(json_path: Path, root: str, require_images: bool, folder: Path):
    # The lock spares the other processes of a start the work. Where the file system has none, whoever is first wins.
    with FileLock(f"{folder}.lock"), TemporaryDirectory(dir=folder.parent) as unfinished:
        if folder.is_dir():
            return
        new_folder = Path(unfinished, "records")
        new_folder.mkdir()
        _write_records(json_path, root, require_images, new_folder)
        try:
            new_folder.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _write_records(json_path: Path, root: str, require_images: bool, folder: Path):
    schema, rows = RECORD_FEATURES.arrow_schema, []
    with (
        pa.ipc.new_stream(str(folder / "records.arrow"), schema) as writer,
        open(folder / "bad_records.jsonl", "w", encoding="utf-8") as bad_records,
    ):
        for index, record in enumerate(tqdm(read_records(json_path), desc="Reading records", unit=" records")):
            try:
                images, messages = parse_record(record, require_images)
            except BadRecord as error:
                record_id = record.get("id") if isinstance(record, dict) else None
                line = {"index": index, "id": record_id, "file": error.file, "kind": error.kind, "reason": str(error)}
                bad_records.write(json.dumps(line) + "\n")
                continue
            rows.append(
                {
                    "index": index,
                    "id": json.dumps(record["id"]),
                    "marker_moved": any(map(_moves_marker, record["conversations"])),
                    "images": [{"path": os.path.join(root, image)} for image in images],
                    "messages": messages,
                }
            )
            if len(rows) == _ROWS_PER_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
                rows = []
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
