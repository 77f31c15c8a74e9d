"""LLaVA's JSON and image folder as a checked `datasets.Dataset`, and the batches that both stages train on."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from datasets import Dataset, Features, Image, List, Value
from torch.utils.data import Sampler
from tqdm.contrib.concurrent import thread_map
from transformers import BatchFeature, ProcessorMixin, Trainer
from transformers.utils import logging
from trl import prepare_multimodal_messages


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
