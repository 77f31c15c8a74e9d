"""The costs are what the model computes and holds: counted by torch, weighed by its allocator, and as in the paper."""

import gc
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, Qwen2Config, Qwen3Config
from trl.trainer import utils as trl_utils

from delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, costs
from delta_llava.costs import (
    TRAINABLE_PARTS,
    inference_costs,
    largest_budget,
    main,
    parameter_counts,
    recipe_config,
    training_flops,
    training_memory,
)


QWEN = Qwen2Config(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    pad_token_id=0,
)
QWEN3 = Qwen3Config(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    pad_token_id=0,
)
VARIANTS = {
    "CLIP and Llama": {},
    "SigLIP": {"siglip": True},
    "Qwen2, grouped queries, tied head": {"text_config": QWEN},
    "Qwen3, wide heads": {"text_config": QWEN3},
    "trimmed tower": {"memory_feature_layers": [1, 2], "query_feature_layer": 3},
    "paper": {"projector_variant": "paper", "projector_intermediate_size": 80},
    "residual": {"projector_variant": "residual"},
    "No DeltaProj": {"use_delta_projection": False},
    "No EMHSA": {"use_self_attention": False},
    "No TB": {"use_refinement_block": False, "projector_variant": "paper"},
}
variants = pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)


def counted_flops(function):
    """What torch counts, with attention as the matrix products that it is, and without the rotary embedding's one."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    counts = counter.get_flop_counts()
    rotary = sum(sum(flops.values()) for name, flops in counts.items() if name.endswith("language_model.rotary_emb"))
    return counter.get_total_flops() - rotary


@variants
def test_parameters_are_those_of_the_model(tiny_config, overrides):
    config = tiny_config(**overrides)
    model = DeltaLlavaForConditionalGeneration(config)
    counts = parameter_counts(config)
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        assert counts[name] == sum(weight.numel() for weight in getattr(model.model, name).parameters()), name
    assert sum(counts.values()) == model.num_parameters()  # which counts a tied head once


@pytest.mark.parametrize("budget", [1, 9, 144])
@variants
def test_flops_of_an_answer_are_those_that_torch_counts(tiny_config, overrides, budget):
    config = tiny_config(**overrides)
    model = DeltaLlavaForConditionalGeneration(config).eval().requires_grad_(False)
    pixel_values = torch.randn(1, 3, 48, 48)
    prompt = torch.tensor([[1, *[config.image_token_id] * budget, *range(5, 11)]])
    cache = DynamicCache()
    reading = {"pixel_values": pixel_values, "num_visual_tokens": budget, "logits_to_keep": 1}

    expected = inference_costs(config, budget, text_tokens=7, new_tokens=4)
    tower = counted_flops(lambda: model.model.vision_tower(pixel_values))
    features = counted_flops(lambda: model.get_image_features(pixel_values, budget))
    prefill = counted_flops(lambda: model(prompt, past_key_values=cache, **reading))
    decode = sum(counted_flops(lambda: model(prompt[:, -1:], past_key_values=cache)) for _ in range(3))
    assert expected["vision"] == tower
    assert expected["projector"] == features - tower
    assert expected["prefill"] == prefill - features
    assert expected["decode"] == decode
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert expected["kv_cache_bytes"] == held // 2  # this cache is in float32


def test_generate_takes_what_an_answer_costs(tiny_config):
    config = tiny_config()
    model = DeltaLlavaForConditionalGeneration(config).eval()
    prompt = torch.tensor([[1, *[config.image_token_id] * 36, 5, 6]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    taken = counted_flops(lambda: model.generate(prompt, pixel_values=torch.randn(1, 3, 48, 48), **options))
    expected = inference_costs(config, 36, text_tokens=3, new_tokens=5)
    assert taken == sum(expected[part] for part in ("vision", "projector", "prefill", "decode"))


def test_the_papers_convention_gives_the_figures_of_the_paper():
    config = recipe_config("vicuna-7b")
    for budget, prefill in {576: 6.72, 144: 2.16, 16: 0.85, 1: 0.70}.items():
        answer = inference_costs(config, budget, text_tokens=68, new_tokens=30, convention="paper")
        assert answer["prefill"] / 1e12 == pytest.approx(prefill, rel=0.01)
        assert answer["vision"] / 1e12 == pytest.approx(0.382, rel=0.01)
    assert inference_costs(config, 576, 68, 30, "paper")["decode"] / 1e12 == pytest.approx(0.31, rel=0.01)
    assert inference_costs(config, 16, 68, 28, "paper")["decode"] / 1e12 == pytest.approx(0.28, rel=0.01)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("parts", [("language_model", "lm_head"), TRAINABLE_PARTS, TRAINABLE_PARTS[:1]])
def test_flops_of_training_are_those_that_torch_counts(tiny_config, parts, gradient_checkpointing):
    config = tiny_config()
    model = DeltaLlavaForConditionalGeneration(config).train()
    model.requires_grad_(False)
    for part in parts:
        model.get_submodule("lm_head" if part == "lm_head" else f"model.{part}").requires_grad_(True)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    input_ids = torch.tensor([[1, *[config.image_token_id] * 36, *range(5, 20)]] * 3)
    pixel_values = torch.randn(3, 3, 48, 48)

    def step():
        hidden_states = model.model(input_ids, pixel_values).last_hidden_state
        model.lm_head(hidden_states[:, -7:]).sum().backward()  # 7 labels a row

    expected = training_flops(config, 36, 3, 3, input_ids.shape[1], 3 * 7, parts, gradient_checkpointing)
    head_again = expected["lm_head"] / (3 if "lm_head" in parts else 2)  # by TRL, not here
    taken, expected_in_all = counted_flops(step), sum(expected.values()) - head_again
    if "multi_modal_projector" in parts:
        # Counted three times, of which torch saves the gradient of what comes from the tower
        forward = expected["multi_modal_projector"] / 3
        assert 2 * forward < expected["multi_modal_projector"] - (expected_in_all - taken) < 3 * forward
    else:
        assert taken == expected_in_all


@variants
def test_flops_of_the_projector_in_training_are_those_that_torch_counts(tiny_config, overrides):
    config = tiny_config(**overrides)
    projector = DeltaLlavaForConditionalGeneration(config).train().model.multi_modal_projector
    width, levels = config.vision_config.hidden_size, len(config.memory_feature_layers)
    features = torch.randn(1, 144, width), torch.randn(1, 144, width * levels)
    for budget in (9, 144):
        taken = counted_flops(lambda budget=budget: projector(*features, budget))
        counted = training_flops(config, budget, 1, 1, 200, 1, ["lm_head"])
        assert counted["multi_modal_projector"] == taken


def test_adapters_cost_three_times_their_forward_pass_and_their_base_twice(tiny_config):
    config = tiny_config(text_config=QWEN)
    size = (config, 36, 0, 2, 50, 20, ["multi_modal_projector"])
    model = DeltaLlavaForConditionalGeneration(config).train()
    targets = r"model\.language_model\..*_proj"
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, target_modules=targets))
    embeddings = torch.randn(2, 50, 64, requires_grad=True)
    language_model = model.base_model.model.model.language_model
    taken = counted_flops(lambda: language_model(inputs_embeds=embeddings).last_hidden_state.sum().backward())
    with_adapters = training_flops(*size, gradient_checkpointing=False, lora_rank=4)
    assert taken == with_adapters["language_model"]
    assert training_flops(*size)["language_model"] < taken


def peak_bytes(function):
    """The most that torch's allocator holds at a time for `function`."""
    gc.collect()  # what an earlier test left behind would be freed, and counted, within
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.cumsum(0).max())


@pytest.fixture
def peak_of_training():
    """`measure(config, parts, …)`: the most bytes of steps as the trainer takes them, and what was expected of them."""

    def measure(config, parts, gradient_checkpointing=True, lora_rank=None, num_rows=2, length=256):
        torch.manual_seed(0)
        model = DeltaLlavaForConditionalGeneration(config).bfloat16().train()
        model.requires_grad_(False)
        for part in parts:
            model.get_submodule("lm_head" if part == "lm_head" else f"model.{part}").float().requires_grad_(True)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
        trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        wrapped = model
        if lora_rank:
            # No dropout: on a CPU its mask takes four bytes, where a GPU's takes one
            targets, saved = r"model\.language_model\..*_proj", ["multi_modal_projector"]
            adapters = LoraConfig(r=lora_rank, lora_dropout=0.0, target_modules=targets, modules_to_save=saved)
            wrapped = get_peft_model(model, adapters)
            wrapped.enable_input_require_grads()
        trained = [weight for weight in wrapped.parameters() if weight.requires_grad]
        for weight in trained:
            weight.data = weight.data.float()
        optimizer = torch.optim.AdamW(trained, fused=True)
        input_ids = torch.randint(2, config.text_config.vocab_size, (num_rows, length))
        input_ids[:, 1:37] = config.image_token_id
        batch = {"input_ids": input_ids, "labels": input_ids, "pixel_values": torch.randn(num_rows, 3, 48, 48)}

        def steps():
            for micro_step in range(4):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = wrapped(**batch, fused_lm_head=True).loss
                loss.backward()
                del loss
                if micro_step % 2:
                    optimizer.step()
                    optimizer.zero_grad()

        weights = {weight.data_ptr(): weight.nbytes for weight in wrapped.parameters()}
        taken = sum(weights.values()) + peak_bytes(steps)
        num_labels = num_rows * (length - 1)  # on a CPU, TRL computes the logits of all
        size = (config, 36, num_rows, num_rows, length, num_labels, parts)
        options = {"gradient_checkpointing": gradient_checkpointing, "lora_rank": lora_rank}
        return taken, training_memory(*size, **options)

    return measure


def small_config(num_layers=4, **overrides):
    """Layers of 256 channels, so that weights, what AdamW keeps and activations all count."""
    text_config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=688, num_hidden_layers=num_layers, num_attention_heads=8
    )
    vision_config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4, image_size=48, patch_size=4
    )
    defaults = {"image_token_id": 1, "num_visual_tokens": 36}
    return DeltaLlavaConfig(vision_config=vision_config, text_config=text_config, **defaults, **overrides)


@pytest.fixture
def narrow_tile(monkeypatch):
    """The head's tile is as wide as for a large vocabulary, and would hide everything else of a small model."""
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 128)
    monkeypatch.setattr(costs, "HEAD_WORDS", 128)


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
@pytest.mark.parametrize(
    ("parts", "lora_rank"),
    [(TRAINABLE_PARTS[:1], None), (TRAINABLE_PARTS, None), (TRAINABLE_PARTS[:1], 8)],
    ids=["pretrain", "finetune", "lora"],
)
def test_memory_is_what_training_takes(narrow_tile, peak_of_training, parts, lora_rank, gradient_checkpointing):
    taken, expected = peak_of_training(small_config(), parts, gradient_checkpointing, lora_rank)
    assert expected["total"] == pytest.approx(taken, rel=0.1)


def test_memory_of_many_weights_and_few_tokens(narrow_tile, peak_of_training):
    taken, expected = peak_of_training(small_config(num_layers=8), TRAINABLE_PARTS, length=64)
    assert expected["total"] == pytest.approx(taken, rel=0.05)


@pytest.mark.parametrize("lora_rank", [None, 8])
def test_memory_of_the_papers_projector(narrow_tile, peak_of_training, lora_rank):
    config = small_config(projector_variant="paper")
    taken, expected = peak_of_training(config, TRAINABLE_PARTS[:1], lora_rank=lora_rank, num_rows=8, length=64)
    assert expected["total"] == pytest.approx(taken, rel=0.1)


def test_memory_of_the_heads_tile(peak_of_training):
    taken, expected = peak_of_training(small_config(), TRAINABLE_PARTS[:1])
    assert expected["logits"] > expected["total"] / 2
    assert expected["total"] == pytest.approx(taken, rel=0.1)


def test_sharding_divides_what_it_should():
    config = recipe_config("vicuna-7b")
    sizes = (config, 144, 1, 1, 256, 100, TRAINABLE_PARTS)
    trained = sum(count for part, count in parameter_counts(config).items() if part in TRAINABLE_PARTS)
    frozen = parameter_counts(config)["vision_tower"]
    memory = {
        (sharding, num_gpus): training_memory(*sizes, num_gpus=num_gpus, sharding=sharding)
        for sharding in ("ddp", "zero2", "zero3", "fsdp2")
        for num_gpus in (1, 8, 16)
    }
    for (sharding, num_gpus), needed in memory.items():
        assert needed["optimizer"] == 8 * trained // (1 if sharding == "ddp" else num_gpus)
        assert needed["total"] == sum(size for name, size in needed.items() if name != "total")
    more = {sharding: memory[sharding, 8]["weights"] - memory[sharding, 16]["weights"] for sharding, _ in memory}
    assert more["ddp"] == 0
    assert more["zero2"] == 4 * trained // 16
    assert more["fsdp2"] == pytest.approx((4 * trained + 2 * frozen) / 16, abs=1)
    assert more["zero3"] == pytest.approx((4 * trained + 2 * trained + 2 * frozen) / 16, abs=1)
    # DDP's buckets hold each gradient once more
    assert memory["ddp", 8]["gradients"] - memory["ddp", 1]["gradients"] == 4 * trained


def test_four_bits_hold_the_language_models_layers_alone():
    sizes = (recipe_config("qwen2.5-7b"), 144, 1, 1, 256, 100, TRAINABLE_PARTS[:1])
    whole, quantized = training_memory(*sizes, lora_rank=8), training_memory(*sizes, lora_rank=8, load_in_4bit=True)
    num_quantized = 28 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944)
    dequantized = 2 * 3584 * 18944
    saved = whole["weights"] - quantized["weights"]
    assert saved == pytest.approx((2 - 0.515869) * num_quantized - dequantized, rel=1e-4)


WRONG = {
    "budget": ({"num_visual_tokens": 25}, r"num_visual_tokens=25 .*\[1, 4, 9, 16, 36, 64, 144, 576\]"),
    "tower": ({"trained_parts": ["vision_tower"]}, r"\['vision_tower'\].*The tower is frozen"),
    "nothing": ({"trained_parts": []}, "trained_parts is empty"),
    "adapters on trained weights": ({"lora_rank": 8}, "lora_rank=8.*leave it out"),
    "sharding": ({"sharding": "fsdp"}, r"sharding='fsdp' is not one of \['ddp', 'zero2', 'zero3', 'fsdp2'\]"),
    "no GPU": ({"num_gpus": 0}, "num_gpus=0 must be 1 or more"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_trained_is_refused(changes, message):
    size = {"num_visual_tokens": 144, "num_images": 1, "num_rows": 1, "sequence_length": 256, "num_labels": 100}
    with pytest.raises(ValueError, match=message):
        training_memory(recipe_config("vicuna-7b"), **{**size, "trained_parts": TRAINABLE_PARTS, **changes})


def test_a_backbone_of_unknown_costs_is_refused(tiny_config):
    config = tiny_config(text_config={"model_type": "gpt_neox", "hidden_size": 64, "num_attention_heads": 2})
    with pytest.raises(ValueError, match=r"text_config\.model_type='gpt_neox' are unknown, only those of .*'qwen3'"):
        parameter_counts(config)


def test_the_largest_budget_is_the_last_one_within_every_target():
    config = recipe_config("vicuna-7b")
    budgets = config.valid_visual_token_counts

    def largest(**targets):
        return largest_budget(config, text_tokens=68, new_tokens=30, budgets=budgets, **targets)

    # Keys and values of 32 layers of 4096 channels in two bytes: 0.524288 MB a token; 97 + 64 tokens have 84.410368
    assert largest(max_kv_cache_mb=100) == 64
    assert (largest(max_kv_cache_mb=84.410368), largest(max_kv_cache_mb=84.410367)) == (64, 36)
    # All four parts count: the prefill alone has 2.77 at 144
    assert sum(inference_costs(config, 144, 68, 30)[part] for part in costs.FLOP_PARTS) == pytest.approx(3.54e12, 1e-3)
    assert (largest(max_tflops=3), largest(max_tflops=3.55), largest(max_tflops=1000)) == (64, 144, 576)
    assert largest(max_tflops=3, max_kv_cache_mb=60) == largest(max_tflops=1.9, max_kv_cache_mb=100) == 16
    assert largest(max_tflops=3, convention="paper") == 144


def test_the_largest_budget_is_one_that_the_checkpoint_was_trained_for(capsys, tmp_path, tiny_config):
    config = tiny_config(visual_token_budgets=[36, 4, 16])
    assert largest_budget(config, 68, 30, max_tflops=1) == 36
    # Two layers of 64 channels: 512 bytes a token
    assert largest_budget(config, 68, 30, max_kv_cache_mb=(97 + 35) * 512 / 1e6) == 16
    message = r"trained for, \[4, 16, 36\], stays within max_kv_cache_mb=0.05: the smallest, 4, takes 0.051712 MB"
    with pytest.raises(ValueError, match=message):
        largest_budget(config, 68, 30, max_kv_cache_mb=0.05)
    with pytest.raises(ValueError, match="both None"):
        largest_budget(config, 68, 30)
    config.save_pretrained(tmp_path)
    main(["--config", str(tmp_path), "--max_tflops", "1"])
    assert "36 visual tokens, of those that the checkpoint was trained for, [4, 16, 36]." in capsys.readouterr().out


def test_the_command_prints_every_budget_and_draws_it(capsys, tmp_path, tiny_config):
    main(["--recipe", "vicuna-7b", "--convention", "paper", "--json", "--plot", str(tmp_path / "costs.png")])
    budgets = json.loads(capsys.readouterr().out)["budgets"]
    assert list(budgets) == ["1", "4", "9", "16", "36", "64", "144", "576"]
    assert budgets["144"] == inference_costs(recipe_config("vicuna-7b"), 144, 68, 30, "paper")
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")

    tiny_config().save_pretrained(tmp_path)
    main(["--config", str(tmp_path), "--text_tokens", "10", "--new_tokens", "2"])
    expected = inference_costs(tiny_config(), 36, text_tokens=10, new_tokens=2)
    printed = capsys.readouterr().out
    assert f"| 36 | {expected['vision'] / 1e6:.3f} |" in printed and "total MFLOPs" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "vicuna-70b"], "invalid choice: 'vicuna-70b' (choose from"),
        (["--recipe", "vicuna-7b", "--new_tokens", "0"], "new_tokens=0 must be 1 or more"),
        (["--config", "nowhere"], "nowhere holds no config.json"),
        (["--recipe", "vicuna-7b", "--plot", "costs.xyz"], "--plot costs.xyz: Format 'xyz' is not supported"),
        (["--recipe", "vicuna-7b", "--max_tflops", "0"], "max_tflops=0.0 must be a finite number above 0"),
        (["--recipe", "vicuna-7b", "--max_kv_cache_mb", "nan"], "max_kv_cache_mb=nan must be a finite number"),
        (["--recipe", "vicuna-7b", "--max_tflops", "-3"], "max_tflops=-3.0 must be a finite number above 0"),
        (
            ["--recipe", "vicuna-7b", "--max_tflops", "1", "--max_kv_cache_mb", "100"],
            "max_tflops=1 and max_kv_cache_mb=100: the smallest, 1, takes 1.656907677 TFLOPs and 51.380224 MB",
        ),
        (["--config", "backbones/vicuna-7b-v1.5"], "model_type='llama', but it must be 'delta_llava'"),
    ],
)
def test_the_command_says_what_is_wrong(capsys, monkeypatch, backbones, arguments, message):
    monkeypatch.chdir(backbones.parent)
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
