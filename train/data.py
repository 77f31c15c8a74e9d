"""LLaVA's JSON and image folder as a checked `datasets.Dataset`."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import Dataset, Features, Image, List, Value
from tqdm.contrib.concurrent import thread_map
from transformers.utils import logging


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


class _BadRecord(ValueError):
    def __init__(self, reason: str, file: str | None = None):
        super().__init__(reason)
        self.file = file


def load_llava_json(
    json_path: str | Path,
    image_folder: str | Path,
    bad_records_path: str | Path = "bad_records.jsonl",
    skip_bad_records: bool = False,
    require_images: bool = False,
) -> Dataset:
    """
    Read LLaVA's training data: a JSON list of `{id, image?, conversations: [{from: human|gpt, value}]}` and a folder.

    Every record is checked, and every image is decoded once, before anything is returned.

    Args:
        json_path (`str` or `Path`):
            JSON file. `image` is a path inside the folder or a list of paths, and each of them has one `<image>` at
            its place in a human turn; the one image of a turn comes before its text, as LLaVA trains. A first turn
            `from: system` is allowed.
        image_folder (`str` or `Path`):
            Folder that every image lies in. A path that leaves it, by `..` or through a link too, is refused.
        bad_records_path (`str` or `Path`, *optional*, defaults to `"bad_records.jsonl"`):
            Where all bad records are listed, one JSON object a line with `index`, `id`, `file` and `reason`. When there
            are none, the file of an earlier call is removed.
        skip_bad_records (`bool`, *optional*, defaults to `False`):
            Leave bad records out, with a warning that counts them, instead of raising.
        require_images (`bool`, *optional*, defaults to `False`):
            Whether a record without an image is bad, as it is where the projector alone is trained.

    Returns:
        `datasets.Dataset`: One row per good record, in the file's order. `images` holds images that are decoded when
        the row is read (`[]` for a text-only record), `messages` is a chat whose contents are lists of
        `{"type": "image", "text": None}` and `{"type": "text", "text": …}`.

    Raises:
        `ValueError`: The file is no JSON list, a record is bad and `skip_bad_records` is off, or no record is good.
        `FileNotFoundError`: The file or the folder does not exist.
    """
    json_path, image_folder, bad_records_path = Path(json_path), Path(image_folder), Path(bad_records_path)
    if not json_path.is_file():
        raise FileNotFoundError(f"json_path={json_path} is not a file: name LLaVA's JSON file.")
    if not image_folder.is_dir():
        raise FileNotFoundError(f"image_folder={image_folder} is not a folder: name the folder that the images lie in.")
    try:
        records = json.loads(json_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{json_path} is not JSON ({error}). A JSON list of records in UTF-8 is needed.") from error
    if not isinstance(records, list) or not records:
        found = "an empty list" if records == [] else type(records).__name__
        raise ValueError(f"{json_path} holds {found}, where a JSON list of records is needed.")

    root = image_folder.resolve()
    rows: dict[int, tuple[list[str], list[dict]]] = {}
    bad_records: dict[int, _BadRecord] = {}
    for index, record in enumerate(records):
        try:
            rows[index] = _parse_record(record, root, require_images)
        except _BadRecord as error:
            bad_records[index] = error

    # Threads, because Pillow decodes outside the interpreter lock. An image that many records share is read once.
    files = sorted({file for images, _ in rows.values() for file in images})
    faults = dict(zip(files, thread_map(_image_fault, files, desc="Checking images", unit="image"), strict=True))
    for index, (images, _) in list(rows.items()):
        if unreadable := next((file for file in images if faults[file]), None):
            image = str(Path(unreadable).relative_to(root))
            bad_records[index] = _BadRecord(f"image {image} cannot be read: {faults[unreadable]}", image)
            del rows[index]

    if bad_records:
        _report(bad_records, records, json_path, bad_records_path, skip_bad_records)
    else:
        bad_records_path.unlink(missing_ok=True)
    images, messages = zip(*rows.values(), strict=True)
    return Dataset.from_dict({"images": images, "messages": messages}, features=FEATURES)


def _report(bad_records, records, json_path, bad_records_path, skip_bad_records):
    lines = []
    for index, error in sorted(bad_records.items()):
        record_id = records[index].get("id") if isinstance(records[index], dict) else None
        lines.append({"index": index, "id": record_id, "file": error.file, "reason": str(error)})
    bad_records_path.parent.mkdir(parents=True, exist_ok=True)
    bad_records_path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    examples = "\n".join(f"  record {line['index']} (id {line['id']!r}): {line['reason']}" for line in lines[:3])
    message = (
        f"{len(lines)} of the {len(records)} records in {json_path} are bad. The first:\n{examples}\n"
        f"All are listed in {bad_records_path}."
    )
    if len(lines) == len(records):
        raise ValueError(f"{message} No record is left to train on.")
    if not skip_bad_records:
        raise ValueError(f"{message} Mend them, or leave them out with --skip_bad_records.")
    logger.warning(f"{message} They are left out.")


def _parse_record(record: Any, image_folder: Path, require_images: bool) -> tuple[list[str], list[dict]]:
    """Return the image files of a record and its messages; raise `_BadRecord` with what is wrong."""
    if not isinstance(record, dict):
        raise _BadRecord(f"the record is a {type(record).__name__}, not an object with id and conversations")
    if not isinstance(record.get("id"), str | int):
        raise _BadRecord(f"id is {record.get('id')!r}, not a string or a number")

    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise _BadRecord(f"image is {record['image']!r}, not a path or a list of paths")
    if require_images and not images:
        raise _BadRecord("the record has no image, and this stage trains the projector alone")
    files = []
    for image in images:
        try:
            file = (image_folder / image).resolve()
            is_file = file.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, a loop of links, a null character
            raise _BadRecord(f"image {image!r} is no path: {error}", image) from error
        if not file.is_relative_to(image_folder):
            raise _BadRecord(f"image {image} leaves the image folder: it leads to {file}", image)
        if not is_file:
            raise _BadRecord(f"image {image} does not exist in the image folder", image)
        files.append(str(file))

    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _BadRecord("conversations is not a list of {from, value} objects")
    speakers = [turn.get("from") for turn in turns]
    dialogue = speakers[1:] if speakers[:1] == ["system"] else speakers
    if not dialogue or dialogue != ["human", "gpt"] * (len(dialogue) // 2):
        raise _BadRecord(f"the turns are from {speakers}: they must alternate, human first and gpt last")

    messages, num_markers = [], 0
    for number, turn in enumerate(turns):
        value = turn.get("value")
        if not isinstance(value, str) or not value.strip():
            raise _BadRecord(f"turn {number} has the value {value!r}, not a text")
        if value != value.encode(errors="ignore").decode():
            raise _BadRecord(f"turn {number} holds half of a surrogate pair, which UTF-8 cannot write")
        first, *others = value.strip().split(IMAGE_MARKER)
        if others and turn["from"] != "human":
            raise _BadRecord(f"turn {number} from {turn['from']} contains {IMAGE_MARKER}: only human turns may")
        num_markers += len(others)
        if first and len(others) == 1:
            # As LLaVA trains: the one image of a turn comes before its text, wherever the record has it
            first, others = "", [f"{first}{others[0]}".strip()]
        content = [{"type": "text", "text": first}] if first else []
        for text in others:
            content.append({"type": "image", "text": None})
            # LLaVA writes "<image>\n"; the chat template brings this line break itself
            if text := text.removeprefix("\n"):
                content.append({"type": "text", "text": text})
        messages.append({"role": ROLES[turn["from"]], "content": content})
    if num_markers != len(images):
        raise _BadRecord(f"the conversation has {num_markers} {IMAGE_MARKER} and the record {len(images)} images")
    return files, messages


def _image_fault(file: str) -> str | None:
    try:
        with PIL.Image.open(file) as image:
            image.load()  # decodes every pixel: a header alone does not show a truncated file
    except Exception as error:  # Pillow's plug-ins raise whatever a broken file makes them trip over
        return f"{type(error).__name__}: {error}"
    return None
