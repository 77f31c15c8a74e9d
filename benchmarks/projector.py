"""What our projectors cost at each budget, beside the released one written plainly, TokenPacker's, average pooling and
that after LLaVA-Meteor's abstract.

    python -m delta_llava.benchmarks.projector --size 7b --rounds 9 --output projector.json

The 7B's sizes, CLIP-L/336 and a width of 4096, run on a CPU too: it is the projectors alone, with random weights and
features. Before anything is timed, the released one and the plain one must give the same tokens. Average pooling feeds
LLaVA-1.5's MLP, and is LLaVA-1.5's projector where the budget is all patches. The one after LLaVA-Meteor's abstract
reads an instruction, too, of 68 tokens here, and chooses what it keeps. Backward passes are those of training, without
drop path.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..configuration_delta_llava import DeltaLlavaConfig
from ..modeling_delta_llava import DeltaProjection, DeltaProjector, RefinementBlock
from ..study.meteor import MeteorConfig, MeteorProjector
from ..study.projectors import AveragePoolingProjector, TokenPackerProjector
from .training import SIZES, peak_bytes, seconds_of


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = ("forward", "forward and backward")
RESIDUAL, RELEASED, PLAIN = "Delta-LLaVA, residual", "Delta-LLaVA, released", "Delta-LLaVA, released, plain"
TOKEN_PACKER, POOLING, METEOR = "TokenPacker", "average pooling + MLP", "after LLaVA-Meteor's abstract"
INSTRUCTION_TOKENS = 68
NO_DROP_PATH = {"attention_drop_path": 0.0, "convolution_drop_path": 0.0, "mlp_drop_path": 0.0}
# Largest relative difference of ours from the plain one: rounding, which is all that may differ
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def plain_projector(
    projector: DeltaProjector, query_features: torch.Tensor, memory_features: torch.Tensor, num_visual_tokens: int
) -> torch.Tensor:
    """
    The released variant without drop path as it would be written down, step by step, with the weights of `projector`.

    Args:
        projector (`DeltaProjector`): Of the variant `"released"`, with bilinear pooling and no part switched off.
        query_features (`torch.Tensor` of shape `(batch_size, G², vision_hidden_size)`), memory_features
        (`torch.Tensor` of shape `(batch_size, G², num_levels * vision_hidden_size)`), num_visual_tokens (`int`):
            As the projector takes them.

    Returns:
        `torch.Tensor` of shape `(batch_size, V, text_hidden_size)`.
    """
    batch_size, num_patches, size = query_features.shape
    grid_side, side = round(num_patches**0.5), round(num_visual_tokens**0.5)
    scale = grid_side // side

    grid = query_features.permute(0, 2, 1).reshape(batch_size, size, grid_side, grid_side)
    grid = F.interpolate(grid, size=(side, side), mode="bilinear")
    grid = _plain_refinement(projector.refinement_block, grid)
    positions = F.interpolate(projector.positions.float(), size=(side, side), mode="bicubic").to(grid.dtype)
    queries = (grid + positions).flatten(2).permute(0, 2, 1)
    queries = _plain_projection(projector.query_projection, queries)

    attention = projector.attention
    query_weight, key_weight, value_weight = attention.in_proj_weight.chunk(3)
    query_bias, key_bias, value_bias = attention.in_proj_bias.chunk(3)
    queries = F.linear(queries, query_weight, query_bias)
    keys = F.linear(_plain_projection(projector.key_projection, memory_features), key_weight, key_bias)
    values = F.linear(_plain_projection(projector.value_projection, memory_features), value_weight, value_bias)

    # (batch, row of the cell, row in the cell, column of the cell, column in the cell, head, channel of the head)
    cells = (batch_size, side, scale, side, scale, attention.num_heads, attention.head_dim)
    shape = (batch_size, num_visual_tokens, attention.num_heads, scale**2, attention.head_dim)
    keys = keys.reshape(cells).permute(0, 1, 3, 5, 2, 4, 6).reshape(shape)
    values = values.reshape(cells).permute(0, 1, 3, 5, 2, 4, 6).reshape(shape)
    queries = queries.reshape(batch_size, num_visual_tokens, attention.num_heads, 1, attention.head_dim)
    weights = torch.softmax(queries @ keys.transpose(-1, -2) / attention.head_dim**0.5, dim=-1)
    attended = (weights @ values).reshape(batch_size, num_visual_tokens, size)
    attended = F.linear(attended, attention.out_proj.weight, attention.out_proj.bias)

    first, _, second = projector.mlp
    return F.linear(F.gelu(F.linear(attended, first.weight, first.bias)), second.weight, second.bias)


def _plain_projection(projection: DeltaProjection, features: torch.Tensor) -> torch.Tensor:
    update = features @ projection.U @ projection.V
    return _plain_norm(projection.norm, F.gelu(F.linear(features, projection.shared_weight.weight) + update))


def _plain_norm(norm: nn.LayerNorm, features: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(features, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _plain_refinement(block: RefinementBlock, grid: torch.Tensor) -> torch.Tensor:
    """`(batch_size, vision_hidden_size, g, g)` to the same."""
    attended = F.conv2d(grid, block.attention_input.weight)
    tokens = attended.flatten(2).permute(0, 2, 1)
    attention = block.attention
    tokens = _plain_norm(attention.norm, _plain_norm(attention.input_norm, tokens))
    heads = (*tokens.shape[:2], tokens.shape[2] // attention.head_dim, attention.head_dim)
    queries, keys, values = (
        F.linear(tokens, part.weight, part.bias).reshape(heads).permute(0, 2, 1, 3)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    weights = torch.softmax(queries @ keys.transpose(-1, -2) / attention.head_dim**0.5, dim=-1)
    tokens = (weights @ values).permute(0, 2, 1, 3).reshape(tokens.shape)
    tokens = F.linear(tokens, attention.out_proj.weight, attention.out_proj.bias)
    attended = attended + tokens.permute(0, 2, 1).reshape(attended.shape)

    convolution = block.convolution
    convolved = F.conv2d(attended, block.convolution_input.weight)
    groups = convolution.grouped.groups
    inner = F.conv2d(convolved, convolution.grouped.weight, padding=1, groups=groups)
    inner = _plain_norm(convolution.norm, inner.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    convolved = convolved + F.conv2d(F.relu(inner), convolution.pointwise.weight)

    first, _, second = block.mlp
    refined = torch.cat([attended, convolved], dim=1)
    widened = F.relu(F.conv2d(refined, first.weight, first.bias))
    return refined + F.conv2d(widened, second.weight, second.bias)


def make_projectors(config: DeltaLlavaConfig, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """
    The modules by their names, in eval mode.

    Args:
        config ([`DeltaLlavaConfig`]): Sizes; its variant does not count.
        device (`torch.device`), dtype (`torch.dtype`): Of the weights.
    """
    torch.manual_seed(0)

    def delta(variant: str) -> DeltaProjector:
        variant = {"projector_variant": variant, **NO_DROP_PATH}
        return DeltaProjector(DeltaLlavaConfig(**config.to_dict() | variant))

    with device:
        projectors = {
            RESIDUAL: delta("residual"),
            RELEASED: delta("released"),
            TOKEN_PACKER: TokenPackerProjector(config),
            POOLING: AveragePoolingProjector(config),
            METEOR: MeteorProjector(MeteorConfig.from_delta_llava(config)),
        }
    return {name: projector.to(dtype).eval() for name, projector in projectors.items()}


def make_steps(
    projectors: dict[str, nn.Module], features: tuple[torch.Tensor, torch.Tensor], num_visual_tokens: int
) -> dict[tuple[str, str], Callable[[], None]]:
    """What is timed at a budget, by projector and pass."""
    attention = features[0][..., 0]
    instruction = features[0].new_ones(len(attention), INSTRUCTION_TOKENS, projectors[METEOR].mlp[0].out_features)
    mask = torch.ones(instruction.shape[:2], dtype=torch.bool, device=instruction.device)

    def meteor(query_features: torch.Tensor, _, num_visual_tokens: int) -> torch.Tensor:
        budgets = [num_visual_tokens] * len(query_features)
        return torch.stack(projectors[METEOR](query_features, attention, instruction, mask, budgets)[0])

    calls = {
        **projectors,
        METEOR: meteor,
        PLAIN: lambda *inputs: plain_projector(projectors[RELEASED], *inputs),
    }

    def set_training(training: bool):
        for projector in projectors.values():
            projector.train(training)

    def forward(call: Callable) -> Callable[[], None]:
        def step():
            set_training(False)
            with torch.no_grad():
                call(*features, num_visual_tokens)

        return step

    def forward_and_backward(call: Callable) -> Callable[[], None]:
        def step():
            set_training(True)
            tokens = call(*features, num_visual_tokens)
            tokens.backward(torch.ones_like(tokens))
            for projector in projectors.values():
                projector.zero_grad()

        return step

    makers = (forward, forward_and_backward)
    return {(name, kind): make(call) for name, call in calls.items() for kind, make in zip(PASSES, makers, strict=True)}


@torch.no_grad()
def check_agreement(
    projector: DeltaProjector, features: tuple[torch.Tensor, torch.Tensor], num_visual_tokens: int
) -> float:
    """
    The relative difference of the released projector's tokens from those of the plain implementation.

    Raises:
        RuntimeError: If it is more than rounding.
    """
    expected = plain_projector(projector, *features, num_visual_tokens).float()
    difference = (projector(*features, num_visual_tokens).float() - expected).norm() / expected.norm()
    tolerance = TOLERANCES[features[0].dtype]
    if not difference <= tolerance:
        raise RuntimeError(
            f"At num_visual_tokens={num_visual_tokens} the projector's tokens differ from the plain implementation's by"
            f" {difference:.2g}, of which rounding explains {tolerance}: one of the two computes something else."
        )
    return difference.item()


def measure(
    config: DeltaLlavaConfig,
    budgets: tuple[int, ...],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> Iterator[dict]:
    """
    Measures all projectors, one budget after the other.

    Args:
        config ([`DeltaLlavaConfig`]): Sizes; its variant does not count.
        budgets (`tuple[int, ...]`): Numbers of visual tokens.
        batch_size (`int`): Images in a step.
        device (`torch.device`), dtype (`torch.dtype`): Of weights and features.
        rounds (`int`): How often each step is timed; in a round every projector takes its turn.

    Yields:
        `dict`: `projector`, `num_visual_tokens`, and for each pass a dict of `seconds`, a list, and `peak_bytes`.

    Raises:
        RuntimeError: If ours and the plain implementation do not agree.
    """
    projectors = make_projectors(config, device, dtype)
    size, patches = config.vision_config.hidden_size, config.patch_grid_size**2
    features = (
        torch.randn(batch_size, patches, size, device=device, dtype=dtype),
        torch.randn(batch_size, patches, len(config.memory_feature_layers) * size, device=device, dtype=dtype),
    )
    for budget in budgets:
        check_agreement(projectors[RELEASED], features, budget)
    for budget in budgets:
        steps = make_steps(projectors, features, budget)
        figures = {}
        for key, step in steps.items():
            step()  # the first call pays for what later ones reuse
            figures[key] = {"seconds": [], "peak_bytes": peak_bytes(step, device, ())}
        for _ in range(rounds):
            for key, step in steps.items():
                figures[key]["seconds"].append(seconds_of(step, device))
        for name in dict.fromkeys(name for name, _ in steps):
            yield {
                "projector": name,
                "num_visual_tokens": budget,
                **{kind: figures[name, kind] for kind in PASSES},
            }


def ratio(row: dict, other: dict, kind: str) -> float:
    """The median of the rounds' ratios: what slows one turn down, slows the next one too."""
    return median(a / b for a, b in zip(row[kind]["seconds"], other[kind]["seconds"], strict=True))


def table(report: dict) -> str:
    """The report in Markdown."""
    is_cpu = report["device"] == "cpu"
    caption = (
        f"Size {report['size']} on {report['device']}, torch {report['torch']}, {report['threads']} CPU thread(s),",
        f"{report['dtype']}, batch {report['batch_size']}. ms is the median of {report['rounds']} interleaved rounds,",
        "a ratio the median of the rounds' own. MB is the most that a step had allocated at a time beside weights and",
        f"features, gradients included, {'by the profiler' if is_cpu else 'by max_memory_allocated'}.",
    )
    heads = ("ms", "to TokenPacker", "to plain", "MB")
    columns = ["visual tokens", "projector", *(f"{kind}: {head}" for kind in PASSES for head in heads)]
    lines = [" ".join(caption), "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows = {(row["projector"], row["num_visual_tokens"]): row for row in report["rows"]}
    for (name, budget), row in rows.items():
        cells = [str(budget), name]
        for kind in PASSES:
            cells += [
                f"{1e3 * median(row[kind]['seconds']):.4g}",
                f"{ratio(row, rows[TOKEN_PACKER, budget], kind):.2f}",
                f"{ratio(row, rows[PLAIN, budget], kind):.2f}",
                f"{row[kind]['peak_bytes'] / 1e6:.3g}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None):
    """Measure and print a table; the figures are also written where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True, help="widths, memory levels, patch grid and budgets")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch finds it")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on a CPU")
    parser.add_argument("--batch_size", type=int, default=1, help="images in a step (default: 1)")
    parser.add_argument("--rounds", type=int, default=9, help="how often each step is timed (default: 9)")
    parser.add_argument("--output", type=Path, help="JSON file for the raw figures")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1 is needed.")
    if options.batch_size < 1:
        parser.error(f"--batch_size {options.batch_size}: at least 1 is needed.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here. Leave it out, or take --device cpu.")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")

    size = SIZES[options.size]
    config = DeltaLlavaConfig(vision_config=size.vision_config, text_config=size.text_config)
    num_rows = 6 * len(size.budgets)
    rows = measure(config, size.budgets, options.batch_size, device, DTYPES[dtype], options.rounds)
    report = {
        "size": options.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": dtype,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "rows": list(tqdm(rows, total=num_rows, unit="row")),
    }
    print(table(report))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
