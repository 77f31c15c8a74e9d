"""What the benchmarks share: sizes, models and inputs, options, time and memory of a step, ratios and tables."""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..configuration_delta_llava import DeltaLlavaConfig, query_grid_size


BACKBONES = Path(__file__).parents[1] / "backbones"
BASELINE, OURS = "LLaVA-1.5", "Delta-LLaVA"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    # The proportions of the real thing, as far as one core allows: a tower that is small beside the language model,
    # four memory levels, an embedding table of a few percent
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


def name_contestants(num_patches: int, budgets: Iterable[int]) -> list[tuple[str, int]]:
    """LLaVA-1.5 with all patches, then Delta-LLaVA at every budget: the name and the number of visual tokens."""
    return [(BASELINE, num_patches), *((OURS, budget) for budget in budgets)]


def make_configs(size: Size, budgets: Iterable[int]) -> tuple[LlavaConfig, DeltaLlavaConfig]:
    """Configurations of LLaVA-1.5 and of Delta-LLaVA for these budgets, with the same backbones."""
    backbones = {"vision_config": size.vision_config, "text_config": size.text_config}
    image_token_id = size.text_config.vocab_size - 1
    return (
        LlavaConfig(**backbones, image_token_index=image_token_id),
        DeltaLlavaConfig(**backbones, image_token_id=image_token_id, visual_token_budgets=list(budgets)),
    )


def make_models(
    size: Size, budgets: Iterable[int], device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """
    LLaVA-1.5 (transformers' own) and Delta-LLaVA, in eval mode, which share one language model.

    The weights are random; on `meta` there are none.
    """
    # Without weights at first, because two language models would not fit where one does
    with torch.device("meta"):
        llava, delta_llava = (
            AutoModelForImageTextToText.from_config(config, dtype=dtype) for config in make_configs(size, budgets)
        )
    delta_llava.model.language_model, delta_llava.lm_head = llava.model.language_model, llava.lm_head
    if device.type != "meta":
        llava.to_empty(device=device)
        for part in (delta_llava.model.vision_tower, delta_llava.model.multi_modal_projector):
            part.to_empty(device=device)
        torch.manual_seed(0)
        for model in (llava, delta_llava):
            model.init_weights()
    return llava.eval(), delta_llava.eval()


def make_inputs(
    config: PreTrainedConfig, num_visual_tokens: int, batch: Batch, device: torch.device
) -> dict[str, torch.Tensor | int]:
    """A batch of random pixels and tokens, as the collator makes it of images and conversations."""
    text = torch.randint(config.image_token_id, (batch.rows, batch.text_tokens), device=device)
    input_ids = F.pad(text, (num_visual_tokens, 0), value=config.image_token_id)
    labels = input_ids.clone()
    labels[:, : -batch.labels] = -100
    side = config.vision_config.image_size
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(batch.rows, 3, side, side, device=device),
        "labels": labels,
    }
    return inputs | ({"num_visual_tokens": num_visual_tokens} if isinstance(config, DeltaLlavaConfig) else {})


def make_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """A parser of the options that all have: `--size`, `--rounds` with this default, and `--output`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True, help="tiny or small for a CPU, 7b for a CUDA GPU")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"repeats of each measurement (default: {rounds})")
    parser.add_argument("--output", type=Path, help="JSON file for the raw figures")
    return parser


def add_device_options(parser: argparse.ArgumentParser):
    """`--device` and `--dtype`, which [`parse_options`] resolves."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch finds it")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on a CPU")


def add_request_options(parser: argparse.ArgumentParser, new_tokens: int):
    """`--budgets`, `--text_tokens`, and `--new_tokens` with this default."""
    parser.add_argument("--budgets", type=int, nargs="+", help="visual tokens of ours (default: those of the size)")
    parser.add_argument("--new_tokens", type=int, default=new_tokens, help=f"of each answer (default: {new_tokens})")
    parser.add_argument("--text_tokens", type=int, default=68, help="of each prompt, beside the visual (default: 68)")


def parse_options(
    parser: argparse.ArgumentParser, arguments: list[str] | None, lowest: dict[str, int], large_on_cpu: bool = False
) -> argparse.Namespace:
    """
    Options that can be measured; others end the program with a sentence.

    `lowest` has, by option, the least that a number, or each of a list, may be; `large_on_cpu` allows `--size 7b`
    without a GPU. What returns has a `device` (`torch.device`), a `dtype` (its name) and, if the parser knows them,
    `budgets`, given or by default.
    """
    options = parser.parse_args(arguments)
    for name, least in {"rounds": 1, **lowest}.items():
        value = getattr(options, name)
        given = min(value) if isinstance(value, list) else value
        if given < least:
            parser.error(f"--{name} {given}: at least {least} is needed.")
    for name, value in vars(options).items():
        if isinstance(value, list) and len(set(value)) < len(value):
            parser.error(f"--{name} {' '.join(map(str, value))}: name each once.")
        if isinstance(value, Path) and not value.parent.is_dir():
            parser.error(f"--{name} {value}: there is no folder {value.parent}.")
    size = SIZES[options.size]
    if "budgets" in options:
        options.budgets = options.budgets or list(size.budgets)
        try:
            for budget in options.budgets:
                query_grid_size(budget, size.vision_config.image_size // size.vision_config.patch_size)
        except ValueError as error:
            parser.error(f"--budgets: {error}")
    has_gpu = torch.cuda.is_available()
    device = getattr(options, "device", None)
    if device == "cuda" and not has_gpu:
        parser.error("--device cuda: torch finds no CUDA GPU here. Leave it out, or take --device cpu.")
    options.device = torch.device(device or ("cuda" if has_gpu else "cpu"))
    if options.size == "7b" and options.device.type == "cpu" and not large_on_cpu:
        parser.error("--size 7b needs a CUDA GPU, and none is used here. On a CPU take --size small.")
    options.dtype = getattr(options, "dtype", None) or ("bfloat16" if options.device.type == "cuda" else "float32")
    return options


def describe_run(options: argparse.Namespace) -> dict[str, Any]:
    """How a report begins: with what, and on what, it was measured."""
    return {
        "size": options.size,
        "device": torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "cpu",
        "dtype": options.dtype,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
    }


def run_caption(report: dict[str, Any]) -> str:
    """How the caption of a report's table begins."""
    threads = f"{report['threads']} CPU thread(s)"
    return f"Size {report['size']} on {report['device']}, {report['dtype']}, torch {report['torch']}, {threads}"


def write_report(report: dict[str, Any], file: Path | None):
    """Write the raw figures as JSON, where a file was asked for."""
    if file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def peak_bytes(step: Callable[[], Any], device: torch.device, resident: Iterable) -> int:
    """
    The most bytes that a step, which is run once, takes at a time.

    Of what is on the device already, only the tensors among `resident` count.
    """
    resident = [tensor for tensor in resident if isinstance(tensor, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in resident}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return sum(storages.values()) + torch.cuda.max_memory_allocated(device) - before
    # Otherwise it reports on standard error when it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # Allocations and, as negative bytes, what is freed again; torch's own tables have only their sums
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return sum(storages.values()) + max(accumulate(changes, initial=0))


def seconds_of(step: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def median_ratio(figures: list[float], others: list[float]) -> float:
    """The median of the rounds' ratios: what slows one turn down slows the next one too."""
    return median(figure / other for figure, other in zip(figures, others, strict=True))


def markdown_table(columns: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return "\n".join([head, "|---" * len(columns) + "|", *lines])
