r"""
Check LLaVA's training data before it is trained on: every record and every image, and how to mend what is wrong.

```
python -m delta_llava.train.check_data --json llava_v1_5_mix665k.json --images LLaVA-Tuning \
    --write_clean llava_v1_5_mix665k.clean.json
```

Bad records stop a training; notes are harmless here. Training on the same file and images finds all of it checked.
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

from .data import IMAGE_MARKER, Check, check_llava_json, read_records, write_bad_records
from .images import similar_files


# How to mend each kind of bad record, and what each kind of note means elsewhere
FAULTS = {
    "record": "A record is an object with id, conversations and maybe image, a path or a list of paths: mend the JSON.",
    "no_image": "Leave text-only records out: with --require_images every record needs an image (stage 1).",
    "turns": "Turns alternate, human first and gpt last, each with a text that is not empty: mend the JSON.",
    "text": "Half of a UTF-16 surrogate pair is left of a character: write the whole character, or delete it.",
    "marker_in_answer": f"Only human turns may contain {IMAGE_MARKER}: delete it elsewhere.",
    "marker_missing": f"Write one {IMAGE_MARKER} per image into the human turns. --write_clean puts that of a single "
    "image at the start of the first one.",
    "marker_surplus": f"Delete the {IMAGE_MARKER} that have no image, or add the images to the record.",
    "missing": "Complete the download or mend the path; for LLaVA, --images is the folder that holds coco/, gqa/, "
    "ocr_vqa/, textvqa/ and vg/.",
    "missing_ocr_vqa": "OCR-VQA's images are downloaded one by one, and some links are dead: run its loadDataset.py "
    "again, save all as .jpg, and leave out what stays missing.",
    "missing_other_suffix": "The same name is there with another suffix: write that into the record. --write_clean "
    "does, where there is only one.",
    "missing_other_name": "The same name is there in other letter case, with other slashes or in another Unicode form: "
    "write that into the record. --write_clean does, where there is only one.",
    "outside": "Copy the image into the folder, or allow links that lead out by --follow_links; no path may leave it.",
    "no_path": "Mend the path: no file system can hold it.",
    "unreadable": "Download the image again: it is empty, damaged or of no known format.",
    "truncated": "Download the image again: its end is missing.",
    "too_large": "Scale the image down or cut it: so much memory is not spent on one image.",
}
NOTES = {
    "marker_moved": "It is moved before the text, as LLaVA does; other tools may leave it where it is.",
    "other_format": "It is read by its content here; for other tools, rename it and its path in the records.",
    "rotated": "It is shown upright here; LLaVA's own loader ignores EXIF and trains on it as it is stored.",
    "warning": "It is read all the same; save it anew with Pillow to be rid of the warning.",
}


def write_clean(check: Check, json_path: str | Path, image_folder: str | Path, clean_path: str | Path, **options):
    """
    Write the records that pass the check, mended where that needs no guess.

    Args:
        check ([`Check`]):
            What was found in `json_path`.
        json_path (`str` or `Path`), image_folder (`str` or `Path`), **options:
            What it was found with, as [`~delta_llava.train.data.check_llava_json`] takes them.
        clean_path (`str` or `Path`):
            JSON file to write. It holds good records unchanged, and passes the check by itself.

    Returns:
        `tuple[Check, Counter[str], Counter[str]]`: What is found in the written file (nothing bad); how many mends were
        made, and how many records were left out, by kind of fault.

    Raises:
        `ValueError`: No record is left.
    """
    clean_path = Path(clean_path)
    clean_path.parent.mkdir(parents=True, exist_ok=True)
    num_records, source = check.num_records, json_path
    mended, left_out = Counter(), Counter()
    with TemporaryDirectory(dir=clean_path.parent) as folder:
        # A mended record may have another fault behind the first: the next round finds it
        for number in count():
            candidate = Path(folder, f"{number}.json")
            _mend_all(check, source, image_folder, candidate, mended, left_out)
            if left_out.total() == num_records:
                raise ValueError(f"No record of {json_path} is good or can be mended: {clean_path} is not written.")
            check, source = check_llava_json(candidate, image_folder, **options), candidate
            if not check.num_bad_records:
                candidate.replace(clean_path)
                return check, mended, left_out


def _mend_all(
    check: Check, source: str | Path, image_folder: str | Path, target: Path, mended: Counter, left_out: Counter
):
    faults = check.bad_records()
    fault = next(faults, None)
    with open(target, "w", encoding="utf-8") as file:
        separator = "[\n"
        for index, record in enumerate(read_records(source)):
            if fault and fault["index"] == index:
                record = mend(record, fault, image_folder)
                (left_out if record is None else mended)[fault["kind"]] += 1
                fault = next(faults, None)
                if record is None:
                    continue
            file.write(separator + json.dumps(record))
            separator = ",\n"
        file.write("\n]\n")


def mend(record: Any, fault: dict[str, Any], image_folder: str | Path) -> dict[str, Any] | None:
    """
    Mend what can be mended without a guess.

    Args:
        record:
            A bad record.
        fault (`dict`):
            Its line of `bad_records.jsonl`.
        image_folder (`str` or `Path`):
            Folder of its images.

    Returns:
        `dict`, *optional*: A record without this fault; `None` if that would need a guess.
    """
    if fault["kind"] in ("missing_other_suffix", "missing_other_name"):
        root = os.path.realpath(image_folder)
        missing = os.path.join(root, fault["file"])
        others = similar_files(missing, root)
        if len(others) == 1:
            name = Path(others[0]).relative_to(root).as_posix()
            images = [record["image"]] if isinstance(record["image"], str) else record["image"]
            images = [name if os.path.join(root, image) == missing else image for image in images]
            return {**record, "image": images[0] if isinstance(record["image"], str) else images}
    if fault["kind"] == "marker_missing" and (isinstance(record["image"], str) or len(record["image"]) == 1):
        turns = [dict(turn) for turn in record["conversations"]]
        first = next(turn for turn in turns if turn["from"] == "human")
        first["value"] = f"{IMAGE_MARKER}\n{first['value']}"
        return {**record, "conversations": turns}
    return None


def _print_table(severity: str, remedies: dict[str, str], lines: Iterable[dict[str, Any]]):
    counts, examples = Counter(), {}
    for line in lines:
        counts[line["kind"]] += 1
        examples.setdefault(line["kind"], line)
    for kind, remedy in remedies.items():
        if kind in counts:
            example = examples[kind]
            file = f", {example['file']}" if example["file"] else ""
            unit = "images" if severity == "note" and file else "records"
            print(f"{severity:4} {kind:20} {counts[kind]:>9,} {unit}")
            print(f"       record {example['index']} (id {example['id']!r}){file}: {example['reason']}")
            print(f"       {remedy}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="LLaVA's JSON file")
    parser.add_argument("--images", required=True, help="folder that its images lie in")
    parser.add_argument("--require_images", action="store_true", help="a record without an image is bad (stage 1)")
    parser.add_argument("--follow_links", action="store_true", help="links may lead out of the folder of the images")
    parser.add_argument("--write_clean", help="JSON file to write, of the good and the mended records")
    parser.add_argument("--report", help="list of the bad records (default: bad_records.jsonl, beside --write_clean)")
    parser.add_argument("--num_proc", type=int, help="processes that decode images (default: one per core)")
    options = parser.parse_args(arguments)
    if options.write_clean and Path(options.write_clean).resolve() == Path(options.json).resolve():
        parser.error(f"--write_clean {options.write_clean} would overwrite --json: name another file")
    report = options.report or Path(options.write_clean or "").parent / "bad_records.jsonl"
    settings = {name: getattr(options, name) for name in ("require_images", "num_proc", "follow_links")}

    check = check_llava_json(options.json, options.images, **settings)
    write_bad_records(check, report)
    num_images = pc.list_value_length(check.records["images"])
    print(f"{options.json}: {check.num_records:,} records, {check.num_bad_records:,} of them bad")
    print(f"{pc.sum(pc.equal(num_images, 0)).as_py() or 0:,} text-only rows; {check.num_images:,} different images")
    _print_table("bad", FAULTS, check.bad_records())
    _print_table("note", NOTES, check.notes())
    if check.num_bad_records:
        print(f"All bad records are listed in {report}.")

    if check.num_decoded:
        rate = check.num_decoded / check.seconds
        print(f"Decoded {check.num_decoded:,} images in {check.seconds:.1f} s: {rate:,.0f} images/s.")
    if options.write_clean:
        clean, mended, left_out = write_clean(check, options.json, options.images, options.write_clean, **settings)
        print(f"Wrote {clean.num_records:,} records to {options.write_clean}, none of them bad.")
        for action, counts in (("mended", mended), ("left out", left_out)):
            for kind, number in counts.items():
                print(f"     {action:8} {kind:20} {number:>9,}")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    own, workers = (
        resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(f"Peak memory {own:,.0f} MiB, and {workers:,.0f} MiB in the largest of the worker processes.")
    return int(check.num_bad_records > 0 and not options.write_clean)


if __name__ == "__main__":
    sys.exit(main())
