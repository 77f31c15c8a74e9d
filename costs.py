"""
FLOPs, parameters and bytes of a Delta-LLaVA for any token budget, from its configuration alone.

What an answer costs at each budget, as a table, as JSON, or as a picture too:

```
python -m delta_llava.costs --recipe vicuna-7b --text_tokens 68 --new_tokens 30 --convention paper
python -m delta_llava.costs --config checkpoints/delta-llava-7b-144 --json
python -m delta_llava.costs --recipe qwen2.5-7b --plot costs.png
```

and the largest budget that a request can afford, by its FLOPs, its KV cache, or both:

```
python -m delta_llava.costs --recipe vicuna-7b --max_tflops 3 --max_kv_cache_mb 100
```

The model itself runs on torch's `meta` device, without weights, under `torch.utils.flop_counter`. A FLOP is a
multiplication or an addition: a linear layer costs two for each of its weights and rows. Matrix products and
convolutions are counted; norms, activations, softmax and interpolation are not. Causal attention and its cache are
counted in full, as without a mask or a window. An answer of n tokens takes the prefill, which yields the first, and
n - 1 passes of decoding; the output head is computed only at the last position of each pass.

There are two conventions. `exact` counts what this model computes, to the FLOP. `paper` counts what the paper's figure
3 must have counted, since it yields the paper's numbers: two matrices in each MLP of the language model, where Llama
has three, and one layer of the tower after the last one that is read, which LLaVA runs in vain and we cut off. The
paper does not give its prompt's length; with 68 text tokens beside the visual ones, the first command gives a prefill
of 6.70, 2.16, 0.85 and 0.70 TFLOPs at 576, 144, 16 and 1 visual tokens (6.72, 2.16, 0.85 and 0.70 in the paper), 0.382
for the tower (0.382), and 0.31 for the decoding at 576 (0.31). The paper's 0.28 for the decoding at 4 to 16 is that of
28 tokens: its answers ended by themselves, after about 30. What it counted of the projector is unclear: its 0.024 at
576 is the released projector's last MLP alone, and its at most 0.002 elsewhere is less than the keys and values of 576
patches take (0.010). Both conventions count the whole projector.
"""

import argparse
import json
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedConfig, PreTrainedModel

from .configuration_delta_llava import DeltaLlavaConfig, query_grid_size
from .modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaProjector


BACKBONES = Path(__file__).parent / "backbones"
# By the names of their recipes
LANGUAGE_MODELS = {
    "vicuna-7b": "vicuna-7b-v1.5",
    "vicuna-13b": "vicuna-13b-v1.5",
    "qwen2.5-7b": "qwen2.5-7b-instruct",
}
CONVENTIONS = ("exact", "paper")
PAPER_DECODERS = ("llama", "qwen2", "qwen3")  # whose MLPs have three matrices
FLOP_PARTS = ("vision", "projector", "prefill", "decode")
UNITS = {1e12: "TFLOPs", 1e9: "GFLOPs", 1e6: "MFLOPs"}
TRAINABLE_PARTS = ("multi_modal_projector", "language_model", "lm_head")
SHARDINGS = ("ddp", "zero2", "zero3", "fsdp2")

# NF4 in blocks of 64 weights: half a byte each, and nested, an 8-bit scale of each block and a float32 of 256 scales
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
# TRL's fused head computes logits in tiles of this many tokens and words
HEAD_TOKENS, HEAD_WORDS = 4096, 32768


def recipe_config(recipe: str) -> DeltaLlavaConfig:
    """
    The configuration that a recipe trains: CLIP-L/336, the `residual` projector, the language model of that name
    in `LANGUAGE_MODELS`.

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


def _once(count: Callable) -> Callable:
    """Counts once for each configuration: a pass of 32 layers takes a quarter of a second, even without weights."""
    counted = {}

    @wraps(count)
    def recall(config: PreTrainedConfig, *arguments):
        key = (config.to_json_string(), *arguments)
        if key not in counted:
            counted[key] = count(config, *arguments)
        return copy(counted[key])

    return recall


@contextmanager
def _backbone(name: str, config: PreTrainedConfig) -> Iterator[PreTrainedModel]:
    """A backbone without weights, in implementations that torch can count: fused kernels are not matrix products."""
    try:
        with torch.device("meta"), torch.no_grad():
            yield AutoModel.from_config(config, attn_implementation="eager", experts_implementation="batched_mm").eval()
    except Exception as error:  # of any kind, from code of any architecture
        raise ValueError(
            f"The costs of {name}.model_type={config.model_type!r} are unknown: torch cannot count them on its meta "
            f"device ({error})."
        ) from error


def _flops(function: Callable, *arguments: Any, **options: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments, **options)
    return counter.get_total_flops()


@_once
def _tower_flops(vision_config: PreTrainedConfig, image_size: int, more_layers: int = 0) -> int:
    """Of one image; `more_layers` are added to those of the configuration."""
    vision_config = deepcopy(vision_config)
    vision_config.num_hidden_layers += more_layers
    with _backbone("vision_config", vision_config) as tower:
        return _flops(tower, torch.empty(1, 3, image_size, image_size, dtype=tower.dtype))


@_once
def _projector_flops(config: DeltaLlavaConfig, num_visual_tokens: int, training: bool = False) -> int:
    """Of one image, in a forward pass."""
    patches, size = config.patch_grid_size**2, config.vision_config.hidden_size
    with torch.device("meta"), torch.no_grad():
        features = [torch.empty(1, patches, size * levels) for levels in (1, len(config.memory_feature_layers))]
        return _flops(DeltaProjector(config).train(training), *features, num_visual_tokens)


@dataclass(frozen=True)
class _Decoder:
    """What a language model without its output head computes for a token, and its sizes."""

    token_flops: int  # of one token, without attention
    attention_flops: int  # of one query and one key, in all layers
    cache_size: int  # keys and values of one token
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    layer_parameters: int
    linear_weights: int
    linear_widths: int  # inputs and outputs of the linear layers together: an adapter of rank r has r times as many
    parameters: int

    @property
    def attention_size(self) -> int:
        return self.attention_flops // (4 * self.num_layers)

    @property
    def head_weights(self) -> int:
        return self.hidden_size * self.vocab_size

    def flops(self, num_tokens: float, pairs: float) -> float:
        """Of so many tokens, and of so many pairs of a query and a key."""
        return self.token_flops * num_tokens + self.attention_flops * pairs


@_once
def _decoder(text: PreTrainedConfig) -> _Decoder:
    with _backbone("text_config", text) as model:
        caches = [DynamicCache(config=text) for _ in range(3)]
        one, two, three = (
            _flops(model, torch.zeros(1, length, dtype=torch.long), past_key_values=cache)
            for length, cache in enumerate(caches, start=1)
        )
        attention_flops = (two - 2 * one) // 2
        token_flops = one - attention_flops
        if three != 3 * token_flops + 9 * attention_flops:
            raise ValueError("they do not grow as those of linear layers and attention do")
        layer = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        return _Decoder(
            token_flops=token_flops,
            attention_flops=attention_flops,
            cache_size=sum(cached.keys.numel() + cached.values.numel() for cached in caches[0].layers),
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            intermediate_size=getattr(text, "intermediate_size", None)
            or max((module.in_features for module in linear), default=0),
            num_heads=text.num_attention_heads,
            vocab_size=text.vocab_size,
            layer_parameters=_num_parameters(layer),
            linear_weights=sum(module.weight.numel() for module in linear),
            linear_widths=sum(sum(module.weight.shape) for module in linear),
            parameters=_num_parameters(model),
        )


def _num_parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@_once
def parameter_counts(config: DeltaLlavaConfig) -> dict[str, int]:
    """
    Parameters of each part: `vision_tower`, `multi_modal_projector`, `language_model` with its embeddings, and
    `lm_head`, which is 0 where it is the embeddings.
    """
    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(config)
    counts = {name: _num_parameters(part) for name, part in model.model.named_children()}
    return {**counts, "lm_head": 0 if config.tie_word_embeddings else _num_parameters(model.lm_head)}


def inference_costs(
    config: DeltaLlavaConfig, num_visual_tokens: int, text_tokens: int, new_tokens: int, convention: str = "exact"
) -> dict[str, int]:
    """
    What it takes to answer one question about one image.

    Args:
        config ([`DeltaLlavaConfig`]): With backbones that torch can run without weights.
        num_visual_tokens (`int`): The image's budget.
        text_tokens (`int`): Tokens of the prompt, without the visual ones.
        new_tokens (`int`): Tokens of the answer.
        convention (`str`, *optional*, defaults to `"exact"`): `"exact"` or `"paper"`; see the module's docstring.

    Returns:
        `dict[str, int]`: FLOPs of `vision` (the tower), `projector`, `prefill` and `decode`, and `kv_cache_bytes`, the
        bfloat16 keys and values at the answer's end.

    Raises:
        ValueError: The patch grid does not allow the budget, a number of tokens is not positive, the convention is
            unknown or not for this language model, or torch cannot count a backbone.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is not one of {list(CONVENTIONS)}.")
    if text_tokens < 1 or new_tokens < 1:
        raise ValueError(f"text_tokens={text_tokens} and new_tokens={new_tokens} must be 1 or more.")
    is_paper = convention == "paper"
    text = config.text_config
    if is_paper and text.model_type not in PAPER_DECODERS:
        raise ValueError(
            f"convention='paper' is for MLPs of three matrices, those of {PAPER_DECODERS}: with "
            f"text_config.model_type={text.model_type!r}, use convention='exact'."
        )
    decoder = _decoder(text)
    prompt, num_decoded = num_visual_tokens + text_tokens, new_tokens - 1
    left_out = 2 * text.num_hidden_layers * text.hidden_size * text.intermediate_size if is_paper else 0
    head = 2 * decoder.head_weights
    # Each pass of decoding attends to one position more than the one before
    decoded_pairs = num_decoded * prompt + num_decoded * (num_decoded + 1) // 2
    return {
        "vision": _tower_flops(config.vision_config, config.image_size, int(is_paper)),
        "projector": _projector_flops(config, num_visual_tokens),
        "prefill": decoder.flops(prompt, prompt**2) - left_out * prompt + head,
        "decode": decoder.flops(num_decoded, decoded_pairs) + (head - left_out) * num_decoded,
        "kv_cache_bytes": 2 * decoder.cache_size * (prompt + num_decoded),
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

    A frozen tower takes a forward pass only. The projector counts three times where it is trained, slightly too much,
    since no gradient goes on to the tower's features. A linear layer of the language model counts its forward pass and
    the gradient of its input, and the gradient of its weights if these are trained; its attention always counts three
    times. Weights with adapters are not trained; their adapters count three times.

    Args:
        config ([`DeltaLlavaConfig`]): With a language model whose weights are those of linear layers, not of experts.
        num_visual_tokens (`int`): Budget of each image.
        num_images (`int`), num_rows (`int`), sequence_length (`int`):
            Size of the micro-batch on one GPU; the length is that of the padded rows with their visual tokens.
        num_labels (`int`): Tokens with a loss, in all rows together: TRL computes logits of these only.
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
    decoder = _trained_decoder(config, trained_parts, lora_rank)
    num_tokens = num_rows * sequence_length
    num_pairs = num_rows * sequence_length**2
    linear = decoder.flops(num_tokens, 0) * (3 if "language_model" in trained_parts else 2)
    adapters = 2 * (lora_rank or 0) * decoder.linear_widths * num_tokens
    attention = decoder.flops(0, num_pairs)
    head = 2 * decoder.head_weights * num_labels
    # Recomputation stops after the last tensor that backward reads, which in a Llama is before a layer's last product
    last = 2 * decoder.num_layers * decoder.hidden_size * decoder.intermediate_size * num_tokens
    again = decoder.flops(num_tokens, num_pairs) + adapters - last if gradient_checkpointing else 0
    projector = num_images * _projector_flops(config, num_visual_tokens, True)
    return {
        "vision_tower": float(num_images * _tower_flops(config.vision_config, config.image_size)),
        "multi_modal_projector": float(projector * (3 if "multi_modal_projector" in trained_parts else 1)),
        "language_model": float(linear + 3 * adapters + 3 * attention),
        "lm_head": float(head * (3 if _head_part(config) in trained_parts else 2)),
        "recomputation": float(again + head),
    }


def _trained_decoder(
    config: DeltaLlavaConfig, parts: Collection[str], lora_rank: int | None, load_in_4bit: bool = False
) -> _Decoder:
    """The language model, if these parts can be trained."""
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
    decoder = _decoder(config.text_config)
    if decoder.token_flops != 2 * decoder.linear_weights:
        raise ValueError(
            f"The costs of training text_config.model_type={config.text_config.model_type!r} are unknown: not all of "
            "its weights are those of linear layers."
        )
    return decoder


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
    Estimate of the bytes that a GPU holds when a training step holds most. No GPU has measured it yet.

    Under bfloat16 autocast with TRL's fused head, scaled dot product attention and the fused AdamW; gradients are those
    of accumulated micro-batches. The CUDA context, the allocator's fragmentation and NCCL's buffers are not counted.

    - `ddp`, also for one GPU: frozen weights in bfloat16; trained ones in float32, and in bfloat16 too while autocast
      caches them. On several GPUs the gradients are there twice, in DDP's buckets as well.
    - `fsdp2`: the same weights sharded, with two blocks and the head gathered in bfloat16.
    - `zero2`: all weights in bfloat16; float32 copies of the trained ones, gradients and optimizer states sharded.
      `zero3`: the bfloat16 weights sharded too.
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
    decoder = _trained_decoder(config, trained_parts, lora_rank, load_in_4bit)
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding={sharding!r} is not one of {list(SHARDINGS)}.")
    if num_gpus < 1:
        raise ValueError(f"num_gpus={num_gpus} must be 1 or more.")
    resident, in_forward, in_backward = _model_states(
        config, decoder, trained_parts, num_gpus, sharding, gradient_checkpointing, lora_rank, load_in_4bit
    )

    trains_decoder = "language_model" in trained_parts
    trains_head = _head_part(config) in trained_parts
    num_tokens = num_rows * sequence_length
    # Embeddings in float32 make a residual stream in float32
    stream = (4 if trains_decoder and sharding == "ddp" else 2) * decoder.hidden_size
    layer = _layer_bytes(decoder, stream, trains_decoder, lora_rank)
    kept = num_tokens * decoder.num_layers * (stream if gradient_checkpointing else layer)
    projector = num_images * _projector_bytes(config, num_visual_tokens)
    if "multi_modal_projector" in trained_parts:
        kept += projector
    # The last layer's output, the float32 in its norm, and the norm's output
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
    trained: Collection[str],
    num_gpus: int,
    sharding: str,
    gradient_checkpointing: bool,
    lora_rank: int | None,
    load_in_4bit: bool,
) -> tuple[Counter, Counter, Counter]:
    """Bytes of weights, gradients and optimizer states that stay, and what forward and backward add to them."""
    counts = parameter_counts(config)
    trains_decoder = "language_model" in trained
    adapters = (lora_rank or 0) * decoder.linear_widths
    num_trained = adapters + sum(counts[part] for part in set(trained))
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

    shards = 1 if sharding == "ddp" else num_gpus
    match sharding:
        case "ddp":
            # Autocast's copies; not of the head, which TRL casts in tiles
            cast, cast_layers = num_projector + adapters, decoder.linear_weights if trains_decoder else 0
            still_cast = cast_layers // decoder.num_layers if gradient_checkpointing else cast_layers
            weights, gradients = 4 * num_trained + 2 * num_frozen, 4 * num_trained * (2 if num_gpus > 1 else 1)
            in_forward, in_backward = 2 * (cast + cast_layers), 2 * (cast + still_cast)
            new_gradients = 6 * matrix  # of a matrix, in bfloat16, and cast to float32
        case "fsdp2":
            weights, gradients = (4 * num_trained + 2 * num_frozen) / shards, 4 * num_trained / shards
            in_forward = in_backward = gathered + 2 * decoder.head_weights
            new_gradients = 4 * block  # and a copy to reduce and scatter
        case "zero2" | "zero3":
            lowered = 2 * (num_trained + num_frozen) / (shards if sharding == "zero3" else 1)
            weights = lowered + 4 * num_trained / shards
            gradients = 6 * num_trained / shards  # in bfloat16, and in float32 for the optimizer
            in_forward = in_backward = gathered if sharding == "zero3" else 0
            new_gradients = 2 * block
    return (
        Counter(weights=weights + quantized, gradients=gradients, optimizer=8 * num_trained / shards),
        Counter(weights=in_forward + dequantized),
        Counter(weights=in_backward + dequantized, gradients=new_gradients * trains_decoder),
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
        # Each layer's input after a dropout of its own, with a mask of one byte
        saved += 3 * (5 * size + attention + mlp) + 7 * 2 * lora_rank
    return saved


def _projector_bytes(config: DeltaLlavaConfig, num_visual_tokens: int) -> int:
    """What autograd saves of an image in the projector, roughly for the queries, which are few."""
    size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
    tokens = query_grid_size(num_visual_tokens, config.patch_grid_size) ** 2
    levels, patches = len(config.memory_feature_layers), config.patch_grid_size**2
    memory = patches * (levels if config.projector_variant == "paper" else 1)
    queries, keys = (tokens, memory) if memory > tokens else (1, 1)
    # Of keys and values alike: before GELU, before the norm in float32, in their cells
    projected = (keys + memory) * 8 * size
    # What each head looks for and finds there, at full width
    widened = queries * 4 * size * config.projector_num_attention_heads if memory > tokens else tokens * 4 * size
    return patches * 2 * (levels + 1) * size + projected + widened + queries * 40 * size + tokens * 6 * text_size


def _tile_bytes(decoder: _Decoder, num_labels: int) -> int:
    """A tile of TRL's fused head in bfloat16: hidden states, the weights of its words, logits."""
    rows, words = min(num_labels, HEAD_TOKENS), min(decoder.vocab_size, HEAD_WORDS)
    # The logits have as much room for a smaller vocabulary
    return 2 * ((rows + words) * decoder.hidden_size + rows * HEAD_WORDS)


def flops_unit(flops: float) -> tuple[float, str]:
    """The unit in which so many FLOPs have digits before the point: its size in FLOPs, and its name."""
    return next(((size, name) for size, name in UNITS.items() if flops >= size), (1.0, "FLOPs"))


def _unit(costs: dict[int, dict[str, int]]) -> tuple[float, str]:
    """In which, with three digits after the point, no part that is computed is zero."""
    return flops_unit(1e3 * min(cost[part] for cost in costs.values() for part in FLOP_PARTS if cost[part]))


def costs_table(costs: dict[int, dict[str, int]]) -> str:
    """
    A table in Markdown, with a row for each budget, of what [`inference_costs`] returns by number of visual tokens.
    """
    size, unit = _unit(costs)
    lines = [
        f"| visual tokens | tower | projector | prefill | decode | total {unit} | KV cache, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for num_visual_tokens, cost in costs.items():
        columns = [f"{flops / size:.3f}" for flops in (*(cost[part] for part in FLOP_PARTS), _total_flops(cost))]
        lines.append(f"| {num_visual_tokens} | {' | '.join(columns)} | {cost['kv_cache_bytes'] / 1e6:.4g} |")
    return "\n".join(lines)


def _plot(costs: dict[int, dict[str, int]], title: str, file: Path):
    """Draw a stacked bar for each budget."""
    from matplotlib.figure import Figure

    size, unit = _unit(costs)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    budgets = [str(num_visual_tokens) for num_visual_tokens in costs]
    bottom = [0.0] * len(budgets)
    for part in FLOP_PARTS:
        heights = [cost[part] / size for cost in costs.values()]
        axis.bar(budgets, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axis.set(xlabel="visual tokens", ylabel=f"{unit} of an answer", title="\n".join(textwrap.wrap(title, 80)))
    axis.legend()
    figure.savefig(file, dpi=150)


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
    targets.add_argument("--max_tflops", type=float, metavar="TFLOPS", help="at most this many 10¹² FLOPs in total")
    targets.add_argument("--max_kv_cache_mb", type=float, metavar="MB", help="at most this many 10⁶ bytes of KV cache")
    parser.add_argument("--json", action="store_true", help="print FLOPs as JSON instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them into this image file")
    options = parser.parse_args(arguments)
    request = (options.text_tokens, options.new_tokens)
    targets = (options.max_tflops, options.max_kv_cache_mb)
    largest = None
    try:
        config = recipe_config(options.recipe) if options.recipe else _read_config(options.config)
        # A recipe can be trained for any budget
        budgets = config.valid_visual_token_counts if options.recipe else config.visual_token_budgets
        costs = {
            budget: inference_costs(config, budget, *request, options.convention)
            for budget in config.valid_visual_token_counts
        }
        if targets != (None, None):
            choices = budgets if options.recipe else None
            largest = largest_budget(config, *request, *targets, choices, options.convention)
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
    print(title, costs_table(costs), sep="\n\n")
    if largest:
        choice = "the tower allows" if options.recipe else "the checkpoint was trained for"
        choice = f"{choice}, {sorted(budgets)}"
        print(f"\nLargest budget within the target: {largest} visual tokens, of those that {choice}.")


if __name__ == "__main__":
    main()
