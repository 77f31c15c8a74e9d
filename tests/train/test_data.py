"""`load_llava_json` lets only good records through."""

import json

import pytest
from PIL import Image

from delta_llava.train.data import load_llava_json


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
            record(id=7, image=None, conversations=turns("Hello.", "Hi.", "Bye.", "Bye.")),
            {"id": "s", "conversations": [{"from": "system", "value": "Be kind."}, *turns("Hello.", "Hi.")]},
        ]
    )
    assert rows.column_names == ["images", "messages"]
    assert [image.size for image in rows[1]["images"]] == [(30, 20), (64, 64)]
    assert rows[3]["images"] == []
    image, text = {"type": "image", "text": None}, lambda text: {"type": "text", "text": text}
    assert rows[0]["messages"] == [
        {"role": "user", "content": [image, text("What?")]},
        {"role": "assistant", "content": [text("A square.")]},
    ]
    assert rows[1]["messages"][0]["content"] == [image, text("Is this\n"), image, text("that?")]
    assert rows[2]["messages"] == rows[0]["messages"]
    assert [message["role"] for message in rows[3]["messages"]] == ["user", "assistant"] * 2
    assert rows[4]["messages"][0] == {"role": "system", "content": [text("Be kind.")]}


BAD_RECORDS = {
    "not an object": ("text", "not an object"),
    "no id": ({key: value for key, value in record().items() if key != "id"}, "id is None"),
    "image is a number": (record(image=3), "image is 3"),
    "missing image": (record(image="b.png"), "image b.png does not exist"),
    "unreadable image": (record(image="text.png"), "text.png cannot be read: UnidentifiedImageError"),
    "truncated image": (record(image="cut.jpg"), "cut.jpg cannot be read: OSError"),
    "absolute path": (record(image="/etc/hostname"), "leaves the image folder"),
    "path upwards": (record(image="../outside.png"), "leaves the image folder"),
    "path through a link": (record(image="link.png"), "leaves the image folder"),
    "path of no file system": (record(image="a\0.png"), "is no path"),
    "path too long": (record(image="a" * 5000), "is no path"),
    "half a character": (record(conversations=turns("<image>\nWhat?", "\ud83d")), "turn 1 holds half"),
    "no conversations": ({"id": "0"}, "conversations is not a list"),
    "conversations of texts": (record(conversations=["What?", "That."]), "conversations is not a list"),
    "empty conversations": (record(conversations=[]), "must alternate"),
    "answer first": (
        record(conversations=turns("<image>\nA square.", "What?", speakers=("gpt", "human"))),
        "alternate",
    ),
    "question last": (record(conversations=turns("<image>\nWhat?", "This.", "And?")), "must alternate"),
    "two questions": (record(conversations=turns("<image>\nWhat?", "Well?", speakers=("human", "human"))), "alternate"),
    "unknown speaker": (record(conversations=turns("<image>\nWhat?", "This.", speakers=("user", "gpt"))), "alternate"),
    "no value": (record(conversations=[{"from": "human"}, {"from": "gpt", "value": "A"}]), "turn 0 has the value None"),
    "empty answer": (record(conversations=turns("<image>\nWhat?", " ")), "turn 1 has the value ' '"),
    "image in an answer": (record(conversations=turns("What?", "<image>")), "turn 1 from gpt contains <image>"),
    "too few markers": (record(conversations=turns("What?", "This.")), "has 0 <image> and the record 1 images"),
    "too many markers": (record(image=None), "has 1 <image> and the record 0 images"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_stops_the_run_and_is_reported(load, tmp_path, bad, reason):
    with pytest.raises(ValueError, match="1 of the 2 records") as error:
        load([record(), bad])
    report = tmp_path / "out" / "bad_records.jsonl"
    assert str(report) in str(error.value)
    assert "--skip_bad_records" in str(error.value)
    (line,) = map(json.loads, report.read_text().splitlines())
    assert line["index"] == 1
    assert line["id"] == ("0" if isinstance(bad, dict) and "id" in bad else None)
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
    [("{", "is not JSON"), ("[]", "holds an empty list"), ('{"id": 1}', "holds dict"), ('["\xff', "is not JSON")],
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
