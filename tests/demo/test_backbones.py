"""The committed backbones: what a stranger's AutoClasses load, small, and as skilled as `skills.json` says."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from delta_llava.demo import pretrain_backbones, scenes


FOLDER = pretrain_backbones.FOLDER


@pytest.fixture(scope="module")
def language():
    folder = FOLDER / "language_model"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_every_word_of_the_world_is_one_token_and_any_text_survives(language):
    tokenizer = language[1]
    words = [*scenes.KINDS, *scenes.COLOURS, "top", "bottom"]
    assert all(len(tokenizer.encode(" " + word)) == 1 for word in words)
    assert all(len(tokenizer.encode(answer)) == 1 for answer in [*words, *scenes.COUNTS, *scenes.DIGITS])
    text = "Grüße, 世界!\n\tx = 3.14 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_language_model_answers_from_a_scene_told_in_words(language):
    model, tokenizer = language
    rng, right = np.random.default_rng(5), []
    for number in range(40):
        layout = scenes.random_layout(rng, held_out=True)
        question, answer = scenes.ask(layout, rng, ("kind", "colour", "number")[number % 3]) or (None, None)
        if question is None:
            continue
        chat = f"{pretrain_backbones.SYSTEM}<|im_start|>user\n{scenes.tell(layout, rng)}\n{question}<|im_end|>\n"
        inputs = tokenizer(chat + "<|im_start|>assistant\n", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        right.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == answer)
    assert np.mean(right) >= 0.9


def test_the_vision_tower_fits_a_processor_and_the_language_model(language):
    folder = FOLDER / "vision_tower"
    tower, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    picture = scenes.render(scenes.random_layout(np.random.default_rng(0), True), np.random.default_rng(0), True)[0]
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, pretrain_backbones.to_pixels(picture[None], processor), atol=1e-4, rtol=0)
    assert AutoConfig.from_pretrained(folder).patch_size * pretrain_backbones.PATCH_GRID == scenes.IMAGE_SIZE
    assert tower(pixels).last_hidden_state.shape[:2] == (1, 1 + pretrain_backbones.PATCH_GRID**2)


def test_the_backbones_are_small_and_their_skills_are_on_record():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) < 10e6
    skills = json.loads((FOLDER / "skills.json").read_text(encoding="utf-8"))
    assert skills["vision_tower"]["digits alone"] >= 0.93
    # Finding a thing in a sentence is the one skill that it lacks; the mosaics are what pictures are like.
    for form, by_type in skills["language_model"].items():
        assert min(by_type.values()) >= (0.5 if form == "words" else 0.97), form
