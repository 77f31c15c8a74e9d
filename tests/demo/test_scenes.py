"""The demo's world: the same files every time, held-out scenes and scans kept apart, answers that are true."""

import json

import numpy as np
import pytest
from PIL import Image

from delta_llava.demo import scenes
from delta_llava.train.data import load_llava_json


LAYOUT = (("red", "circle"), None, ("blue", "7"), ("red", "triangle"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for folder in folders:
        scenes.write_scenes(folder, train_scenes=150, held_out_scenes=50)
    return folders


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_the_same_seed_writes_the_same_files(written):
    files = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} for folder in written]
    assert len(files[0]) == 150 + 50 + 3
    assert files[0] == files[1]


def test_training_data_passes_the_checks_of_the_training_stages(written, tmp_path):
    for name, turns in (("pretrain", 2), ("finetune", 8)):
        dataset = load_llava_json(
            written[0] / f"{name}.json", written[0] / "images", tmp_path / "bad.jsonl", require_images=turns == 2
        )
        assert len(dataset) == 150
        assert dataset[0]["images"][0].size == (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)
        assert max(len(messages) for messages in dataset["messages"]) >= turns


def test_held_out_layouts_and_scans_occur_in_no_training_scene():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        layouts = {held_out: scenes.random_layout(rng, held_out) for held_out in (False, True)}
        for held_out, layout in layouts.items():
            assert scenes.is_held_out(layout) == held_out
            allowed = np.concatenate(list(scenes.digit_scans(held_out).values()))
            assert set(scenes.render(layout, rng, held_out)[1]) <= set(allowed.tolist())
    sides = [set(np.concatenate(list(scenes.digit_scans(held_out).values()))) for held_out in (False, True)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 1797


def test_answers_agree_with_the_layout():
    rng = np.random.default_rng(0)
    asked = {scenes.ask(LAYOUT, rng, name) for name in scenes.QUESTION_TYPES for _ in range(200)}
    assert asked >= {
        ("What is at the top right?", "nothing"),
        ("What is at the bottom left?", "digit"),
        ("What colour is the thing at the bottom right?", "red"),
        ("Which digit is at the bottom left?", "7"),
        ("Where is the blue thing?", "bottom left"),
        ("How many things are there?", "three"),
        ("How many red things are there?", "two"),
        ("How many green things are there?", "zero"),
    }
    assert len({question for question, _ in asked}) == len(asked), "a question has two answers"


def test_a_question_that_a_scene_does_not_allow_is_not_asked():
    twins = (("red", "circle"), ("red", "square"), None, None)
    rng = np.random.default_rng(0)
    assert scenes.ask(twins, rng, "digit") is None
    assert scenes.ask(twins, rng, "place") is None


def test_blind_guessing_stays_below_45_percent(written):
    questions = read(written[0], "held_out")
    assert {row["type"] for row in questions} == set(scenes.QUESTION_TYPES)
    frequent = 0
    for name in scenes.QUESTION_TYPES:
        answers = [row["answer"] for row in questions if row["type"] == name]
        frequent += max(map(answers.count, answers))
    assert frequent / len(questions) < 0.45


def test_things_are_drawn_at_their_places_in_their_colours(written):
    picture = scenes.render(LAYOUT, np.random.default_rng(0), held_out=False)[0].astype(int)
    spread = [np.ptp(picture[r : r + 24, c : c + 24], axis=-1).max() for r in (0, 24) for c in (0, 24)]
    assert min(spread[0], spread[2], spread[3]) > 100 > spread[1]
    assert picture[:24, :24, 0].max() > picture[:24, :24, 2].max() + 80  # the circle is red
    assert Image.open(written[0] / "images" / "train-00000.png").mode == "RGB"
