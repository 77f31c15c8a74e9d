"""Finds the image files of training data and checks, once, that they can be trained on."""

import multiprocessing
import os
import re
import stat
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, List, Value
from filelock import FileLock
from tqdm.auto import tqdm

from .. import processing_delta_llava
from ..processing_delta_llava import open_image


# What the cache keeps: a row for each image file
_REMARK = {"kind": Value("string"), "reason": Value("string")}
IMAGE_SCHEMA = Features(
    {
        "path": Value("string"),
        "size": Value("int64"),
        "mtime_ns": Value("int64"),
        "fault": _REMARK,
        "notes": List(_REMARK),
    }
).arrow_schema
# Suffixes under which the same image may have been saved
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")

_IMAGES_PER_TASK = 32
_IMAGES_PER_LOOK = 1000
_LOOKING_THREADS = 16


def checking_code() -> str:
    """Everything that decides which images are good; another version may find other faults."""
    sources = [Path(file).read_text(encoding="utf-8") for file in (__file__, processing_delta_llava.__file__)]
    return "".join([*sources, PIL.__version__])


def read_table(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


def image_name(path: str, root: str) -> str:
    return path.removeprefix(root + os.sep)


def _remark(kind: str, reason: str) -> dict[str, str]:
    return {"kind": kind, "reason": reason}


def locate_images(
    paths: list[str], root: str, follow_links: bool
) -> tuple[dict[str, tuple[int, int]], dict[str, dict[str, str]]]:
    """Return size and time of change of the images that exist, and the faults of the others."""
    real_directory = lru_cache(maxsize=None)(os.path.realpath)

    def locate(some_paths: list[str]):
        return [_locate_image(path, root, real_directory, follow_links) for path in some_paths]

    # Threads, because a network file system answers many requests in the time of one
    chunks = [paths[start : start + _IMAGES_PER_LOOK] for start in range(0, len(paths), _IMAGES_PER_LOOK)]
    stats, faults = {}, {}
    with ThreadPoolExecutor(_LOOKING_THREADS) as pool:
        for path, found in zip(paths, chain.from_iterable(pool.map(locate, chunks)), strict=True):
            (faults if isinstance(found, dict) else stats)[path] = found
    return stats, faults


def _locate_image(
    path: str, root: str, real_directory: Callable[[str], str], follow_links: bool
) -> tuple[int, int] | dict[str, str]:
    name = image_name(path, root)
    try:
        file = os.path.join(real_directory(os.path.dirname(path)), os.path.basename(path))
        if os.path.islink(file):
            file = os.path.realpath(file)
        inside = root.rstrip(os.sep) + os.sep
        status, others = None, []
        if file.startswith(inside) or (follow_links and path.startswith(inside) and ".." not in Path(path).parts):
            status = os.stat(file)
        elif path.startswith(inside) or not (others := similar_files(path, root)):
            return _remark("outside", f"image {name} leaves the image folder and leads to {file}")
    except (FileNotFoundError, NotADirectoryError):
        others = similar_files(path, root)
    except (OSError, ValueError) as error:  # a name too long, a loop of links, a null character
        return _remark("no_path", f"image {name!r} is not a path: {error}")
    if status and stat.S_ISREG(status.st_mode):
        return status.st_size, status.st_mtime_ns
    reason = f"image {name} does not exist in the image folder"
    if status:
        return _remark("missing", f"{reason}: it is not a file")
    if others:
        has_other_suffix = _key(os.path.splitext(others[0])[1]) != _key(os.path.splitext(path)[1])
        found = " and ".join(image_name(other, root) for other in others)
        return _remark(f"missing_other_{'suffix' if has_other_suffix else 'name'}", f"{reason}, but {found} does")
    return _remark("missing_ocr_vqa" if name.startswith("ocr_vqa/") else "missing", reason)


def similar_files(path: str, root: str) -> list[str]:
    """
    Paths in `root` that the path of a missing image, in `root` or absolute, may mean.

    They differ from it only in letter case, slashes or Unicode form; if there are none, also in the suffix.
    """
    *folders, name = [part for part in re.split(r"[\\/]", image_name(path, root)) if part not in ("", ".")] or [""]
    places = [root]
    for part in folders:
        places = [os.path.join(place, other) for place in places for other in _entries(place).get(_key(part), [])]
    stem, _ = os.path.splitext(name)
    for wanted in ([name], [stem + suffix for suffix in SUFFIXES]):
        found = [
            os.path.join(place, other)
            for place in places
            for key in dict.fromkeys(map(_key, wanted))
            for other in _entries(place).get(key, [])
        ]
        if found := list(filter(os.path.isfile, found)):
            break
    return found


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _entries(folder: str) -> dict[str, list[str]]:
    """The names in a folder, grouped by the key that similar names share."""
    try:
        return _read_entries(folder, os.stat(folder).st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=64)
def _read_entries(folder: str, mtime_ns: int) -> dict[str, list[str]]:
    entries = {}
    for name in sorted(os.listdir(folder)):
        entries.setdefault(_key(name), []).append(name)
    return entries


def check_images(
    table_path: Path, stats: dict[str, tuple[int, int]], num_proc: int | None
) -> tuple[pa.Table, int, float]:
    """Return the rows of the images in `stats` (`IMAGE_SCHEMA`), how many had to be decoded, and the time that took."""
    num_decoded, seconds = 0, 0.0
    table, changed = _known_images(table_path, stats)
    if changed:
        with FileLock(f"{table_path}.lock"), TemporaryDirectory(dir=table_path.parent) as unfinished:
            table, changed = _known_images(table_path, stats)  # another process may have decoded them by now
            if changed:
                start = time.perf_counter()
                decoded = pa.Table.from_batches(_decode_images(changed, num_proc), IMAGE_SCHEMA)
                num_decoded, seconds = len(changed), time.perf_counter() - start
                known = table.filter(pc.invert(pc.is_in(table["path"], value_set=pa.array(changed, pa.string()))))
                table = pa.concat_tables([known, decoded]).combine_chunks()
                with pa.ipc.new_stream(f"{unfinished}/images.arrow", IMAGE_SCHEMA) as writer:
                    writer.write_table(table)
                os.replace(f"{unfinished}/images.arrow", table_path)
    return table.filter(pc.is_in(table["path"], value_set=pa.array(stats, pa.string()))), num_decoded, seconds


def _known_images(table_path: Path, stats: dict[str, tuple[int, int]]) -> tuple[pa.Table, list[str]]:
    """Return the cached table, and the images in `stats` that are missing from it or have changed."""
    table = read_table(table_path) if table_path.is_file() else IMAGE_SCHEMA.empty_table()
    paths, sizes, times = (table[column].to_pylist() for column in ("path", "size", "mtime_ns"))
    known = dict(zip(paths, zip(sizes, times, strict=True), strict=True))
    return table, [path for path, status in stats.items() if known.get(path) != status]


def _decode_images(paths: list[str], num_proc: int | None) -> list[pa.RecordBatch]:
    tasks = [paths[start : start + _IMAGES_PER_TASK] for start in range(0, len(paths), _IMAGES_PER_TASK)]
    num_proc = min(num_proc or num_cores(), len(tasks))
    batches = []
    with tqdm(desc="Checking images", total=len(paths), unit=" images") as progress:

        def collect(results: Iterable[pa.RecordBatch]):
            for batch in results:
                batches.append(batch)
                progress.update(len(batch))

        if num_proc == 1:
            collect(map(_decode_task, tasks))
            return batches
        try:
            with ProcessPoolExecutor(num_proc, initializer=_end_with_parent) as pool:
                collect(pool.map(_decode_task, tasks))
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"One of the {num_proc} processes that decode images was killed, after {progress.n} of {len(paths)} "
                "images: memory has probably run out. Try again with a smaller num_proc."
            ) from error
    return batches


def _end_with_parent():
    # An executor's processes outlive a killed parent and would wait forever for its next task
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _decode_task(paths: list[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([decode_image(path) for path in paths], IMAGE_SCHEMA)


def decode_image(path: str) -> dict[str, Any]:
    """Open an image as training does, and return what was found as a row of `IMAGE_SCHEMA`."""
    size, mtime_ns, fault, notes = -1, -1, None, []
    try:
        status = os.stat(path)
        size, mtime_ns = status.st_size, status.st_mtime_ns
        with warnings.catch_warnings(record=True, action="always") as caught:
            found = open_image(path).info
    except (OSError, ValueError) as error:
        error = error.__cause__ or error
        kind = "too_large" if isinstance(error, PIL.Image.DecompressionBombError) else "unreadable"
        fault = _remark("truncated" if "truncated" in str(error) else kind, str(error) or type(error).__name__)
    else:
        suffix = os.path.splitext(path)[1]
        named = PIL.Image.registered_extensions().get(suffix.lower(), found["format"])
        if named != found["format"] and (named, found["format"]) != ("JPEG", "MPO"):  # a JPEG with more after it
            notes.append(_remark("other_format", f"it is {found['format']}, though named {suffix}"))
        if found["orientation"] != 1:
            notes.append(_remark("rotated", f"EXIF orientation {found['orientation']}: it is shown upright here"))
        notes += [_remark("warning", f"{item.category.__name__}: {item.message}") for item in caught]
    return {"path": path, "size": size, "mtime_ns": mtime_ns, "fault": fault, "notes": notes}
