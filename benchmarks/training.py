"""What a training step of Delta-LLaVA costs at each budget, beside LLaVA-1.5 with its 576 tokens in the same run.

    python -m delta_llava.benchmarks.training --size small --rounds 5 --output training.json --plot training.png

Both models have the same tower, one and the same language model, and random weights; LLaVA-1.5 is transformers' own.
Each step is a step of our training: the tower without autograd, the output head at labelled positions only, gradient
checkpointing of the language model, clipping, AdamW on the trained parts.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..configuration_delta_llava import DeltaLlavaConfig


BACKBONES = Path(__file__).parents[1] / "backbones"
BASELINE = "LLaVA-1.5"
STAGES = {1: "Stage 1: projector trained", 2: "Stage 2: projector and language model trained"}
# Table 4 of the paper: seconds of an epoch over those of its "LLaVA 576", by stage and visual tokens. (The paper's text
# names other times for "standard LLaVA", which are not its table's.)
PAPER_RATIOS = {
    1: {144: 2012 / 5041, 64: 1404 / 5041, 16: 1116 / 5041, 4: 992 / 5041, 1: 960 / 5041},
    2: {144: 12097 / 16460, 64: 11843 / 16460, 16: 11669 / 16460, 4: 11554 / 16460, 1: 10310 / 16460},
}


@dataclass(frozen=True)
class Batch:
    """Shape of a batch: every row is an image, then `text_tokens` tokens of which the last `labels` are learnt."""

    rows: int
    text_tokens: int
    labels: int


@dataclass(frozen=True)
class Size:
    """Backbones, the budgets to measure and each stage's batch; the first budget is all patches, as LLaVA-1.5 has."""

    vision_config: PreTrainedConfig
    text_config: PreTrainedConfig
    budgets: tuple[int, ...]
    batches: dict[int, Batch]


SIZES = {
    "tiny": Size(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=48,
            patch_size=4,
        ),
        LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2),
        (144, 36, 16, 9, 4, 1),
        {1: Batch(rows=2, text_tokens=6, labels=6), 2: Batch(rows=2, text_tokens=16, labels=4)},
    ),
    # The shares of the real thing, as far as one core allows: a tower that is small beside the language model, four
    # memory levels, an embedding table of few percent
    "small": Size(
        CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=8,
            num_attention_heads=3,
            image_size=336,
            patch_size=14,
        ),
        LlamaConfig(
            vocab_size=2048, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6
        ),
        (576, 144, 64, 36, 16, 4, 1),
        {1: Batch(rows=2, text_tokens=30, labels=30), 2: Batch(rows=2, text_tokens=256, labels=64)},
    ),
    # The rows are those of one GPU in train/recipes/vicuna-7b
    "7b": Size(
        AutoConfig.from_pretrained(BACKBONES / "clip-vit-large-patch14-336"),
        AutoConfig.from_pretrained(BACKBONES / "vicuna-7b-v1.5"),
        (576, 144, 64, 36, 16, 4, 1),
        {1: Batch(rows=32, text_tokens=30, labels=30), 2: Batch(rows=16, text_tokens=256, labels=64)},
    ),
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

    def tensors(self) -> list[torch.Tensor]:
        """What lies in memory between two steps."""
        states = [state.values() for optimizer in self.optimizers for state in optimizer.state.values()]
        tensors = chain(self.model.parameters(), self.model.buffers(), self.inputs.values(), *states)
        return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]

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


def make_inputs(config: PreTrainedConfig, num_visual_tokens: int, batch: Batch, device: torch.device):
    """A batch of random pixels and tokens, as the collator makes it of images and conversations."""
    text = torch.randint(config.image_token_id, (batch.rows, batch.text_tokens), device=device)
    input_ids = F.pad(text, (num_visual_tokens, 0), value=config.image_token_id)
    labels = input_ids.clone()
    labels[:, : -batch.labels] = -100
    side = config.vision_config.image_size
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(batch.rows, 3, side, side, device=device),
        "labels": labels,
    }


def make_contestants(size: Size, stage: int, device: torch.device) -> list[Contestant]:
    """
    The baseline, then Delta-LLaVA at every budget; none checkpoints gradients yet.

    Args:
        size (`Size`): Backbones, budgets and batches.
        stage (`int`): 1 trains the projector, 2 the language model with its head as well.
        device (`torch.device`): Where weights are made. On a GPU, frozen ones are bfloat16.

    Returns:
        `list[Contestant]`: All with one language model between them.
    """
    configs = {"vision_config": size.vision_config, "text_config": size.text_config}
    image_token_id = size.text_config.vocab_size - 1
    delta_llava_config = DeltaLlavaConfig(
        **configs, image_token_id=image_token_id, visual_token_budgets=list(size.budgets)
    )
    llava_config = LlavaConfig(**configs, image_token_index=image_token_id)
    frozen_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        llava = AutoModelForImageTextToText.from_config(llava_config, dtype=frozen_dtype)
        delta_llava = AutoModelForImageTextToText.from_config(delta_llava_config, dtype=frozen_dtype)
    # One for both, since two with their optimizers' states do not fit on one GPU
    delta_llava.model.language_model, delta_llava.lm_head = llava.model.language_model, llava.lm_head

    for model in (llava, delta_llava):
        model.train().requires_grad_(False)
        model.model.multi_modal_projector.float().requires_grad_(True)
    shared_optimizers = []
    if stage == 2:
        language = nn.ModuleList([llava.model.language_model, llava.lm_head])
        language.to(language_dtype(language, device)).requires_grad_(True)
        shared_optimizers.append(adamw(language))
    llava_optimizers = [adamw(llava.model.multi_modal_projector), *shared_optimizers]
    delta_llava_optimizers = [adamw(delta_llava.model.multi_modal_projector), *shared_optimizers]

    batch = size.batches[stage]
    contestants = [
        Contestant(BASELINE, llava, make_inputs(llava_config, size.budgets[0], batch, device), llava_optimizers)
    ]
    for budget in size.budgets:
        inputs = make_inputs(delta_llava_config, budget, batch, device) | {"num_visual_tokens": budget}
        contestants.append(Contestant("Delta-LLaVA", delta_llava, inputs, delta_llava_optimizers))
    # What is no longer needed refers to itself: the second language model, and the models of an earlier stage
    gc.collect()
    torch.cuda.empty_cache()
    return contestants


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW as the Trainer makes it, without weight decay as in our recipes."""
    return torch.optim.AdamW(module.parameters(), lr=2e-5, weight_decay=0.0, fused=True)


def language_dtype(language: nn.Module, device: torch.device) -> torch.dtype:
    """float32 as in our training, or bfloat16 where that does not fit: for 7B, on a GPU with less than about 130 GB."""
    # A weight, its gradient and AdamW's two states in float32, autocast's copy in bfloat16; a tenth for the activations
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


def peak_bytes(step: Callable[[], None], device: torch.device, resident: Iterable[torch.Tensor]) -> int:
    """
    Most bytes taken at any moment of a step.

    Args:
        step (`Callable`):
            The step, which is run once.
        device (`torch.device`):
            Whose allocator is watched.
        resident (`Iterable[torch.Tensor]`):
            What is there already and counts; what else lies on the device does not.

    Returns:
        `int`: Bytes.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in resident}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return sum(storages.values()) + torch.cuda.max_memory_allocated(device) - before
    # Else it reports on standard error when it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # Allocations and, as negative bytes, what is freed again; torch's own tables have only their sums
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return sum(storages.values()) + max(accumulate(changes, initial=0))


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Wall-clock seconds of a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def peak_flops_per_second(device: torch.device) -> float:
    """What the fastest of ten products of large square matrices reaches, in the dtype that training computes in."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(seconds_of(lambda: matrix @ matrix, device) for _ in range(10))


def measure(size: Size, stage: int, device: torch.device, rounds: int, progress: tqdm) -> dict:
    """
    Measures a stage.

    Args:
        size (`Size`), stage (`int`), device (`torch.device`):
            See [`make_contestants`].
        rounds (`int`):
            How often each step is timed; in a round every contestant takes its turn.
        progress (`tqdm`):
            Advanced `3 + rounds` times for each contestant.

    Returns:
        `dict`: `stage`; `batch`, its shape; `trained_dtype`, of the weights that are trained; and `rows`, one for each
        contestant: `model`, `num_visual_tokens`, `tokens` and `flops` of a step, `peak_bytes` and `seconds`, a list.
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
        row["peak_bytes"] = peak_bytes(contestant.step, device, contestant.tensors())
        progress.update()
    for _ in range(rounds):
        for contestant, row in zip(contestants, rows, strict=True):
            row["seconds"].append(seconds_of(contestant.step, device))
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
    sentences = (
        f"**{STAGES[measured['stage']]}.**",
        f"Size {report['size']} on {report['device']}, torch {report['torch']}, {report['threads']} CPU thread(s).",
        f"Held equal: {batch['rows']} rows, each an image and {batch['text_tokens']} text tokens, {batch['labels']} of",
        "them labels; the language model, the tower's shape, random weights; AdamW on the trained weights in",
        f"{measured['trained_dtype']}, all computed in {'bfloat16' if on_gpu else 'float32'}; gradient checkpointing",
        "of the language model; the frozen tower without autograd; the output head at labels only.",
        f"s/step is the median of {len(measured['rows'][0]['seconds'])} interleaved rounds. A ratio is that of the",
        "column before it to the first row; the paper's is of its Table 4, whole epochs of the 7B on its own machine.",
        "Tokens are visual and text.",
        f"Peak memory is what {'the GPU' if on_gpu else 'the CPU'} allocator had given out for the row's own model.",
        "MFU is TFLOP, those of the model without recomputation, over s/step and the",
        f"{report['peak_flops_per_second'] / 1e12:.3g} TFLOP/s that a large matrix product reached in the same run.",
    )
    return " ".join(sentences)


def table(report: dict, measured: dict) -> str:
    """A stage of the report in Markdown."""
    baseline = measured["rows"][0]
    baseline_seconds = median(baseline["seconds"])
    has_paper_grid = baseline["num_visual_tokens"] == 576
    lines = [
        caption(report, measured),
        "",
        "| model | visual tokens | s/step | ratio | paper's ratio | tokens/s | ratio | peak GB | ratio | TFLOP | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
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
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(report: dict, file: Path):
    """Seconds per step and peak memory against visual tokens, the baseline as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for column, measured in zip(axes.T, report["stages"], strict=True):
        baseline, *rows = measured["rows"]
        budgets = [row["num_visual_tokens"] for row in rows]
        for axis, label, value in (
            (column[0], "seconds per step", lambda row: median(row["seconds"])),
            (column[1], "peak memory, GB", lambda row: row["peak_bytes"] / 1e9),
        ):
            axis.plot(budgets, [value(row) for row in rows], "o-", label="Delta-LLaVA")
            axis.axhline(
                value(baseline), color="grey", linestyle="--", label=f"{BASELINE}, {baseline['num_visual_tokens']}"
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True, help="tiny and small for a CPU, 7b for a CUDA GPU")
    parser.add_argument("--rounds", type=int, default=5, help="how often each step is timed (default: 5)")
    parser.add_argument("--output", type=Path, help="JSON file for the raw figures")
    parser.add_argument("--plot", type=Path, help="picture of seconds and memory against visual tokens")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1 is needed.")
    if options.size == "7b" and not torch.cuda.is_available():
        parser.error("--size 7b needs a CUDA GPU, and torch finds none here. On a CPU take --size small.")
    size = SIZES[options.size]
    device = torch.device("cuda", 0) if options.size == "7b" else torch.device("cpu")

    report = {
        "size": options.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "peak_flops_per_second": peak_flops_per_second(device),
        "stages": [],
    }
    with tqdm(total=len(STAGES) * (1 + len(size.budgets)) * (3 + options.rounds), unit="step") as progress:
        for stage in STAGES:
            report["stages"].append(measure(size, stage, device, options.rounds, progress))
    print("\n\n".join(table(report, measured) for measured in report["stages"]))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(report, options.plot)


if __name__ == "__main__":
    main()
