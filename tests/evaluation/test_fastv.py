"""FastV drops what it says it drops, and nothing else changes."""

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from delta_llava.evaluation.fastv import fastv


LAYERS = 4


@pytest.fixture
def model(tiny_model, tiny_config):
    """A model of four layers whose queries look for something, so that no two tokens receive the same attention."""
    text_config = tiny_config().text_config.to_dict() | {"num_hidden_layers": LAYERS, "num_key_value_heads": 1}
    model = tiny_model(text_config=LlamaConfig(**text_config))
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.mul_(20)
    return model


def prompts(model, num_rows=2, num_visual_tokens=16):
    """Rows of different length, padded on the left."""
    image = [model.config.image_token_id] * num_visual_tokens
    rows = [[1, *image, *range(5, 9 + 3 * row)] for row in range(num_rows)]
    longest = max(map(len, rows))
    torch.manual_seed(1)
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.randn(num_rows, 3, 48, 48),
        "num_visual_tokens": num_visual_tokens,
    }


def answer(model, inputs, **kwargs):
    return model.generate(
        **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True,
        **kwargs,
    )  # fmt: skip


def stays(model, inputs, num_visual_tokens, layer):
    """Positions that stay, `(num_rows, length)`, by the attention that transformers itself gives out."""
    model.set_attn_implementation("eager")
    attentions = model(**inputs, output_attentions=True).attentions[layer - 1]
    model.set_attn_implementation("sdpa")
    is_visual = inputs["input_ids"] == model.config.image_token_id
    received = attentions.mean(1)[:, -1].masked_fill(~is_visual, -1)
    return (~is_visual).scatter(1, received.topk(num_visual_tokens, dim=1).indices, True)


@torch.inference_mode()
@pytest.mark.parametrize(("layer", "num_beams"), [(1, 1), (3, 1), (2, 3)])
def test_upper_layers_no_longer_see_the_dropped_tokens(model, layer, num_beams):
    """To leave a token out is to let nobody attend to it: positions stay as they were."""
    inputs = prompts(model)
    kept = stays(model, inputs, 4, layer)

    def hide(decoder, args, kwargs):
        mask = kwargs["attention_mask"]
        columns = kept.repeat_interleave(num_beams, dim=0)
        columns = torch.nn.functional.pad(columns, (0, mask.shape[-1] - kept.shape[1]), value=True)
        return args, {**kwargs, "attention_mask": mask & columns[:, None, None]}

    handles = [
        decoder.register_forward_pre_hook(hide, with_kwargs=True)
        for decoder in model.model.language_model.layers[layer:]
    ]
    expected = answer(model, inputs, num_beams=num_beams)
    for handle in handles:
        handle.remove()
    with fastv(model, 4, layer):
        pruned = answer(model, inputs, num_beams=num_beams)
    assert torch.equal(pruned.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(pruned.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
    unpruned = answer(model, inputs, num_beams=num_beams)
    assert (torch.stack(pruned.logits) - torch.stack(unpruned.logits)).abs().max() > 1e-3


@torch.inference_mode()
def test_upper_layers_do_not_cache_the_dropped_tokens(model):
    inputs = prompts(model)
    length = inputs["input_ids"].shape[1]
    with fastv(model, 4, layer=2):
        lengths = [layer.keys.shape[2] for layer in answer(model, inputs).past_key_values.layers]
    assert lengths == [length + 4] * 2 + [length + 4 - 12] * 2  # the last of five new tokens is not read any more


@torch.inference_mode()
def test_a_row_is_pruned_in_a_batch_as_it_is_alone(model):
    inputs = prompts(model)
    with fastv(model, 4):
        together = torch.stack(answer(model, inputs).logits, dim=1)
        for row in range(2):
            length = inputs["attention_mask"][row].sum()
            alone = {name: value[row : row + 1] for name, value in inputs.items() if name != "num_visual_tokens"}
            alone |= {name: alone[name][:, -length:] for name in ("input_ids", "attention_mask")}
            logits = torch.stack(answer(model, {**alone, "num_visual_tokens": 16}).logits, dim=1)
            torch.testing.assert_close(logits[0], together[row], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_last_prompt_counts_even_if_it_is_one_token(model):
    token = {"input_ids": torch.tensor([[5]])}
    expected = torch.stack(answer(model, token).logits)
    with fastv(model, 4):
        answer(model, prompts(model))
        torch.testing.assert_close(torch.stack(answer(model, token).logits), expected)


@torch.inference_mode()
def test_with_all_tokens_kept_nothing_changes_and_afterwards_nothing_is_left(model):
    inputs = prompts(model)
    before = torch.stack(answer(model, inputs).logits)
    with fastv(model, 16):
        torch.testing.assert_close(torch.stack(answer(model, inputs).logits), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.stack(answer(model, inputs).logits), before)
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.inference_mode()
def test_prompts_without_images_are_left_alone(model):
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    before = torch.stack(answer(model, text).logits)
    with fastv(model, 4):
        torch.testing.assert_close(torch.stack(answer(model, text).logits), before)


@torch.inference_mode()
def test_llava_of_transformers_can_be_pruned(tiny_config):
    config = tiny_config()
    text_config = LlamaConfig(**config.text_config.to_dict() | {"num_hidden_layers": LAYERS})
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config, text_config=text_config, image_token_index=config.image_token_id
        )
    ).eval()
    inputs = prompts(llava, num_visual_tokens=144)
    del inputs["num_visual_tokens"]
    with fastv(llava, 36):
        cache = answer(llava, inputs).past_key_values
    assert cache.layers[0].keys.shape[2] - cache.layers[2].keys.shape[2] == 144 - 36


@torch.inference_mode()
def test_what_it_cannot_prune_is_refused(model):
    for layer in (0, LAYERS):
        with pytest.raises(ValueError, match=rf"layer={layer} must be at least 1, .* below the language model's 4"):
            fastv(model, 4, layer).__enter__()
    inputs = prompts(model)
    with fastv(model, 17), pytest.raises(ValueError, match=r"The rows have \[16, 16\] visual tokens; to keep 17"):
        model(**inputs)
    flipped = {**inputs, **{name: inputs[name].flip(1) for name in ("input_ids", "attention_mask")}}
    with fastv(model, 4), pytest.raises(ValueError, match="padded on the right"):
        model(**flipped)
    with fastv(model, 4), pytest.raises(ValueError, match=r"a cache that grows.*StaticCache"):
        answer(model, inputs, cache_implementation="static")
    with fastv(model, 4):
        cache = answer(model, inputs).past_key_values
        with pytest.raises(ValueError, match="2 tokens follow 28 cached ones"):
            model(input_ids=torch.tensor([[5, 6]] * 2), past_key_values=cache)
    with fastv(model, 4), pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 64))
    with fastv(model, 4), pytest.raises(ValueError, match="calls of the whole model, not of its parts"):
        model.model(**inputs)
    with pytest.raises(ValueError, match="num_visual_tokens=-1 must be 0 or more"):
        fastv(model, -1).__enter__()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='sdpa', not 'eager'"):
        fastv(model, 4).__enter__()
    model.set_attn_implementation("sdpa")
