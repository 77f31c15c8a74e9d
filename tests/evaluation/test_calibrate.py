"""The threshold of a cascade: from a few numbers by hand, and from a checkpoint's own answers."""

import json

import pytest
from llava_records import record

from delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from delta_llava.cascade import NEVER, generate, generate_scored, read_calibration
from delta_llava.evaluation import calibrate as module
from delta_llava.evaluation.calibrate import Cascade, cascades, choose, main, read_questions


def test_every_threshold_that_makes_a_difference():
    small = [True, False, False, True], [-0.1, -0.5, -0.2, 0.0]
    found = cascades(small, [True, True, False, False], [1, 1, 2, 1], (4, 36))
    assert found == [
        Cascade(NEVER, 4.0, 0.5, 0.0),
        Cascade(-0.5, 4.0, 0.5, 0.0),
        Cascade(-0.2, 4 + 36 / 5, 0.75, 0.25),
        Cascade(-0.1, 4 + 3 * 36 / 5, 0.75, 0.5),
        Cascade(0.0, 4 + 4 * 36 / 5, 0.75, 0.75),  # which is sure is not asked again
    ]
    assert choose(found, 1000) == found[2]
    assert choose(found, 11) == found[0]
    with pytest.raises(ValueError, match=r"target_tokens=3\.9 is less than the smaller budget"):
        choose(found, 3.9)


@pytest.fixture
def validation(tmp_path, noise):
    """`validation(answers)`: JSON of a question about each of as many images."""
    (tmp_path / "images").mkdir()

    def make(answers):
        records = []
        for index, (image, answer) in enumerate(zip(noise(len(answers), size=(4, 4)), answers, strict=True)):
            image.save(tmp_path / f"images/{index}.png")
            records.append(record("<image>\nWhat?", answer, image=f"{index}.png"))
        (tmp_path / "validation.json").write_text(json.dumps(records))
        return tmp_path / "validation.json"

    return make


def test_the_threshold_is_found_written_and_used(checkpoint, validation, tmp_path, capsys):
    model = DeltaLlavaForConditionalGeneration.from_pretrained(checkpoint)
    processor = DeltaLlavaProcessor.from_pretrained(checkpoint)
    json_path = validation(["?"] * 6)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    inputs = {
        budget: processor(
            images=[tmp_path / f"images/{index}.png" for index in range(6)],
            text=[processor.apply_chat_template(chat, add_generation_prompt=True)] * 6,
            num_visual_tokens=budget,
            return_tensors="pt",
        )
        for budget in (4, 36)
    }
    said, scores = {}, {}
    for budget in (4, 36):
        answers, scores[budget] = generate_scored(model, **inputs[budget], do_sample=False, max_new_tokens=8)
        said[budget] = processor.batch_decode(answers, skip_special_tokens=True)
    assert all(small != large for small, large in zip(said[4], said[36], strict=True))
    order = scores[4].argsort().tolist()
    # The two least sure are right at the larger budget alone, the others at the smaller alone
    answers = [said[36 if row in order[:2] else 4][row] for row in range(6)]
    validation(answers)

    arguments = f"--checkpoint {checkpoint} --json_path {json_path} --image_folder {tmp_path / 'images'} --budgets 4 36"
    plot = tmp_path / "curve.png"
    main([*arguments.split(), "--target_tokens", "20", "--max_new_tokens", "8", "--plot", str(plot)])
    out = capsys.readouterr().out
    assert "| 4 | 66.7 |" in out and "| 36 | 33.3 |" in out and "| 16.0: 4, and 36 for the 33.3% below" in out
    assert plot.read_bytes()[1:4] == b"PNG"
    found = read_calibration(checkpoint)
    assert found["num_visual_tokens"] == [4, 36]
    assert found["threshold"] == pytest.approx(float(scores[4][order[2]]), rel=1e-5)
    assert found["validation"] == {"questions": 6, "accuracy": 1.0, "mean_visual_tokens": 16.0, "asked_again": 1 / 3}

    output = generate(model, **inputs[4], do_sample=False, max_new_tokens=8)
    assert processor.batch_decode(output.sequences, skip_special_tokens=True) == answers
    assert output.visual_tokens_used.float().mean() == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (36, 4)}, "the smaller one first"),
        ({"budgets": (4, 7)}, r"num_visual_tokens=\[7\] must be among"),
        ({"target_tokens": 1}, "target_tokens=1 is less than"),
        ({"plot": "nowhere/curve.png"}, r"plot=nowhere/curve\.png must be a picture in an existing folder"),
        ({"plot": "curve.txt"}, r"plot=curve\.txt must be a picture"),
        ({"checkpoint": "org/name"}, "org/name is not a folder"),
        ({"image_folder": "nowhere"}, "record 0: there is no image nowhere"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_any_answer(
    checkpoint, validation, tmp_path, monkeypatch, change, message
):
    monkeypatch.setattr(module, "answer_all", None)
    arguments = {
        "checkpoint": checkpoint,
        "json_path": validation(["red"]),
        "image_folder": tmp_path / "images",
        "budgets": (4, 36),
        "target_tokens": 40,
        "plot": tmp_path / "curve.png",
        "max_new_tokens": 1,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        module.calibrate(**arguments)
    assert not (checkpoint / "cascade.json").exists()


def test_a_record_without_its_question_is_named(tmp_path):
    (tmp_path / "v.json").write_text(json.dumps([{"conversations": [{"from": "human", "value": "<image>"}]}]))
    with pytest.raises(ValueError, match=r"v\.json, record 0: "):
        read_questions(tmp_path / "v.json", tmp_path)
