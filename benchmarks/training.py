"""What a training step of Delta-LLaVA costs at each budget, beside LLaVA-1.5 with its 576 tokens in the same run.

    python -m delta_llava.benchmarks.training --size small --rounds 5 --output training.json --plot training.png

Both models have the same tower, share one language model, and have random weights; LLaVA-1.5 is transformers' own. Each
step is a step of our training: the tower without autograd, the output head at labelled positions only, gradient
checkpointing of the language model, clipping, AdamW on the trained parts.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import PreTrainedModel

from . import harness
from .harness import BASELINE, OURS, SIZES


STAGES = {1: "Stage 1: projector trained", 2: "Stage 2: projector and language model trained"}
# Table 4 of the paper: seconds of an epoch over those of its "LLaVA 576", by stage and visual tokens. (The paper's text
# names other times for "standard LLaVA", which are not its table's.)
PAPER_RATIOS = {
    1: {144: 2012 / 5041, 64: 1404 / 5041, 16: 1116 / 5041, 4: 992 / 5041, 1: 960 / 5041},
    2: {144: 12097 / 16460, 64: 11843 / 16460, 16: 11669 / 16460, 4: 11554 / 16460, 1: 10310 / 16460},
}


@dataclass
class Contestant:
    """A model at a budget, with its batch and the optimizers of its trained parts."""

    name: str
    model: PreTrainedModel
    inputs: dict[str, torch.Tensor | int]
    optimizers: list[torch.optim.Optimizer]

    def step(self):
        """One optimizer step."""
        self.backward(self.inputs)
        trained = [weight for optimizer in self.optimizers for weight in optimizer.param_groups[0]["params"]]
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def resident(self) -> Iterator:
        """What lies in memory between two steps."""
        states = [state.values() for optimizer in self.optimizers for state in optimizer.state.values()]
        return chain(self.model.parameters(), self.model.buffers(), self.inputs.values(), *states)

    def backward(self, inputs: dict[str, torch.Tensor | int]):
        """Forward and backward pass."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        is_label = labels != -100
        device = labels.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            hidden_states = self.model.model(**inputs, use_cache=False).last_hidden_state
            # As TRL's fused head on a GPU; without Triton it would compute all logits
            logits = self.model.lm_head(hidden_states[:, :-1][is_label])
        F.cross_entropy(logits.float(), labels[is_label]).backward()


def make_contestants(size: harness.Size, stage: int, device: torch.device) -> list[Contestant]:
    """
    The baseline, then Delta-LLaVA at every budget, which share one language model; none checkpoints gradients yet.

    Stage 1 trains the projector, stage 2 also the language model with its head. On a GPU, frozen weights are bfloat16.
    """
    # An earlier stage's models refer to themselves
    gc.collect()
    torch.cuda.empty_cache()
    frozen_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    llava, delta_llava = models = harness.make_models(size, size.budgets, device, frozen_dtype)
    for model in models:
        model.train().requires_grad_(False)
        model.model.multi_modal_projector.float().requires_grad_(True)
    shared_optimizers = []
    if stage == 2:
        language = nn.ModuleList([llava.model.language_model, llava.lm_head])
        language.to(language_dtype(language, device)).requires_grad_(True)
        shared_optimizers.append(adamw(language))
    parts = {
        name: (model, [adamw(model.model.multi_modal_projector), *shared_optimizers])
        for name, model in ((BASELINE, llava), (OURS, delta_llava))
    }
    contestants = []
    for name, budget in harness.name_contestants(size.budgets[0], size.budgets):
        model, optimizers = parts[name]
        inputs = harness.make_inputs(model.config, budget, size.batches[stage], device)
        contestants.append(Contestant(name, model, inputs, optimizers))
    return contestants


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW as the Trainer makes it, without weight decay as in our recipes."""
    return torch.optim.AdamW(module.parameters(), lr=2e-5, weight_decay=0.0, fused=True)


def language_dtype(language: nn.Module, device: torch.device) -> torch.dtype:
    """float32 as in our training, or bfloat16 where that does not fit: for 7B, on a GPU with less than about 130 GB."""
    # A weight, its gradient and AdamW's two states in float32, autocast's copy in bfloat16; a tenth for activations
    needed = 1.1 * (4 * 4 + 2) * sum(weight.numel() for weight in language.parameters())
    if device.type == "cuda" and needed > torch.cuda.get_device_properties(device).total_memory:
        return torch.bfloat16
    return torch.float32


def model_flops(contestant: Contestant) -> int:
    """FLOPs of forward and backward pass, counted on one row of the batch; no recomputation may be switched on yet."""
    one_row = {
        name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in contestant.inputs.items()
    }
    # Attention as plain products, because torch's counter knows no fused one on CPUs
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        contestant.backward(one_row)
    contestant.model.zero_grad()
    return counter.get_total_flops() * len(contestant.inputs["input_ids"])


def peak_flops_per_second(device: torch.device) -> float:
    """The fastest of ten products of large square matrices, in the dtype that training computes in."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(harness.seconds_of(lambda: matrix @ matrix, device) for _ in range(10))


def measure(size: harness.Size, stage: int, device: torch.device, rounds: int, progress: tqdm) -> dict:
    """
    Measures a stage; in each round every contestant takes its turn.

    Advances `progress` `3 + rounds` times for each contestant. Returns `stage`; `batch`, its shape; `trained_dtype`,
    that of the trained weights; and `rows`, one for each contestant: `model`, `num_visual_tokens`, `tokens` and `flops`
    of a step, `peak_bytes` and `seconds`, a list.
    """
    contestants = make_contestants(size, stage, device)
    rows = []
    for contestant in contestants:
        input_ids = contestant.inputs["input_ids"]
        row = {
            "model": contestant.name,
            "num_visual_tokens": input_ids.shape[1] - size.batches[stage].text_tokens,
            "tokens": input_ids.numel(),
            "flops": model_flops(contestant),
            "seconds": [],
        }
        rows.append(row)
        progress.update()

    language_model = contestants[0].model.model.language_model
    # By the name that every release we support knows, and in TRL's default kind
    language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for contestant, row in zip(contestants, rows, strict=True):
        contestant.step()  # the first one makes the optimizer's states
        progress.update()
        row["peak_bytes"] = harness.peak_bytes(contestant.step, device, contestant.resident())
        progress.update()
    for _ in range(rounds):
        for contestant, row in zip(contestants, rows, strict=True):
            row["seconds"].append(harness.seconds_of(contestant.step, device))
            progress.update()
    trained_dtype = contestants[0].optimizers[-1].param_groups[0]["params"][0].dtype
    return {
        "stage": stage,
        "batch": vars(size.batches[stage]),
        "trained_dtype": str(trained_dtype).removeprefix("torch."),
        "rows": rows,
    }


def caption(report: dict, measured: dict) -> str:
    """What was held equal, and what the columns mean."""
    batch, on_gpu = measured["batch"], report["device"] != "cpu"
    text = f"""**{STAGES[measured["stage"]]}.** {harness.run_caption(report)}. Held equal: {batch["rows"]} rows, each
    an image and {batch["text_tokens"]} text tokens, {batch["labels"]} of them labels; the language model, the tower's
    shape, random weights; AdamW on the trained weights in {measured["trained_dtype"]}, all computed in
    {"bfloat16" if on_gpu else "float32"}; gradient checkpointing of the language model; the frozen tower without
    autograd; the output head at labels only. s/step is the median of {report["rounds"]} interleaved rounds. A ratio is
    that of the column before it to the first row; the paper's is of its Table 4, whole epochs of the 7B on its own
    machine. Tokens are visual and text. Peak memory is what the {"GPU" if on_gpu else "CPU"} allocator had given out
    for the row's own model. MFU is TFLOP, those of the model without recomputation, over s/step and the
    {report["peak_flops_per_second"] / 1e12:.3g} TFLOP/s that a large matrix product reached in the same run."""
    return " ".join(text.split())


def table(report: dict, measured: dict) -> str:
    """A stage of the report in Markdown."""
    columns = ["model", "visual tokens", "s/step", "ratio", "paper's ratio", "tokens/s", "ratio"]
    columns += ["peak GB", "ratio", "TFLOP", "MFU"]
    baseline = measured["rows"][0]
    baseline_seconds = median(baseline["seconds"])
    has_paper_grid = baseline["num_visual_tokens"] == 576
    lines = []
    for row in measured["rows"]:
        seconds = median(row["seconds"])
        paper = PAPER_RATIOS[measured["stage"]].get(row["num_visual_tokens"]) if has_paper_grid else None
        speed, baseline_speed = row["tokens"] / seconds, baseline["tokens"] / baseline_seconds
        cells = (
            row["model"],
            str(row["num_visual_tokens"]),
            f"{seconds:.3g}",
            f"{seconds / baseline_seconds:.2f}",
            f"{paper:.2f}" if paper else "",
            f"{speed:.0f}",
            f"{speed / baseline_speed:.2f}",
            f"{row['peak_bytes'] / 1e9:.3g}",
            f"{row['peak_bytes'] / baseline['peak_bytes']:.2f}",
            f"{row['flops'] / 1e12:.3g}",
            f"{row['flops'] / seconds / report['peak_flops_per_second']:.0%}",
        )
        lines.append(cells)
    return f"{caption(report, measured)}\n\n{harness.markdown_table(columns, lines)}"


def draw(report: dict, file: Path):
    """Seconds per step and peak memory against visual tokens, the baseline as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for column, measured in zip(axes.T, report["stages"], strict=True):
        baseline, *rows = measured["rows"]
        budgets = [row["num_visual_tokens"] for row in rows]
        for axis, label, value in (
            (column[0], "seconds per step", lambda row: median(row["seconds"])),
            (column[1], "peak memory, GB", lambda row: row["peak_bytes"] / 1e9),
        ):
            axis.plot(budgets, [value(row) for row in rows], "o-", label=OURS)
            axis.axhline(
                value(baseline),
                color="grey",
                linestyle="--",
                label=f"{BASELINE}, {baseline['num_visual_tokens']}",
            )
            axis.set(xscale="log", xticks=budgets, xticklabels=budgets, ylabel=label)
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
        column[0].set_title(STAGES[measured["stage"]], fontsize=10)
        column[1].set_xlabel("visual tokens")
        column[0].legend()
    figure.savefig(file, dpi=100)


def main(arguments: list[str] | None = None):
    """Measure both stages and print a table of each; the figures are also written where asked."""
    parser = harness.make_parser(__doc__, rounds=5)
    parser.add_argument("--plot", type=Path, help="picture of seconds and memory against visual tokens")
    options = harness.parse_options(parser, arguments, {})
    if options.size != "7b":  # what the smaller sizes are for
        options.device, options.dtype = torch.device("cpu"), "float32"
    size, device = SIZES[options.size], options.device
    report = {**harness.describe_run(options), "peak_flops_per_second": peak_flops_per_second(device), "stages": []}
    with tqdm(total=len(STAGES) * (1 + len(size.budgets)) * (3 + options.rounds), unit="step") as progress:
        for stage in STAGES:
            report["stages"].append(measure(size, stage, device, options.rounds, progress))
    print("\n\n".join(table(report, measured) for measured in report["stages"]))
    harness.write_report(report, options.output)
    if options.plot:
        draw(report, options.plot)


if __name__ == "__main__":
    main()
