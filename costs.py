"""
FLOPs, parameters and bytes of a Delta-LLaVA for any token budget, from its configuration alone.

What an answer costs at each budget, as a table, as JSON, as a picture too:

```
python -m delta_llava.costs --recipe vicuna-7b --text_tokens 68 --new_tokens 30 --convention paper
python -m delta_llava.costs --config checkpoints/delta-llava-7b-144 --json
python -m delta_llava.costs --recipe qwen2.5-7b --plot costs.png
```

and the largest budget that a request can afford, by its FLOPs, its KV cache, or both:

```
python -m delta_llava.costs --recipe vicuna-7b --max_tflops 3 --max_kv_cache_mb 100
```

A FLOP is a multiplication or an addition: a linear layer costs two for each of its weights and rows. Matrix products
and convolutions are counted; norms, activations, softmax and interpolation are not. Causal attention is counted in
full, like attention without a mask, as kernels' counters do. An answer of n tokens takes the prefill, which yields the
first, and n - 1 passes of decoding; the output head is computed at the last position of each pass alone.

There are two conventions. `exact` counts what this model computes, to the FLOP as `torch.utils.flop_counter` does for
the eager path. `paper` counts what the paper's figure 3 must have counted, for its numbers come out: two matrices in
each MLP of the language model, where Llama has three, and one layer of the tower behind the last one that is read,
which LLaVA runs in vain and we cut off. The paper does not tell its prompt's length; with 68 text tokens beside the
visual ones, the first command gives a prefill of 6.70, 2.16, 0.85 and 0.70 TFLOPs at 576, 144, 16 and 1 visual tokens
(6.72, 2.16, 0.85 and 0.70 in the paper), 0.382 for the tower (0.382), and 0.31 for the decoding at 576 (0.31). The
paper's 0.28 for the decoding at 4 to 16 is that of 28 tokens: its answers ended by themselves, after about 30. What it
counted of the projector we cannot tell: its 0.024 at 576 is the released projector's last MLP alone, and its at most
0.002 elsewhere is less than the keys and values of 576 patches take (0.010). Both conventions count the whole one.
"""

import argparse
import json
import math
import textwrap
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from .configuration_delta_llava import DeltaLlavaConfig, query_grid_size


BACKBONES = Path(__file__).parent / "backbones"
# By the names that the recipes have
LANGUAGE_MODELS = {
    "vicuna-7b": "vicuna-7b-v1.5",
    "vicuna-13b": "vicuna-13b-v1.5",
    "qwen2.5-7b": "qwen2.5-7b-instruct",
}
CONVENTIONS = ("exact", "paper")
KNOWN_DECODERS = ("llama", "qwen2", "qwen3")
FLOP_PARTS = ("vision", "projector", "prefill", "decode")
UNITS = {1e12: "TFLOPs", 1e9: "GFLOPs", 1e6: "MFLOPs"}
TRAINABLE_PARTS = ("multi_modal_projector", "language_model", "lm_head")
SHARDINGS = ("ddp", "zero2", "zero3", "fsdp2")

# NF4 in blocks of 64 weights: half a byte each, and nested, an 8-bit scale of each block and a float32 of 256 scales
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
# TRL's fused head computes logits in tiles of so many tokens and words
HEAD_TOKENS, HEAD_WORDS = 4096, 32768


def recipe_config(recipe: str) -> DeltaLlavaConfig:
    """
    The configuration that a recipe trains: CLIP-L/336, the `residual` projector, the language model of that name.

    Args:
        recipe (`str`): One of `LANGUAGE_MODELS`.

    Raises:
        ValueError: There is no recipe of that name; the message lists those that there are.
    """
    if recipe not in LANGUAGE_MODELS:
        raise ValueError(f"recipe={recipe!r} is not one of {list(LANGUAGE_MODELS)}.")
    return DeltaLlavaConfig(
        vision_config=AutoConfig.from_pretrained(BACKBONES / "clip-vit-large-patch14-336"),
        text_config=AutoConfig.from_pretrained(BACKBONES / LANGUAGE_MODELS[recipe]),
        projector_variant="residual",
    )


@dataclass(frozen=True)
class _Decoder:
    """Sizes of a language model: widths, and weights of all its linear layers, without the output head."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    attention_size: int
    key_value_size: int
    vocab_size: int
    layer_parameters: int
    linear_weights: int
    linear_widths: int  # inputs and outputs of the linear layers together: an adapter of rank r has r times as many
    parameters: int

    @classmethod
    def of(cls, config: DeltaLlavaConfig) -> "_Decoder":
        text = config.text_config
        if text.model_type not in KNOWN_DECODERS:
            raise ValueError(
                f"The costs of text_config.model_type={text.model_type!r} are unknown, only those of {KNOWN_DECODERS}."
            )
        with torch.device("meta"):
            model = AutoModel.from_config(text)
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        head_dim = model.layers[0].self_attn.head_dim
        return cls(
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_heads=text.num_attention_heads,
            attention_size=text.num_attention_heads * head_dim,
            key_value_size=text.num_key_value_heads * head_dim,
            vocab_size=text.vocab_size,
            layer_parameters=_num_parameters(model.layers[0]),
            linear_weights=sum(module.weight.numel() for module in linear),
            linear_widths=sum(sum(module.weight.shape) for module in linear),
            parameters=_num_parameters(model),
        )

    @property
    def head_weights(self) -> int:
        return self.hidden_size * self.vocab_size

    def attention_flops(self, num_queries: int, num_keys: int) -> int:
        """Scores and weighted sums of one row, in all layers."""
        return 4 * num_queries * num_keys * self.attention_size * self.num_layers


def _num_parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def parameter_counts(config: DeltaLlavaConfig) -> dict[str, int]:
    """
    Parameters of each part.

    Args:
        config ([`DeltaLlavaConfig`]): With a CLIP or SigLIP tower and a Llama, Qwen2 or Qwen3.

    Returns:
        `dict[str, int]`: `vision_tower`, `multi_modal_projector`, `language_model` with its embeddings, and `lm_head`,
        which is 0 where it is the embeddings.
    """
    return _count_parameters(config, _Decoder.of(config))


def _count_parameters(config: DeltaLlavaConfig, decoder: _Decoder) -> dict[str, int]:
    with torch.device("meta"):
        tower = AutoModel.from_config(config.vision_config)
    projector = _projector_maps(config, config.num_visual_tokens, training=True)
    return {
        "vision_tower": _num_parameters(tower),
        "multi_modal_projector": sum(weights + others for weights, others, _ in projector),
        "language_model": decoder.parameters,
        "lm_head": 0 if config.tie_word_embeddings else decoder.head_weights,
    }


def inference_costs(
    config: DeltaLlavaConfig, num_visual_tokens: int, text_tokens: int, new_tokens: int, convention: str = "exact"
) -> dict[str, int]:
    """
    What it takes to answer one question about one image.

    Args:
        config ([`DeltaLlavaConfig`]): With a CLIP or SigLIP tower and a Llama, Qwen2 or Qwen3.
        num_visual_tokens (`int`): The image's budget.
        text_tokens (`int`): Tokens of the prompt, without the visual ones.
        new_tokens (`int`): Tokens of the answer.
        convention (`str`, *optional*, defaults to `"exact"`): `"exact"` or `"paper"`; see the module's docstring.

    Returns:
        `dict[str, int]`: FLOPs of `vision` (the tower), `projector`, `prefill` and `decode`, and `kv_cache_bytes`, the
        bfloat16 keys and values at the answer's end.

    Raises:
        ValueError: The patch grid does not allow the budget, a number of tokens is not positive, the convention or the
            kind of a backbone is unknown.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is not one of {list(CONVENTIONS)}.")
    if text_tokens < 1 or new_tokens < 1:
        raise ValueError(f"text_tokens={text_tokens} and new_tokens={new_tokens} must be 1 or more.")
    is_paper = convention == "paper"
    decoder = _Decoder.of(config)
    weights = decoder.linear_weights
    if is_paper:
        weights -= decoder.num_layers * decoder.hidden_size * decoder.intermediate_size
    prompt = num_visual_tokens + text_tokens
    context = range(prompt + 1, prompt + new_tokens)  # positions that each pass of decoding attends to
    head = 2 * decoder.head_weights
    return {
        "vision": _tower_flops(config, config.vision_config.num_hidden_layers + is_paper),
        "projector": _projector_flops(config, num_visual_tokens),
        "prefill": 2 * weights * prompt + decoder.attention_flops(prompt, prompt) + head,
        "decode": sum(2 * weights + decoder.attention_flops(1, num_keys) + head for num_keys in context),
        "kv_cache_bytes": 2 * 2 * decoder.num_layers * decoder.key_value_size * (prompt + new_tokens - 1),
    }


def largest_budget(
    config: DeltaLlavaConfig,
    text_tokens: int,
    new_tokens: int,
    max_tflops: float | None = None,
    max_kv_cache_mb: float | None = None,
    budgets: Collection[int] | None = None,
    convention: str = "exact",
) -> int:
    """
    The largest budget at which a request, one question about one image, stays within the targets.

    Args:
        config ([`DeltaLlavaConfig`]), text_tokens (`int`), new_tokens (`int`), convention (`str`, *optional*):
            As [`inference_costs`] takes them.
        max_tflops (`float`, *optional*): Most TFLOPs (10¹² FLOPs) of the request: tower, projector, prefill and decode.
        max_kv_cache_mb (`float`, *optional*): Most MB (10⁶ bytes) of its bfloat16 keys and values at the answer's end.
        budgets (`Collection[int]`, *optional*, defaults to `config.visual_token_budgets`):
            To choose from. The default are those that the checkpoint was trained for.

    Returns:
        `int`: the number of visual tokens.

    Raises:
        ValueError: No target is given, a target is not a number above 0, no budget stays within the targets, or what
            [`inference_costs`] raises.
    """
    targets = {"max_tflops": max_tflops, "max_kv_cache_mb": max_kv_cache_mb}
    targets = {name: target for name, target in targets.items() if target is not None}
    if not targets:
        raise ValueError("max_tflops and max_kv_cache_mb are both None: give one of them, or both.")
    for name, target in targets.items():
        if not 0 < target < math.inf:
            raise ValueError(f"{name}={target} must be a finite number above 0.")
    taken = {}
    for budget in config.visual_token_budgets if budgets is None else budgets:
        costs = inference_costs(config, budget, text_tokens, new_tokens, convention)
        taken[budget] = {"max_tflops": _total_flops(costs) / 1e12, "max_kv_cache_mb": costs["kv_cache_bytes"] / 1e6}
    fitting = [budget for budget, takes in taken.items() if all(takes[name] <= targets[name] for name in targets)]
    if not fitting:
        smallest, units = min(taken), {"max_tflops": "TFLOPs", "max_kv_cache_mb": "MB of KV cache"}
        whose = f"that the checkpoint was trained for, {sorted(taken)}," if budgets is None else f"of {sorted(taken)}"
        raise ValueError(
            f"No budget {whose} stays within "
            f"{' and '.join(f'{name}={target:.10g}' for name, target in targets.items())}: the smallest, {smallest}, "
            f"takes {' and '.join(f'{taken[smallest][name]:.10g} {units[name]}' for name in targets)}."
        )
    return max(fitting)


def _total_flops(cost: dict[str, int]) -> int:
    return sum(cost[part] for part in FLOP_PARTS)


def _tower_flops(config: DeltaLlavaConfig, num_layers: int) -> int:
    """Of one image. A SigLIP's pooling head, which an assembled checkpoint does not have, is not counted."""
    vision = config.vision_config
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(
            f"The costs of vision_config.model_type={vision.model_type!r} are unknown: clip_vision_model or "
            "siglip_vision_model."
        )
    with torch.device("meta"):
        tower = AutoModel.from_config(vision)
    (patch_embedding,) = (module for module in tower.modules() if isinstance(module, nn.Conv2d))
    num_patches = config.patch_grid_size**2
    num_tokens = num_patches + (config.vision_feature_select_strategy == "default")  # with CLS
    weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    layer = 2 * weights * num_tokens + 4 * num_tokens**2 * vision.hidden_size
    return 2 * patch_embedding.weight.numel() * num_patches + layer * num_layers


def _projector_maps(config: DeltaLlavaConfig, num_visual_tokens: int, training: bool) -> list[tuple[int, int, int]]:
    """Weights of each linear map or convolution, biases and norms beside it, and the rows of an image that it maps."""
    tokens = query_grid_size(num_visual_tokens, config.patch_grid_size) ** 2
    size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
    memory = _memory_tokens(config)
    levels = len(config.memory_feature_layers)
    match config.projector_variant:
        case "released" | "residual":
            memory_size, updates = levels * size, 1
            gate = size if config.projector_variant == "residual" else 0
            text_maps = [(size * text_size, text_size + gate, tokens), (text_size**2, text_size, tokens)]
        case "paper":
            memory_size, updates = size, levels
            mlp_size = config.projector_intermediate_size
            text_maps = [
                (size * text_size, text_size, tokens),
                (text_size * mlp_size, 2 * text_size + mlp_size, tokens),
                (mlp_size * text_size, text_size, tokens),
            ]
        case unknown:
            raise ValueError(f"The costs of projector_variant={unknown!r} are unknown.")
    rank = config.projector_rank if config.use_delta_projection else 0
    queries, keys = _query_and_key_rows(config, tokens, training)

    maps = [(size**2, 2 * size, queries), (rank * 2 * size, 0, queries)]
    for rows in (keys, memory):
        maps += [(memory_size * size, 2 * size, rows)]
        maps += [(rank * (memory_size + size), 0, rows // updates)] * updates
    if config.use_refinement_block:
        convolution_size = size // 4
        attention_size = size - convolution_size
        mlp_size = config.refinement_mlp_ratio * size
        head_dim = max(divisor for divisor in range(1, 33) if convolution_size % divisor == 0)
        maps += [(size * attention_size, 0, queries)]
        if config.use_self_attention:
            maps += [(attention_size**2, 2 * attention_size, queries)] * 4  # with a bias each, and two norms
        maps += [(attention_size * convolution_size, 0, queries)]
        maps += [(9 * convolution_size * head_dim, 2 * convolution_size, queries), (convolution_size**2, 0, queries)]
        maps += [(size * mlp_size, mlp_size, queries), (mlp_size * size, size, queries)]
    # The attention's: of queries and keys, none on the memory where it is larger; of values and the output
    maps += [(size**2, size, queries)] * 2 + [(size**2, size, tokens)] * 2
    return maps + text_maps


def _memory_tokens(config: DeltaLlavaConfig) -> int:
    """Memory tokens of one image, of all cells together."""
    levels = {"released": 1, "residual": 1, "paper": len(config.memory_feature_layers)}
    return levels[config.projector_variant] * config.patch_grid_size**2


def _query_and_key_rows(config: DeltaLlavaConfig, num_visual_tokens: int, training: bool) -> tuple[int, int]:
    """Of one image. Where a cell has a single memory token, training computes one of each, and inference none."""
    memory = _memory_tokens(config)
    if memory > num_visual_tokens:
        return num_visual_tokens, memory
    return (1, 1) if training else (0, 0)


def _projector_flops(config: DeltaLlavaConfig, num_visual_tokens: int, training: bool = False) -> int:
    """Of one image, in a forward pass."""
    size = config.vision_config.hidden_size
    memory = _memory_tokens(config)
    flops = sum(2 * weights * rows for weights, _, rows in _projector_maps(config, num_visual_tokens, training))
    if memory > num_visual_tokens:
        # Each memory token meets the one query of its cell, in every head at full width
        flops += 4 * memory * size * config.projector_num_attention_heads
    if config.use_refinement_block and config.use_self_attention:
        queries, _ = _query_and_key_rows(config, num_visual_tokens, training)
        flops += 4 * queries**2 * (size - size // 4)
    return flops


def training_flops(
    config: DeltaLlavaConfig,
    num_visual_tokens: int,
    num_images: int,
    num_rows: int,
    sequence_length: int,
    num_labels: int,
    trained_parts: Collection[str],
    gradient_checkpointing: bool = True,
    lora_rank: int | None = None,
) -> dict[str, float]:
    """
    FLOPs of one micro-batch, forward and backward.

    A frozen tower has a forward pass alone. The projector counts three times where it is trained, a little too much: no
    gradient goes on to the tower's features. A linear layer of the language model counts its forward pass and the
    gradient of its input, and the gradient of its weights if these are trained; its attention always counts three
    times. Weights with adapters are not trained, their adapters count three times.

    Args:
        config ([`DeltaLlavaConfig`]): With a CLIP or SigLIP tower and a Llama, Qwen2 or Qwen3.
        num_visual_tokens (`int`): Budget of each image.
        num_images (`int`), num_rows (`int`), sequence_length (`int`):
            Size of the micro-batch on one GPU; the length is that of the padded rows with their visual tokens.
        num_labels (`int`): Tokens with a loss, in all rows together: TRL computes logits of these alone.
        trained_parts (`Collection[str]`): Some of `multi_modal_projector`, `language_model` and `lm_head`.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`): Whether every decoder layer is computed again.
        lora_rank (`int`, *optional*): Rank of adapters on all linear layers of the language model.

    Returns:
        `dict[str, float]`: `vision_tower`, `multi_modal_projector`, `language_model`, `lm_head`, and `recomputation`:
        what gradient checkpointing and the head's tiles compute again, which is no part of a model's FLOPs
        utilization.

    Raises:
        ValueError: A part cannot be trained, or the patch grid does not allow the budget.
    """
    trained = _trained(trained_parts, lora_rank, load_in_4bit=False)
    decoder = _Decoder.of(config)
    num_tokens = num_rows * sequence_length
    linear = 2 * decoder.linear_weights * num_tokens
    adapters = 2 * (lora_rank or 0) * decoder.linear_widths * num_tokens
    attention = num_rows * decoder.attention_flops(sequence_length, sequence_length)
    head = 2 * decoder.head_weights * num_labels
    # The layer's last product is not needed again: recomputation stops behind the last tensor that backward reads
    last = 2 * decoder.num_layers * decoder.hidden_size * decoder.intermediate_size * num_tokens
    again = linear + adapters + attention - last if gradient_checkpointing else 0
    return {
        "vision_tower": float(num_images * _tower_flops(config, config.vision_config.num_hidden_layers)),
        "multi_modal_projector": float(
            num_images
            * _projector_flops(config, num_visual_tokens, training=True)
            * (3 if "multi_modal_projector" in trained else 1)
        ),
        "language_model": float(linear * (3 if "language_model" in trained else 2) + 3 * adapters + 3 * attention),
        "lm_head": float(head * (3 if _head_part(config) in trained else 2)),
        "recomputation": float(again + head),
    }


def _trained(parts: Collection[str], lora_rank: int | None, load_in_4bit: bool) -> set[str]:
    if unknown := set(parts) - set(TRAINABLE_PARTS):
        raise ValueError(
            f"trained_parts names {sorted(unknown)}: it must be some of {list(TRAINABLE_PARTS)}. The tower is frozen."
        )
    if not parts:
        raise ValueError(f"trained_parts is empty: it must be some of {list(TRAINABLE_PARTS)}.")
    if "language_model" in parts and (lora_rank is not None or load_in_4bit):
        raise ValueError(
            f"trained_parts names language_model, whose weights are not trained with lora_rank={lora_rank} and "
            f"load_in_4bit={load_in_4bit}: leave it out."
        )
    return set(parts)


def training_memory(
    config: DeltaLlavaConfig,
    num_visual_tokens: int,
    num_images: int,
    num_rows: int,
    sequence_length: int,
    num_labels: int,
    trained_parts: Collection[str],
    num_gpus: int = 1,
    sharding: str = "ddp",
    gradient_checkpointing: bool = True,
    lora_rank: int | None = None,
    load_in_4bit: bool = False,
) -> dict[str, int]:
    """
    Bytes that a GPU holds at the moment of a training step when it holds most.

    Under bfloat16 autocast with TRL's fused head, scaled dot product attention and the fused AdamW; gradients are those
    of accumulated micro-batches. Not counted: the CUDA context, the allocator's fragmentation, buffers of NCCL.

    - `ddp`, also for one GPU: frozen weights in bfloat16; trained ones in float32, and in bfloat16 too while autocast
      caches them. On several GPUs the gradients are there twice, in DDP's buckets as well.
    - `fsdp2`: the same weights sharded, with two blocks and the head gathered in bfloat16.
    - `zero2`: all weights in bfloat16; float32 copies of the trained ones, gradients and optimizer sharded. `zero3`:
      the former sharded too.
    - 4-bit weights are whole on every GPU: accelerate and DeepSpeed do not shard them.

    Args:
        config ([`DeltaLlavaConfig`]), num_visual_tokens (`int`), num_images (`int`), num_rows (`int`),
        sequence_length (`int`), num_labels (`int`), trained_parts (`Collection[str]`):
            As [`training_flops`] takes them.
        num_gpus (`int`, *optional*, defaults to 1): GPUs of all nodes together.
        sharding (`str`, *optional*, defaults to `"ddp"`): `"ddp"`, `"zero2"`, `"zero3"` or `"fsdp2"`.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`): Whether every decoder layer is computed again.
        lora_rank (`int`, *optional*): Rank of adapters, with dropout, on all linear layers of the language model.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether the language model's linear layers are NF4 with nested quantization.

    Returns:
        `dict[str, int]`: `weights`, `gradients`, `optimizer`, `activations`, `logits` and their sum, `total`.

    Raises:
        ValueError: A part cannot be trained, the sharding is unknown, or the patch grid does not allow the budget.
    """
    trained = _trained(trained_parts, lora_rank, load_in_4bit)
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding={sharding!r} is not one of {list(SHARDINGS)}.")
    if num_gpus < 1:
        raise ValueError(f"num_gpus={num_gpus} must be 1 or more.")
    decoder = _Decoder.of(config)
    resident, in_forward, in_backward = _model_states(
        config, decoder, trained, num_gpus, sharding, gradient_checkpointing, lora_rank, load_in_4bit
    )

    trains_decoder = "language_model" in trained
    trains_head = _head_part(config) in trained
    num_tokens = num_rows * sequence_length
    # Embeddings in float32 make a residual stream in float32
    stream = (4 if trains_decoder and sharding == "ddp" else 2) * decoder.hidden_size
    layer = _layer_bytes(decoder, stream, trains_decoder, lora_rank)
    kept = num_tokens * decoder.num_layers * (stream if gradient_checkpointing else layer)
    projector = num_images * _projector_bytes(config, num_visual_tokens)
    if "multi_modal_projector" in trained:
        kept += projector
    # What the last layer gives out, its norm's float32, the normed
    at_head = num_tokens * (2 * stream + 4 * decoder.hidden_size)
    # Gradients of the residual stream and of the MLP's wide tensors, one of whose values may be gone by then
    at_layer = num_tokens * (stream + (4 if trains_decoder else 6) * decoder.intermediate_size)
    if gradient_checkpointing:
        at_layer += num_tokens * layer
    logits = num_labels * stream + _tile_bytes(decoder, num_labels)
    head_gradients = 4 * decoder.hidden_size * num_labels + 4 * decoder.head_weights * trains_head

    moments = [
        in_forward + Counter(activations=kept + at_head, logits=logits),
        in_backward + Counter(activations=kept + at_head, logits=logits + head_gradients),
        in_backward + Counter(activations=kept + at_layer),
    ]
    peak = resident + max(moments, key=Counter.total)
    memory = {name: round(peak[name]) for name in ("weights", "gradients", "optimizer", "activations", "logits")}
    return {**memory, "total": sum(memory.values())}


def _model_states(
    config: DeltaLlavaConfig,
    decoder: _Decoder,
    trained: set[str],
    num_gpus: int,
    sharding: str,
    gradient_checkpointing: bool,
    lora_rank: int | None,
    load_in_4bit: bool,
) -> tuple[Counter, Counter, Counter]:
    """Bytes of weights, gradients and optimizer that stay, and that come on top in forward and in backward."""
    counts = _count_parameters(config, decoder)
    trains_decoder = "language_model" in trained
    adapters = (lora_rank or 0) * decoder.linear_widths
    num_trained = adapters + sum(counts[part] for part in trained)
    num_quantized = decoder.linear_weights if load_in_4bit else 0
    num_frozen = sum(counts.values()) + adapters - num_trained - num_quantized
    num_projector = counts["multi_modal_projector"] if "multi_modal_projector" in trained else 0
    if lora_rank is not None:
        num_frozen += 2 * num_projector  # peft keeps what it was before training, in float32
    quantized = NF4_BYTES * num_quantized
    matrix, block = decoder.hidden_size * decoder.intermediate_size, decoder.layer_parameters
    # bitsandbytes restores one matrix at a time
    dequantized = 2 * matrix if load_in_4bit else 0
    gathered = 0 if load_in_4bit else 2 * 2 * block

    if sharding == "ddp":
        # Autocast's copies; not of the head, which TRL casts in tiles
        cast, cast_layers = num_projector + adapters, decoder.linear_weights if trains_decoder else 0
        still_cast = cast_layers // decoder.num_layers if gradient_checkpointing else cast_layers
        return (
            Counter(
                weights=4 * num_trained + 2 * num_frozen + quantized,
                gradients=4 * num_trained * (2 if num_gpus > 1 else 1),
                optimizer=8 * num_trained,
            ),
            Counter(weights=2 * (cast + cast_layers) + dequantized),
            # The gradient of a matrix, in bfloat16, and cast to float32
            Counter(weights=2 * (cast + still_cast) + dequantized, gradients=6 * matrix * trains_decoder),
        )
    if sharding == "fsdp2":
        unsharded = gathered + 2 * decoder.head_weights + dequantized
        return (
            Counter(
                weights=(4 * num_trained + 2 * num_frozen) / num_gpus + quantized,
                gradients=4 * num_trained / num_gpus,
                optimizer=8 * num_trained / num_gpus,
            ),
            Counter(weights=unsharded),
            # Those of a block, and a copy to reduce and scatter
            Counter(weights=unsharded, gradients=4 * block * trains_decoder),
        )
    unsharded = dequantized + (gathered if sharding == "zero3" else 0)
    lowered = 2 * (num_trained + num_frozen) / (num_gpus if sharding == "zero3" else 1)
    return (
        Counter(
            weights=lowered + 4 * num_trained / num_gpus + quantized,
            gradients=6 * num_trained / num_gpus,  # in bfloat16, and in float32 for the optimizer
            optimizer=8 * num_trained / num_gpus,
        ),
        Counter(weights=unsharded),
        Counter(weights=unsharded, gradients=2 * block * trains_decoder),
    )


def _head_part(config: DeltaLlavaConfig) -> str:
    """The part that the output head belongs to."""
    return "language_model" if config.tie_word_embeddings else "lm_head"


def _layer_bytes(decoder: _Decoder, stream: int, is_trained: bool, lora_rank: int | None) -> int:
    """What autograd saves of a token in one decoder layer; `stream` is the bytes of its residual stream."""
    size, attention, mlp = decoder.hidden_size, decoder.attention_size, decoder.intermediate_size
    saved = 2 * 4 * size  # inputs of both norms, in float32
    # Queries, keys and values, repeated to all heads as with a padding mask, what comes out, and a float32 of each head
    saved += 4 * 2 * attention + 4 * decoder.num_heads
    saved += 3 * 2 * mlp  # gate, its activation, up
    if is_trained:
        saved += 2 * stream + 2 * mlp  # inputs of the norms' weights and of the last linear layer
        # Of the others: autocast makes each its own bfloat16 of a float32
        saved += 2 * size * (5 if stream == 4 * size else 2)
    if lora_rank is not None:
        # Each layer's input behind a dropout of its own, with a mask of one byte
        saved += 3 * (5 * size + attention + mlp) + 7 * 2 * lora_rank
    return saved


def _projector_bytes(config: DeltaLlavaConfig, num_visual_tokens: int) -> int:
    """What autograd saves of an image in the projector, roughly for the queries, which are few."""
    size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
    tokens = query_grid_size(num_visual_tokens, config.patch_grid_size) ** 2
    levels, patches = len(config.memory_feature_layers), config.patch_grid_size**2
    memory = _memory_tokens(config)
    queries, keys = _query_and_key_rows(config, tokens, training=True)
    # Of keys and values alike: before GELU, before the norm in float32, in their cells
    projected = (keys + memory) * 8 * size
    # What each head asks for and finds there, at full width
    widened = queries * 4 * size * config.projector_num_attention_heads if memory > tokens else tokens * 4 * size
    return patches * 2 * (levels + 1) * size + projected + widened + queries * 40 * size + tokens * 6 * text_size


def _tile_bytes(decoder: _Decoder, num_labels: int) -> int:
    """A tile of TRL's fused head in bfloat16: hidden states, the weights of its words, logits."""
    rows, words = min(num_labels, HEAD_TOKENS), min(decoder.vocab_size, HEAD_WORDS)
    # The logits have as much room for a smaller vocabulary
    return 2 * ((rows + words) * decoder.hidden_size + rows * HEAD_WORDS)


def _unit(costs: dict[int, dict[str, int]]) -> tuple[float, str]:
    """In which the largest total has digits before the point, as FLOPs and by name."""
    return flops_unit(max(map(_total_flops, costs.values())))


def flops_unit(flops: float) -> tuple[float, str]:
    """
    The unit in which a figure has digits before the point.

    Args:
        flops (`float`): The figure, in FLOPs.

    Returns:
        `tuple[float, str]`: The unit's size in FLOPs, and its name.
    """
    return next(((size, name) for size, name in UNITS.items() if flops >= size), (1.0, "FLOPs"))


def _table(costs: dict[int, dict[str, int]], title: str) -> str:
    """Costs by budget in Markdown, for people."""
    size, unit = _unit(costs)
    lines = [
        title,
        "",
        f"| visual tokens | tower | projector | prefill | decode | total {unit} | KV cache, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for num_visual_tokens, cost in costs.items():
        flops = [cost[part] / size for part in FLOP_PARTS]
        columns = [f"{number:.3f}" for number in (*flops, sum(flops))]
        lines.append(f"| {num_visual_tokens} | {' | '.join(columns)} | {cost['kv_cache_bytes'] / 1e6:.4g} |")
    return "\n".join(lines)


def _plot(costs: dict[int, dict[str, int]], title: str, file: Path):
    """Draw a stacked bar for each budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size, unit = _unit(costs)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    budgets = [str(num_visual_tokens) for num_visual_tokens in costs]
    bottom = [0.0] * len(budgets)
    for part in FLOP_PARTS:
        heights = [cost[part] / size for cost in costs.values()]
        axis.bar(budgets, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axis.set(xlabel="visual tokens", ylabel=f"{unit} of an answer", title="\n".join(textwrap.wrap(title, 80)))
    axis.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _read_config(folder: Path) -> DeltaLlavaConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json: name the folder of a Delta-LLaVA checkpoint.")
    model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    if model_type != DeltaLlavaConfig.model_type:
        raise ValueError(f"{file} has model_type={model_type!r}, but it must be {DeltaLlavaConfig.model_type!r}.")
    return DeltaLlavaConfig.from_pretrained(folder)


def main(arguments: list[str] | None = None):
    """Print what an answer costs at each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recipe", choices=LANGUAGE_MODELS, help="CLIP-L/336 with this language model")
    source.add_argument("--config", type=Path, metavar="DIR", help="folder of a checkpoint")
    parser.add_argument("--text_tokens", type=int, default=68, help="of the prompt (default: 68)")
    parser.add_argument("--new_tokens", type=int, default=30, help="of the answer (default: 30)")
    parser.add_argument("--convention", choices=CONVENTIONS, default="exact", help="what to count (default: exact)")
    targets = parser.add_argument_group(
        "the largest budget for a request that takes",
        "of the budgets that the checkpoint was trained for, or with --recipe of all that the tower allows",
    )
    targets.add_argument("--max_tflops", type=float, metavar="TFLOPS", help="at most so many 10¹² FLOPs in total")
    targets.add_argument("--max_kv_cache_mb", type=float, metavar="MB", help="at most so many 10⁶ bytes of KV cache")
    parser.add_argument("--json", action="store_true", help="print FLOPs as JSON instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them into this picture")
    options = parser.parse_args(arguments)
    try:
        config = recipe_config(options.recipe) if options.recipe else _read_config(options.config)
        costs = {
            budget: inference_costs(config, budget, options.text_tokens, options.new_tokens, options.convention)
            for budget in config.valid_visual_token_counts
        }
        largest = None
        if options.max_tflops is not None or options.max_kv_cache_mb is not None:
            # A recipe has not been trained yet, and can be for any
            budgets = config.valid_visual_token_counts if options.recipe else None
            largest = largest_budget(
                config,
                options.text_tokens,
                options.new_tokens,
                options.max_tflops,
                options.max_kv_cache_mb,
                budgets,
                options.convention,
            )
    except ValueError as error:
        parser.error(str(error))
    title = (
        f"{options.recipe or options.config}: {_unit(costs)[1]} of {options.new_tokens} tokens that answer "
        f"{options.text_tokens} tokens and one image, {options.convention} convention."
    )
    if options.plot:
        try:
            _plot(costs, title, options.plot)
        except (OSError, ValueError) as error:
            parser.error(f"--plot {options.plot}: {error}")
    if options.json:
        print(json.dumps({"budgets": costs} | ({"largest_budget": largest} if largest else {})))
        return
    print(_table(costs, title))
    if largest:
        choice = "the tower allows" if options.recipe else "the checkpoint was trained for"
        budgets = sorted(budgets or config.visual_token_budgets)
        print(f"\nLargest budget within the target: {largest} visual tokens, of those that {choice}, {budgets}.")


if __name__ == "__main__":
    main()
