"""`load_llava_json` lets only good records through, and looks at what it has checked only once."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import datasets
import PIL.Image
import pytest
from clients import encoded
from datasets import Dataset, DatasetDict, Features, List, Value, Video
from datasets import Image as Image_
from llava_records import record, turns
from PIL import Image

from delta_llava.train import data, images
from delta_llava.train.check_data import FAULTS
from delta_llava.train.data import check_llava_json, load_llava_json


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of `datasets`, new and empty."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "delta_llava"


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are opened, as they are opened."""
    names, original = [], images.open_image

    def open_and_count(path):
        names.append(os.path.basename(path))
        return original(path)

    monkeypatch.setattr(images, "open_image", open_and_count)
    return names


@pytest.fixture
def load(tmp_path):
    """Writes records beside two images, one of them cut short, and loads them."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    Image.effect_noise((64, 64), 50).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-500])
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "folder").mkdir()
    (folder / "folder" / "inside.png").symlink_to(folder / "a.png")
    (folder / "alias").symlink_to(folder / "folder")

    def load(records, **kwargs):
        (tmp_path / "data.json").write_text(records if isinstance(records, str) else json.dumps(records))
        return load_llava_json(tmp_path / "data.json", folder, tmp_path / "out" / "bad_records.jsonl", **kwargs)

    return load


def test_rows_hold_lazily_decoded_images_and_messages_with_images_at_their_place(load):
    rows = load(
        [
            record(),
            record("<image>\nIs this\n<image>\nthat?", "No.", image=["a.png", "whole.jpg"]),
            record("What?\n<image>", "A square."),
            record("<image> \n What? ", " A square."),
            record("Hello.", "Hi.", "Bye.", "Bye.", id=7, image=None),
            {"id": "s", "conversations": [{"from": "system", "value": "Be kind."}, *turns("Hello.", "Hi.")]},
        ]
    )
    assert rows.column_names == ["images", "messages"]
    assert [image.size for image in rows[1]["images"]] == [(30, 20), (64, 64)]
    assert rows[4]["images"] == []
    image, text = {"type": "image", "text": None}, lambda text: {"type": "text", "text": text}
    assert rows[0]["messages"] == [
        {"role": "user", "content": [image, text("What?")]},
        {"role": "assistant", "content": [text("A square.")]},
    ]
    assert rows[1]["messages"][0]["content"] == [image, text("Is this\n"), image, text("that?")]
    assert rows[2]["messages"] == rows[3]["messages"] == rows[0]["messages"]
    assert [message["role"] for message in rows[4]["messages"]] == ["user", "assistant"] * 2
    assert rows[5]["messages"][0] == {"role": "system", "content": [text("Be kind.")]}


# Faults of the records themselves are in test_records.py
BAD_RECORDS = {
    "not an object": ("text", "record", "not an object"),
    "id of another type": (record(id={}), "record", "id is {}, not a string"),
    "missing image": (record(image="b.png"), "missing", "image b.png does not exist"),
    "missing image of OCR-VQA": (record(image="ocr_vqa/b.jpg"), "missing_ocr_vqa", "image ocr_vqa/b.jpg does not"),
    "other suffix": (record(image="a.jpg"), "missing_other_suffix", "not exist in the image folder, but a.png does"),
    "other case": (record(image="A.png"), "missing_other_name", "does not exist in the image folder, but a.png does"),
    "a folder": (record(image="folder"), "missing", "does not exist in the image folder: it is not a file"),
    "path below a file": (record(image="a.png/b.png"), "missing", "a.png/b.png does not exist"),
    "unreadable image": (record(image="text.png"), "unreadable", "text.png cannot be read: it is no image of the"),
    "truncated image": (record(image="cut.jpg"), "truncated", "cut.jpg cannot be read: image file is truncated"),
    **{
        f"path {image}": (record(image=image), "outside", f"image {image} leaves the image folder")
        for image in (
            *("/etc/hostname", "../outside.png", "folder/../../outside.png", "link.png", "linked/outside.png"),
            "linked/../outside.png",
        )
    },
    "path of no file system": (record(image="a\0.png"), "no_path", "is not a path"),
    "path too long": (record(image="a" * 5000), "no_path", "is not a path"),
    "a loop of links": (record(image="loop.png"), "no_path", "is not a path"),
}


@pytest.mark.parametrize(("bad", "kind", "reason"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_stops_the_run_and_is_reported(load, tmp_path, bad, kind, reason):
    with pytest.raises(ValueError, match="1 of the 2 records") as error:
        load([record(), bad])
    report = tmp_path / "out" / "bad_records.jsonl"
    assert str(report) in str(error.value)
    assert "--skip_bad_records" in str(error.value)
    (line,) = map(json.loads, report.read_text().splitlines())
    assert line["index"] == 1
    assert line["id"] == (None if not isinstance(bad, dict) else bad["id"] if bad["id"] == "0" else "{}")
    assert line["file"] == (None if kind == "record" else bad["image"])
    assert line["kind"] == kind
    assert reason in line["reason"]
    assert reason in str(error.value)


def test_bad_records_are_left_out_when_asked_and_their_list_goes_once_they_are_fixed(load, tmp_path):
    good = record("<image>\nWhat?", "Another.")
    rows = load([record(image="b.png"), good, record(image="cut.jpg")], skip_bad_records=True)
    assert [row["messages"][1]["content"][0]["text"] for row in rows] == ["Another."]
    assert len((tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()) == 2
    load([good])
    assert not (tmp_path / "out" / "bad_records.jsonl").exists()
    with pytest.raises(ValueError, match="No record is left"):
        load([record(image="b.png")], skip_bad_records=True)


def test_a_key_that_an_object_has_twice_makes_its_record_bad(load, tmp_path):
    twice = json.dumps(record()).replace('"gpt", ', '"gpt", "value": "Another.", ')
    with pytest.raises(ValueError, match=r"1 of the 2 records.*\n.*record 0 .*has the key 'value' twice"):
        load(f"[{twice}, {json.dumps(record())}]")


def test_stage_1_takes_images_with_one_question_and_one_answer(load):
    two = record("<image>\nWhat?", "A square.", "Sure?", "Yes.")
    none = record("Hello.", "Hi.", image=None)
    with pytest.raises(ValueError, match=r"(?s)record 1 .*: this stage takes one question and.*record 2 .* no image"):
        load([record(), two, none], require_images=True)
    assert len(load([record(), two, none])) == 3  # the cache keeps both results


def test_links_inside_the_image_folder_are_followed(load):
    rows = load([record(image="folder/inside.png"), record(image="alias/inside.png"), record(image="folder/../a.png")])
    assert [row["images"][0].size for row in rows] == [(30, 20)] * 3


def test_the_rows_are_memory_mapped_from_the_cache(load, cache):
    for records in ([record()], [record(), record(image="b.png")]):
        (file,) = load(records, skip_bad_records=True).cache_files
        assert str(cache) in file["filename"]


def test_what_is_checked_is_not_looked_into_again(load, decoded):
    records = [record(), record(image="whole.jpg"), record(image="whole.jpg"), record(image="cut.jpg")]
    first = load(records, skip_bad_records=True)
    assert sorted(decoded) == ["a.png", "cut.jpg", "whole.jpg"]
    decoded.clear()
    assert load(records, skip_bad_records=True).with_format("arrow")[:] == first.with_format("arrow")[:]
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read: image file is truncated"):
        load(records)
    assert decoded == []


def test_another_file_over_the_same_images_is_read_but_its_images_are_known(load, decoded):
    load([record(), record(image="whole.jpg")])
    decoded.clear()
    rows = load([record("<image>\nWhat?", "Another.")])
    assert rows["messages"][0][1]["content"][0]["text"] == "Another."
    assert decoded == []


def test_a_changed_image_is_checked_again(load, tmp_path, decoded):
    load([record(), record(image="whole.jpg")])
    decoded.clear()
    image = tmp_path / "images" / "a.png"
    changed = image.stat().st_mtime_ns
    image.write_bytes(image.read_bytes()[:-30])
    os.utime(image, ns=(changed, changed))  # its size tells
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        load([record(), record(image="whole.jpg")])
    Image.new("RGB", (8, 8)).save(image)
    load([record(), record(image="whole.jpg")])
    os.utime(image, ns=(changed, changed + 1))
    load([record(), record(image="whole.jpg")])
    assert decoded == ["a.png"] * 3


def test_a_vanished_image_is_missed_and_found_again(load, tmp_path, decoded):
    load([record(), record(image="whole.jpg")])
    decoded.clear()
    image = tmp_path / "images" / "a.png"
    image.rename(image.with_suffix(".gif"))
    with pytest.raises(ValueError, match=r"a\.png does not exist in the image folder, but a\.gif"):
        load([record(), record(image="whole.jpg")])
    image.with_suffix(".gif").rename(image)
    load([record(), record(image="whole.jpg")])
    image.unlink()
    image.symlink_to(tmp_path / "outside.png")
    with pytest.raises(ValueError, match=r"a\.png leaves the image folder"):
        load([record(), record(image="whole.jpg")])
    assert decoded == []


def test_a_stopped_check_leaves_nothing_half_in_the_cache(load, cache, monkeypatch):
    with pytest.raises(ValueError, match="is not JSON"):
        load(json.dumps([record()] * 2500)[:-1])
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    monkeypatch.setattr(images, "_decode_task", lambda paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load([record()])
    assert {path.suffix for path in cache.iterdir() if path.name.startswith("images")} == {".lock"}
    monkeypatch.undo()


def test_an_image_too_large_is_bad_and_a_warning_a_note(load, tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(ValueError, match=r"whole\.jpg cannot be read: Image size .* exceeds limit"):
        load([record(image="whole.jpg")])
    load([record()])
    (note,) = check_llava_json(tmp_path / "data.json", tmp_path / "images").notes()
    assert (note["kind"], note["file"]) == ("warning", "a.png")
    assert "DecompressionBombWarning" in note["reason"]


def test_several_processes_find_what_one_finds(load, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(images, "_IMAGES_PER_TASK", 1)
    load([record(), record(image="cut.jpg"), record(image="whole.jpg")], skip_bad_records=True, num_proc=2)
    many = list(check_llava_json(tmp_path / "data.json", tmp_path / "images").bad_records())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another_cache")
    one = check_llava_json(tmp_path / "data.json", tmp_path / "images", num_proc=1)
    assert one.num_decoded == 3
    assert list(one.bad_records()) == many
    with pytest.raises(ValueError, match="num_proc=0 must be at least 1"):
        load([record()], num_proc=0)


def png(colour="red"):
    return encoded(Image.new("RGB", (30, 20), colour))


WRITERS = {
    "JSON lines": lambda rows, path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "Parquet": lambda rows, path: rows.to_parquet(path),
    "a saved data set": lambda rows, path: rows.save_to_disk(path),
    "saved splits": lambda rows, path: DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_other_files_than_json_lists_are_read_alike(load, tmp_path, write):
    turn = {"from": Value("string"), "value": Value("string")}
    features = Features({"id": Value("int64"), "image": Value("string"), "conversations": List(turn)})
    records = [record(id=1), record(id=2, image="whole.jpg"), record("?", "!", id=3, image=None)]
    write(Dataset.from_list(records, features=features), tmp_path / "data")
    rows = load_llava_json(tmp_path / "data", tmp_path / "images", tmp_path / "bad.jsonl")
    assert rows.with_format("arrow")[:] == load(records).with_format("arrow")[:]
    write(Dataset.from_list([record(id=1), record(id=2, image="none.png")], features=features), tmp_path / "more")
    with pytest.raises(ValueError, match=r"record 1 \(id 2\): image none.png does not exist"):
        load_llava_json(tmp_path / "more", tmp_path / "images", tmp_path / "bad.jsonl")


def test_images_that_come_with_their_records_are_checked_too(load, tmp_path, decoded):
    features = Features(
        {"photos": List(Image_()), "texts": List({"user": Value("string"), "assistant": Value("string")})}
    )
    pair = {"user": "Which?", "assistant": "That."}
    good = {"photos": [{"bytes": png(), "path": "a.jpg"}, {"bytes": png("blue"), "path": None}], "texts": [pair, pair]}
    cut = {"photos": [{"bytes": png()[:-30], "path": "b.png"}], "texts": [pair]}
    path = tmp_path / "data.parquet"
    Dataset.from_list([good, cut], features=features).to_parquet(path)
    with pytest.raises(ValueError, match=r"record 1 \(id None\): image b.png cannot be read: "):
        load_llava_json(path, bad_records_path=tmp_path / "bad.jsonl")
    decoded.clear()
    rows = load_llava_json(path, bad_records_path=tmp_path / "bad.jsonl", skip_bad_records=True)
    assert decoded == []
    assert [image.getpixel((0, 0)) for image in rows[0]["images"]] == [(255, 0, 0), (0, 0, 255)]
    assert [part["type"] for part in rows[0]["messages"][0]["content"]] == ["image", "image", "text"]
    check = check_llava_json(path)
    assert (check.num_records, check.num_bad_records, check.num_images) == (2, 1, 2)
    (note,) = check.notes()
    assert (note["kind"], note["reason"]) == ("other_format", "image a.jpg: it is PNG, though named .jpg")


def test_a_video_of_a_data_set_is_refused_undecoded(tmp_path):
    features = Features({"video": Video(), "prompt": Value("string"), "completion": Value("string")})
    row = {"video": {"bytes": b"no video", "path": None}, "prompt": "What?", "completion": "That."}
    path = tmp_path / "data.parquet"
    Dataset.from_list([row, {**row, "video": None}], features=features).to_parquet(path)
    with pytest.raises(ValueError, match=r"1 of the 2 records.*\n.*record 0 .* has video, which cannot be trained on"):
        load_llava_json(path, bad_records_path=tmp_path / "bad.jsonl")


def test_a_data_set_is_read_by_configuration_and_split(load, tmp_path):
    folder = tmp_path / "images"
    for name in ("one", "two"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for split in ("train", "validation"):
            text = record("<image>\nWhat?", f"{name} {split}")
            (tmp_path / "set" / name / f"{split}.json").write_text(json.dumps([text]))
    card = "configs:\n" + "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("one", "two"))
    (tmp_path / "set" / "README.md").write_text(f"---\n{card}---\n")
    rows = load_llava_json(tmp_path / "set", folder, tmp_path / "bad.jsonl", dataset_config="two", split="validation")
    assert rows["messages"][0][1]["content"][0]["text"] == "two validation"
    with pytest.raises(ValueError, match=r"set cannot be read by datasets with dataset_config=None .*\n.*'one', 'two'"):
        load_llava_json(tmp_path / "set", folder)
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(ValueError, match=r"dataset_config=two has no effect on .*data\.json"):
        load_llava_json(tmp_path / "data.json", folder, dataset_config="two")
    WRITERS["saved splits"](Dataset.from_list([record()]), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"dataset_config=two has no effect on .*saved"):
        load_llava_json(tmp_path / "saved", folder, dataset_config="two")
    with pytest.raises(ValueError, match=r"it has the splits \['test', 'train'\], but 'validation' is needed"):
        load_llava_json(tmp_path / "saved", folder, split="validation")


def test_a_file_that_datasets_cannot_read_is_named(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"json_path=.*data\.parquet cannot be read by datasets"):
        load_llava_json(tmp_path / "data.parquet")
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"have the columns \['text'\], but one of \['conversations', 'messages'"):
        load_llava_json(tmp_path / "data.parquet")


def test_a_record_that_names_a_file_needs_a_folder(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([record()]))
    with pytest.raises(ValueError, match=r"image a\.png is a file, but no image_folder is named"):
        load_llava_json(tmp_path / "data.json", bad_records_path=tmp_path / "bad.jsonl")


def test_a_loss_that_is_turned_off_makes_a_third_column(load):
    quiet = record()
    quiet["conversations"][1]["loss"] = True
    assert load([record(), quiet]).column_names == ["images", "messages"]
    two = record("<image>\nWhat?", "That.", "And?", "This.")
    two["conversations"][1]["loss"] = False
    rows = load([record(), two])
    assert rows.column_names == ["images", "messages", "loss"]
    assert rows["loss"][:] == [[True, True], [True, False, True, True]]


by_fork = pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="processes must inherit a patch")


@by_fork
def test_a_killed_process_is_a_clear_error(load, monkeypatch):
    monkeypatch.setattr(images, "_IMAGES_PER_TASK", 1)
    monkeypatch.setattr(images, "decode_image", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"One of the 2 processes that decode images was killed.*smaller num_proc"):
        load([record(), record(image="whole.jpg")], num_proc=2)


@by_fork
def test_a_killed_run_leaves_no_process_and_no_lock_behind(load, cache, monkeypatch):
    monkeypatch.setattr(images, "_IMAGES_PER_TASK", 1)
    records = [record(), record(image="whole.jpg")]
    alive, inherited = multiprocessing.Pipe(duplex=False)
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode_image", lambda path: (cache / "decoding").touch() or time.sleep(0.2))
        run = multiprocessing.Process(target=load, args=(records,), kwargs={"num_proc": 2})
        run.start()
    while not (cache / "decoding").exists():
        time.sleep(0.01)
    run.kill()
    inherited.close()
    assert alive.poll(20)  # the pipe ends with the last process that has inherited it
    assert len(load(records, num_proc=2)) == 2


@by_fork
def test_of_processes_that_start_together_one_checks_for_all(load, cache, monkeypatch, tmp_path):
    original = images.decode_image

    def decode_slowly(path):
        with open(tmp_path / "decoded.txt", "a") as file:
            file.write(os.path.basename(path) + "\n")
        time.sleep(0.1)
        return original(path)

    monkeypatch.setattr(images, "decode_image", decode_slowly)
    (tmp_path / "data.json").write_text(json.dumps([record(), record(image="whole.jpg")]))
    files = tmp_path / "data.json", tmp_path / "images"
    runs = [multiprocessing.Process(target=load_llava_json, args=files) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert sorted((tmp_path / "decoded.txt").read_text().split()) == ["a.png", "whole.jpg"]


def test_where_locks_do_not_hold_no_run_disturbs_another(load, monkeypatch):
    write_records = data._write_records

    def write_and_be_outrun(read, root, parse, folder):
        write_records(read, root, parse, folder)
        (lock,) = folder.parent.glob("records-*.lock")
        for file in folder.iterdir():  # as another node does in the meantime
            shutil.copy(file, lock.with_suffix(file.suffix))

    monkeypatch.setattr(data, "_write_records", write_and_be_outrun)
    assert len(load([record()])) == 1


def test_every_kind_of_fault_has_a_remedy():
    assert {kind for _, kind, _ in BAD_RECORDS.values()} <= FAULTS.keys()


def test_a_byte_order_mark_is_no_part_of_the_records(data, tmp_path):
    marked = tmp_path / "marked.json"
    marked.write_text("\ufeff" + data[0].read_text(), encoding="utf-8")
    assert load_llava_json(marked, data[1])["messages"] == load_llava_json(data[0], data[1])["messages"]
