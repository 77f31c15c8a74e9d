r"""
Check every record and image of training data before a training, and say how to fix what is wrong.

```
python -m delta_llava.train.check_data --json llava_v1_5_mix665k.json --images LLaVA-Tuning \
    --write_clean llava_v1_5_mix665k.clean.json
```

`--json` takes what `--json_path` takes in training. Bad records stop a training; notes are harmless. A training on the
same file and images uses the results of this check.
"""

import argparse
import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.compute as pc

from ..records import FOREIGN_PLACEHOLDER, PLACEHOLDER, ROLES, name_keys, read_records
from .data import CheckedRecords, check_llava_json, is_json_file, write_bad_records
from .images import similar_files


# How to fix each kind of bad record, and what each kind of note means elsewhere
FAULTS = {
    "record": "A record is an object with conversations (or another form of turns) and possibly id and image, a path "
    "or a list of paths, and no object in it has a key twice: fix the JSON.",
    "no_image": "Leave out text-only records: with --require_images every record needs an image (stage 1).",
    "answer": "Stage 1 learns one answer to one question, without a system prompt: split the record, or keep it for "
    "stage 2.",
    "turns": "Turns alternate, human first and gpt last, each with a text that is not empty: fix the JSON.",
    "part": "A part of a content is {type: text, text}, {type: image} or {type: image_url, image_url}: delete others.",
    "loss": "loss, weight and train are 0, 1, false or true, turn off the loss of answers only, and leave one on.",
    "unsupported": "The model sees only images and texts, and learns plain answers: leave out such records.",
    "text": "Half of a UTF-16 surrogate pair is left of a character: write the whole character, or delete it.",
    "placeholder_in_answer": f"Only human turns may contain {PLACEHOLDER}: delete it elsewhere.",
    "placeholder_missing": f"Write one {PLACEHOLDER} per image into the human turns. --write_clean puts that of a "
    "single image at the start of the first one.",
    "placeholder_surplus": f"Delete each {PLACEHOLDER} that has no image, or add the images to the record.",
    "placeholder_foreign": f"Write {PLACEHOLDER} instead. --write_clean does if there is one for each image.",
    "address": "Download the image and name its file: training fetches nothing. Encode a data: URL again.",
    "missing": "Complete the download or correct the path; for LLaVA, --images is the folder that holds coco/, gqa/, "
    "ocr_vqa/, textvqa/ and vg/.",
    "missing_ocr_vqa": "OCR-VQA's images are downloaded one by one, and some links are dead: run its loadDataset.py "
    "again, save all as .jpg, and leave out those that stay missing.",
    "missing_other_suffix": "The same name exists with another suffix: write that into the record. --write_clean does "
    "if there is only one.",
    "missing_other_name": "The same name exists in another letter case, with other slashes or in another Unicode form: "
    "write that into the record. --write_clean does if there is only one.",
    "outside": "Copy the image into the folder, or allow links that lead out by --follow_links; no path may leave it.",
    "no_path": "Correct the path: no file system can hold it.",
    "unreadable": "Download the image again: it is empty, damaged or of no known format.",
    "truncated": "Download the image again: its end is missing.",
    "too_large": "Scale the image down or crop it: it would take too much memory.",
}
NOTES = {
    "placeholder_moved": "It is moved before the text, as LLaVA does; other tools may leave it where it is.",
    "other_format": "It is read by its content here; for other tools, rename it and its path in the records.",
    "rotated": "It is shown upright here; LLaVA's own loader ignores EXIF and trains on it as it is stored.",
    "foreign_text": "Another program writes this for an image, but each image has its <image> already: delete it.",
    "ignored_key": "Nothing here reads it, so it changes nothing: rename it if it was meant to.",
    "warning": "It is read all the same; save it again with Pillow to avoid the warning.",
}


def write_clean(
    found: CheckedRecords, json_path: str | Path, image_folder: str | Path, clean_path: str | Path, **options
) -> tuple[CheckedRecords, Counter[str], Counter[str]]:
    """
    Write the records that pass the check, fixed where that needs no guess.

    Args:
        found ([`CheckedRecords`]):
            What the check of `json_path` returned.
        json_path (`str` or `Path`), image_folder (`str` or `Path`), **options:
            What was checked and how, as [`~delta_llava.train.data.check_llava_json`] takes them.
        clean_path (`str` or `Path`):
            JSON file to write. It holds good records unchanged, and passes the check by itself.

    Returns:
        `tuple[CheckedRecords, Counter[str], Counter[str]]`: The check of the written file (nothing bad); how many fixes
        were made, and how many records were left out, by kind of fault.

    Raises:
        `ValueError`: No record is left.
    """
    clean_path = Path(clean_path)
    clean_path.parent.mkdir(parents=True, exist_ok=True)
    num_records, source = found.num_records, json_path
    fixed, left_out = Counter(), Counter()
    with TemporaryDirectory(dir=clean_path.parent) as folder:
        # A fixed record may have a second fault, which the next round finds
        for number in count():
            candidate = Path(folder, f"{number}{clean_path.suffix}")
            _fix_all(found, source, image_folder, candidate, fixed, left_out)
            if left_out.total() == num_records:
                raise ValueError(f"No record of {json_path} is good or can be fixed: {clean_path} is not written.")
            found, source = check_llava_json(candidate, image_folder, **options), candidate
            if not found.num_bad_records:
                candidate.replace(clean_path)
                return found, fixed, left_out


def _fix_all(
    found: CheckedRecords, source: str | Path, image_folder: str | Path, target: Path, fixed: Counter, left_out: Counter
):
    faults = {fault["index"]: fault for fault in found.bad_records()}
    separator, between, closing = ("", "\n", "\n") if target.suffix == ".jsonl" else ("[\n", ",\n", "\n]\n")
    with open(target, "w", encoding="utf-8") as file:
        for index, record in enumerate(read_records(source)):
            if fault := faults.get(index):
                record = fix(record, fault, image_folder)
                (left_out if record is None else fixed)[fault["kind"]] += 1
                if record is None:
                    continue
            try:
                file.write(separator + json.dumps(record))
            except RecursionError:
                raise ValueError(f"{source}: record {index} is nested too deeply to be written") from None
            separator = between
        file.write(closing)


def fix(record: Any, fault: dict[str, Any], image_folder: str | Path) -> dict[str, Any] | None:
    """The record without the fault of its line in `bad_records.jsonl`, or `None` if a fix would need a guess."""
    if not isinstance(record, dict):
        return None
    key = "images" if record.get("images") is not None else "image"
    images = record[key] if isinstance(record.get(key), list) else [record.get(key)]
    if not all(isinstance(image, str) for image in images):
        return None
    if fault["kind"] in ("missing_other_suffix", "missing_other_name"):
        root = os.path.realpath(image_folder)
        missing = os.path.join(root, fault["file"])
        others = similar_files(missing, root)
        if len(others) == 1:
            name = Path(others[0]).relative_to(root).as_posix()
            images = [name if os.path.join(root, image) == missing else image for image in images]
            return {**record, key: images[0] if isinstance(record[key], str) else images}
    form = "conversations" if record.get("conversations") is not None else "messages"
    if fault["kind"] in ("placeholder_missing", "placeholder_foreign") and form in record:
        turns = [dict(turn) for turn in record[form]]
        questions = [turn for turn in turns if ROLES[turn.get("from") or turn["role"]] == "user"]
        if _fix_placeholders(questions, len(images)):
            return {**record, form: turns}
    return None


def _fix_placeholders(questions: list[dict[str, Any]], num_images: int) -> bool:
    texts = [turn.get("value") or turn.get("content") for turn in questions]
    if not all(isinstance(text, str) for text in texts):
        return False
    found = [match for text in texts for match in FOREIGN_PLACEHOLDER.finditer(text)]
    numbers = [int(match["number"]) for match in found if match["number"]]
    if not found and num_images == 1:
        texts[0] = f"{PLACEHOLDER}\n{texts[0]}"
    elif len(found) == num_images and numbers in ([], [*range(len(found))], [*range(1, len(found) + 1)]):
        texts = [FOREIGN_PLACEHOLDER.sub(PLACEHOLDER, text) for text in texts]
    else:
        return False
    for turn, text in zip(questions, texts, strict=True):
        turn["value" if turn.get("value") is not None else "content"] = text
    return True


def _print_table(severity: str, remedies: dict[str, str], lines: Iterable[dict[str, Any]]):
    counts, examples, ignored_keys, last_index = Counter(), {}, Counter(), None
    for line in lines:
        examples.setdefault(line["kind"], line)
        if line["kind"] == "ignored_key":
            ignored_keys[line["reason"]] += 1
            if line["index"] == last_index:  # a record may have several
                continue
            last_index = line["index"]
        counts[line["kind"]] += 1
    for kind, remedy in remedies.items():
        if kind in counts:
            example = examples[kind]
            file = f", {example['file']!r}" if example["file"] else ""
            unit = "images" if severity == "note" and file else "records"
            print(f"{severity:4} {kind:21} {counts[kind]:>9,} {unit}")
            print(f"       record {example['index']} (id {example['id']!r}){file}: {example['reason']}")
            print(f"       {remedy}")
    if ignored_keys:
        print(f"       {name_keys(ignored_keys)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="JSON list or lines, Parquet file, folder or data set of the Hub")
    parser.add_argument("--images", help="folder of its images, if they are files")
    parser.add_argument("--dataset_config", help="configuration of a data set that has several")
    parser.add_argument("--split", default="train", help="split of a data set (default: train)")
    parser.add_argument(
        "--require_images",
        action="store_true",
        help="a record must have an image, one question and one answer, as stage 1 takes it",
    )
    parser.add_argument("--follow_links", action="store_true", help="links may lead out of the folder of the images")
    parser.add_argument("--write_clean", help="JSON file to write, of the good and the fixed records")
    parser.add_argument("--report", help="list of the bad records (default: bad_records.jsonl, next to --write_clean)")
    parser.add_argument("--num_proc", type=int, help="processes that decode images (default: one per core)")
    options = parser.parse_args(arguments)
    if options.write_clean and Path(options.write_clean).resolve() == Path(options.json).resolve():
        parser.error(f"--write_clean {options.write_clean} would overwrite --json: name another file")
    if options.write_clean and not is_json_file(Path(options.json)):
        parser.error(f"--write_clean {options.write_clean} writes JSON, but {options.json} is not JSON")
    report = options.report or Path(options.write_clean or "").parent / "bad_records.jsonl"
    settings = {name: getattr(options, name) for name in ("require_images", "num_proc", "follow_links")}

    found = check_llava_json(
        options.json, options.images, **settings, dataset_config=options.dataset_config, split=options.split
    )
    write_bad_records(found, report)
    num_images = pc.list_value_length(found.records["images"])
    print(f"{options.json}: {found.num_records:,} records, {found.num_bad_records:,} of them bad")
    print(f"{pc.sum(pc.equal(num_images, 0)).as_py() or 0:,} text-only rows; {found.num_images:,} distinct images")
    _print_table("bad", FAULTS, found.bad_records())
    _print_table("note", NOTES, found.notes())
    if found.num_bad_records:
        print(f"All bad records are listed in {report}.")

    if found.num_decoded:
        rate = found.num_decoded / found.seconds
        print(f"Decoded {found.num_decoded:,} images in {found.seconds:.1f} s: {rate:,.0f} images/s.")
    if options.write_clean:
        clean, fixed, left_out = write_clean(found, options.json, options.images, options.write_clean, **settings)
        print(f"Wrote {clean.num_records:,} records to {options.write_clean}, none of them bad.")
        for action, counts in (("fixed", fixed), ("left out", left_out)):
            for kind, number in counts.items():
                print(f"     {action:8} {kind:21} {number:>9,}")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    own, workers = (
        resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(f"Peak memory {own:,.0f} MiB, and {workers:,.0f} MiB in the largest worker process.")
    return int(found.num_bad_records > 0 and not options.write_clean)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
