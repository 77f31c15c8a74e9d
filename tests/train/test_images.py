"""Image files: what the check accepts loads in training, what is damaged is found by both, and names and links."""

import json
import os
import unicodedata

import datasets
import numpy as np
import pytest
from clients import encoded, photograph
from llava_records import record
from PIL import Image

from delta_llava.train.batches import BudgetedRows
from delta_llava.train.check_data import main
from delta_llava.train.data import check_llava_json, load_llava_json


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "coco").mkdir(parents=True)
    return tmp_path / "images"


@pytest.fixture
def check(images):
    """`check(*names)`: checks a record for each image; the faults by image, and a file that names the images."""

    def check(*names, **options):
        (images.parent / "data.json").write_text(json.dumps([record(image=name) for name in names]))
        found = check_llava_json("data.json", images, num_proc=1, **options)
        return {line["file"]: (line["kind"], line["reason"]) for line in found.bad_records()}

    return check


def hollow(data, start, length=300):
    return data[:start] + bytes(length) + data[start + length :]


PHOTOGRAPH = photograph()
DEEP = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))
SOUND = {
    "photograph.jpg": encoded(PHOTOGRAPH, "JPEG"),
    "photograph.png": encoded(PHOTOGRAPH, "PNG"),
    "twelve-bit.png": encoded(DEEP, "PNG"),
    "float.tif": encoded(Image.fromarray(np.random.default_rng(0).random((9, 9), np.float32)), "TIFF"),
    "long.png": encoded(Image.new("L", (2000, 10)), "PNG"),
    "animated.gif": encoded(PHOTOGRAPH, "GIF", save_all=True, append_images=[PHOTOGRAPH.rotate(90)]),
    "pixel.bmp": encoded(Image.new("1", (1, 1)), "BMP"),
}
DAMAGED = {
    "hole.jpg": hollow(SOUND["photograph.jpg"], 3000),
    "cut.gif": SOUND["animated.gif"][:5000],
    "tail.png": hollow(SOUND["photograph.png"], len(SOUND["photograph.png"]) - 300),
    "normalized.tif": encoded(Image.fromarray(np.linspace(-2, 2, 16, dtype=np.float32).reshape(4, 4)), "TIFF"),
    "thin.png": encoded(Image.new("L", (1, 60_000)), "PNG"),
    "page.jpg": encoded(PHOTOGRAPH, "EPS"),
    "empty.jpg": b"",
}


def test_what_the_check_accepts_loads_and_what_is_damaged_is_found_by_both(images, check):
    for name, content in {**SOUND, **DAMAGED}.items():
        (images / name).write_bytes(content)
    faults = check(*SOUND, *DAMAGED)
    assert faults.keys() == DAMAGED.keys()
    assert {name for name, (kind, _) in faults.items() if kind == "too_large"} == {"thin.png"}
    rows = load_llava_json("data.json", images, skip_bad_records=True)
    extent = {"num_messages": [2] * len(rows), "num_images": [1] * len(rows)}
    for name, column in extent.items():
        rows = rows.add_column(name, column)
    read = BudgetedRows(rows)
    assert [read[index, 1]["images"][0].mode for index in range(len(read))] == ["RGB"] * len(SOUND)
    # Exchanged after the check
    for damaged in DAMAGED:
        (images / "photograph.jpg").write_bytes(DAMAGED[damaged])
        with pytest.raises(ValueError, match=r"The row 'What\? A square\.'.*photograph\.jpg cannot be read: "):
            read[0, 1]


@pytest.mark.parametrize(
    "name", ["COCO/a.jpg", "coco/A.JPG", r"coco\a.jpg", r"\coco\a.jpg", "/coco/a.jpg", "Coco//./a.jpg", "coco/a.JPG"]
)
def test_a_name_that_differs_in_case_or_slashes_alone_is_named_and_corrected(images, check, name):
    (images / "coco" / "a.jpg").write_bytes(SOUND["photograph.jpg"])
    ((kind, reason),) = check(name).values()
    assert kind == "missing_other_name"
    assert reason.endswith("does not exist in the image folder, but coco/a.jpg does")
    assert main(["--json", "data.json", "--images", "images", "--write_clean", "clean.json", "--num_proc", "1"]) == 0
    assert [found["image"] for found in json.loads((images.parent / "clean.json").read_text())] == ["coco/a.jpg"]


def test_a_name_in_another_unicode_form_is_named(images, check):
    composed, decomposed = (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))
    (images / "coco" / decomposed).write_bytes(SOUND["photograph.jpg"])
    assert check(f"coco/{composed}")[f"coco/{composed}"][0] == "missing_other_name"
    (images / "coco" / "É.JPG").write_bytes(SOUND["photograph.jpg"])
    (_, reason) = check(f"coco/{composed}")[f"coco/{composed}"]
    assert reason.endswith(f"but coco/{decomposed} and coco/É.JPG does")  # which of them is a guess
    assert check("coco/e.jpg")["coco/e.jpg"][0] == "missing"
    assert check("../é.jpg")["../é.jpg"][0] in ("missing", "outside")


def test_links_out_of_the_folder_are_followed_when_asked(images, check, tmp_path):
    """COCO linked in, as LLaVA's layout has it, and a snapshot of the Hub, whose files link to its blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b").write_bytes(SOUND["photograph.jpg"])
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "b.jpg").write_bytes(SOUND["photograph.jpg"])
    (images / "a.jpg").symlink_to("../blobs/0a1b")
    (images / "coco" / "train2017").symlink_to(tmp_path / "train2017")
    names = [
        "a.jpg",
        "coco/train2017/b.jpg",
        "../blobs/0a1b",
        "coco/train2017/../blobs/0a1b",
        str(tmp_path / "blobs/0a1b"),
    ]
    assert {kind for kind, _ in check(*names).values()} == {"outside"}
    assert check(*names, follow_links=True).keys() == set(names[2:])
    check(*names[:2])
    assert len(load_llava_json("data.json", images, follow_links=True)) == 2
    assert main(["--json", "data.json", "--images", "images", "--num_proc", "1"]) == 1
    assert main(["--json", "data.json", "--images", "images", "--num_proc", "1", "--follow_links"]) == 0
    os.unlink(tmp_path / "blobs" / "0a1b")
    assert check("a.jpg", follow_links=True)["a.jpg"][0] == "missing"
