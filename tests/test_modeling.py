"""The model: what every user of a transformers VLM expects of it, at any budget, in any mix."""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CohereConfig,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    PhiConfig,
    Qwen2Config,
    ResNetConfig,
    TorchAoConfig,
)
from trl.trainer.utils import add_fused_lm_head

from delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaLlavaModel, DeltaLlavaProcessor
from delta_llava.configuration_delta_llava import RELEASE
from delta_llava.hub.parts import join


ALL_BUDGETS = [1, 4, 9, 16, 36, 144]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def mixed_batch(tiny_processor, noise):
    """Rows with two images, none, one and three, at mixed budgets: as one padded batch, and each by itself."""
    first, second, third, fourth, fifth, sixth = noise(6)
    texts = [
        "USER: <image>\n<image>\nWhat differs? ASSISTANT:",
        "USER: Who are you? ASSISTANT:",
        "USER: <image>\nWhat is it? ASSISTANT:",
        "USER: <image> and <image> and <image> ASSISTANT:",
    ]
    images = [[first, second], [], [third], [fourth, fifth, sixth]]
    budgets = [[36, 4], [], [144], [1, 16, 9]]

    def inputs(images, text, budgets):
        return tiny_processor()(images=images, text=text, num_visual_tokens=budgets, padding=True, return_tensors="pt")

    rows = [inputs(*row) for row in zip(images, texts, budgets, strict=True)]
    return inputs(images, texts, [budget for row in budgets for budget in row]), rows


def new_tokens(model, inputs, **options):
    return model.generate(**inputs, **{**GREEDY, **options})[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("siglip", [False, True])
def test_a_left_padded_batch_generates_what_its_rows_do(tiny_model, mixed_batch, siglip):
    model, (batch, rows) = tiny_model(siglip=siglip), mixed_batch
    together = new_tokens(model, batch)
    assert torch.equal(together, torch.cat([new_tokens(model, row) for row in rows]))
    # The images and their order must matter for this to prove anything
    assert len({tuple(row.tolist()) for row in together}) > 1
    swapped = {**rows[0], "pixel_values": rows[0]["pixel_values"].flip(0)}
    assert not torch.equal(model(**swapped).logits, model(**rows[0]).logits)


def test_budget_of_the_call_before_that_of_the_processor_before_that_of_the_config(tiny_model, tiny_processor, noise):
    for budget in ALL_BUDGETS:
        inputs = tiny_processor()(images=noise(1), text="<image>", num_visual_tokens=budget, return_tensors="pt")
        outputs = tiny_model()(**inputs)
        assert outputs.image_hidden_states.shape == (budget, 64)
        assert outputs.logits.shape == (1, budget, 320)
    model = tiny_model(num_visual_tokens=16)
    pixel_values = tiny_processor()(images=noise(1), text="<image>", return_tensors="pt")["pixel_values"]
    assert len(model.get_image_features(pixel_values).pooler_output[0]) == 16
    inputs = tiny_processor(num_visual_tokens=9)(images=noise(1), text="<image>", return_tensors="pt")
    assert len(model(**inputs).image_hidden_states) == 9
    assert len(model.get_image_features(pixel_values, num_visual_tokens=4).pooler_output[0]) == 4


@pytest.mark.parametrize("variant", ["released", "residual"])
def test_image_features_of_mixed_budgets_are_those_of_each_image_alone(variant, tiny_model, tiny_processor, noise):
    model = tiny_model(projector_variant=variant)
    pixel_values = tiny_processor()(images=noise(5), text="<image>" * 5, return_tensors="pt")["pixel_values"]
    budgets = torch.tensor([36, 4, 36, 144, 4])
    tower_passes, projector_passes = [], []
    model.model.vision_tower.register_forward_hook(lambda *_: tower_passes.append(1))
    model.model.multi_modal_projector.register_forward_hook(lambda *call: projector_passes.append(call[1][2]))
    features = model.get_image_features(pixel_values, num_visual_tokens=budgets).pooler_output
    assert (len(tower_passes), projector_passes) == (1, [4, 36, 144])
    for index, budget in enumerate(budgets.tolist()):
        alone = model.get_image_features(pixel_values[index : index + 1], num_visual_tokens=budget).pooler_output[0]
        torch.testing.assert_close(features[index], alone)


def test_an_untrained_budget_works_and_warns_once(tiny_model, tiny_processor, noise, monkeypatch):
    messages = []
    logger = sys.modules[DeltaLlavaForConditionalGeneration.__module__].logger
    monkeypatch.setattr(logger, "warning", lambda message, *args, **kwargs: messages.append(message))
    model = tiny_model(visual_token_budgets=[36])
    pixel_values = tiny_processor()(images=noise(1), text="<image>", return_tensors="pt")["pixel_values"]
    for _ in range(2):
        assert len(model.get_image_features(pixel_values, num_visual_tokens=9).pooler_output[0]) == 9
    assert len([message for message in messages if "trained for [36] visual tokens" in message]) == 1


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_implementations_agree(tiny_model, mixed_batch, attention):
    model, (batch, _) = tiny_model(), mixed_batch
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).logits[real]
        model.set_attn_implementation({"text_config": attention, "vision_config": "eager"})
        assert model.model.language_model.config._attn_implementation == attention
        torch.testing.assert_close(model(**batch).logits[real], expected, atol=2e-4, rtol=2e-4)


def test_bfloat16_takes_float32_pixels(tiny_model, tiny_processor, noise):
    inputs = tiny_processor()(images=noise(1), text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].dtype == torch.float32
    outputs = tiny_model().to(torch.bfloat16)(**inputs)
    assert outputs.logits.dtype == torch.bfloat16 and outputs.logits.isfinite().all()


def test_static_cache_generates_the_same(tiny_model, tiny_processor, noise):
    inputs = tiny_processor()(images=noise(2), text="<image> or <image>", num_visual_tokens=[9, 4], return_tensors="pt")
    model = tiny_model()
    # `disable_compile`: what is checked is the cache, not the compiler
    static = new_tokens(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, new_tokens(model, inputs))


def gradients(model, inputs, run):
    """Of the loss that `run`, the model or what it is compiled to, gives on these inputs, by the names of weights."""
    model.zero_grad()
    run(**inputs).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("variant", ["released", "residual"])
def test_gradient_checkpointing_gives_the_same_gradients(variant, tiny_model, tiny_processor, noise):
    model = tiny_model(projector_variant=variant, drops=False).train()
    inputs = tiny_processor()(images=noise(1), text="<image> a red circle", return_tensors="pt")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    passes = []
    model.model.language_model.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
    expected = gradients(model, inputs, model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(model, inputs, model).items():
        torch.testing.assert_close(gradient, expected[name])
    assert len(passes) == 3  # the last backward pass runs it again
    assert any("multi_modal_projector" in name for name in expected) and any(
        "vision_tower" in name for name in expected
    )


def test_a_frozen_tower_builds_no_graph_even_with_gradient_checkpointing(tiny_model, tiny_processor, noise):
    model = tiny_model().train()
    model.model.vision_tower.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    inputs = tiny_processor()(images=noise(1), text="<image>", return_tensors="pt")
    outputs = model.get_image_features(inputs["pixel_values"])
    assert outputs.pooler_output[0].requires_grad and not outputs.last_hidden_state.requires_grad


def test_inputs_embeds_find_their_image_tokens(tiny_model, mixed_batch):
    model, (batch, _) = tiny_model(), mixed_batch
    embedded = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    del embedded["input_ids"]
    torch.testing.assert_close(model(**embedded).logits, model(**batch).logits)
    assert torch.equal(model.generate(**embedded, **GREEDY), new_tokens(model, batch))


def test_logits_to_keep(tiny_model, tiny_processor, noise):
    model = tiny_model()
    inputs = tiny_processor()(images=noise(1), text="<image> what", return_tensors="pt")
    everything = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, everything[:, -1:])
    some = torch.tensor([0, 5])
    torch.testing.assert_close(model(**inputs, logits_to_keep=some).logits, everything[:, some])
    # As transformers 5.23 has it: positions of each row, and a mask, which flattens
    batch = {"input_ids": torch.tensor([[1, 5, 6, 7], [1, 8, 9, 10]])}
    rows, columns = torch.tensor([[0], [1]]), torch.tensor([[0, 3], [2, 1]])
    everything = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=columns).logits, everything[rows, columns])
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    kept = model(**batch, logits_to_keep=mask).logits
    assert kept.shape == (3, 320)
    torch.testing.assert_close(kept, everything[mask])


SIZE = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "text_config",
    [
        PhiConfig(**SIZE, **HEADS),  # a bias
        GPTJConfig(n_embd=64, n_layer=1, n_head=4, rotary_dim=8, vocab_size=320),
        GraniteConfig(**SIZE, **HEADS, logits_scaling=6.0, embedding_multiplier=3.0),
        CohereConfig(**SIZE, **HEADS, logit_scale=0.3),
        Gemma2Config(**SIZE, **HEADS, head_dim=16, final_logit_softcapping=0.5),
    ],
    ids=lambda config: config.model_type,
)
def test_heads_that_do_more_than_multiply(tiny_config, tiny_processor, noise, text_config, tmp_path):
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(text_config).eval()
    with torch.no_grad():
        for name, weight in language_model.get_output_embeddings().named_parameters():
            weight.normal_() if name == "bias" else weight.mul_(20)
    ids = torch.tensor([[1, 7, 8, 9, 33, 44]])
    expected = language_model(input_ids=ids).logits

    config = tiny_config(text_config=text_config)
    tower = DeltaLlavaForConditionalGeneration(config).model.vision_tower
    join(config, tower, language_model).save_pretrained(tmp_path)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)

    # Training is of the same model
    inputs = tiny_processor()(images=noise(1), text="<image> what", num_visual_tokens=4, return_tensors="pt")
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    add_fused_lm_head(model)
    torch.testing.assert_close(model(**inputs, labels=inputs["input_ids"], fused_lm_head=True).loss, loss)


def test_missing_weights_are_an_error(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    whole = dict(weights)
    del weights["model.multi_modal_projector.attention.out_proj.weight"]
    weights["model.multi_modal_projector.gate"] = torch.zeros(32)  # of another version
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = (
        r"lacks 1 of the model's weights, .*random: .*multi_modal_projector\.attention\.out_proj\.weight\. "
        r"It has others, .*does not know: .*multi_modal_projector\.gate\. "
    )
    for load in (
        DeltaLlavaForConditionalGeneration.from_pretrained,
        DeltaLlavaModel.from_pretrained,
        lambda folder: AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    # Whoever looks for himself, or has the weights in memory
    _, info = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == 1
    del weights["model.multi_modal_projector.gate"]
    config = DeltaLlavaConfig.from_pretrained(tmp_path)
    DeltaLlavaForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights)
    DeltaLlavaForConditionalGeneration.from_pretrained(None, config=config, state_dict=whole)


def test_placeholders_without_images_are_refused(tiny_model, tiny_processor, noise):
    model = tiny_model()
    inputs = tiny_processor()(images=noise(1), text="<image> what", return_tensors="pt")
    encoded = model.get_image_features(inputs.pop("pixel_values"))
    message = r'tokens: 36, features: 0\. Pass pixel_values, or mm_encoder_outputs=\{"image": '
    mistaken = {**inputs, "mm_encoder_outputs": encoded}
    for wrong in (inputs, mistaken):
        with pytest.raises(ValueError, match=message):
            model.generate(**wrong, max_new_tokens=2)
    for forward, wrong in ((model, mistaken), (model.model, mistaken), (model.train(), inputs)):
        with pytest.raises(ValueError, match=message):
            forward(**wrong)
    model.eval()
    # transformers' common tests run a model on its `input_ids` alone, and generate from embeddings alone
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(model(**inputs).logits, model(inputs_embeds=embeds).logits)
    model.generate(inputs_embeds=embeds, max_new_tokens=2)
    # A placeholder that the model itself says is a token like others
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[model.config.image_token_id] = 1
        model.model.language_model.norm.weight.fill_(0.0)
    tokens = new_tokens(model, {**inputs, "mm_encoder_outputs": {"image": encoded}}, suppress_tokens=[0])
    assert tokens.shape == (1, 8)
    answer = {"input_ids": torch.tensor([[1, 5]])}
    cache = model(**answer, use_cache=True).past_key_values
    model(input_ids=torch.tensor([[model.config.image_token_id]]), past_key_values=cache)


def test_a_draft_model_need_not_see_the_images(tiny_model, tiny_processor, noise):
    # transformers hands it the placeholders alone
    model, inputs = tiny_model(), tiny_processor()(images=noise(1), text="<image> what", return_tensors="pt")
    drafted = new_tokens(model, inputs, suppress_tokens=[0], assistant_model=tiny_model())
    assert torch.equal(drafted, new_tokens(model, inputs, suppress_tokens=[0]))


@pytest.fixture
def compilable(tiny_model, tiny_processor, noise):
    """A model after one eager call, and the inputs of a call with an int budget."""
    model = tiny_model(drops=False)
    inputs = tiny_processor()(images=noise(1), text="<image> a red circle", num_visual_tokens=9, return_tensors="pt")
    inputs = {**inputs, "num_visual_tokens": 9, "use_cache": False}
    model(**inputs)
    torch.compiler.reset()
    return model, inputs


@pytest.mark.skipif(RELEASE < (5, 23), reason="the tower's layers are taken by hooks")
def test_one_graph_in_inference_and_training(compilable):
    model, inputs = compilable
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    inputs["labels"] = inputs["input_ids"]
    model.model.vision_tower.requires_grad_(False)
    expected = gradients(model.train(), inputs, model)
    assert any("multi_modal_projector" in name for name in expected)
    for name, gradient in gradients(model, inputs, compiled).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.skipif(RELEASE < (5, 23), reason="the tower's layers are taken by hooks")
@pytest.mark.parametrize("strict", [True, False])
def test_export(compilable, strict):
    model, inputs = compilable
    exported = torch.export.export(model, (), kwargs=inputs, strict=strict).module()
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    torch.testing.assert_close(exported(**other).logits, model(**other).logits)


def test_loss_is_that_of_shifted_labels(tiny_model, tiny_processor, noise):
    model = tiny_model()
    inputs = tiny_processor()(images=noise(1), text="<image> what", num_visual_tokens=4, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    outputs = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(outputs.loss, expected)
    as_tuple = model(**inputs, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], outputs.loss)


def test_device_map_with_a_split_between_parts(tiny_model, tiny_processor, noise, tmp_path):
    model = tiny_model(projector_variant="residual")
    inputs = tiny_processor()(images=noise(1), text="<image> what", return_tensors="pt")
    expected = new_tokens(model, inputs)
    model.save_pretrained(tmp_path)
    device_map = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "disk"}
    split = DeltaLlavaForConditionalGeneration.from_pretrained(
        tmp_path, device_map={**device_map, "lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    )
    assert set(split.hf_device_map.values()) == {"disk", "cpu"}
    assert torch.equal(new_tokens(split, inputs), expected)
    automatic = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(new_tokens(automatic, inputs), expected)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 1, "num_return_sequences": 2}],
)
def test_several_sequences_per_prompt_with_two_images_each(tiny_model, mixed_batch, options):
    model, (batch, rows) = tiny_model(), mixed_batch
    if options["num_beams"] == 1:
        options = {**options, "do_sample": True, "top_k": 1}  # sampling without chance
    together = new_tokens(model, batch, **options)
    assert torch.equal(together, torch.cat([new_tokens(model, row, **options) for row in rows]))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_images_encoded_once_serve_several_questions(tiny_model, tiny_processor, noise, options):
    model, processor = tiny_model(), tiny_processor()
    images = noise(2)
    pixels = processor(images=images, text="<image><image>", num_visual_tokens=[9, 36], return_tensors="pt")
    encoded = model.get_image_features(pixels["pixel_values"], num_visual_tokens=pixels["num_visual_tokens"])
    for question in ("<image><image> same?", "first <image>, then <image>: which?"):
        inputs = processor(images=images, text=question, num_visual_tokens=[9, 36], return_tensors="pt")
        expected = new_tokens(model, inputs, **options)
        del inputs["pixel_values"]
        assert torch.equal(new_tokens(model, inputs, mm_encoder_outputs={"image": encoded}, **options), expected)
        torch.testing.assert_close(
            model(**inputs, mm_encoder_outputs={"image": encoded}).logits,
            model(**inputs, pixel_values=pixels["pixel_values"]).logits,
        )


def test_image_text_mismatch_is_refused_with_both_numbers(tiny_model, tiny_processor, noise):
    model = tiny_model()
    inputs = tiny_processor()(images=noise(2), text="<image>, <image>", num_visual_tokens=[36, 4], return_tensors="pt")
    with pytest.raises(
        ValueError, match=r"tokens: 40, features: 13, of 2 .*=\[9, 4\]\. Pass the same num_visual_tokens"
    ):
        model(**inputs | {"num_visual_tokens": torch.tensor([9, 4])})
    # The totals agree, but the first image would stand in the second's place
    with pytest.raises(ValueError, match=r"runs of image tokens end after \[36, 40\].*\[4, 36\] tokens each"):
        model(**inputs | {"num_visual_tokens": torch.tensor([4, 36])})
    with pytest.raises(ValueError, match="names 3 budgets, but there are 2 images"):
        model.get_image_features(inputs["pixel_values"], num_visual_tokens=torch.tensor([4, 4, 4]))
    with pytest.raises(ValueError, match=r"num_visual_tokens=5 .* one of \[1, 4, 9, 16, 36, 144\]"):
        model.get_image_features(inputs["pixel_values"], num_visual_tokens=5)
    with pytest.raises(ValueError, match="images of 48x96 pixels, but must be of 48x48"):
        model.get_image_features(torch.zeros(1, 3, 48, 96))
    encoded = model.get_image_features(inputs["pixel_values"])
    with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
        model(**inputs, mm_encoder_outputs={"image": encoded})
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize(
    ("layers", "query", "deepest"), [(None, -2, 4), ([1, 2], 2, 2), ([-5, -1], 1, 5), ([3], -3, 3)]
)
def test_the_tower_runs_no_deeper_than_it_is_read(
    tiny_model, tiny_config, tiny_processor, noise, layers, query, deepest
):
    overrides = {"memory_feature_layers": layers, "query_feature_layer": query}
    model = tiny_model(**overrides)
    assert len(model.model._vision_tower_layers()) == model.config.vision_config.num_hidden_layers == deepest
    assert tiny_config().vision_config.num_hidden_layers == 4 and min(model.config.memory_feature_layers) > 0

    pixel_values = tiny_processor()(images=noise(1), text="<image>", return_tensors="pt")["pixel_values"]
    alive = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: alive.append(args))
    model.get_image_features(pixel_values)
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    query_features, memory_features, _ = alive[0]
    torch.testing.assert_close(query_features, states[model.config.query_feature_layer][:, 1:])
    expected = torch.cat([states[layer][:, 1:] for layer in model.config.memory_feature_layers], dim=-1)
    torch.testing.assert_close(memory_features, expected)


def test_only_the_layers_that_are_read_are_kept(tiny_model, tiny_processor, noise):
    model = tiny_model(memory_feature_layers=[2], query_feature_layer=5)
    pixel_values = tiny_processor()(images=noise(1), text="<image>", return_tensors="pt")["pixel_values"]
    kept = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: kept.append(output.hidden_states))
    assert model.get_image_features(pixel_values).hidden_states is None
    assert model._can_compile_fullgraph is (RELEASE >= (5, 23))  # hooks need a break in the graph
    if RELEASE >= (5, 23):
        assert [layer for layer in range(6) if kept[0][layer] is not None] == [2, 5]
    else:
        assert kept == [None] and not any(layer._forward_hooks for layer in model.model._vision_tower_layers())


def test_two_threads_share_one_tower(tiny_model, tiny_processor, noise):
    model = tiny_model()
    pixel_values = tiny_processor()(images=noise(2), text="<image><image>", return_tensors="pt")["pixel_values"]
    expected = [model.get_image_features(image[None]).pooler_output[0] for image in pixel_values]
    both_inside = threading.Barrier(2, timeout=60)

    def wait(module, args):
        both_inside.wait()

    model.model._vision_tower_layers()[2].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda image: model.get_image_features(image[None]).pooler_output[0], pixel_values)
        torch.testing.assert_close(list(found), expected)


def test_a_tied_head_stays_tied(tiny_model, tiny_processor, noise, tmp_path):
    model = tiny_model(text_config=Qwen2Config(**SIZE, **HEADS, tie_word_embeddings=True))
    inputs = tiny_processor()(images=noise(1), text="<image> what", return_tensors="pt")
    model.save_pretrained(tmp_path)
    loaded = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(new_tokens(loaded, inputs), new_tokens(model, inputs))
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_defaults_of_the_configuration(tiny_config):
    config = DeltaLlavaConfig()
    assert (config.query_feature_layer, config.memory_feature_layers) == (23, [12, 16, 22, 23])
    assert (config.num_visual_tokens, config.visual_token_budgets) == (144, [144])
    assert config.valid_visual_token_counts == [1, 4, 9, 16, 36, 64, 144, 576]
    config.image_token_index = 7  # LLaVA's name
    assert config.image_token_id == config.to_dict()["image_token_id"] == config.image_token_index == 7
    for image_size, patch_size, default in ((224, 14, 64), (384, 14, 81)):
        vision_config = {"model_type": "siglip_vision_model", "image_size": image_size, "patch_size": patch_size}
        assert DeltaLlavaConfig(vision_config=vision_config).num_visual_tokens == default
    # What is stored is positive, so that a trimmed tower keeps its meaning
    again = DeltaLlavaConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_visual_tokens": 64}, r"num_visual_tokens=64 .* one of \[1, 4, 9, 16, 36, 144\]"),
        ({"visual_token_budgets": [36, 2]}, r"num_visual_tokens=2 .* one of \[1, 4"),
        ({"memory_feature_layers": [3, 6]}, r"memory_feature_layers names layer 6, but the vision tower has 5 layers"),
        ({"query_feature_layer": 0}, "query_feature_layer names layer 0"),
        ({"memory_feature_layers": []}, r"memory_feature_layers=\[\] must name a layer"),
        ({"visual_token_budgets": []}, r"visual_token_budgets=\[\] must name budgets"),
        ({"visual_token_budgets": [4, 4]}, r"visual_token_budgets=\[4, 4\] must name budgets, each once"),
        ({"projector_rank": 0}, "projector_rank=0 must be 1 or more"),
        ({"projector_num_attention_heads": 0}, "projector_num_attention_heads=0 must divide .* hidden_size=32"),
        ({"projector_num_attention_heads": 3}, "projector_num_attention_heads=3 must divide .* hidden_size=32"),
    ],
)
def test_bad_configuration_is_refused(tiny_config, overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)
    # Whichever way it comes in
    config = tiny_config()
    config.save_pretrained(tmp_path)
    message = message.replace("has 5 layers", "has 4 layers")  # it is trimmed
    with pytest.raises(ValueError, match=message):
        DeltaLlavaConfig.from_pretrained(tmp_path, **overrides)
    for name, value in overrides.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        config.save_pretrained(tmp_path / "bad")


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_visual_tokens": True},
        {"visual_token_budgets": [36, True]},
        {"memory_feature_layers": [True, 2]},
        {"projector_rank": True},
        {"image_size": True},
    ],
)
def test_a_bool_is_no_number_in_a_configuration(tiny_config, tmp_path, overrides):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **overrides}))
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(overrides))):
        DeltaLlavaConfig.from_pretrained(tmp_path)


def test_a_bool_is_no_budget_of_a_processor(tiny_processor, tmp_path):
    tiny_processor().save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    for overrides in ({"num_visual_tokens": True}, {"num_visual_tokens": True, "patch_grid_size": None}):
        file.write_text(json.dumps({**settings, **overrides}))
        with pytest.raises(ValueError, match="num_visual_tokens=True"):
            DeltaLlavaProcessor.from_pretrained(tmp_path)


def test_fields_named_at_loading_are_checked(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for load in (DeltaLlavaForConditionalGeneration, AutoModelForImageTextToText):
        assert load.from_pretrained(tmp_path, num_visual_tokens=4).config.num_visual_tokens == 4
        with pytest.raises(ValueError, match=r"num_visual_tokens=5 .* one of \[1, 4, 9, 16, 36, 144\]"):
            load.from_pretrained(tmp_path, num_visual_tokens=5)
    config, others = DeltaLlavaConfig.from_pretrained(
        tmp_path, query_feature_layer=-1, nonsense=1, return_unused_kwargs=True
    )
    assert config.query_feature_layer == 4 and others == {"nonsense": 1}
    with pytest.raises(ValueError, match=r"num_visual_tokens=True .* one of"):
        tiny_model().get_image_features(torch.zeros(1, 3, 48, 48), num_visual_tokens=True)


def test_bad_tower_is_refused(tiny_config):
    vision_config = tiny_config().vision_config
    vision_config.image_size = [48, 64]
    with pytest.raises(ValueError, match="patch grid must be square"):
        tiny_config(vision_config=vision_config)
    with pytest.raises(ValueError, match="type 'resnet' have no image_size and no patch_size"):
        tiny_config(vision_config=ResNetConfig())
    vision_config = tiny_config().vision_config
    vision_config.hidden_size = 36
    with pytest.raises(ValueError, match="hidden_size=36 must be a multiple of 8"):
        tiny_config(vision_config=vision_config)


QUANTIZATION = {
    "bitsandbytes-8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes-4bit": lambda: BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"]),
    "bitsandbytes-dict": lambda: {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "torchao": lambda: TorchAoConfig(__import__("torchao.quantization", fromlist=["x"]).Int8WeightOnlyConfig()),
}


@pytest.mark.parametrize("method", QUANTIZATION)
def test_quantization_leaves_tower_and_projector_alone(tiny_model, tiny_processor, noise, tmp_path, method):
    pytest.importorskip(method.split("-")[0])
    original = tiny_model(projector_variant="residual")
    original.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, trust_remote_code=True, quantization_config=QUANTIZATION[method](), device_map="cpu"
    )

    def is_plain(name, weight):
        return type(weight.data) is torch.Tensor and weight.dtype.is_floating_point

    plain = {name for name, weight in model.named_parameters() if is_plain(name, weight)}
    spared = ("model.vision_tower.", "model.multi_modal_projector.", "lm_head.")
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in names if name.startswith(spared)} <= plain
    quantized = names - plain
    assert quantized and all(".layers." in name and "language_model" in name for name in quantized)

    inputs = tiny_processor()(images=noise(1), text="<image>", return_tensors="pt")
    features = model.get_image_features(inputs["pixel_values"]).pooler_output[0].float()
    expected = original.get_image_features(inputs["pixel_values"]).pooler_output[0]
    torch.testing.assert_close(features, expected, atol=0.1, rtol=0.1)
    assert model(**inputs).logits.isfinite().all()


def test_prefill_in_chunks_is_one_prefill_or_refused(tiny_model, tiny_processor, noise):
    model = tiny_model()
    inputs = tiny_processor()(images=noise(1), text="USER: <image> What?", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    if RELEASE >= (5, 23):
        expected = model.generate(**inputs, **options)
        assert model.generate(**inputs, prefill_chunk_size=8, **options).equal(expected)
    else:
        with pytest.raises(ValueError, match="prefill_chunk_size=8 loses the images before transformers 5"):
            model.generate(**inputs, prefill_chunk_size=8, **options)
