"""The demo's world: the same files every time, held-out scenes kept apart, answers that are true."""

import json

import numpy as np
import pytest
from PIL import Image

from delta_llava.demo import atlases, draw, scenes
from delta_llava.train.data import load_llava_json


LAYOUT = scenes.parse("c1 big bus, a1 cat, b2 pear, d4 airplane, d3 panda")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for folder in folders:
        scenes.write_scenes(folder, train_scenes=150, held_out_scenes=50)
    return folders


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_every_design_draws_every_thing_its_own_way():
    for design in atlases.DESIGNS:
        crops = atlases.crops(design)
        assert crops.shape == (len(scenes.THINGS), 64, 64, 4)
        assert (crops[..., 3].reshape(len(crops), -1) > 128).mean(1).min() > 0.05
        assert f"`{design}.webp`" in (atlases.FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    flat = np.stack([atlases.crops(design) for design in atlases.DESIGNS]).reshape(len(atlases.DESIGNS), -1)
    assert len(np.unique(flat, axis=0)) == len(atlases.DESIGNS)
    assert sum(path.stat().st_size for path in atlases.FOLDER.iterdir()) < 3e6
    assert len(scenes.THINGS) == len(set(scenes.THINGS))


def test_the_same_seed_writes_the_same_files(written):
    files = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} for folder in written]
    assert len(files[0]) == 150 + 2 * 50 + 4
    assert files[0] == files[1]


def test_training_data_passes_the_checks_of_the_training_stages(written, tmp_path):
    for name, turns in (("pretrain", 2), ("finetune", 8)):
        dataset = load_llava_json(
            written[0] / f"{name}.json", written[0] / "images", tmp_path / "bad.jsonl", require_images=turns == 2
        )
        assert len(dataset) == 150
        assert dataset[0]["images"][0].size == (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)
        assert max(len(messages) for messages in dataset["messages"]) >= turns


def test_neither_held_out_layouts_nor_the_held_out_design_are_trained_on(written, monkeypatch):
    captions = [row["conversations"][1]["value"] for row in read(written[0], "pretrain")]
    assert not any(scenes.is_held_out(scenes.parse(caption)) for caption in captions)
    assert {row["design"] for row in read(written[0], "held_out")} == set(scenes.TRAIN_DESIGNS)
    assert {row["design"] for row in read(written[0], "held_out_design")} == {"openmoji"}
    drawn = []
    render = scenes.render
    monkeypatch.setattr(
        scenes, "render", lambda layout, rng, design: drawn.append(design) or render(layout, rng, design)
    )
    scenes.write_scenes(written[1], train_scenes=20, held_out_scenes=0)
    assert set(drawn) == set(scenes.TRAIN_DESIGNS) == set(atlases.DESIGNS) - {"openmoji"}
    for seed in range(100):
        for held_out in (False, True):
            layout = scenes.random_layout(np.random.default_rng(seed), held_out)
            assert scenes.is_held_out(layout) == held_out and scenes.parse(scenes.tell(layout)) == layout


def test_answers_agree_with_the_layout():
    rng = np.random.default_rng(0)
    asked = {scenes.ask(LAYOUT, rng, name) for name in scenes.QUESTION_TYPES for _ in range(400)}
    assert asked >= {
        ("What is at d2?", "bus", "big"),
        ("What is at a1?", "cat", "small"),
        ("What is at a4?", "nothing", None),
        ("Where is the bus?", "c1", "big"),
        ("Where is the airplane?", "d4", "small"),
        ("What is right of the pear?", "bus", None),
        ("What is above the airplane?", "panda", None),
        ("What is left of the airplane?", "nothing", None),
        ("How many animals are there?", "two", None),
        ("How many vehicles are there?", "two", None),
        ("How many tools are there?", "zero", None),
        ("Which group does the thing at c2 belong to?", "vehicles", "big"),
        ("Is there an airplane?", "yes", "small"),
        ("Is there a tiger?", "no", None),
    }
    assert len({question for question, *_ in asked}) == len(asked), "a question has two answers"
    assert not any(question.startswith("What is above the bus") for question, *_ in asked)  # of big things it is open


def test_a_question_that_a_scene_does_not_allow_is_not_asked():
    rng = np.random.default_rng(0)
    only_big = scenes.parse("a1 big cat")
    assert scenes.ask(only_big, rng, "beside") is None


def test_blind_guessing_stays_below_45_percent(written):
    questions = read(written[0], "held_out")
    assert {row["type"] for row in questions} == set(scenes.QUESTION_TYPES)
    frequent = 0
    for name in scenes.QUESTION_TYPES:
        answers = [row["answer"] for row in questions if row["type"] == name]
        frequent += max(map(answers.count, answers))
    assert frequent / len(questions) < 0.45


def test_things_are_drawn_at_their_places(written):
    picture = scenes.render(LAYOUT, np.random.default_rng(0), "noto").astype(float)
    places = picture.reshape(4, 24, 4, 24, 3).std((1, 3)).sum(-1)
    filled = [[scenes.COLUMNS[c] + scenes.ROWS[r] in scenes.covered(LAYOUT) for c in range(4)] for r in range(4)]
    assert places[np.array(filled)].min() > 3 * places[~np.array(filled)].max()
    assert Image.open(written[0] / "images" / "train-00000.png").size == (96, 96)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a1 cat, e2 bus", r"'e2 bus': there is no place 'e2'; columns are a to d, rows 1 to 4"),
        ("a1 dragon", r"'a1 dragon': there is no 'dragon'; things are panda, mouse"),
        ("b1 big cat", r"a big thing is at one of a1, c1, a3, c3"),
        ("a1 cat, c1 cat", r"cat occurs twice"),
        ("a1 big cat, b2 bus", r"'b2 bus' and 'a1 big cat' are both at b2"),
        ("cat", r"'cat' is not a thing at a place: write it like 'a1 cat'"),
        ("a1 cat,", r"'' is not a thing at a place"),
    ],
)
def test_a_scene_that_cannot_be_drawn_is_refused_by_name(text, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        draw.main([text, "--output", str(tmp_path / "scene.png")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "scene"), "--output scene is not a picture file: name one such as scene.png"),
        (("--output", "scene.psd"), "--output scene.psd is not a picture file"),
        (("--seed", "-1"), "--seed -1 is negative"),
        (("--output", "missing/scene.png"), "missing/scene.png"),
    ],
)
def test_an_option_that_cannot_be_is_named(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        draw.main(["a1 cat", *options])


def test_a_scene_of_one_s_own_is_drawn_in_the_design_asked_for(tmp_path, capsys):
    pictures = {}
    for design in ("noto", "openmoji"):
        draw.main(["a1 cat, c3 big bus", "--output", str(tmp_path / f"{design}.png"), "--design", design])
        pictures[design] = Image.open(tmp_path / f"{design}.png")
        assert pictures[design].size == (96, 96) and f"written: {tmp_path}" in capsys.readouterr().out
    assert pictures["noto"].tobytes() != pictures["openmoji"].tobytes()
