"""The committed backbones: what a stranger's AutoClasses load, small, and as skilled as `skills.json` says."""

import json

import numpy as np
import pytest
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from delta_llava.demo import pretrain_backbones, scenes


FOLDER = pretrain_backbones.FOLDER


@pytest.fixture(scope="module")
def language():
    folder = FOLDER / "language_model"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_every_word_of_the_world_is_one_token_and_any_text_survives(language):
    tokenizer = language[1]
    words = [*scenes.THINGS, *scenes.GROUPS, *scenes.PLACES, *scenes.COUNTS, "yes", "no", "nothing", "big"]
    assert all(len(tokenizer.encode(text)) == 1 for word in words for text in (word, f" {word}"))
    text = "Grüße, 世界!\n\tx = 3.14 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_language_model_answers_from_a_scene_in_words(language):
    model, tokenizer = language
    rng, right = np.random.default_rng(5), []
    for number in range(60):
        layout = scenes.random_layout(rng, held_out=True)
        asked = scenes.ask(layout, rng, scenes.QUESTION_TYPES[number % len(scenes.QUESTION_TYPES)])
        if asked is None:
            continue
        chat = f"{pretrain_backbones.SYSTEM}<|im_start|>user\n{scenes.tell(layout)}\n{asked.question}<|im_end|>\n"
        inputs = tokenizer(chat + "<|im_start|>assistant\n", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        said = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right.append(said == asked.answer)
    assert np.mean(right) >= 0.95


def test_the_vision_tower_fits_a_processor_and_the_language_model(language):
    folder = FOLDER / "vision_tower"
    tower, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    rng = np.random.default_rng(0)
    picture = scenes.render(scenes.random_layout(rng, True), rng, "twemoji")
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(pixels, pretrain_backbones.to_pixels(picture[None], processor), atol=1e-4)
    assert AutoConfig.from_pretrained(folder).patch_size * pretrain_backbones.PATCH_GRID == scenes.IMAGE_SIZE
    assert tower(pixels).last_hidden_state.shape[:2] == (1, 1 + pretrain_backbones.PATCH_GRID**2)


def test_a_mosaic_has_the_mean_of_its_patches_words(language):
    tokenizer = language[1]
    storyteller = pretrain_backbones.Storyteller(tokenizer)
    layout = scenes.parse("a1 big cat, d4 bus")
    batch = storyteller.batch([layout], 2, [[("What is at a1?", "cat")]])
    assert batch.ids.shape == batch.labels.shape and (batch.grid, batch.cells.shape) == (2, (1, 16, 3))
    assert tokenizer.decode(batch.cells[0, 5]) == " b2 big cat"
    assert tokenizer.decode(batch.cells[0, 15]) == " d4 small bus"
    assert tokenizer.decode(batch.cells[0, 3]) == " d1 small nothing"
    assert tokenizer.decode(batch.labels[0][batch.labels[0] != -100]) == "cat<|im_end|>"


def test_the_backbones_are_small_and_their_skills_are_on_record():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) < 12e6
    skills = json.loads((FOLDER / "skills.json").read_text(encoding="utf-8"))
    known, new = (skills["vision_tower"][name] for name in ("known designs", "held-out design"))
    assert min(known["small"], known["big"]) >= 0.95 and min(new["small"], new["big"]) >= 0.6
    # The ceiling of whatever is answered from a picture.
    assert min(skills["language_model"]["words"].values()) >= 0.985
