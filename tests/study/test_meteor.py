"""The comparator after LLaVA-Meteor's abstract fuses, judges and keeps as it says, and never sees an answer first."""

import json
import logging
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2WithRegistersConfig, LlamaConfig

from delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from delta_llava.costs import FLOP_PARTS, inference_costs, recipe_config
from delta_llava.study.meteor import (
    MeteorConfig,
    MeteorForConditionalGeneration,
    MeteorProcessor,
    MeteorProjector,
    main,
    meteor_costs,
    meteor_from,
    scan,
    unscan,
    visual_native_selection,
)
from delta_llava.study.run import METHODS
from delta_llava.train.batches import Collator
from delta_llava.turns import TEMPLATES


SIDE, PATCHES, SIZE, TEXT_SIZE = 12, 144, 32, 64
SCANS = ("raster", "window", "local_to_single")
every_scan = pytest.mark.parametrize("kind", SCANS)


@pytest.fixture
def meteor_config(tiny_config):
    def make(**fields):
        return MeteorConfig.from_delta_llava(tiny_config(), **fields)

    return make


@pytest.fixture
def meteor(tiny_config):
    """A model of random weights, so that fusion does something, whose images sway what it says."""

    def make(siglip=False, **fields):
        torch.manual_seed(0)
        model = meteor_from(DeltaLlavaForConditionalGeneration(tiny_config(siglip=siglip)), **fields).eval()
        with torch.no_grad():
            torch.nn.init.normal_(model.model.multi_modal_projector.fusion.mixer.out_proj.weight, std=0.3)
            model.model.multi_modal_projector.mlp[-1].weight.mul_(50)
            model.lm_head.weight.mul_(10)
        return model

    return make


@pytest.fixture
def fusion(meteor_config):
    """With weights as training might leave them: all that starts at zero or faintly is random."""

    def make(**fields):
        torch.manual_seed(0)
        model = MeteorForConditionalGeneration(meteor_config(**fields))
        module = model.model.multi_modal_projector.fusion
        torch.nn.init.kaiming_uniform_(module.mixer.out_proj.weight, a=5**0.5)
        return module

    return make


@pytest.fixture
def processor(tiny_processor):
    parts = tiny_processor()
    return MeteorProcessor(
        parts.image_processor,
        parts.tokenizer,
        num_visual_tokens=29,
        patch_grid_size=12,
        chat_template=parts.chat_template,
    )


def instruction_of(batch_size, length, num_pads=()):
    """Random embeddings, and a mask with so many pads on the left of each row."""
    mask = torch.ones(batch_size, length, dtype=torch.bool)
    for row, pads in enumerate(num_pads):
        mask[row, :pads] = False
    return torch.randn(batch_size, length, TEXT_SIZE), mask


def chat(*turns, images=()):
    """Questions and answers in turn, with images before the first question."""
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": [{"type": "text", "text": text}]}
        for index, text in enumerate(turns)
    ]
    messages[0]["content"] = [{"type": "image", "image": image} for image in images] + messages[0]["content"]
    return messages


def prompt_of(processor, *chats, **kwargs):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template([*chats], **options, processor_kwargs={"padding": True, **kwargs})


def row_of(image, *turns, budget=17):
    """As training reads it."""
    messages = chat(*turns)
    messages[0]["content"].insert(0, {"type": "image", "text": None})
    return {"images": [image], "messages": messages, "num_visual_tokens": budget}


# Flash Global Fusion


def test_the_mixer_is_a_selective_state_space_recurrence(fusion):
    mixer = fusion().mixer
    inputs = torch.randn(2, 150, SIZE)  # more than two chunks
    gate, signal, step = mixer.in_proj(inputs).split([2 * SIZE, 2 * SIZE + 128, mixer.num_heads], dim=-1)
    padded = F.pad(signal, (0, 0, 3, 0))
    signal = F.silu(sum(padded[:, k : k + 150] * mixer.conv1d.weight[:, 0, k] for k in range(4)))
    values, into, out_of = signal.split([2 * SIZE, 64, 64], dim=-1)
    step = F.softplus(step + mixer.dt_bias)
    state, outputs = torch.zeros(2, mixer.num_heads, mixer.head_dim, 64), []
    for t in range(150):
        value = values[:, t].unflatten(-1, (mixer.num_heads, mixer.head_dim))
        decay = torch.exp(-step[:, t] * mixer.A_log.exp())[..., None, None]
        state = decay * state + (step[:, t, :, None] * value)[..., None] * into[:, t, None, None]
        read = (state * out_of[:, t, None, None]).sum(-1)
        outputs.append((read + mixer.D[:, None] * value).flatten(1))
    gated = torch.stack(outputs, dim=1) * F.silu(gate)
    normed = mixer.norm.weight * gated * (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(mixer(inputs), mixer.out_proj(normed), rtol=1e-4, atol=1e-5)


def test_half_of_the_heads_remember_hundreds_of_patches(fusion):
    mixer = fusion().mixer
    slow = mixer.A_log.exp() * 0.1 * 500 < 1  # at the largest first step, after 500 patches: more than 1/e is left
    assert slow.sum() == mixer.num_heads / 2


@every_scan
def test_both_directions_reach_every_patch(fusion, kind):
    module = fusion(scan=kind)
    features = torch.randn(1, PATCHES, SIZE)
    text = instruction_of(1, 3)
    with torch.no_grad():
        fused = module(features, *text)
        for changed in (0, 70, 143):
            other = features.clone()
            other[0, changed] = torch.randn(SIZE)
            assert ((module(other, *text) - fused).abs().amax(-1) > 1e-5).all()


@every_scan
def test_scan_and_its_inverse_are_the_identity(fusion, kind):
    module, patches = fusion(scan=kind), torch.randn(2, PATCHES, 5)
    summary = torch.randn(2, 1, 5) if module.has_summaries else None
    sequence = scan(patches, module.window, summary)
    assert sequence.shape[1] == {"raster": 144, "window": 144, "local_to_single": 144 + 9}[kind]
    assert torch.equal(unscan(sequence, SIDE, module.window, module.has_summaries), patches)


def test_the_local_to_single_scan_reads_a_windows_mean_before_its_patches():
    grid = torch.arange(36.0).view(1, 36, 1)  # 6 x 6, windows of 2 x 2
    sequence = scan(grid, 2, torch.full((1, 1, 1), 100.0))[0, :, 0].view(9, 5)
    assert sequence[0].tolist() == [103.5, 0, 1, 6, 7]
    assert sequence[1].tolist() == [105.5, 2, 3, 8, 9]  # to the right of it
    assert sequence[3].tolist() == [115.5, 12, 13, 18, 19]  # below it
    assert torch.equal(scan(grid, 6), grid)  # the raster order
    assert scan(grid, 3)[0, :10, 0].tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14, 3]


@every_scan
def test_before_training_it_is_the_mlp_of_llava(meteor_config, kind):
    torch.manual_seed(0)
    model = MeteorForConditionalGeneration(meteor_config(scan=kind))
    projector, features = model.model.multi_modal_projector, torch.randn(2, PATCHES, SIZE)
    tokens, patches = projector(features, torch.rand(2, PATCHES), *instruction_of(2, 5), [PATCHES, 7])
    first, _, second = projector.mlp
    expected = F.gelu(features @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(tokens[0], expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens[1], expected[1, patches[1]], rtol=0, atol=1e-6)


def change_with_the_instruction(module):
    """Of each patch by fusion, in shares of what fusion adds to it."""
    torch.manual_seed(1)
    features = torch.randn(4, PATCHES, SIZE)
    (first, mask), (second, _) = instruction_of(4, 20), instruction_of(4, 20)
    with torch.no_grad():
        one, other = module(features, first, mask) - features, module(features, second, mask) - features
    return ((one - other).norm(dim=-1) / one.norm(dim=-1)).mean(0)


def test_the_instruction_does_not_fade_on_its_way_over_the_image(fusion):
    change = change_with_the_instruction(fusion())
    assert change[-1] > 0.01 and change.min() > 0.01
    # A part of it comes by the windows' summaries
    assert change.mean() > 1.2 * change_with_the_instruction(fusion(scan="window")).mean()


def test_pads_of_the_instruction_leave_no_trace(fusion):
    module, features = fusion(), torch.randn(2, PATCHES, SIZE)
    text, mask = instruction_of(2, 9, num_pads=(0, 4))
    fused = module(features, text, mask)
    torch.testing.assert_close(fused[1:], module(features[1:], text[1:, 4:], mask[1:, 4:]), rtol=1e-4, atol=1e-5)
    nothing = module(features, text[:, :0], mask[:, :0])
    torch.testing.assert_close(module(features, text, mask & False), nothing, rtol=1e-4, atol=1e-5)


@every_scan
def test_gradients_reach_every_weight_of_the_projector(meteor, kind):
    model = meteor(scan=kind)
    prompt = torch.tensor([[1, *[model.config.image_token_id] * 20, 5, 6, 7]])
    inputs = {"pixel_values": torch.randn(1, 3, 48, 48), "instruction_ids": torch.tensor([[5, 6]])}
    model(prompt, num_visual_tokens=20, labels=prompt, **inputs).loss.backward()
    for name, weight in model.model.multi_modal_projector.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_an_instruction_has_no_gradient_into_the_embeddings(meteor):
    model = meteor()
    features = model.get_image_features(torch.randn(1, 3, 48, 48), 20, torch.tensor([[5, 6]]))
    features.pooler_output[0].sum().backward()
    assert model.get_input_embeddings().weight.grad is None


def test_training_without_an_instruction_leaves_no_weight_without_a_gradient(meteor):
    """As in stage 1, where DDP waits for a gradient of every weight."""
    model = meteor().train()
    model.get_image_features(torch.randn(2, 3, 48, 48), 20).pooler_output[0].sum().backward()
    assert all(weight.grad is not None for weight in model.model.multi_modal_projector.parameters())


# Visual-Native Selection


def test_ranks_are_averaged_and_ties_go_by_position():
    tokens = torch.tensor([[[1.0, 0], [0, 1], [0.9, 0.1], [1, 1], [0, 1]]])
    attention = torch.tensor([[0.1, 0.3, 0.5, 0.2, 0.3]])  # ranks 4 1 0 3 2
    text, mask = (
        torch.tensor([[[0.0, 2], [9, 9]]]),
        torch.tensor([[True, False]]),
    )  # cosines 0 1 .11 .71 1, ranks 4 0 3 2 1

    def kept(experts, count, mask=mask):
        return visual_native_selection(experts, tokens, attention, text, mask, [count])[0].tolist()

    assert [kept("visual", count) for count in (1, 2, 3)] == [[2], [1, 2], [1, 2, 4]]
    assert [kept("native", count) for count in (1, 2, 3)] == [[1], [1, 4], [1, 3, 4]]
    assert [kept("both", count) for count in (1, 2, 3, 4)] == [[1], [1, 2], [1, 2, 4], [1, 2, 3, 4]]  # sums 8 1 3 5 3
    assert kept("native", 2, mask & False) == kept("visual", 2)  # nothing is asked


def test_the_native_expert_takes_the_nearest_token_of_the_instruction():
    tokens = torch.eye(3)[None]
    text = torch.tensor([[[0.0, 0, 1], [0.1, 0.9, 0]]])
    mask, attention = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[3.0, 2, 1]])
    assert visual_native_selection("native", tokens, attention, text, mask, [2])[0].tolist() == [1, 2]


def test_every_number_of_patches_is_kept_by_one_set_of_weights(meteor):
    model, pixels, ids = meteor(), torch.randn(1, 3, 48, 48), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        (everything,) = model.get_image_features(pixels, PATCHES, ids).pooler_output
        counts = torch.arange(1, PATCHES + 1)
        features = model.get_image_features(pixels.expand(PATCHES, -1, -1, -1), counts, ids.expand(PATCHES, -1))
    for count, tokens, patches in zip(counts, features.pooler_output, features.kept_patches, strict=True):
        assert tokens.shape == (count, TEXT_SIZE)
        assert all(a < b for a, b in pairwise(patches.tolist()))
        torch.testing.assert_close(tokens, everything[patches], rtol=1e-4, atol=1e-4)  # whole patches, no merged ones
    found = [set(patches.tolist()) for patches in features.kept_patches]
    assert all(fewer < more for fewer, more in pairwise(found))


@pytest.mark.parametrize("budget", [0, 145, -1])
def test_no_other_number_of_patches_is_taken(meteor, meteor_config, processor, noise, budget):
    message = rf"num_visual_tokens={budget} must be an integer from 1 to 144"
    with pytest.raises(ValueError, match=message):
        meteor().get_image_features(torch.randn(1, 3, 48, 48), budget)
    with pytest.raises(ValueError, match=message):
        meteor_config(num_visual_tokens=budget)
    with pytest.raises(ValueError, match=message):
        processor(images=noise(1), text="<image>", num_visual_tokens=budget)
    with pytest.raises(ValueError, match=message):
        meteor_costs(meteor_config(), budget, 8, 4)


@pytest.mark.parametrize("siglip", [False, True])
def test_the_visual_expert_reads_what_an_eager_tower_returns(meteor, siglip, caplog):
    model = meteor(siglip=siglip)
    pixels, layer = torch.randn(2, 3, 48, 48), model.config.query_feature_layer
    layers = model.model._vision_tower_layers()
    assert [each.self_attn.config._attn_implementation for each in layers] == ["sdpa"] * (layer - 1) + ["eager"]
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    with caplog.at_level(logging.WARNING, logger="transformers"):
        kept = model.get_image_features(pixels, 10).kept_patches  # nothing is asked: the visual expert alone
    assert "attentions" not in caplog.text
    model.model.vision_tower.set_attn_implementation("eager")
    outputs = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    # The tower ends where it is read
    hidden = outputs.hidden_states[-2]
    attention = layers[-1].self_attn(layers[-1].layer_norm1(hidden), attention_mask=None)[1].mean(1)
    received = attention.mean(1) if siglip else attention[:, 0, 1:]
    for image in range(2):
        assert kept[image].tolist() == sorted(received[image].topk(10).indices.tolist())


def test_towers_with_other_tokens_before_their_patches_are_read_alike():
    """CLS comes first, then registers."""
    tower = Dinov2WithRegistersConfig(
        hidden_size=SIZE, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=4, num_register_tokens=4
    )
    text = LlamaConfig(
        vocab_size=8, hidden_size=TEXT_SIZE, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = MeteorForConditionalGeneration(MeteorConfig(vision_config=tower, text_config=text, image_token_id=7)).eval()
    features = model.get_image_features(torch.randn(2, 3, 48, 48), 10, output_attentions=True)
    (attention,) = features.attentions  # of one layer
    expected = attention.mean(1)[:, 0, 5:].topk(10).indices.sort().values
    assert torch.equal(torch.stack(features.kept_patches), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_any_attention_of_the_whole_model_gives_the_same(meteor, implementation):
    model, pixels, ids = meteor(), torch.randn(2, 3, 48, 48), torch.tensor([[5, 6], [7, 8]])
    expected = model.get_image_features(pixels, 30, ids)
    model.set_attn_implementation(implementation)
    found = model.get_image_features(pixels, 30, ids)
    for ours, theirs in zip(found.pooler_output, expected.pooler_output, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# The instruction


def test_the_answer_changes_nothing_that_is_kept(meteor, processor, noise):
    """In stage 2, whose rows hold their answers; they keep what the same question keeps when it is asked."""
    model, (image,), seen = meteor(), noise(1), []
    batches = [
        Collator(processor)([row_of(image, "What is it?", *answers)])
        for answers in (["a red circle"], ["nothing at all"], ["a", "And what is left of it?", "two more"])
    ]
    batches.append(prompt_of(processor, chat("What is it?", images=[image]), num_visual_tokens=17))
    batches.append(
        prompt_of(processor, chat("What is it?", "no", "And what is left?", images=[image]), num_visual_tokens=17)
    )
    for batch in batches:
        names = ("pixel_values", "num_visual_tokens", "instruction_ids")
        kept = model.get_image_features(*(batch[name] for name in names)).kept_patches[0]
        seen.append((processor.decode(batch["instruction_ids"][0]), kept.tolist()))
    assert seen == seen[:1] * 5
    assert seen[0][0].endswith("USER: \nWhat is it? ASSISTANT:")
    # Not that the question did not matter either
    other = processor(images=image, text="<image>Where?", num_visual_tokens=17, return_tensors="pt")
    assert model.get_image_features(*(other[name] for name in names)).kept_patches[0].tolist() != seen[0][1]


def test_stage_1_has_no_instruction(meteor, processor, noise):
    """Its rows hold nothing but captions, which are the answers."""
    model, (image,) = meteor(), noise(1)
    template = (TEMPLATES / "plain.jinja").read_text()
    batch = Collator(processor, chat_template=template)(
        [row_of(image, "Describe it.", "a USER: red ASSISTANT: circle")]
    )
    assert (batch["instruction_ids"] < 0).all()
    kept = model.get_image_features(batch["pixel_values"], 17, batch["instruction_ids"]).kept_patches[0]
    assert torch.equal(kept, meteor(experts="visual").get_image_features(batch["pixel_values"], 17).kept_patches[0])


def test_rows_without_images_train_beside_others(meteor, processor, noise):
    rows = [row_of(None, "Who are you?", "nobody"), row_of(noise(1)[0], "What is it?", "a red circle")]
    rows[0] = {**rows[0], "images": [], "messages": chat("Who are you?", "nobody")}
    batch = Collator(processor)(rows)
    assert batch["instruction_ids"].shape[0] == 1 and "What is it?" in processor.decode(batch["instruction_ids"][0])
    assert meteor()(**batch).loss.isfinite()
    alone = Collator(processor)(rows[:1])
    assert "instruction_ids" not in alone and meteor()(**alone).loss.isfinite()


def test_a_chat_that_begins_with_an_answer_has_no_instruction(processor, noise):
    messages = [{"role": "assistant", "content": "Hello."}, *chat("What is it?", images=noise(1))]
    assert (prompt_of(processor, messages)["instruction_ids"] < 0).all()


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        ("<image>\nWhat is it?", "\nWhat is it?"),
        ("<s>USER: <image>\nWhat? ASSISTANT:", "USER: \nWhat? ASSISTANT:"),
        ("<s>USER: <image>\nWhat? ASSISTANT: a cat</s>USER: Why? ASSISTANT:", "USER: \nWhat? ASSISTANT:"),
        ("<s><image></s>", ""),
    ],
)
def test_a_text_is_an_instruction_up_to_its_first_answer(processor, noise, text, instruction):
    ids = processor(images=noise(1), text=text, return_tensors="pt")["instruction_ids"]
    assert processor.decode(ids[ids >= 0]) == instruction


def test_an_instruction_can_be_given(processor, noise):
    text = ["<image><image>", "none", "<image> and"]
    images = [noise(2), [], noise(1)]
    inputs = processor(images=images, text=text, instruction=["What?", "never", "Where is it?"], padding=True)
    assert [processor.decode([token for token in row if token >= 0]) for row in inputs["instruction_ids"]] == [
        "What?", "What?", "Where is it?",
    ]  # fmt: skip
    assert len({len(row) for row in inputs["instruction_ids"]}) == 1 and inputs["instruction_ids"][0][0] == -100
    nested = processor(images=images, text=text, images_kwargs={"instruction": "What?"}, padding=True)
    assert nested["instruction_ids"][2] == nested["instruction_ids"][0]
    assert "instruction_ids" not in processor(text="none", images_kwargs={"instruction": "What?"})
    asked = chat("What is it?", images=noise(1))
    given = prompt_of(processor, asked, instruction="What?")["instruction_ids"]
    assert torch.equal(given, torch.tensor([processor.tokenizer.encode("What?", add_special_tokens=False)]))
    with pytest.raises(ValueError, match="instruction has 2 texts, but there are 3"):
        processor(images=images, text=text, instruction=["What?", "Where?"])


def test_pads_may_stand_anywhere_in_the_ids(meteor):
    model, pixels = meteor(), torch.randn(1, 3, 48, 48)
    placeholder = model.config.image_token_id
    expected = model.get_image_features(pixels, 20, torch.tensor([[5, 6, 7]]))
    for ids in ([[-100, 5, 6, 7]], [[5, 6, 7, -100, -1]], [[5, -100, placeholder, 6, 7]]):
        found = model.get_image_features(pixels, 20, torch.tensor(ids))
        assert torch.equal(found.kept_patches[0], expected.kept_patches[0])
        torch.testing.assert_close(found.pooler_output[0], expected.pooler_output[0], rtol=1e-4, atol=1e-4)


def test_there_is_an_instruction_for_each_image(meteor):
    with pytest.raises(ValueError, match="instruction_ids has 1 rows, but there are 2 images"):
        meteor().get_image_features(torch.randn(2, 3, 48, 48), 20, torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="num_visual_tokens names 3 budgets, but there are 2 images"):
        meteor().get_image_features(torch.randn(2, 3, 48, 48), torch.tensor([1, 2, 3]))


# Switches


def kept_for(model, ids):
    torch.manual_seed(2)
    features = model.get_image_features(torch.randn(1, 3, 48, 48), 20, torch.tensor([ids]))
    return features.kept_patches[0].tolist(), features.pooler_output[0]


@pytest.mark.parametrize("experts", ["both", "visual", "native"])
def test_experts_can_be_switched(meteor, experts):
    model = meteor(experts=experts)
    (one, tokens), (other, others) = kept_for(model, [5, 6]), kept_for(model, [70, 80])
    assert (one == other) == (experts == "visual")
    assert not torch.equal(tokens, others)  # fusion reads the instruction all the same


def test_without_the_instruction_nothing_reads_it(meteor):
    model = meteor(use_instruction=False)
    (one, tokens), (other, others) = kept_for(model, [5, 6]), kept_for(model, [70, 80])
    assert one == other and torch.equal(tokens, others)
    assert {name.split(".")[0] for name, _ in model.model.multi_modal_projector.fusion.named_parameters()} == {
        "visual_norm", "mixer",
    }  # fmt: skip


def test_what_contradicts_itself_is_refused(meteor_config, meteor, tmp_path):
    with pytest.raises(ValueError, match='experts="native" judges by the instruction'):
        meteor_config(experts="native", use_instruction=False)
    with pytest.raises(
        ValueError, match=r"scan_window=5 must divide the grid of 12x12 patches: one of \[1, 2, 3, 4, 6"
    ):
        meteor_config(scan_window=5)
    with pytest.raises(ValueError, match="each once"):
        meteor_config(visual_token_budgets=[4, 4])
    meteor_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="scan_window=5"):
        MeteorConfig.from_pretrained(tmp_path, scan_window=5)


def test_windows_fit_the_grid_by_default():
    grids = {(336, 14): 4, (384, 14): 3, (224, 14): 4, (518, 14): 1}  # 24, 27, 16 and 37 patches a side
    for (image_size, patch_size), window in grids.items():
        vision = {"model_type": "clip_vision_model", "image_size": image_size, "patch_size": patch_size}
        config = MeteorConfig(vision_config=vision)
        assert config.scan_window == window
        assert config.num_visual_tokens == 144 and config.memory_feature_layers == [config.query_feature_layer]


def test_each_variant_of_the_study_switches_what_its_name_says():
    assert {name: method.meteor for name, method in METHODS.items() if method.meteor is not None} == {
        "meteor": {},
        "meteor-no-instruction": {"use_instruction": False},
        "meteor-no-local-summaries": {"scan": "window"},
        "meteor-visual-expert": {"experts": "visual"},
        "meteor-native-expert": {"experts": "native"},
    }


# The model


@torch.inference_mode()
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_left_padded_batch_answers_as_its_rows_do(meteor, processor, noise, num_beams):
    """Several images of several budgets in a row, one, and none."""
    model, (first, second, third) = meteor(), noise(3)
    chats = [
        chat("Are these the same?", images=[first, second]),
        chat("What?", images=[third]),
        chat("Who are you, and what do you see at the very left of all that is there?"),
    ]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    batch = prompt_of(processor, *chats, num_visual_tokens=[29, 3, 144])
    assert not batch["attention_mask"].all()
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, budgets in enumerate(([29, 3], [144], [])):
        single = prompt_of(processor, chats[row], **({"num_visual_tokens": budgets} if budgets else {}))
        alone = model.generate(**single, **options)[:, single["input_ids"].shape[1] :]
        length = min(alone.shape[1], together.shape[1])
        assert alone[0, :length].tolist() == together[row, :length].tolist()


@torch.inference_mode()
def test_generation_with_a_cache_equals_one_pass(meteor, processor, noise):
    model = meteor()
    inputs = prompt_of(processor, chat("What is it?", images=noise(1)), num_visual_tokens=29)
    answer = model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    whole = {**inputs, "input_ids": answer.sequences, "attention_mask": torch.ones_like(answer.sequences)}
    logits = model(**whole).logits[0, inputs["input_ids"].shape[1] - 1 : -1]
    torch.testing.assert_close(torch.cat(answer.logits), logits, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_images_encoded_once_give_the_same_answer(meteor, processor, noise):
    model = meteor()
    inputs = prompt_of(processor, chat("What is it?", images=noise(1)), num_visual_tokens=29)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, **options)
    encoded = model.get_image_features(
        *(inputs.pop(name) for name in ("pixel_values", "num_visual_tokens")), inputs.pop("instruction_ids")
    )
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, mm_encoder_outputs={"image": encoded}, **options), expected)
    pixels = torch.zeros(1, 3, 48, 48)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
            call(**inputs, pixel_values=pixels, mm_encoder_outputs={"image": encoded})


def test_what_is_asked_changes_what_is_answered(meteor, processor, noise):
    model, (image,) = meteor(), noise(1)
    inputs = processor(images=image, text="<image>", num_visual_tokens=29, return_tensors="pt")
    del inputs["instruction_ids"]
    with torch.inference_mode():
        one, other = (model(**inputs, instruction_ids=torch.tensor([ids])).logits for ids in ([5, 6], [70, 80]))
    assert (one - other).abs().max() > 1e-2


@torch.inference_mode()
def test_it_answers_in_bfloat16(meteor, processor, noise):
    inputs = prompt_of(processor, chat("What is it?", images=noise(2)), num_visual_tokens=[5, 29])
    answer = meteor().to(torch.bfloat16).generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3


def test_it_saves_and_loads_by_its_own_classes(meteor, processor, tmp_path):
    model = meteor(scan="window", experts="visual")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    for file in ("config.json", "processor_config.json"):
        assert "auto_map" not in json.loads((tmp_path / file).read_text())
    loaded = MeteorForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.config.scan, loaded.config.experts, loaded.config.num_visual_tokens) == ("window", "visual", 36)
    for (name, weight), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name
    again = MeteorProcessor.from_pretrained(tmp_path)
    assert (again.num_visual_tokens, again.patch_grid_size, again.chat_template) == (29, 12, processor.chat_template)


def test_it_takes_tower_and_language_model_over(tiny_model):
    model = tiny_model()
    ours = meteor_from(model)
    for part in ("model.vision_tower", "model.language_model", "lm_head"):
        theirs = model.get_submodule(part).state_dict()
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.get_submodule(part).state_dict().items())
    assert ours.config.visual_token_budgets == model.config.visual_token_budgets
    assert isinstance(ours.model.multi_modal_projector, MeteorProjector)
    assert isinstance(model.config, DeltaLlavaConfig) and not isinstance(model.config, MeteorConfig)


# Costs


def test_costs_are_those_of_the_model(meteor, meteor_config):
    config = meteor_config()
    costs = meteor_costs(config, 29, text_tokens=8, new_tokens=4)
    model = MeteorForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # whose products are counted on a CPU too
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = model.get_image_features(torch.randn(1, 3, 48, 48), 29, torch.arange(5, 13)[None])
    assert costs["vision"] + costs["projector"] == counter.get_total_flops()
    assert features.pooler_output[0].shape == (29, TEXT_SIZE)
    language = ("vision", "prefill", "decode", "kv_cache_bytes")
    squares = inference_costs(config, 36, text_tokens=1, new_tokens=4)
    assert {part: costs[part] for part in language} == {part: squares[part] for part in language}  # 29 + 8 = 36 + 1


def test_fusion_costs_what_its_matrices_do(meteor_config):
    """At all patches, in the raster order, without an instruction: 144 places, read twice."""
    config = meteor_config(scan="raster", use_instruction=False)
    found = meteor_costs(config, 1, text_tokens=8, new_tokens=1)["projector"]
    inner, state, heads, chunk = 2 * SIZE, 64, 8, 64
    head_dim = inner // heads
    mlp = 2 * PATCHES * (SIZE * TEXT_SIZE + TEXT_SIZE**2)
    maps = 2 * PATCHES * SIZE * (2 * inner + 2 * state + heads + inner)
    convolution = 2 * (PATCHES + 3) * 4 * (inner + 2 * state)
    chunks = math.ceil(PATCHES / chunk)
    within = 2 * chunks * heads * chunk**2 * (state + head_dim)  # scores, and what they weigh
    between = 2 * chunks * heads * chunk * state * head_dim * 2  # into the states, and out of them
    carried = 2 * heads * (chunks + 1) ** 2 * head_dim * state
    assert found == mlp + 2 * (maps + convolution + within + between + carried)


def test_costs_are_printed_beside_our_own(capsys, meteor_config):
    main(["--recipe", "vicuna-7b", "--text_tokens", "40", "--new_tokens", "3"])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [int(row[0]) for row in rows] == [1, 4, 9, 16, 36, 64, 144, 576]
    ours = inference_costs(recipe_config("vicuna-7b"), 36, 40, 3)
    theirs = meteor_costs(MeteorConfig.from_delta_llava(recipe_config("vicuna-7b")), 36, 40, 3)
    expected = [
        text
        for costs in (theirs, ours)
        for text in (f"{costs['projector'] / 1e9:.1f}", f"{sum(costs[part] for part in FLOP_PARTS) / 1e12:.3f}")
    ]
    assert rows[4][1:] == expected
    with pytest.raises(SystemExit):
        main(["--new_tokens", "0"])
    assert "new_tokens=0 must be 1 or more" in capsys.readouterr().err
