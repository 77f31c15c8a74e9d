"""What our projectors cost at each budget, beside the released one with torch's own attention, TokenPacker's, average
pooling and that after LLaVA-Meteor's abstract.

    python -m delta_llava.benchmarks.projector --size 7b --rounds 9 --output projector.json

The 7B's sizes, CLIP-L/336 and a width of 4096, run on a CPU too: these are only the projectors, with random weights and
features. Before anything is timed, the released one must give the same tokens with either attention. Average pooling
feeds LLaVA-1.5's MLP, and is LLaVA-1.5's projector where the budget is all patches. The one after LLaVA-Meteor's
abstract also reads an instruction, of 68 tokens here, and chooses what it keeps. Backward passes are those of training,
without drop path.
"""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import nn
from tqdm import tqdm

from ..configuration_delta_llava import DeltaLlavaConfig
from ..modeling_delta_llava import DeltaProjector
from ..study.meteor import MeteorConfig, MeteorProjector
from ..study.projectors import AveragePoolingProjector, TokenPackerProjector
from . import harness
from .harness import DTYPES, SIZES


PASSES = ("forward", "forward and backward")
RESIDUAL, RELEASED = "Delta-LLaVA, residual", "Delta-LLaVA, released"
TORCHS = f"{RELEASED}, torch's attention"
TOKEN_PACKER, POOLING, METEOR = "TokenPacker", "average pooling + MLP", "after LLaVA-Meteor's abstract"
INSTRUCTION_TOKENS = 68
NO_DROP_PATH = {"attention_drop_path": 0.0, "convolution_drop_path": 0.0, "mlp_drop_path": 0.0}
# Largest relative difference between the attentions: rounding, which is all that may differ
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def with_torchs_attention(
    projector: DeltaProjector, query_features: torch.Tensor, memory_features: torch.Tensor, num_visual_tokens: int
) -> torch.Tensor:
    """A `released` projector, called as ever, with torch's own attention: it maps each patch to a key and a value."""
    side = round(num_visual_tokens**0.5)
    grid = query_features.transpose(1, 2).unflatten(-1, (projector.patch_grid_size, projector.patch_grid_size))
    queries = projector._queries(grid, side).flatten(0, 1).unsqueeze(1)
    projections = (projector.key_projection, projector.value_projection)
    memory = (projector._cells(projection(memory_features), side).flatten(0, 1) for projection in projections)
    attended, _ = nn.MultiheadAttention.forward(projector.attention, queries, *memory, need_weights=False)
    return projector.mlp(attended.view(len(query_features), num_visual_tokens, -1))


def make_projectors(config: DeltaLlavaConfig, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The modules by their names, in eval mode, in the sizes of a configuration of any variant."""
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
        TORCHS: lambda *inputs: with_torchs_attention(projectors[RELEASED], *inputs),
    }

    def step(call: Callable, kind: str):
        is_backward = kind == PASSES[1]
        for projector in projectors.values():
            projector.train(is_backward)
        with torch.set_grad_enabled(is_backward):
            tokens = call(*features, num_visual_tokens)
        if is_backward:
            tokens.backward(torch.ones_like(tokens))
            for projector in projectors.values():
                projector.zero_grad()

    return {(name, kind): partial(step, call, kind) for name, call in calls.items() for kind in PASSES}


@torch.no_grad()
def check_agreement(
    projector: DeltaProjector, features: tuple[torch.Tensor, torch.Tensor], num_visual_tokens: int
) -> float:
    """The relative difference between both attentions' tokens; a `RuntimeError` if it is more than rounding."""
    expected = with_torchs_attention(projector, *features, num_visual_tokens).float()
    difference = (projector(*features, num_visual_tokens).float() - expected).norm() / expected.norm()
    tolerance = TOLERANCES[features[0].dtype]
    if not difference <= tolerance:
        raise RuntimeError(
            f"At num_visual_tokens={num_visual_tokens} the projector's tokens and those of torch's attention differ by"
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
    Measures all projectors, one budget after the other; in each round every projector takes its turn.

    Yields `projector`, `num_visual_tokens`, and for each pass a dict of `seconds`, a list, and `peak_bytes`.
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
            figures[key] = {"seconds": [], "peak_bytes": harness.peak_bytes(step, device, ())}
        for _ in range(rounds):
            for key, step in steps.items():
                figures[key]["seconds"].append(harness.seconds_of(step, device))
        for name in dict.fromkeys(name for name, _ in steps):
            yield {
                "projector": name,
                "num_visual_tokens": budget,
                **{kind: figures[name, kind] for kind in PASSES},
            }


def table(report: dict) -> str:
    """The report in Markdown."""
    source = "by the profiler" if report["device"] == "cpu" else "by max_memory_allocated"
    caption = f"""{harness.run_caption(report)}, batch {report["batch_size"]}. ms is the median of {report["rounds"]}
    interleaved rounds, a ratio the median of the rounds' own. MB is the most that a step had allocated at a time beside
    weights and features, gradients included, {source}."""
    heads = ("ms", "to TokenPacker", "to torch's attention", "MB")
    columns = ["visual tokens", "projector", *(f"{kind}: {head}" for kind in PASSES for head in heads)]
    rows = {(row["projector"], row["num_visual_tokens"]): row for row in report["rows"]}
    lines = []
    for (name, budget), row in rows.items():
        cells = [str(budget), name]
        for kind in PASSES:
            seconds = row[kind]["seconds"]
            others = [rows[other, budget][kind]["seconds"] for other in (TOKEN_PACKER, TORCHS)]
            cells.append(f"{1e3 * median(seconds):.4g}")
            cells += [f"{harness.median_ratio(seconds, other):.2f}" for other in others]
            cells.append(f"{row[kind]['peak_bytes'] / 1e6:.3g}")
        lines.append(cells)
    return f"{' '.join(caption.split())}\n\n{harness.markdown_table(columns, lines)}"


def main(arguments: list[str] | None = None):
    """Measure and print a table; the figures are also written where asked."""
    parser = harness.make_parser(__doc__, rounds=9)
    harness.add_device_options(parser)
    parser.add_argument("--batch_size", type=int, default=1, help="images in a step (default: 1)")
    options = harness.parse_options(parser, arguments, {"batch_size": 1}, large_on_cpu=True)
    size, batch_size = SIZES[options.size], options.batch_size
    config = DeltaLlavaConfig(vision_config=size.vision_config, text_config=size.text_config)
    rows = measure(config, size.budgets, batch_size, options.device, DTYPES[options.dtype], options.rounds)
    rows = list(tqdm(rows, total=6 * len(size.budgets), unit="row"))
    report = {**harness.describe_run(options), "batch_size": batch_size, "rows": rows}
    print(table(report))
    harness.write_report(report, options.output)


if __name__ == "__main__":
    main()
