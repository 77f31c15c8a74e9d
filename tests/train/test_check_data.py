"""`check_data` finds LLaVA's known faults, says how to fix them, and writes a file that passes."""

import json
import runpy
import shutil

import datasets
import pytest
from datasets import Dataset
from llava_records import record as llava_record
from PIL import Image

from delta_llava.train.check_data import FAULTS, NOTES, main
from delta_llava.train.data import load_llava_json


def record(question="<image>\nWhat?", answer="A square.", **changes):
    """A good record, with whatever a test wants different."""
    return llava_record(question, answer, **{"image": "coco/a.jpg", **changes})


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Folders as LLaVA has them, with an image of every known kind."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    (folder / "coco").mkdir(parents=True)
    (folder / "ocr_vqa").mkdir()
    image = Image.new("RGB", (40, 20), "red")
    image.save(folder / "coco" / "a.jpg")
    image.save(folder / "coco" / "gif.jpg", format="GIF")
    image.save(folder / "coco" / "two.png")
    image.save(folder / "coco" / "two.gif")
    image.save(folder / "ocr_vqa" / "other.gif")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    image.save(folder / "coco" / "rotated.jpg", exif=rotated)
    (folder / "coco" / "cut.jpg").write_bytes((folder / "coco" / "a.jpg").read_bytes()[:-20])
    return folder


@pytest.fixture
def check(images, capsys):
    """Runs the command on records; returns its exit status and what it printed."""

    def check(records, *options):
        (images.parent / "data.json").write_text(json.dumps(records))
        status = main(["--json", "data.json", "--images", "images", *options])
        return status, capsys.readouterr().out

    return check


def test_bad_records_are_counted_with_an_example_and_a_remedy(check, images):
    bad = {
        "truncated": record(image="coco/cut.jpg"),
        "missing": record(image="coco/none.jpg"),
        "missing_ocr_vqa": record(image="ocr_vqa/none.jpg"),
        "missing_other_suffix": record(image="ocr_vqa/other.jpg"),
        "placeholder_in_answer": record(answer="<image>"),
        "placeholder_missing": record(question="What?"),
        "placeholder_surplus": record(question="<image><image>\nWhat?"),
        "outside": record(image="../secret.jpg"),
    }
    status, printed = check([record(), *({**line, "id": f"{kind}-{n}"} for kind, line in bad.items() for n in (1, 2))])
    assert status == 1
    assert "17 records, 16 of them bad" in printed
    rows = {tuple(line.split()) for line in printed.splitlines() if line.startswith("bad")}
    assert rows == {("bad", kind, "2", "records") for kind in bad}
    lines = [json.loads(line) for line in (images.parent / "bad_records.jsonl").read_text().splitlines()]
    assert [(line["index"], line["kind"]) for line in lines] == [*enumerate(sorted([*bad] * 2, key=[*bad].index), 1)]
    for line in lines[::2]:
        assert f"record {line['index']} (id '{line['kind']}-1')" in printed
        assert FAULTS[line["kind"]] in printed


KNOWN_NOTES = {
    "GIF named .jpg": ("other_format", "it is GIF, though named .jpg", record(image="coco/gif.jpg")),
    "rotated by EXIF": ("rotated", "EXIF orientation 6", record(image="coco/rotated.jpg")),
    "placeholder after the text": ("placeholder_moved", "after the question's text", record(question="What?\n<image>")),
}


@pytest.mark.parametrize(("kind", "reason", "noted"), KNOWN_NOTES.values(), ids=KNOWN_NOTES)
def test_what_is_harmless_is_noted_at_the_second_look_too(check, images, kind, reason, noted):
    for _ in range(2):
        status, printed = check([record(), noted])
        assert status == 0
        assert "0 of them bad" in printed
        (row,) = [line.split() for line in printed.splitlines() if line.startswith("note")]
        assert row[1:3] == [kind, "1"]
        assert "record 1 (id '0')" in printed
        assert reason in printed
        assert NOTES[kind] in printed
    assert not (images.parent / "bad_records.jsonl").exists()


def test_an_image_of_many_records_is_decoded_and_noted_once(check):
    _, printed = check([record(image="coco/gif.jpg")] * 3)
    assert "3 records" in printed
    assert "1 distinct images" in printed
    assert "Decoded 1 images" in printed
    assert "Peak memory" in printed
    assert next(line.split() for line in printed.splitlines() if line.startswith("note"))[2:] == ["1", "images"]
    _, printed = check([record(image="coco/gif.jpg")] * 3)
    assert "Decoded" not in printed


def test_text_only_rows_are_counted_and_bad_where_images_are_required(check):
    records = [record(), record(question="Who?", image=None)]
    status, printed = check(records)
    assert status == 0
    assert "1 text-only rows" in printed
    status, printed = check(records, "--require_images")
    assert status == 1
    assert FAULTS["no_image"] in printed


MESSAGE = {"role": "assistant", "content": "That."}
FIXABLE = [
    record(image="ocr_vqa/other.jpg"),
    record(question="What?"),
    record(question="What?", image=["ocr_vqa/other.jpg"]),
    record(question="<image><image>", image=["coco/a.jpg", "ocr_vqa/other.jpg"]),
]
FIXED = [
    record(image="ocr_vqa/other.gif"),
    record(question="<image>\nWhat?"),
    record(question="<image>\nWhat?", image=["ocr_vqa/other.gif"]),
    record(question="<image><image>", image=["coco/a.jpg", "ocr_vqa/other.gif"]),
]
GUESSES = [
    record(image="coco/two.jpg"),  # .png or .gif?
    record(question="What?", image=["coco/a.jpg", "coco/a.jpg"]),
    record(question="<image>", image=["coco/a.jpg", "coco/a.jpg"]),
    record(question="What?", image="coco/none.jpg"),
    record(answer="<image>"),
    record(image={"path": "ocr_vqa/other.jpg"}),
    record(question="What?", image={"path": "coco/a.jpg"}),
    "no record",
]
GOOD = [record(id="ä\ud83d", model="other", n=[1.5, None]), record(question="What?\n<image>", image="coco/rotated.jpg")]


def test_the_clean_file_passes_with_good_records_unchanged_and_others_fixed_or_left_out(check, images):
    status, printed = check([GOOD[0], *FIXABLE, *GUESSES, GOOD[1]], "--write_clean", "out/clean.json")
    assert status == 0
    assert json.loads((images.parent / "out" / "clean.json").read_text()) == [GOOD[0], *FIXED, GOOD[1]]
    assert len((images.parent / "out" / "bad_records.jsonl").read_text().splitlines()) == 12
    assert "Wrote 6 records to out/clean.json" in printed
    actions = {tuple(line.split()) for line in printed.splitlines() if line.startswith("     ")}
    assert {("fixed", "missing_other_suffix", "3"), ("fixed", "placeholder_missing", "3")} < actions
    assert {("left", "out", "missing_other_suffix", "2"), ("left", "out", "missing", "1")} < actions

    shutil.copy("out/clean.json", "clean.json")
    assert len(load_llava_json("clean.json", images)) == 6
    status, printed = check(json.loads((images.parent / "clean.json").read_text()))
    assert status == 0
    assert "6 records, 0 of them bad" in printed


def test_another_programs_placeholder_is_replaced_where_each_image_has_one(check, images):
    two = ["coco/a.jpg", "coco/a.jpg"]
    records = [
        record(question="<ImageHere>\nWhat?"),
        record(question="<|vision_start|><|image_pad|><|vision_end|>What?"),
        {"images": two, "messages": [{"role": "user", "content": "<image_1> or <image_2>?"}, MESSAGE]},
        record(question="<image_2> or <image_1>?", image=two),  # which is which?
        record(question="<ImageHere> and again <ImageHere>"),
        record(question="<img>coco/a.jpg</img>What?"),
    ]
    status, printed = check(records, "--write_clean", "clean.json")
    assert status == 0
    assert "placeholder_foreign" in printed and FAULTS["placeholder_foreign"] in printed
    assert json.loads((images.parent / "clean.json").read_text()) == [
        record(question="<image>\nWhat?"),
        record(question="<image>What?"),
        {"images": two, "messages": [{"role": "user", "content": "<image> or <image>?"}, MESSAGE]},
    ]


def test_a_clean_file_is_of_the_lines_or_the_list_that_its_name_says(check, images):
    (images.parent / "lines.jsonl").write_text(f"{json.dumps(record())}\n{json.dumps(record(image='none.jpg'))}\n")
    for name, content in [
        ("clean.jsonl", json.dumps(record()) + "\n"),
        ("clean.json", f"[\n{json.dumps(record())}\n]\n"),
    ]:
        assert main(["--json", "lines.jsonl", "--images", "images", "--write_clean", name]) == 0
        assert (images.parent / name).read_text() == content


def test_keys_that_nothing_reads_are_counted_by_name(check):
    _, printed = check([record(model="a", source="b"), record(model="c"), record()])
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("note")]
    assert row[1:4] == ["ignored_key", "2", "records"]
    assert NOTES["ignored_key"] in printed
    assert "'model' in 2, 'source' in 1" in printed


def test_a_data_set_is_checked_but_not_written_as_json(images, capsys):
    rows = Dataset.from_list([record(), record(image="coco/none.jpg")])
    rows.save_to_disk("saved")
    assert main(["--json", "saved", "--images", "images"]) == 1
    assert "2 records, 1 of them bad" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--json", "saved", "--images", "images", "--write_clean", "clean.json"])
    assert "writes JSON, but saved is not JSON" in capsys.readouterr().err


def test_what_stops_the_check_is_said_in_one_line(images, monkeypatch, capsys):
    (images.parent / "deep.json").write_text("[" * 100_000)
    monkeypatch.setattr("sys.argv", ["check_data", "--json", "deep.json", "--images", "images"])
    with pytest.raises(SystemExit) as error:
        runpy.run_module("delta_llava.train.check_data", run_name="__main__")
    assert str(error.value).startswith("error: deep.json is not JSON (record 0: it is nested too deeply)")


def test_a_clean_file_without_records_is_not_written(check, images):
    with pytest.raises(ValueError, match=r"No record of data\.json is good or can be fixed"):
        check([record(image="coco/none.jpg")], "--write_clean", "clean.json")
    assert not (images.parent / "clean.json").exists()
    assert {path.name for path in images.parent.iterdir()} == {"images", "cache", "data.json", "bad_records.jsonl"}


def test_the_checked_file_is_not_overwritten(check, capsys):
    with pytest.raises(SystemExit):
        check([record()], "--write_clean", "./data.json")
    assert "would overwrite --json" in capsys.readouterr().err


def test_the_report_goes_where_it_is_asked_to(check, images):
    check([record(), "no record"], "--report", "out/report.jsonl", "--num_proc", "1")
    assert json.loads((images.parent / "out" / "report.jsonl").read_text())["kind"] == "record"
