"""Records of every usual form say what they mean, or are bad by name; what means nothing here is noted."""

import base64
import json
import pickle

import pytest
from llava_records import turns

from delta_llava import records
from delta_llava.records import BadRecord, parse_record, read_records
from delta_llava.train.check_data import FAULTS


IMAGE = {"type": "image", "text": None}


def text(value):
    return {"type": "text", "text": value}


def say(role, *content):
    return {"role": role, "content": [text(part) if isinstance(part, str) else part for part in content]}


def llava(*values, **changes):
    return {"id": "0", "conversations": turns(*values), **changes}


def chat(*values, **changes):
    turns = [{"role": ("user", "assistant")[index % 2], "content": value} for index, value in enumerate(values)]
    return {"messages": turns, **changes}


PLACED = [say("user", IMAGE, "What?"), say("assistant", "That.")]
ENCODED = base64.b64encode(b"pixels").decode()
FORMS = {
    "LLaVA": (llava("<image>\nWhat?", "That.", image="a.png"), ["a.png"], PLACED),
    "LLaVA with a list": (llava("What?\n<image>", "That.", images=["a.png"], id=None), ["a.png"], PLACED),
    "system as a key": (
        llava("What?", "That.", system="Be kind."),
        [],
        [say("system", "Be kind."), say("user", "What?"), say("assistant", "That.")],
    ),
    "no system": (llava("<image>What?", "That.", system=" ", image="a.png"), ["a.png"], PLACED),
    "ShareGPT with users": (
        {"conversations": chat("<image>What?", "That.")["messages"], "images": ["a.png"]},
        ["a.png"],
        PLACED,
    ),
    "TRL, texts": (chat("What?", "That.", images=["a.png"]), ["a.png"], PLACED),
    "TRL, texts with placeholders": (chat("<image>\nWhat?", "That.", image="a.png"), ["a.png"], PLACED),
    "TRL, two images": (
        chat("Hm?", "Hm.", "What?", "That.", images=["a.png", "b.png"]),
        ["a.png", "b.png"],
        [say("user", IMAGE, IMAGE, "Hm?"), say("assistant", "Hm."), say("user", "What?"), say("assistant", "That.")],
    ),
    "TRL, parts": (
        chat([{"type": "image", "index": 0}, text("What?")], [text("Th"), text("at.")], images=[{"path": "a.png"}]),
        ["a.png"],
        PLACED,
    ),
    "parts that name their image": (
        chat([{"type": "image", "image": "a.png"}, text("What?")], "That."),
        ["a.png"],
        PLACED,
    ),
    "places are kept": (
        chat([text("What?"), {"type": "image", "path": "a.png"}], "That."),
        ["a.png"],
        [say("user", "What?", IMAGE), say("assistant", "That.")],
    ),
    "OpenAI": (
        chat([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{ENCODED}"}}, text("What?")], "That."),
        [{"bytes": b"pixels", "path": None}],
        PLACED,
    ),
    "a data URL with line breaks": (
        llava("<image>What?", "That.", image=f"DATA:;base64,{ENCODED[:4]}\n{ENCODED[4:]}\n"),
        [{"bytes": b"pixels", "path": None}],
        PLACED,
    ),
    "base64": (
        chat([{"type": "image", "base64": ENCODED}, text("What?")], "That."),
        [{"bytes": b"pixels", "path": None}],
        PLACED,
    ),
    "a file's URL": (chat([{"type": "image", "url": "file://a.png"}, text("What?")], "That."), ["a.png"], PLACED),
    "developer": (
        {"messages": [{"role": "developer", "content": "Be kind."}, *chat("What?", "That.")["messages"]]},
        [],
        [say("system", "Be kind."), say("user", "What?"), say("assistant", "That.")],
    ),
    "prompt and completion": ({"prompt": "What?", "completion": "That.", "images": ["a.png"]}, ["a.png"], PLACED),
    "The Cauldron": ({"texts": [{"user": "What?", "assistant": "That."}], "images": ["a.png"]}, ["a.png"], PLACED),
    "what Arrow adds": (
        chat(
            [{"type": "image", "text": None}, text("What?")], "That.", image="a.png", images=None, video=None, tools=[]
        ),
        ["a.png"],
        PLACED,
    ),
}


@pytest.mark.parametrize(("record", "images", "messages"), FORMS.values(), ids=FORMS)
def test_every_form_says_what_it_means(record, images, messages):
    found = parse_record(record)
    assert found.images == images
    assert found.messages == messages
    assert found.loss == [True] * len(messages)
    assert [note for note in found.notes if note["kind"] != "placeholder_moved"] == []


def weighed(*turns):
    return {"conversations": [{"from": role, "value": "x", **keys} for role, keys in turns]}


LOSSES = {
    "loss": (weighed(("human", {}), ("gpt", {"loss": False}), ("human", {}), ("gpt", {"loss": True})), [1, 0, 1, 1]),
    "weight": (
        weighed(
            ("system", {"weight": 0}), ("human", {}), ("gpt", {"weight": 0}), ("human", {}), ("gpt", {"weight": 1.0})
        ),
        [1, 1, 0, 1, 1],
    ),
    **{
        key: (weighed(("human", {key: 0}), ("gpt", {key: off}), ("human", {}), ("gpt", {})), [1, 0, 1, 1])
        for key, off in (("loss_mask", 0), ("train_on_turn", False), ("train", False))
    },
    "a prompt": (
        {"prompt": chat("a", "b", "c")["messages"], "completion": [{"role": "assistant", "content": "d"}]},
        [1, 0, 1, 1],
    ),
    "a prompt that says otherwise": (
        {"prompt": weighed(("user", {}), ("gpt", {"weight": 1}), ("user", {}))["conversations"], "completion": "d"},
        [1, 1, 1, 1],
    ),
    "a pair": (
        {"texts": [{"user": "a", "assistant": "b", "loss": False}, {"user": "c", "assistant": "d"}]},
        [1, 0, 1, 1],
    ),
}


@pytest.mark.parametrize(("record", "loss"), LOSSES.values(), ids=LOSSES)
def test_a_turn_says_whether_it_is_learnt(record, loss):
    assert parse_record(record).loss == [bool(keeps) for keeps in loss]
    assert parse_record(record).notes == []


BAD = {
    "conversations of texts": ({"conversations": ["What?", "That."]}, "turns", "conversations is not a list"),
    "empty conversations": (llava(), "turns", "must alternate"),
    "question last": (llava("a", "b", "c"), "turns", "must alternate"),
    "unknown speaker": (weighed(("human", {}), ("tool", {})), "turns", "from ['human', 'tool']: they must alternate"),
    "no value": (weighed(("human", {"value": None}), ("gpt", {})), "turns", "turn 0 has the value None"),
    "empty answer": (llava("a", " "), "turns", "turn 1 has the value ' '"),
    "image in an answer": (llava("a", "<image>"), "placeholder_in_answer", "turn 1 from gpt contains <image>"),
    "too many placeholders": (llava("<image>", "b"), "placeholder_surplus", "has 1 <image> and the record 0 images"),
    "half a character": (llava("a", "\ud83d"), "text", "turn 1 holds half of a surrogate pair"),
    "path with half a character": (llava("<image>", "b", image="\udc80.png"), "text", "holds half of a surrogate pair"),
    "no turns": ({"id": "0", "text": "x"}, "turns", "it has ['id', 'text']"),
    "turns twice": ({**llava("a", "b"), **chat("a", "b")}, "turns", "as conversations and as messages: keep one"),
    "role twice": (weighed(("human", {"role": "user"}), ("gpt", {})), "turns", "turn 0 has from and role: keep one"),
    "images twice": (llava("<image>", "b", image="a.png", images=["b.png"]), "turns", "has image and images"),
    "system twice": (
        {"system": "a", **weighed(("system", {}), ("human", {}), ("gpt", {}))},
        "turns",
        "a system prompt and a system turn",
    ),
    "system is a list": (llava("a", "b", system=["x"]), "turns", "system is ['x'], not a text"),
    "image in the system prompt": (llava("a", "b", system="<image>"), "placeholder_in_answer", "the key system"),
    "system late": (weighed(("human", {}), ("gpt", {}), ("system", {})), "turns", "must alternate"),
    "weight of a half": (weighed(("human", {}), ("gpt", {"weight": 0.5})), "loss", "has the weight 0.5"),
    "loss in words": (weighed(("human", {}), ("gpt", {"loss": "no"})), "loss", "has the loss 'no'"),
    "loss on a question": (weighed(("human", {"loss": True}), ("gpt", {})), "loss", "only answers are learnt"),
    "loss that contradicts": (weighed(("human", {}), ("gpt", {"loss": True, "weight": 0})), "loss", "contradicts"),
    "nothing learnt": (weighed(("human", {}), ("gpt", {"loss": False})), "loss", "nothing is left to learn"),
    "video": (llava("a", "b", video="a.mp4"), "unsupported", "the record has video"),
    "tools": (chat("a", "b", tools=[{"name": "f"}]), "unsupported", "the record has tools"),
    "a tool call": (weighed(("human", {}), ("gpt", {"tool_calls": [{}]})), "unsupported", "turn 1 has tool_calls"),
    "video part": (chat([{"type": "video"}, text("a")], "b"), "part", "turn 0 has the part {'type': 'video'}"),
    "a text as a part": (chat(["a"], "b"), "part", "turn 0 has the part {'type': 'a'}"),
    "a part without text": (chat([{"type": "text"}], "b"), "part", "turn 0 has the part"),
    "image part of an answer": (chat("a", [IMAGE]), "placeholder_in_answer", "turn 1 from assistant"),
    "image named by part and record": (
        chat([{"type": "image", "image": "a.png"}, text("a")], "b", images=["a.png"]),
        "turns",
        "both by itself and in the parts",
    ),
    "images in another order": (
        chat([{"type": "image", "index": 1}, {"type": "image", "index": 0}, text("a")], "b", images=["a.png", "b.png"]),
        "part",
        "has image 1 where 0 is expected",
    ),
    "parts without images": (
        chat([text("a")], "b", image="a.png"),
        "placeholder_missing",
        "0 <image> and the record 1",
    ),
    "LLaVA without a placeholder": (
        llava("a", "b", image="a.png"),
        "placeholder_missing",
        "0 <image> and the record 1",
    ),
    "too few placeholders": (chat("<image>a", "b", images=["a", "b"]), "placeholder_missing", "1 <image> and the"),
    "too many parts": (
        chat([IMAGE, {"type": "image", "url": "a.png"}, text("a")], "b"),
        "placeholder_surplus",
        "2 <image> and the record 1 images",
    ),
    "another program's placeholder": (llava("<ImageHere>", "b", image="a"), "placeholder_foreign", "'<ImageHere>'"),
    "a token for an image": (chat("<|image_pad|>a", "b", image="a"), "placeholder_foreign", "'<|image_pad|>'"),
    "numbered placeholders": (chat("<image_1>?", "b", images=["a"]), "placeholder_foreign", "'<image_1>'"),
    "a URL": (chat([{"type": "image", "url": "https://x.y/a.png"}], "b"), "address", "is an address, not a file"),
    "broken base64": (llava("<image>", "b", image="data:image/png;base64,?"), "address", "cannot be decoded"),
    "image of a number": (llava("<image>", "b", image=[3]), "record", "image is 3"),
    "image of an object": (llava("<image>", "b", image={"name": "a.png"}), "record", "image is {'name': 'a.png'}"),
    "image is false": (llava("a", "b", image=False), "record", "image is False"),
}


@pytest.mark.parametrize(("record", "kind", "reason"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_right_is_bad(record, kind, reason):
    with pytest.raises(BadRecord) as error:
        parse_record(record)
    assert (error.value.kind, reason in str(error.value)) == (kind, True), error.value
    assert pickle.loads(pickle.dumps(error.value)).kind == kind  # as workers pass it on
    assert kind in FAULTS  # with a remedy


STAGE_1 = {
    "no image": (llava("a", "b"), "no_image"),
    "two questions": (llava("<image>", "b", "c", "d", image="a.png"), "answer"),
    "a system turn": (
        {**weighed(("system", {}), ("human", {"value": "<image>"}), ("gpt", {})), "image": "a.png"},
        "answer",
    ),
    "a system prompt": (llava("<image>", "b", image="a.png", system="x"), "answer"),
}


@pytest.mark.parametrize(("record", "kind"), STAGE_1.values(), ids=STAGE_1)
def test_stage_1_takes_one_question_and_one_answer(record, kind):
    parse_record(record)
    with pytest.raises(BadRecord) as error:
        parse_record(record, require_images=True)
    assert error.value.kind == kind and kind in FAULTS
    assert parse_record(llava("<image>", "b", image="a.png"), require_images=True).images == ["a.png"]


def test_keys_that_nothing_reads_are_noted_by_name():
    record = chat(
        [{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}, "cache": 1}, text("a")], "b", model="m"
    )
    record["messages"][1]["name"] = "x"
    record["prompt"], record["\ud800"], record["nothing"] = "a", 0, None
    reasons = ["content[].cache", "image.detail", "messages[].name", "model", "prompt", "\\ud800"]
    assert parse_record(record).notes == [{"kind": "ignored_key", "reason": reason} for reason in reasons]


def test_another_programs_placeholder_beside_ours_is_noted():
    (note,) = parse_record(llava("<image>\n<ImageHere>What?", "b", image="a.png")).notes
    assert (note["kind"], note["reason"]) == ("foreign_text", "'<ImageHere>' is trained as text")
    assert parse_record(llava("<image>\nWhat does <b>this</b> say?", "<img>", image="a.png")).notes == []
    assert parse_record(llava("How is <img> written?", "So.")).notes == []


def test_what_is_nested_deeply_is_named_briefly():
    nested = []
    for _ in range(900):
        nested = [nested]
    for record in ({"id": nested}, llava(nested, "b"), llava("<image>", "b", image=nested), chat([nested], "b")):
        with pytest.raises(BadRecord) as error:
            parse_record(record)
        assert len(str(error.value)) < 300


SOUND_JSON = """ [
    {"id": "ä😀\\ud83d", "value": [1, 2.5, -3e-2, true, null, NaN]}, 12345, "a]\\",[" , [], [[ ]], false
] """


@pytest.mark.parametrize("characters", [2, 3, 7, 2**20])
def test_records_are_read_one_by_one_as_the_whole_would_be(tmp_path, monkeypatch, characters):
    monkeypatch.setattr(records, "_CHARACTERS_PER_READ", characters)
    path = tmp_path / "data.json"
    path.write_text(SOUND_JSON, encoding="utf-8")
    assert repr(list(read_records(path))) == repr(json.loads(SOUND_JSON))  # repr, because NaN != NaN


@pytest.mark.parametrize("characters", [3, 2**20])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[ ]", "holds an empty list"),
        ("null", "holds NoneType"),
        ("[1, 2", "is not JSON (record 1: the file ends before the list does"),
        ("[1, 2,]", "record 2: Expecting value at ']'"),
        ('[1, {"id" 2}, 3]', "record 1: Expecting ':' delimiter at '2}, 3]'"),
        ("[1, 2 3]", "record 1 is followed by '3"),
        ("[1]\n[2]", "the list is followed by '[2"),
        ('{"id": 1}\n5', "record 0 is followed by '5', not by an object"),
        ('{"id": 1}\n{"id": 2', "record 1: Expecting ',' delimiter"),
        ("[1, " + "[" * 100_000, "record 1: it is nested too deeply"),
        ("[1, " + "9" * 5000, "record 1: Exceeds the limit"),
    ],
)
def test_broken_json_is_an_error_after_the_good_records_before_it(tmp_path, monkeypatch, characters, content, reason):
    monkeypatch.setattr(records, "_CHARACTERS_PER_READ", characters)
    path, found = tmp_path / "data.json", []
    path.write_text(content)
    with pytest.raises(ValueError, match=r"data\.json (is not JSON|holds)") as error:
        found.extend(read_records(path))
    assert reason in str(error.value)
    assert found in ([1, 2][: len(found)], [{"id": 1}])


@pytest.mark.parametrize("characters", [3, 2**20])
@pytest.mark.parametrize("text", ['{"id": 1}\n{"id": {"a": "}"}}\n\n', ' {"id": 1}{"id": {"a": "}"}}'])
def test_json_lines_are_read_one_by_one(tmp_path, monkeypatch, characters, text):
    monkeypatch.setattr(records, "_CHARACTERS_PER_READ", characters)
    (tmp_path / "data.jsonl").write_text(text)
    assert list(read_records(tmp_path / "data.jsonl")) == [{"id": 1}, {"id": {"a": "}"}}]


def test_a_record_without_end_is_not_read_to_the_end_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_CHARACTERS_PER_READ", 10)
    monkeypatch.setattr(records, "_MAX_CHARACTERS_PER_RECORD", 100)
    (tmp_path / "data.json").write_text('[1, "' + "a" * 300 + '"]')
    with pytest.raises(ValueError, match="record 1: Unterminated string"):
        list(read_records(tmp_path / "data.json"))


def test_a_broken_byte_is_an_error(tmp_path):
    (tmp_path / "data.json").write_bytes(b'[1, "\xed\xa0\xbd"]')
    with pytest.raises(ValueError, match=r"is not JSON .*invalid continuation byte"):
        list(read_records(tmp_path / "data.json"))
