"""`load_llava_json` lets only good records through, and looks at what it has checked only once."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time

import datasets
import PIL.Image
import pytest
from PIL import Image

from delta_llava.train import data, images
from delta_llava.train.check_data import FAULTS, NOTES
from delta_llava.train.data import BadRecord, check_llava_json, load_llava_json, parse_record, read_records


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


def record(**changes):
    """A good record, with what a test wants different."""
    good = {
        "id": "0",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}],
    }
    return {**good, **changes}


def turns(*values, speakers=("human", "gpt")):
    return [{"from": speakers[index % 2], "value": value} for index, value in enumerate(values)]


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
            record(image=["a.png", "whole.jpg"], conversations=turns("<image>\nIs this\n<image>\nthat?", "No.")),
            record(conversations=turns("What?\n<image>", "A square.")),
            record(conversations=turns("<image> \n What? ", " A square.")),
            record(id=7, image=None, conversations=turns("Hello.", "Hi.", "Bye.", "Bye.")),
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


BAD_RECORDS = {
    "not an object": ("text", "record", "not an object"),
    "no id": ({key: value for key, value in record().items() if key != "id"}, "record", "id is None"),
    "image is a number": (record(image=3), "record", "image is 3"),
    "missing image": (record(image="b.png"), "missing", "image b.png does not exist"),
    "missing image of OCR-VQA": (record(image="ocr_vqa/b.jpg"), "missing_ocr_vqa", "image ocr_vqa/b.jpg does not"),
    "other suffix": (
        record(image="a.jpg"),
        "missing_other_suffix",
        "image a.jpg does not exist in the image folder, but a.png does",
    ),
    "other case": (
        record(image="A.png"),
        "missing_other_name",
        "image A.png does not exist in the image folder, but a.png",
    ),
    "a folder": (
        record(image="folder"),
        "missing",
        "image folder does not exist in the image folder: it is not a file",
    ),
    "path behind a file": (record(image="a.png/b.png"), "missing", "a.png/b.png does not exist"),
    "unreadable image": (record(image="text.png"), "unreadable", "text.png cannot be read: it is no image of the"),
    "truncated image": (record(image="cut.jpg"), "truncated", "cut.jpg cannot be read: image file is truncated"),
    "absolute path": (record(image="/etc/hostname"), "outside", "leaves the image folder"),
    "path upwards": (record(image="../outside.png"), "outside", "leaves the image folder"),
    "path up and down": (record(image="folder/../../outside.png"), "outside", "leaves the image folder"),
    "path through a link": (record(image="link.png"), "outside", "leaves the image folder"),
    "path through a linked folder": (record(image="linked/outside.png"), "outside", "leaves the image folder"),
    "path up from a linked folder": (record(image="linked/../outside.png"), "outside", "leaves the image folder"),
    "path of no file system": (record(image="a\0.png"), "no_path", "is no path"),
    "path too long": (record(image="a" * 5000), "no_path", "is no path"),
    "a loop of links": (record(image="loop.png"), "no_path", "is no path"),
    "path with half a character": (record(image="\udc80.png"), "text", "holds half of a surrogate pair"),
    "half a character": (record(conversations=turns("<image>\nWhat?", "\ud83d")), "text", "turn 1 holds half"),
    "no conversations": ({"id": "0"}, "turns", "conversations is not a list"),
    "conversations of texts": (record(conversations=["What?", "That."]), "turns", "conversations is not a list"),
    "empty conversations": (record(conversations=[]), "turns", "must alternate"),
    "answer first": (
        record(conversations=turns("<image>\nA square.", "What?", speakers=("gpt", "human"))),
        "turns",
        "alternate",
    ),
    "question last": (record(conversations=turns("<image>\nWhat?", "This.", "And?")), "turns", "must alternate"),
    "two questions": (
        record(conversations=turns("<image>\nWhat?", "Well?", speakers=("human", "human"))),
        "turns",
        "alternate",
    ),
    "unknown speaker": (
        record(conversations=turns("<image>\nWhat?", "This.", speakers=("user", "gpt"))),
        "turns",
        "alternate",
    ),
    "no value": (
        record(conversations=[{"from": "human"}, {"from": "gpt", "value": "A"}]),
        "turns",
        "turn 0 has the value None",
    ),
    "empty answer": (record(conversations=turns("<image>\nWhat?", " ")), "turns", "turn 1 has the value ' '"),
    "image in an answer": (
        record(conversations=turns("What?", "<image>")),
        "marker_in_answer",
        "turn 1 from gpt contains <image>",
    ),
    "too few markers": (
        record(conversations=turns("What?", "This.")),
        "marker_missing",
        "has 0 <image> and the record 1 images",
    ),
    "too many markers": (record(image=None), "marker_surplus", "has 1 <image> and the record 0 images"),
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
    assert line["id"] == ("0" if isinstance(bad, dict) and "id" in bad else None)
    assert line["kind"] == kind
    assert reason in line["reason"]
    assert reason in str(error.value)


def test_the_file_of_a_bad_image_is_reported(load, tmp_path):
    with pytest.raises(ValueError, match="3 of the 4 records"):
        load([record(), record(image="b.png"), record(image="../outside.png"), record(image="cut.jpg")])
    lines = map(json.loads, (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines())
    assert [line["file"] for line in lines] == ["b.png", "../outside.png", "cut.jpg"]


def test_bad_records_are_left_out_when_asked_and_their_list_goes_once_they_are_mended(load, tmp_path):
    good = record(conversations=turns("<image>\nWhat?", "Another."))
    rows = load([record(image="b.png"), good, record(image="cut.jpg")], skip_bad_records=True)
    assert [row["messages"][1]["content"][0]["text"] for row in rows] == ["Another."]
    assert len((tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()) == 2
    load([good])
    assert not (tmp_path / "out" / "bad_records.jsonl").exists()
    with pytest.raises(ValueError, match="No record is left"):
        load([record(image="b.png")], skip_bad_records=True)


def test_a_record_without_image_is_bad_where_images_are_required(load):
    with pytest.raises(ValueError, match="the record has no image"):
        load([record(), record(image=None, conversations=turns("Hello.", "Hi."))], require_images=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        (" [ ] ", "holds an empty list"),
        ('{"id": 1}', "holds dict"),
        ("null", "holds NoneType"),
        ('["\xff', "is not JSON"),
        ("\ufeff[1]", r"is not JSON \(Unexpected UTF-8 BOM"),
        ('{"id": 1}\n{"id": 2}', r"is not JSON \(Extra data"),
    ],
)
def test_a_file_that_is_no_list_is_refused(load, content, message):
    with pytest.raises(ValueError, match=message):
        load(content)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"json_path=.*none\.json is not a file"):
        load_llava_json(tmp_path / "none.json", tmp_path)
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"image_folder=.*none is not a folder"):
        load_llava_json(tmp_path / "data.json", tmp_path / "none")


SOUND_JSON = """ [
    {"id": "ä😀\\ud83d", "value": [1, 2.5, -3e-2, true, null, NaN]}, 12345, "a]\\",[" , [], [[ ]], false
] """


@pytest.mark.parametrize("characters", [2, 3, 7, 2**20])
def test_records_are_read_one_by_one_as_the_whole_would_be(tmp_path, monkeypatch, characters):
    monkeypatch.setattr(data, "_CHARACTERS_PER_READ", characters)
    path = tmp_path / "data.json"
    path.write_text(SOUND_JSON, encoding="utf-8")
    assert repr(list(read_records(path))) == repr(json.loads(SOUND_JSON))  # repr, because NaN != NaN


@pytest.mark.parametrize("characters", [3, 2**20])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1, 2", "record 1: the file ends before the list does"),
        ("[1, 2,", "record 2: Expecting value"),
        ("[1, 2,]", r"record 2: Expecting value at ']'"),
        ('[1, {"id" 2}, 3]', "record 1: Expecting ':' delimiter at '2}, 3]'"),
        ("[1, 2 3]", "record 1 is followed by '3"),
        ("[1, 2] 3", "the list is followed by '3'"),
    ],
)
def test_broken_json_is_an_error_after_the_good_records_before_it(tmp_path, monkeypatch, characters, content, reason):
    monkeypatch.setattr(data, "_CHARACTERS_PER_READ", characters)
    path, records = tmp_path / "data.json", []
    path.write_text(content)
    with pytest.raises(ValueError, match=r"data\.json is not JSON") as error:
        records.extend(read_records(path))
    assert reason in str(error.value)
    assert records == [1, 2][: len(records)]


def test_a_record_without_end_is_not_read_to_the_end_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CHARACTERS_PER_READ", 10)
    monkeypatch.setattr(data, "_MAX_CHARACTERS_PER_RECORD", 100)
    (tmp_path / "data.json").write_text('[1, "' + "a" * 300 + '"]')
    with pytest.raises(ValueError, match="record 1: Unterminated string"):
        list(read_records(tmp_path / "data.json"))


def test_a_broken_byte_is_an_error(tmp_path):
    (tmp_path / "data.json").write_bytes(b'[1, "\xed\xa0\xbd"]')
    with pytest.raises(ValueError, match=r"is not JSON .*invalid continuation byte"):
        list(read_records(tmp_path / "data.json"))


def test_a_record_is_parsed_without_its_files():
    images, messages = parse_record(
        record(image=["none/a.png", "../b.png"], conversations=turns("<image><image>?", "!"))
    )
    assert images == ["none/a.png", "../b.png"]
    assert [part["type"] for part in messages[0]["content"]] == ["image", "image", "text"]
    assert parse_record({"id": 1, "conversations": turns("?", "!")})[0] == []
    with pytest.raises(BadRecord, match="has 0 <image>") as error:
        parse_record(record(conversations=turns("?", "!")))
    assert error.value.kind == "marker_missing"
    assert pickle.loads(pickle.dumps(error.value)).kind == "marker_missing"  # as workers hand it on
    with pytest.raises(BadRecord, match="has no image"):
        parse_record({"id": 1, "conversations": turns("?", "!")}, require_images=True)


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
    rows = load([record(conversations=turns("<image>\nWhat?", "Another."))])
    assert rows["messages"][0][1]["content"][0]["text"] == "Another."
    assert decoded == []
    with pytest.raises(ValueError, match="has no image"):
        load([record(image=None, conversations=turns("What?", "That."))], require_images=True)


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


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif"])
def test_a_cut_image_is_found_wherever_it_is_cut(load, tmp_path, suffix):
    options = {"progressive": True} if suffix == "jpg" else {}
    image = tmp_path / "images" / f"noise.{suffix}"
    Image.effect_noise((200, 130), 50).save(image, **options)
    whole = image.read_bytes()
    assert len(load([record(image=image.name)])) == 1
    end = 1 if suffix == "jpg" else 25  # behind the pixels' last byte there is nothing to miss
    for cut in (end, 40, 300, len(whole) // 2, len(whole) - 200, len(whole) - 4, len(whole)):
        image.write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=f"noise.{suffix} cannot be read"):
            load([record(image=image.name)])


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


by_fork = pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="processes must inherit a patch")


@by_fork
def test_a_killed_process_is_a_clear_error(load, monkeypatch):
    monkeypatch.setattr(images, "_IMAGES_PER_TASK", 1)
    monkeypatch.setattr(images, "_decode_image", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"One of the 2 processes that decode images was killed.*smaller num_proc"):
        load([record(), record(image="whole.jpg")], num_proc=2)


@by_fork
def test_a_killed_run_leaves_no_process_and_no_lock_behind(load, cache, monkeypatch):
    monkeypatch.setattr(images, "_IMAGES_PER_TASK", 1)
    records = [record(), record(image="whole.jpg")]
    alive, inherited = multiprocessing.Pipe(duplex=False)
    with monkeypatch.context() as patch:
        patch.setattr(images, "_decode_image", lambda path: (cache / "decoding").touch() or time.sleep(0.2))
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
    original = images._decode_image

    def decode_slowly(path):
        with open(tmp_path / "decoded.txt", "a") as file:
            file.write(os.path.basename(path) + "\n")
        time.sleep(0.1)
        return original(path)

    monkeypatch.setattr(images, "_decode_image", decode_slowly)
    runs = [multiprocessing.Process(target=load, args=([record(), record(image="whole.jpg")],)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert sorted((tmp_path / "decoded.txt").read_text().split()) == ["a.png", "whole.jpg"]


def test_where_locks_do_not_hold_whoever_is_first_wins(load, monkeypatch):
    write_records = data._write_records

    def write_and_be_outrun(json_path, root, require_images, folder):
        write_records(json_path, root, require_images, folder)
        (lock,) = folder.parents[1].glob("records-*.lock")
        shutil.copytree(folder, lock.with_suffix(""))  # as another node does in the meantime

    monkeypatch.setattr(data, "_write_records", write_and_be_outrun)
    assert len(load([record()])) == 1


def test_every_kind_of_fault_and_note_has_a_remedy():
    used = {kind for _, kind, _ in BAD_RECORDS.values()}
    assert used | {"no_image", "too_large"} == FAULTS.keys()
    assert not FAULTS.keys() & NOTES.keys()
