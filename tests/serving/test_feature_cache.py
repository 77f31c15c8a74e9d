"""Encode once: an image that was seen at a budget costs neither tower nor projector, and no output changes."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from delta_llava.serving.feature_cache import FeatureCache, cache_image_features


@pytest.fixture
def cached(tiny_model):
    """`cached(**options)`: a model, its cache, and a list to which each pass of the tower adds its number of images."""

    def make(**options):
        model, cache, passes = tiny_model(), FeatureCache(**options), []
        model.model.vision_tower.register_forward_hook(
            lambda module, args, output: passes.append(len(output.last_hidden_state))
        )
        cache_image_features(model, cache)
        return model, cache, passes

    return make


def pixels(count, seed=0):
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(seed))


def encode(model, pixel_values, num_visual_tokens=None):
    with torch.no_grad():
        return model.get_image_features(pixel_values, num_visual_tokens).pooler_output


def equal(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_a_second_question_about_an_image_skips_tower_and_projector(cached, tiny_model, tiny_processor, noise):
    model, cache, passes = cached()
    plain, processor, image = tiny_model(), tiny_processor(), noise(1)[0]
    projected = []
    model.model.multi_modal_projector.register_forward_hook(lambda *args: projected.append(1))
    for question in ("<image> What is it?", "<image> Which colour?", "And <image>?"):
        inputs = processor(images=image, text=question, return_tensors="pt")
        options = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))
    assert passes == [1] and projected == [1]
    assert (cache.hits, cache.misses, len(cache)) == (2, 1, 1)
    beams = {"max_new_tokens": 8, "num_beams": 3}
    assert torch.equal(model.generate(**inputs, **beams), plain.generate(**inputs, **beams))


def test_of_a_batch_only_what_is_missing_is_encoded(cached, tiny_model):
    model, _, passes = cached()
    images, budgets = pixels(4), [36, 4, 144, 1]
    expected = encode(tiny_model(), images, torch.tensor(budgets))
    assert equal(encode(model, images[1:3], torch.tensor(budgets[1:3])), encode(tiny_model(), images[1:3], [4, 144]))
    found = encode(model, images, torch.tensor(budgets))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert passes == [2, 2]
    # In another order, one of them twice, one at another budget
    found = encode(model, images[[3, 0, 0, 2]], [1, 36, 36, 9])
    assert passes == [2, 2, 1] and [len(features) for features in found] == [1, 36, 36, 9]
    torch.testing.assert_close(found[:3], [expected[3], expected[0], expected[0]])
    assert equal(found, encode(model, images[[3, 0, 0, 2]], [1, 36, 36, 9])) and passes == [2, 2, 1]


def test_every_form_of_a_budget_finds_the_same(cached):
    model, cache, passes = cached()
    image = pixels(1)
    for budget in (None, 36, [36], (36,), torch.tensor(36), torch.tensor([36])):
        encode(model, image, budget)
    encode(model.model, image, 36)
    assert passes == [1] and len(cache) == 1
    for wrong in (7, 0, [36, 4]):
        with pytest.raises(ValueError, match="num_visual_tokens"):
            encode(model, image, wrong)


def test_the_bytes_are_bounded_and_the_least_recently_used_go_first(cached):
    one = 36 * 64 * 4
    model, cache, passes = cached(max_bytes=2 * one)
    first, second, third = pixels(3).split(1)
    for image in (first, second, first, third):  # the second is the one used least recently
        encode(model, image)
    assert (len(cache), cache.num_bytes) == (2, 2 * one)
    encode(model, first)
    assert len(passes) == 3
    encode(model, second)
    assert len(passes) == 4
    encode(model, pixels(5, seed=1))
    assert cache.num_bytes == sum(features.untyped_storage().nbytes() for features in cache._features.values())
    encode(model, first, 144)  # larger than all of the cache
    assert cache.num_bytes <= 2 * one
    model, cache, passes = cached(max_bytes=0)
    assert equal(encode(model, first), encode(model, first)) and passes == [1, 1] and len(cache) == 0
    with pytest.raises(ValueError, match="max_bytes=-1"):
        FeatureCache(max_bytes=-1)


def test_what_a_caller_does_to_features_stays_with_the_caller(cached):
    model, _, _ = cached()
    expected = encode(model, pixels(1))[0].clone()
    for _ in range(2):
        encode(model, pixels(1))[0].zero_()
    assert torch.equal(encode(model, pixels(1))[0], expected)


def test_training_and_gradients_see_no_cache(cached):
    model, cache, passes = cached()
    expected = encode(model, pixels(1))[0]
    assert model.get_image_features(pixels(1)).pooler_output[0].requires_grad
    assert passes == [1, 1] and len(cache) == 1
    with torch.no_grad():
        assert model.get_image_features(pixels(1), output_hidden_states=True).hidden_states is not None
        assert isinstance(model.get_image_features(pixels(1), return_dict=False), tuple)
    model.train()
    model.get_image_features(pixels(1))
    assert len(cache) == 0  # a step changes what it held
    with torch.no_grad():
        model.model.multi_modal_projector.mlp[-1].weight.mul_(2)
    assert not torch.equal(encode(model.eval(), pixels(1))[0], expected)


def test_models_that_share_a_cache_do_not_share_features(cached, tiny_model):
    model, cache, _ = cached()
    other = tiny_model(num_visual_tokens=4)
    with torch.no_grad():
        other.model.multi_modal_projector.mlp[-1].weight.mul_(2)
    cache_image_features(other, cache)
    twin = copy.deepcopy(other)
    with torch.no_grad():
        twin.model.multi_modal_projector.mlp[-1].weight.mul_(2)
    found = [encode(which, pixels(1), 4)[0] for which in (model, other, twin)]
    assert len(cache) == 3 and not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_threads_get_what_they_asked_for(cached, tiny_model):
    model, cache, _ = cached(max_bytes=3 * 36 * 64 * 4)  # so small that images come and go
    plain, images = tiny_model(), pixels(4)
    expected = {(image, budget): encode(plain, images[[image]], budget)[0] for image in range(4) for budget in (4, 36)}

    def ask(number):
        key = number % 4, (4, 36)[number // 4 % 2]
        return torch.equal(encode(model, images[[key[0]]], key[1])[0], expected[key])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(160)))
    assert cache.hits + cache.misses == 160 and cache.num_bytes <= cache.max_bytes
