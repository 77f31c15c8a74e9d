"""The costs are what the model computes and holds: counted by torch, weighed by its allocator, and as in the paper."""

import gc
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, DynamicCache, LlamaConfig
from trl.trainer import utils as trl_utils

from delta_llava import DeltaLlavaForConditionalGeneration, costs
from delta_llava.benchmarks.harness import peak_bytes
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


PROJECTOR, LANGUAGE = TRAINABLE_PARTS[:1], TRAINABLE_PARTS[1:]


def language_model(model_type, **overrides):
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(model_type, **{**sizes, **heads, **special, **overrides})


QWEN = {"model_type": "qwen2", "num_hidden_layers": 3, "tie_word_embeddings": True}
VARIANTS = {
    "CLIP and Llama": {},
    "SigLIP": {"siglip": True},
    "trimmed tower": {"memory_feature_layers": [1, 2], "query_feature_layer": 3},
    "paper": {"projector_variant": "paper", "projector_intermediate_size": 80},
    "residual": {"projector_variant": "residual"},
    "Qwen2, grouped queries, tied head": {"text_config": QWEN},
    "Qwen3, wide heads": {"text_config": {"model_type": "qwen3", "head_dim": 24}},
    "Mistral": {"text_config": {"model_type": "mistral"}},
    "Phi-3, joined matrices": {"text_config": {"model_type": "phi3"}},
    "Gemma-2": {"text_config": {"model_type": "gemma2", "head_dim": 16}},
    "OLMo": {"text_config": {"model_type": "olmo"}},
}


@pytest.fixture
def variant_config(tiny_config):
    def make(text_config=None, **overrides):
        text_config = {"text_config": language_model(**text_config)} if text_config else {}
        return tiny_config(**overrides, **text_config)

    return make


def counted_flops(function, *arguments, **options):
    """What torch counts, with attention as the matrix products that it is, and without the rotary embedding's one."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function(*arguments, **options)
    counts = counter.get_flop_counts()
    rotary = sum(sum(flops.values()) for name, flops in counts.items() if name.endswith("language_model.rotary_emb"))
    return counter.get_total_flops() - rotary


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_an_answer_takes_what_torch_counts_and_the_parts_hold_what_the_models_do(variant_config, overrides):
    config = variant_config(**overrides)
    model = DeltaLlavaForConditionalGeneration(config).eval().requires_grad_(False)
    parameters = parameter_counts(config)
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        assert parameters[name] == sum(weight.numel() for weight in getattr(model.model, name).parameters()), name
    assert sum(parameters.values()) == model.num_parameters()  # which counts a tied head once

    pixel_values = torch.randn(1, 3, 48, 48)
    for budget in (9, 144):
        prompt = torch.tensor([[1, *[config.image_token_id] * budget, *range(5, 11)]])
        cache = DynamicCache()
        reading = {"pixel_values": pixel_values, "num_visual_tokens": budget, "logits_to_keep": 1}
        tower = counted_flops(model.model.vision_tower, pixel_values)
        features = counted_flops(model.get_image_features, pixel_values, budget)
        prefill = counted_flops(model, prompt, past_key_values=cache, **reading)
        decode = sum(counted_flops(model, prompt[:, -1:], past_key_values=cache) for _ in range(3))
        assert inference_costs(config, budget, text_tokens=7, new_tokens=4) == {
            "vision": tower,
            "projector": features - tower,
            "prefill": prefill - features,
            "decode": decode,
            # This cache is in float32
            "kv_cache_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 2,
        }


def test_of_a_mixture_of_experts_those_count_that_a_token_goes_to(variant_config):
    experts = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    config, tokens = variant_config(text_config=experts), 36 + 7
    attention_and_router = 2 * 64**2 + 2 * 64 * 32 + 8 * 64
    matrices = 2 * tokens * (attention_and_router + 2 * 3 * 64 * 96) + 4 * tokens**2 * 64
    assert inference_costs(config, 36, text_tokens=7, new_tokens=4)["prefill"] == 2 * matrices + 2 * 64 * 320
    with pytest.raises(ValueError, match=r"training text_config.model_type='mixtral' are unknown: not all of its"):
        training_flops(config, 36, 1, 1, tokens, 7, PROJECTOR)


def test_a_language_model_that_cannot_be_counted_is_refused(tiny_config, variant_config):
    mamba = tiny_config(text_config=AutoConfig.for_model("mamba", hidden_size=64, num_hidden_layers=2, vocab_size=320))
    with pytest.raises(ValueError, match=r"text_config\.model_type='mamba' are unknown: torch cannot count them"):
        inference_costs(mamba, 36, 7, 4)
    mistral = variant_config(text_config={"model_type": "mistral"})
    for convention, message in (("papers", r"\['exact', 'paper'\]"), ("paper", "='mistral', use convention='exact'")):
        with pytest.raises(ValueError, match=message):
            inference_costs(mistral, 36, 7, 4, convention)


def test_generate_takes_what_an_answer_costs(tiny_config):
    config = tiny_config()
    model = DeltaLlavaForConditionalGeneration(config).eval()
    prompt = torch.tensor([[1, *[config.image_token_id] * 36, 5, 6]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    taken = counted_flops(model.generate, prompt, pixel_values=torch.randn(1, 3, 48, 48), **options)
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
@pytest.mark.parametrize("parts", [LANGUAGE, TRAINABLE_PARTS, PROJECTOR])
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
        features = torch.randn(1, 144, 32), torch.randn(1, 144, 32 * len(config.memory_feature_layers))
        taken = counted_flops(model.model.multi_modal_projector, *features, 144)  # all of it, unlike inference
        assert training_flops(config, 144, 1, 1, 200, 1, parts)["multi_modal_projector"] == taken


def test_adapters_cost_three_times_their_forward_pass_and_their_base_twice(variant_config):
    config = variant_config(text_config=QWEN)
    size = (config, 36, 0, 2, 50, 20, PROJECTOR)
    model = DeltaLlavaForConditionalGeneration(config).train()
    targets = r"model\.language_model\..*_proj"
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, target_modules=targets))
    embeddings = torch.randn(2, 50, 64, requires_grad=True)
    decoder = model.base_model.model.model.language_model
    taken = counted_flops(lambda: decoder(inputs_embeds=embeddings).last_hidden_state.sum().backward())
    with_adapters = training_flops(*size, gradient_checkpointing=False, lora_rank=4)
    assert taken == with_adapters["language_model"]
    assert training_flops(*size)["language_model"] < taken


@pytest.fixture
def small_config(tiny_config):
    """Layers of 256 channels, so that weights, what AdamW keeps and activations all count."""

    def make(num_layers=4, **overrides):
        sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": num_layers}
        text_config = LlamaConfig(vocab_size=128, num_attention_heads=8, **sizes)
        return tiny_config(text_config=text_config, image_token_id=1, **overrides)

    return make


def peak_of_training(config, parts, gradient_checkpointing=True, lora_rank=None, num_rows=2, length=256):
    """The most bytes of steps as the trainer takes them, and what was expected of them."""
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

    gc.collect()  # what an earlier test left would be freed, and counted, within
    taken = peak_bytes(steps, torch.device("cpu"), wrapped.parameters())
    num_labels = num_rows * (length - 1)  # on a CPU, TRL computes the logits of all
    size = (config, 36, num_rows, num_rows, length, num_labels, parts)
    options = {"gradient_checkpointing": gradient_checkpointing, "lora_rank": lora_rank}
    return taken, training_memory(*size, **options)


WHOLE = {"gradient_checkpointing": False}
SHORT = {"num_rows": 8, "length": 64}
RUNS = {
    "pretrain": ({}, PROJECTOR, {}),
    "pretrain, no checkpointing": ({}, PROJECTOR, WHOLE),
    "finetune": ({}, TRAINABLE_PARTS, {}),
    "finetune, no checkpointing": ({}, TRAINABLE_PARTS, WHOLE),
    "lora": ({}, PROJECTOR, {"lora_rank": 8}),
    "lora, no checkpointing": ({}, PROJECTOR, {"lora_rank": 8, **WHOLE}),
    "many weights, few tokens": ({"num_layers": 8}, TRAINABLE_PARTS, {"length": 64}),
    "paper": ({"projector_variant": "paper"}, PROJECTOR, SHORT),
    "paper, lora": ({"projector_variant": "paper"}, PROJECTOR, {"lora_rank": 8, **SHORT}),
}


@pytest.mark.parametrize(("overrides", "parts", "options"), RUNS.values(), ids=RUNS)
def test_memory_is_what_training_takes(small_config, monkeypatch, overrides, parts, options):
    # The head's tile is as wide as for a large vocabulary, and would hide everything else of a small model
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 128)
    monkeypatch.setattr(costs, "HEAD_WORDS", 128)
    taken, expected = peak_of_training(small_config(**overrides), parts, **options)
    assert expected["total"] == pytest.approx(taken, rel=0.05 if "num_layers" in overrides else 0.1)


def test_memory_of_the_heads_tile(small_config):
    taken, expected = peak_of_training(small_config(), PROJECTOR)
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


def test_four_bits_hold_the_language_models_layers_only():
    sizes = (recipe_config("qwen2.5-7b"), 144, 1, 1, 256, 100, PROJECTOR)
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


def test_the_largest_budget_is_the_last_one_within_every_target():
    config = recipe_config("vicuna-7b")
    budgets = config.valid_visual_token_counts

    def largest(**targets):
        return largest_budget(config, text_tokens=68, new_tokens=30, budgets=budgets, **targets)

    # Keys and values of 32 layers of 4096 channels in two bytes: 0.524288 MB a token; 97 + 64 tokens have 84.410368
    assert largest(max_kv_cache_mb=100) == 64
    assert (largest(max_kv_cache_mb=84.410368), largest(max_kv_cache_mb=84.410367)) == (64, 36)
    # All four parts count: the prefill alone has 2.77 at 144, all have 3.54
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
        (
            ["--recipe", "vicuna-7b", "--max_tflops", "1", "--max_kv_cache_mb", "100"],
            "max_tflops=1 and max_kv_cache_mb=100: the smallest, 1, takes 1.656916065 TFLOPs and 51.380224 MB",
        ),
        (["--config", "backbones/vicuna-7b-v1.5"], "model_type='llama', but it must be 'delta_llava'"),
    ],
)
def test_the_command_says_what_is_wrong(capsys, monkeypatch, backbones, arguments, message):
    monkeypatch.chdir(backbones.parent)
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
