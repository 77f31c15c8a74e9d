"""The second pass: of whom, with what, and what both cost."""

import json

import pytest
import torch
from transformers import GenerationConfig

from delta_llava.cascade import generate, read_calibration


GREEDY = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
TEXTS = ["USER: <image> What?", "USER: Who are you?", "USER: <image> and <image>, the same or not?", "<image> Where?"]


@pytest.fixture
def prompts(tiny_processor, noise):
    first, *others = noise(4)
    images = [[first], [], others[:2], others[2:]]

    def make(num_visual_tokens, rows=range(4)):
        return tiny_processor()(
            images=[images[row] for row in rows],
            text=[TEXTS[row] for row in rows],
            num_visual_tokens=num_visual_tokens,
            padding=True,
            return_tensors="pt",
        )

    return make


def _answers(model, inputs, **options):
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def _rows(sequences, answers):
    """The rows of a [`CascadeOutput`] as far as these answers go, after which is nothing but padding."""
    for row, answer in zip(sequences.tolist(), answers, strict=True):
        assert not any(row[len(answer) :])
    return [row[: len(answer)] for row, answer in zip(sequences.tolist(), answers, strict=True)]


@pytest.mark.parametrize("options", [GREEDY, {**GREEDY, "num_beams": 3}], ids=["greedy", "beams"])
def test_unsure_rows_are_asked_again_and_no_others(tiny_model, prompts, options):
    model = tiny_model()
    passes = []
    model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    small, large = (_answers(model, prompts(budget), **options) for budget in (4, 36))
    assert small != large
    passes.clear()

    never = generate(model, **prompts(4), budgets=(4, 36), threshold=-float("inf"), **options)
    assert len(passes) == 1
    assert _rows(never.sequences, small) == small
    assert never.num_visual_tokens.tolist() == [4] * 4 and never.visual_tokens_used.tolist() == [4, 0, 8, 4]

    always = generate(model, **prompts(4), budgets=(4, 36), threshold=0.0, **options)
    assert len(passes) == 2
    expected = [small[1] if row == 1 else answer for row, answer in enumerate(large)]
    assert _rows(always.sequences, expected) == expected
    assert always.num_visual_tokens.tolist() == [36, 4, 36, 36]
    assert always.visual_tokens_used.tolist() == [40, 0, 80, 40]

    # Between the surest and the second: the two-image row alone, or all but one
    with_images = never.log_probabilities[[0, 2, 3]]
    threshold = float(with_images.sort().values[:2].mean())
    unsure = (never.log_probabilities < threshold).tolist()
    some = generate(model, **prompts(4), budgets=(4, 36), threshold=threshold, **options)
    again = [unsure[row] and row != 1 for row in range(4)]
    assert sum(again) == 1
    expected = [large[row] if again[row] else small[row] for row in range(4)]
    assert _rows(some.sequences, expected) == expected
    assert some.num_visual_tokens.tolist() == [36 if row else 4 for row in again]
    for row in range(4):
        other = always if again[row] else never
        torch.testing.assert_close(some.log_probabilities[row], other.log_probabilities[row], atol=1e-4, rtol=1e-4)


def test_log_probabilities_are_of_the_answer_with_its_end(tiny_model, prompts):
    model = tiny_model()
    inputs = prompts(4, [0])
    answer = torch.tensor(_answers(model, inputs, **GREEDY))
    end = int(answer[0, 2])  # as if it were an end token: two tokens of the answer are behind it
    assert end not in answer[0, :2]
    output = generate(model, **inputs, budgets=(4, 36), threshold=-1e9, eos_token_id=[end, 299], **GREEDY)
    assert output.sequences.tolist() == answer[:, :3].tolist()
    whole = dict(inputs, input_ids=torch.cat([inputs["input_ids"], answer[:, :3]], dim=1))
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.no_grad():
        log_probabilities = model(**whole).logits[0, -4:-1].log_softmax(-1)
    expected = log_probabilities[range(3), answer[0, :3]].mean()
    torch.testing.assert_close(output.log_probabilities[0], expected, atol=1e-5, rtol=1e-5)


def test_what_follows_a_shorter_answer_counts_for_nothing(tiny_model, prompts):
    model = tiny_model()
    inputs = prompts(4)
    plain = {key: value for key, value in GREEDY.items() if key != "pad_token_id"}
    answers = _answers(model, inputs, **GREEDY)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [answers[0][1], 299], 0
    never = {"budgets": (4, 36), "threshold": -1e9}
    expected = generate(model, **inputs, **never, **plain)
    assert expected.sequences[0, 2:].eq(0).all() and expected.sequences.shape[1] == 5
    # A configuration of its own has no end token, and generate takes the model's
    config = GenerationConfig(**plain)
    output = generate(model, **inputs, **never, generation_config=config)
    assert output.sequences.equal(expected.sequences) and config.eos_token_id is None
    torch.testing.assert_close(output.log_probabilities, expected.log_probabilities)
    alone = generate(model, **prompts(4, [0]), **never, generation_config=config)
    torch.testing.assert_close(alone.log_probabilities, expected.log_probabilities[:1], atol=1e-4, rtol=1e-4)


def test_images_without_a_place_are_an_error(tiny_model, prompts):
    inputs = prompts(4)
    for change, found in ((inputs["pixel_values"][:3], 3), (None, 0), (inputs["pixel_values"].repeat(2, 1, 1, 1), 8)):
        with pytest.raises(ValueError, match=rf"image tokens for \[1, 0, 2, 1\] images, but there are {found}"):
            generate(
                tiny_model(),
                **{**inputs, "pixel_values": change, "num_visual_tokens": None},
                budgets=(4, 36),
                threshold=0,
            )


def test_one_token_widens_too_and_sampling_keeps_the_model_s_log_probabilities(tiny_model, prompts):
    model = tiny_model()
    large = _answers(model, prompts(144), **GREEDY)
    output = generate(model, **prompts(1), budgets=(1, 144), threshold=0.0, **GREEDY)
    assert [_rows(output.sequences, large)[row] for row in (0, 2, 3)] == [large[row] for row in (0, 2, 3)]
    # A temperature that leaves one token is greedy decoding, whose probability it does not change
    cold = {**GREEDY, "do_sample": True, "temperature": 1e-4}
    sampled = generate(model, **prompts(1), budgets=(1, 144), threshold=0.0, **cold)
    assert sampled.sequences.equal(output.sequences)
    torch.testing.assert_close(sampled.log_probabilities, output.log_probabilities)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": (36, 4)}, r"budgets=\(36, 4\) must be two numbers .*, the smaller one first"),
        ({"budgets": (4,)}, r"budgets=\(4,\) must be two numbers"),
        ({"budgets": (4, 7)}, r"num_visual_tokens=7"),
        ({"budgets": (9, 36)}, r"made at the smaller budget, num_visual_tokens=9, but name \[4, 4, 4, 4\]"),
        ({"threshold": 0.1}, r"threshold=0.1 must be a mean log-probability: 0 or less"),
        ({"threshold": float("nan")}, r"threshold=nan must be"),
        ({"streamer": object()}, r"streamer: not for a cascade"),
        ({"num_return_sequences": 2, "num_beams": 2}, r"num_return_sequences: not for"),
        ({"max_length": 300}, r"max_length: not for a cascade"),
        ({"generation_config": GenerationConfig(max_length=300)}, r"max_length=300 counts the prompt"),
        ({"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)}, r"num_return_sequences"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_model, prompts, arguments, message):
    options = {"budgets": (4, 36), "threshold": -1.0, **arguments}
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), **prompts(4), **options)


def test_without_a_calibration_budgets_and_threshold_are_needed(tiny_model, prompts):
    with pytest.raises(FileNotFoundError, match=r"has no cascade.json: name budgets and threshold, or run"):
        generate(tiny_model(), **prompts(4), budgets=(4, 36))


def test_the_checkpoint_s_calibration_is_the_default(tiny_model, prompts, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = type(tiny_model()).from_pretrained(tmp_path)
    file = tmp_path / "cascade.json"
    file.write_text(json.dumps({"num_visual_tokens": [4, 36], "threshold": 0.0, "validation": {}}))
    assert generate(model, **prompts(4), **GREEDY).num_visual_tokens.tolist() == [36, 4, 36, 36]
    output = generate(model, **prompts(4), threshold=-1e9, **GREEDY)
    assert output.num_visual_tokens.tolist() == [4] * 4
    with pytest.raises(ValueError, match=r"calibrated for budgets=\[4, 36\], not for \[1, 36\]: name a threshold"):
        generate(model, **prompts(1), budgets=[1, 36], **GREEDY)
    for damaged in (
        '{"num_visual_tokens": [36, 4], "threshold": -1}',
        '{"threshold": -1}',
        "[",
        '{"num_visual_tokens": 4}',
    ):
        file.write_text(damaged)
        with pytest.raises(ValueError, match=r"cascade.json is damaged"):
            read_calibration(tmp_path)
