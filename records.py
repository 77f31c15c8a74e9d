"""Turns each record of a JSON file into the chat that training reads, and drops nothing silently."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from reprlib import Repr
from typing import Any, NamedTuple, TextIO

from .processing_delta_llava import DeltaLlavaProcessor, decode_data_url


PLACEHOLDER = DeltaLlavaProcessor.image_token
ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
# Where a record may hold its turns, and what must accompany them
FORMS = {"conversations": (), "messages": (), "texts": (), "prompt": ("completion",)}
# They carry meaning that training would lose
UNSUPPORTED_KEYS = ("video", "videos", "audio", "audios", "tools", "functions")
UNSUPPORTED_TURN_KEYS = (
    *("image", "images", "video", "videos", "audio", "audios"),
    *("tool_calls", "function_call", "reasoning_content", "thinking"),
)
LOSS_KEYS = ("loss", "weight", "train", "loss_mask", "train_on_turn")
TURN_KEYS = {"from", "role", "value", "content", *LOSS_KEYS, *UNSUPPORTED_TURN_KEYS}
SOURCE_KEYS = ("image", "image_url", "url", "path", "base64")
# What other programs write for an image
FOREIGN_PLACEHOLDER = re.compile(
    r"(?!(?-i:<image>))(?:"
    r"<\|vision_start\|>(?:<\|image_pad\|>)*<\|vision_end\|>"
    r"|<\|?(?:image|/?img)[ _-]?(?:here|pad|token|soft_token|placeholder|(?P<number>\d+))?\|?>"
    r"|<start_of_image>|<im_start>|(?-i:\[IMG\]))",
    re.IGNORECASE,
)

_SPACE = re.compile(r"[ \t\n\r]*")
_CHARACTERS_PER_READ = 2**20
_MAX_CHARACTERS_PER_RECORD = 2**26  # anything longer is an error, most likely a missing quotation mark

_short = Repr()
_short.maxstring = _short.maxother = 200
_short.maxlist = _short.maxdict = 20
short = _short.repr  # `repr` of values that may be huge or deeply nested


class BadRecord(ValueError):
    """
    A record that cannot be trained on.

    Args:
        reason (`str`):
            What is wrong with it.
        kind (`str`, *optional*, defaults to `"record"`):
            The kind of fault, one of the keys of `delta_llava.train.check_data.FAULTS`.
        file (`str`, *optional*):
            The image at fault, as the record names it.
    """

    def __init__(self, reason: str, kind: str = "record", file: str | None = None):
        super().__init__(reason)
        self.kind = kind
        self.file = file


def read_records(json_path: str | Path) -> Iterator[Any]:
    """
    Yield the records of a JSON list or of JSON lines, in UTF-8, one by one; the file is never in memory as a whole.

    Yields a [`BadRecord`] in place of one in which an object has a key twice.

    Raises:
        `ValueError`: The file is not JSON (possibly after many good records), not a list, or an empty list.
    """
    found = None
    try:
        with open(json_path, encoding="utf-8-sig", newline="") as file:
            text = file.read(_CHARACTERS_PER_READ)
            start = _SPACE.match(text).end()
            if text.startswith("{", start):
                yield from _decode_records(file, text, start, is_list=False)
            elif not text.startswith("[", start):
                found = type(json.loads(text + file.read())).__name__
            elif text.startswith("]", _SPACE.match(text, start + 1).end()):
                found = "an empty list"
            else:
                yield from _decode_records(file, text, start + 1, is_list=True)
    except ValueError as error:
        raise ValueError(f"{json_path} is not JSON ({error}). JSON records in UTF-8 are needed.") from error
    if found:
        raise ValueError(f"{json_path} holds {found}, where a JSON list of records is needed.")


def _decode_records(file: TextIO, text: str, position: int, is_list: bool) -> Iterator[Any]:
    # The standard library's decoder on a moving window. ijson is made for this, but its C parser silently replaces half
    # a surrogate pair by "?"
    repeated_keys = []

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated_keys.append(next(key for key in keys if keys.count(key) > 1))
        return found

    decoder, index = json.JSONDecoder(object_pairs_hook=to_object), 0
    while True:
        repeated_keys.clear()
        is_complete = False
        try:
            record, end = decoder.raw_decode(text, _SPACE.match(text, position).end())
            end = _SPACE.match(text, end).end()
            is_complete, fault = True, "the file ends before the list does" if end == len(text) else None
        except json.JSONDecodeError as error:
            fault = f"{error.msg} at {text[error.pos : error.pos + 40]!r}"
        except RecursionError:
            raise ValueError(f"record {index}: it is nested too deeply") from None
        except ValueError as error:  # a number of too many digits
            raise ValueError(f"record {index}: {error}") from None
        if fault:  # unless the record continues in the part not yet read
            length = len(text) - position
            more = file.read(max(length, _CHARACTERS_PER_READ)) if length < _MAX_CHARACTERS_PER_RECORD else ""
            if more:
                text, position = text[position:] + more, 0
                continue
            if is_list or not is_complete:
                raise ValueError(f"record {index}: {fault}")
        delimiter = text[end : end + 1]
        if delimiter not in ((",", "]") if is_list else ("{", "")):
            expected = "by a comma or the list's end" if is_list else "by an object"
            raise ValueError(f"record {index} is followed by {text[end : end + 40]!r}, not {expected}")
        yield BadRecord(f"an object has the key {short(repeated_keys[0])} twice") if repeated_keys else record
        index, position = index + 1, end + is_list
        if delimiter in ("]", ""):
            break
    if extra := (text[position:] + file.read()).strip():
        raise ValueError(f"the list is followed by {extra[:40]!r}")


class Chat(NamedTuple):
    """
    The contents of a record.

    Args:
        images (`list[str | dict]`):
            Each image in the order of its place: a path as the record has it, or `{"bytes": …, "path": …}`.
        messages (`list[dict]`):
            `{"role": …, "content": [{"type": "image", "text": None}, {"type": "text", "text": …}, …]}` for each turn.
        loss (`list[bool]`):
            For each message, `False` if the record excludes it from the loss.
        notes (`list[dict]`):
            `{"kind": …, "reason": …}` for each harmless oddity, of the kinds in
            `delta_llava.train.check_data.NOTES`.
    """

    images: list[str | dict[str, Any]]
    messages: list[dict[str, Any]]
    loss: list[bool]
    notes: list[dict[str, str]]


def parse_record(record: Any, require_images: bool = False) -> Chat:
    """
    Check one record and turn it into a chat, without opening any file.

    Args:
        record (`dict`):
            A record of one of the forms that [`~delta_llava.train.data.load_llava_json`] lists.
        require_images (`bool`, *optional*, defaults to `False`):
            Whether a record must have an image, one question and one answer, as stage 1 takes it.

    Raises:
        [`BadRecord`]: The record cannot be trained on; `kind` and message say why.
    """
    if isinstance(record, BadRecord):  # from `read_records`
        raise record
    if not isinstance(record, dict):
        raise BadRecord(f"the record is a {type(record).__name__}, not an object with id and conversations")
    record = _without_none(record)
    if not isinstance(record.get("id", ""), str | int | float):
        raise BadRecord(f"id is {short(record['id'])}, not a string or a number")
    _refuse(record, UNSUPPORTED_KEYS, "the record")
    form, turns = _turns(record)
    ignored = record.keys() - {"id", "image", "images", "system", form, *FORMS[form], *UNSUPPORTED_KEYS}
    images = _record_images(record, ignored)

    speakers = [_one_of(turn, ("from", "role"), f"turn {number}") for number, turn in enumerate(turns)]
    roles = [ROLES.get(speaker) if isinstance(speaker, str) else None for speaker in speakers]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if not dialogue or dialogue != ["user", "assistant"] * (len(dialogue) // 2):
        raise BadRecord(
            f"the turns are from {short(speakers)}: they must alternate, human first and gpt last (or user and "
            "assistant; one from system may come before them)",
            "turns",
        )
    names = [f"turn {number}" for number in range(len(turns))]
    system = record.get("system", "")
    if not isinstance(system, str):
        raise BadRecord(f"system is {short(system)}, not a text", "turns")
    if system.strip():
        if roles[0] == "system":
            raise BadRecord("the record has a system prompt and a system turn: keep one", "turns")
        names, speakers, roles = ["the prompt", *names], ["the key system", *speakers], ["system", *roles]
        turns = [{"value": system}, *turns]

    messages, loss, notes, sources, all_texts, num_images = [], [], [], [], True, 0
    for name, speaker, role, turn in zip(names, speakers, roles, turns, strict=True):
        _refuse(turn, UNSUPPORTED_TURN_KEYS, name)
        ignored |= {f"{form}[].{key}" for key in turn.keys() - TURN_KEYS}
        value = _one_of(turn, ("value", "content"), name)
        if isinstance(value, list):
            all_texts = False
            content = _content_of_parts(value, name, num_images, sources, ignored)
        elif isinstance(value, str):
            moves = value.count(PLACEHOLDER) == 1 and not value.lstrip().startswith(PLACEHOLDER)
            if form == "conversations" and moves:
                notes.append({"kind": "placeholder_moved", "reason": f"{PLACEHOLDER} comes after the question's text"})
            content = _content_of_text(value, name, as_llava=form == "conversations")
        else:
            content = []
        if role != "user" and any(part["type"] == "image" for part in content):
            raise BadRecord(
                f"{name} from {speaker} contains {PLACEHOLDER}: only human turns may", "placeholder_in_answer"
            )
        if not any(part["type"] == "image" or part["text"].strip() for part in content):
            raise BadRecord(f"{name} has the value {short(value)}, not a text", "turns")
        messages.append({"role": role, "content": content})
        num_images += sum(part["type"] == "image" for part in content)
        loss.append(_keeps_loss(turn, role, f"{name} from {speaker}"))
    if not any(keeps for keeps, role in zip(loss, roles, strict=True) if role == "assistant"):
        raise BadRecord("the record turns off the loss of all its answers: nothing is left to learn", "loss")

    if sources and images:
        raise BadRecord("the record names images both by itself and in the parts of its turns: keep one", "turns")
    images = sources or images
    if require_images and not images:
        raise BadRecord("the record has no image, and this stage trains the projector alone", "no_image")
    if require_images and roles != ["user", "assistant"]:
        raise BadRecord(f"the turns are from {short(speakers)}: this stage takes one question and one answer", "answer")
    _match_images(messages, num_images, images, may_insert=all_texts and form != "conversations")
    if images and (foreign := _foreign_placeholder(messages)):
        notes.append({"kind": "foreign_text", "reason": f"{short(foreign)} is trained as text"})
    keys = (key.encode(errors="backslashreplace").decode() for key in sorted(ignored))
    notes += [{"kind": "ignored_key", "reason": key} for key in keys]
    return Chat(images, messages, loss, notes)


def _match_images(messages: list[dict[str, Any]], num_placeholders: int, images: list, may_insert: bool):
    """Check that each image has a placeholder; where there is none at all, insert them if that is allowed."""
    if num_placeholders == len(images):
        return
    foreign = _foreign_placeholder(messages) if num_placeholders < len(images) else None
    if may_insert and not num_placeholders and not foreign:
        # As TRL does when all contents are texts
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image", "text": None} for _ in images] + first["content"]
        return
    reason = f"the conversation has {num_placeholders} {PLACEHOLDER} and the record {len(images)} images"
    if foreign:
        raise BadRecord(f"{reason}; other programs write {short(foreign)} for an image", "placeholder_foreign")
    raise BadRecord(reason, f"placeholder_{'missing' if num_placeholders < len(images) else 'surplus'}")


def _foreign_placeholder(messages: list[dict[str, Any]]) -> str | None:
    """The first text in the questions that other programs write for an image."""
    contents = (message["content"] for message in messages if message["role"] == "user")
    texts = (part["text"] for content in contents for part in content if part["type"] == "text")
    return next((match[0] for text in texts for match in FOREIGN_PLACEHOLDER.finditer(text)), None)


def name_keys(counts: Counter[str]) -> str:
    """List ignored keys with the number of records that have each."""
    named = [f"{key!r} in {number:,}" for key, number in counts.most_common(20)]
    return ", ".join(named) + (f" and {len(counts) - 20:,} other keys" if len(counts) > 20 else "")


def _require_utf8(text: str, name: str, file: str | None = None):
    if text != text.encode(errors="ignore").decode():
        raise BadRecord(f"{name} holds half of a surrogate pair, which UTF-8 cannot encode", "text", file)


def _without_none(mapping: dict) -> dict:
    # Arrow writes None for every key that only other records have
    return {key: value for key, value in mapping.items() if value is not None} if None in mapping.values() else mapping


def _one_of(mapping: dict, names: tuple[str, ...], where: str) -> Any:
    """The value of whichever of these keys is present, or `None`."""
    found = [name for name in names if name in mapping]
    if len(found) > 1:
        raise BadRecord(f"{where} has {' and '.join(found)}: keep one", "turns")
    return mapping[found[0]] if found else None


def _refuse(mapping: dict, keys: tuple[str, ...], where: str):
    for key in keys:
        if mapping.get(key) not in (None, "", [], {}):
            raise BadRecord(f"{where} has {key}, which cannot be trained on", "unsupported")


def _turns(record: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    forms = [form for form, others in FORMS.items() if form in record and all(key in record for key in others)]
    if not forms:
        raise BadRecord(
            "conversations is not a list of turns, and the record has neither messages nor texts nor prompt and "
            f"completion: it has {short(sorted(record))}",
            "turns",
        )
    if len(forms) > 1:
        raise BadRecord(f"the record has its turns as {' and as '.join(forms)}: keep one", "turns")
    (form,) = forms
    if form == "prompt":
        prompt, completion = (
            _objects([{"role": role, "content": record[key]}] if isinstance(record[key], str) else record[key], key)
            for key, role in (("prompt", "user"), ("completion", "assistant"))
        )
        # As in TRL, only completions are learnt
        for index, turn in enumerate(prompt):
            is_answer = ROLES.get(str(turn.get("role", turn.get("from")))) == "assistant"
            if is_answer and not turn.keys() & set(LOSS_KEYS):
                prompt[index] = {**turn, "loss": False}
        return form, prompt + completion
    turns = _objects(record[form], form)
    if form == "texts":  # The Cauldron's pairs
        pairs, turns = turns, []
        for pair in pairs:
            answer = {key: value for key, value in pair.items() if key != "user"}
            turns += [_without_none({"role": "user", "content": pair.get("user")})]
            turns += [_without_none({"role": "assistant", "content": answer.pop("assistant", None), **answer})]
    return form, turns


def _objects(values: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise BadRecord(f"{name} is not a list of {{from, value}} or {{role, content}} objects", "turns")
    return [_without_none(value) for value in values]


def _content_of_parts(
    parts: list, name: str, num_images: int, sources: list, ignored: set[str]
) -> list[dict[str, str | None]]:
    """
    A turn's content, after `num_images` images in earlier turns. Adds the images that its parts name to `sources`, and
    unknown keys to `ignored`.
    """
    content = []
    for part in parts:
        part = _without_none(part) if isinstance(part, dict) else {"type": part}
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            before = content.pop()["text"] if content and content[-1]["type"] == "text" else ""
            content += _content_of_text(before + part["text"], name, as_llava=False)
            known = {"type", "text"}
        elif kind in ("image", "image_url"):
            content.append({"type": "image", "text": None})
            source = _one_of(part, SOURCE_KEYS, f"an image of {name}")
            if source is not None:
                encoded = "base64" in part and isinstance(source, str)
                sources.append(_image(f"data:;base64,{source}" if encoded else source, ignored))
            if part.get("index", num_images) != num_images:
                raise BadRecord(f"{name} has image {short(part['index'])} where {num_images} is expected", "part")
            num_images += 1
            known = {"type", "index", *SOURCE_KEYS}
        else:
            raise BadRecord(f"{name} has the part {short(part)}: its type must be text, image or image_url", "part")
        ignored |= {f"content[].{key}" for key in part.keys() - known}
    return content


def _content_of_text(text: str, name: str, as_llava: bool) -> list[dict[str, str | None]]:
    _require_utf8(text, name)
    first, *others = (text.strip() if as_llava else text).split(PLACEHOLDER)
    if as_llava and len(others) == 1:
        # As LLaVA trains, the only image of a turn comes before its text
        first, others = "", [f"{first}{others[0]}".strip()]
    content = [{"type": "text", "text": first}] if first else []
    for text in others:
        content.append({"type": "image", "text": None})
        # LLaVA writes "<image>\n"; here the chat template adds the line break
        if text := text.removeprefix("\n"):
            content.append({"type": "text", "text": text})
    return content


def _keeps_loss(turn: dict[str, Any], role: str, name: str) -> bool:
    said = {key: turn[key] for key in LOSS_KEYS if key in turn}
    for key, value in said.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRecord(f"{name} has the {key} {short(value)}: it must be true, false, 1 or 0", "loss")
        if value and role != "assistant":
            raise BadRecord(f"{name} has the {key} {value}, but only answers are learnt", "loss")
    if len(set(said.values())) > 1:
        raise BadRecord(f"{name} contradicts itself: {said}", "loss")
    return role != "assistant" or all(said.values())


def _record_images(record: dict[str, Any], ignored: set[str]) -> list[str | dict[str, Any]]:
    images = _one_of(record, ("image", "images"), "the record")
    if images is None or images == "":
        return []
    if not isinstance(images, str | list | dict | bytes):
        raise BadRecord(f"image is {short(images)}, not a path or a list of paths")
    return [_image(image, ignored) for image in (images if isinstance(images, list) else [images])]


def _image(source: Any, ignored: set[str]) -> str | dict[str, Any]:
    """An image's path, or its bytes as `datasets` stores them."""
    given = source
    if isinstance(source, dict):
        ignored |= {f"image.{key}" for key in _without_none(source).keys() - {"bytes", "path", "url"}}
        if isinstance(source.get("bytes"), bytes):
            path = source.get("path")
            return {"bytes": source["bytes"], "path": path if isinstance(path, str) else None}
        source = source.get("path", source.get("url"))
    if isinstance(source, bytes):
        return {"bytes": source, "path": None}
    if not isinstance(source, str):
        raise BadRecord(f"image is {short(given)}, not a path or a list of paths")
    _require_utf8(source, f"image {source!r}", source)
    if source[:5].lower() == "data:":
        try:
            return {"bytes": decode_data_url(source), "path": None}
        except ValueError as error:
            raise BadRecord(f"image {short(source)} cannot be decoded: {error}", "address") from error
    source = source.removeprefix("file://")
    if "://" in source:
        raise BadRecord(f"image {short(source)} is an address, not a file", "address", source)
    return source
