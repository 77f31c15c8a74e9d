"""What an answer of Delta-LLaVA costs at each budget, beside LLaVA-1.5 with all its patches in the same run.

    python -m delta_llava.benchmarks.inference --size small --output inference.json --plot inference.png
    python -m delta_llava.benchmarks.inference --size 7b --batch_sizes 1 8 32 128
    python -m delta_llava.benchmarks.inference --size 7b --batch_sizes 1 8 32 --compile

Both models have the same tower, ours without the layers after the last one that it reads, share one language model,
and have random weights; LLaVA-1.5 is transformers' own. A request is an image and a prompt in every row of the batch.
Its prefill yields the first token, each further one takes a forward pass with the KV cache and an argmax: generate's
greedy decoding without its logits processors and stopping criteria, so that only the model is measured and nothing ends
an answer early. One pass is timed at the projector's two ends, at the first token and at the last, and waits for the
GPU each time.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from ..costs import inference_costs
from . import harness
from .harness import BASELINE, DTYPES, OURS, SIZES


FIRST_TOKEN_PARTS, DECODE_PARTS = ("vision", "projector", "prefill"), ("decode",)
PARTS = FIRST_TOKEN_PARTS + DECODE_PARTS
DECODINGS = {
    "eager": "eager decoding with a growing cache",
    "static": "eager decoding with a static cache",
    "compiled": "compiled decoding (reduce-overhead) with a static cache",
}
# Section 6.5 of the paper: tokens per second at the only two visual token counts that it gives a figure for
PAPER_TOKENS_PER_SECOND = {576: 23.96, 1: 37.08}


@dataclass(frozen=True)
class Request:
    """What is asked of every contestant: the lengths of prompt and answer, how it decodes, and where."""

    text_tokens: int
    new_tokens: int
    decoding: str
    device: torch.device
    dtype: torch.dtype


@dataclass
class Contestant:
    """A model at a budget, with its batch."""

    name: str
    model: PreTrainedModel
    num_visual_tokens: int
    inputs: dict[str, torch.Tensor | int]
    request: Request
    decode: Callable  # the model's call after the prefill
    static_cache: StaticCache | None  # None: each answer has a growing one of its own

    @torch.no_grad()
    def answer(self) -> tuple[torch.Tensor, Cache, dict[str, float]]:
        """The new tokens `(batch_size, new_tokens)`, the cache after them, and the seconds of each of `PARTS`."""
        if self.static_cache is not None:
            self.static_cache.reset()
        cache = DynamicCache() if self.static_cache is None else self.static_cache
        times = []

        def stop_watch(*_):
            if self.request.device.type == "cuda":
                torch.cuda.synchronize(self.request.device)
            times.append(time.perf_counter())

        projector = self.model.model.multi_modal_projector
        hooks = projector.register_forward_pre_hook(stop_watch), projector.register_forward_hook(stop_watch)
        try:
            stop_watch()
            outputs = self.model(**self.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens = [outputs.logits.argmax(-1)]
            stop_watch()
        finally:  # memory may not suffice, and the next contestant has the same projector
            for hook in hooks:
                hook.remove()
        for _ in range(self.request.new_tokens - 1):
            outputs = self.decode(input_ids=tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens.append(outputs.logits.argmax(-1))
        stop_watch()
        seconds = {part: end - start for part, (start, end) in zip(PARTS, pairwise(times), strict=True)}
        return torch.cat(tokens, dim=1), cache, seconds

    def resident(self) -> Iterator:
        """What lies in memory between two answers."""
        layers = [] if self.static_cache is None else self.static_cache.layers
        cached = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        return chain(self.model.parameters(), self.model.buffers(), self.inputs.values(), cached)


def make_contestants(
    models: tuple[PreTrainedModel, PreTrainedModel], budgets: list[int], batch_size: int, request: Request
) -> list[Contestant]:
    """LLaVA-1.5 with all patches, then Delta-LLaVA at every budget, with random pixels and tokens."""
    num_patches = models[1].config.patch_grid_size ** 2
    models = dict(zip((BASELINE, OURS), models, strict=True))
    calls = models
    if request.decoding == "compiled":
        # What was compiled for another batch size is no longer needed
        torch.compiler.reset()
        options = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
        calls = {name: torch.compile(model, **options) for name, model in models.items()}
    contestants = []
    for name, count in harness.name_contestants(num_patches, budgets):
        model = models[name]
        inputs = harness.make_inputs(
            model.config, count, harness.Batch(batch_size, request.text_tokens, labels=1), request.device
        )
        del inputs["labels"], inputs["attention_mask"]
        inputs["pixel_values"] = inputs["pixel_values"].to(request.dtype)
        cache = None
        if request.decoding != "eager":
            # The last token is never an input
            cache = StaticCache(model.config, max_cache_len=count + request.text_tokens + request.new_tokens - 1)
        contestants.append(Contestant(name, model, count, inputs, request, calls[name], cache))
    return contestants


def measure(
    models: tuple[PreTrainedModel, PreTrainedModel],
    budgets: list[int],
    batch_size: int,
    request: Request,
    rounds: int,
    progress: tqdm,
) -> list[dict]:
    """
    Measures all contestants at a batch size, each in turn. One that runs out of GPU memory takes no further turn.

    Advances `progress` `2 + rounds` times for each contestant. Returns, for each, `model`, `num_visual_tokens`,
    `batch_size`, `kv_cache_bytes` at the answer's end, `out_of_memory`, `peak_bytes` of an answer, and `seconds`, a
    list for each of `PARTS`; the last two are `None` if it ran out of memory.
    """
    config, itemsize = models[1].config, request.dtype.itemsize
    pairs = []
    for contestant in make_contestants(models, budgets, batch_size, request):
        costs = inference_costs(config, contestant.num_visual_tokens, request.text_tokens, request.new_tokens)
        row = {
            "model": contestant.name,
            "num_visual_tokens": contestant.num_visual_tokens,
            "batch_size": batch_size,
            "kv_cache_bytes": batch_size * costs["kv_cache_bytes"] * itemsize // torch.bfloat16.itemsize,
            "out_of_memory": False,
            "peak_bytes": None,
            "seconds": {part: [] for part in PARTS},
        }
        pairs.append((contestant, row))

    def warm_up(contestant: Contestant, row: dict):
        contestant.answer()  # pays for what later ones reuse: compilation, static caches

    def weigh(contestant: Contestant, row: dict):
        row["peak_bytes"] = harness.peak_bytes(contestant.answer, request.device, contestant.resident())

    def clock(contestant: Contestant, row: dict):
        for part, seconds in contestant.answer()[2].items():
            row["seconds"][part].append(seconds)

    for turn in (warm_up, weigh, *[clock] * rounds):
        for contestant, row in pairs:
            if not row["out_of_memory"]:
                try:
                    turn(contestant, row)
                except torch.OutOfMemoryError:
                    row |= {"out_of_memory": True, "peak_bytes": None, "seconds": None}
                    contestant.static_cache = None
                if row["out_of_memory"]:
                    # Not before the error is gone, whose traceback holds what was allocated
                    gc.collect()
                    torch.cuda.empty_cache()
            progress.update()
    return [row for _, row in pairs]


def seconds_of_parts(row: dict, parts: Iterable[str]) -> list[float]:
    """Seconds of these parts together, in each round."""
    return [sum(seconds) for seconds in zip(*(row["seconds"][part] for part in parts), strict=True)]


def caption(report: dict) -> str:
    """What was held equal, and what the columns mean."""
    text = f"""{harness.run_caption(report)}, {DECODINGS[report["decoding"]]}. Held equal: an image and
    {report["text_tokens"]} text tokens in each row, answers of {report["new_tokens"]} tokens, the language model, the
    tower's shape (ours without the layers that it does not read), random weights. Times are medians of
    {report["rounds"]} interleaved
    rounds, a ratio the median of the rounds' own, to {BASELINE} at the same batch size; of a speed, above 1 is faster.
    TTFT, the time to the first token, is tower, projector and prefill. Decode tokens/s counts the tokens after the
    first and the time after it; request tokens/s and images/s count the whole request. The paper's ratio is of its
    tokens/s to those with 576 visual tokens; it states neither which of the two they are, nor the batch size, taken as
    1, nor the machine. Peak memory is what the {"CPU" if report["device"] == "cpu" else "GPU"} allocator had given out
    for the row's own model, cache included."""
    return " ".join(text.split())


def table(report: dict) -> str:
    """The report in Markdown."""
    columns = ["batch", "model", "visual tokens", *(f"{part}, ms" for part in PARTS), "TTFT, ms", "ratio"]
    columns += ["decode tokens/s", "ratio", "request tokens/s", "ratio", "paper's ratio", "images/s"]
    columns += ["peak GB", "ratio", "KV cache, MB"]
    lines = []
    baselines = {row["batch_size"]: row for row in report["rows"] if row["model"] == BASELINE}
    for row in report["rows"]:
        baseline, cached = baselines[row["batch_size"]], f"{row['kv_cache_bytes'] / 1e6:.4g}"
        cells = [str(row["batch_size"]), row["model"], str(row["num_visual_tokens"])]
        lines.append(cells)
        if row["out_of_memory"]:
            cells += ["out of memory", *[""] * (len(columns) - len(cells) - 2), cached]
            continue
        # With nothing to compare with, ratios stay empty
        has_baseline = not baseline["out_of_memory"]
        cells += [f"{1e3 * median(row['seconds'][part]):.4g}" for part in PARTS]
        first = seconds_of_parts(row, FIRST_TOKEN_PARTS)
        cells.append(f"{1e3 * median(first):.4g}")
        cells.append(
            f"{harness.median_ratio(first, seconds_of_parts(baseline, FIRST_TOKEN_PARTS)):.2f}" if has_baseline else ""
        )
        for tokens, parts in ((report["new_tokens"] - 1, DECODE_PARTS), (report["new_tokens"], PARTS)):
            seconds = seconds_of_parts(row, parts)
            cells.append(f"{row['batch_size'] * tokens / median(seconds):.4g}")
            cells.append(
                f"{harness.median_ratio(seconds_of_parts(baseline, parts), seconds):.2f}" if has_baseline else ""
            )
        paper = PAPER_TOKENS_PER_SECOND.get(row["num_visual_tokens"])
        is_the_papers = paper and row["batch_size"] == 1 and baseline["num_visual_tokens"] == 576
        cells += [
            f"{paper / PAPER_TOKENS_PER_SECOND[576]:.2f}" if is_the_papers else "",
            f"{row['batch_size'] / median(seconds_of_parts(row, PARTS)):.4g}",
            f"{row['peak_bytes'] / 1e9:.3g}",
            f"{row['peak_bytes'] / baseline['peak_bytes']:.2f}" if has_baseline else "",
            cached,
        ]
    return f"{caption(report)}\n\n{harness.markdown_table(columns, lines)}"


def draw(report: dict, file: Path):
    """A row of two pictures for each batch size: what the first token waits for, and tokens per second."""
    from matplotlib.figure import Figure

    batch_sizes = list(dict.fromkeys(row["batch_size"] for row in report["rows"]))
    figure = Figure(figsize=(13, 3.6 * len(batch_sizes)), layout="constrained")
    axes = figure.subplots(len(batch_sizes), 2, squeeze=False)
    for (left, right), batch_size in zip(axes, batch_sizes, strict=True):
        rows = [row for row in report["rows"] if row["batch_size"] == batch_size]
        names = [str(row["num_visual_tokens"]) for row in rows]
        names[0] = f"{BASELINE}\n{names[0]}"
        bottom = [0.0] * len(rows)
        for part in FIRST_TOKEN_PARTS:
            heights = [0 if row["out_of_memory"] else 1e3 * median(row["seconds"][part]) for row in rows]
            left.bar(names, heights, bottom=bottom, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        for name, row in zip(names, rows, strict=True):
            if row["out_of_memory"]:
                left.annotate("out of memory", (name, 0), rotation=90, ha="center", va="bottom", fontsize=8)
        left.set(title=f"batch {batch_size}: time to the first token", xlabel="visual tokens", ylabel="ms")
        left.legend()

        baseline, *ours = [row for row in rows if row is rows[0] or not row["out_of_memory"]]
        budgets = [row["num_visual_tokens"] for row in ours]
        for color, label, tokens, parts in (
            ("C0", "decoding", report["new_tokens"] - 1, DECODE_PARTS),
            ("C1", "whole request", report["new_tokens"], PARTS),
        ):
            speeds = [batch_size * tokens / median(seconds_of_parts(row, parts)) for row in ours]
            right.plot(budgets, speeds, "o-", color=color, label=f"{OURS}, {label}")
            if not baseline["out_of_memory"]:
                speed = batch_size * tokens / median(seconds_of_parts(baseline, parts))
                right.axhline(speed, color=color, linestyle="--", label=f"{BASELINE}, {label}")
        right.set(title=f"batch {batch_size}: tokens per second", xlabel="visual tokens", xscale="log")
        right.set(xticks=budgets, xticklabels=budgets)
        right.minorticks_off()
        right.set_ylim(bottom=0)
        right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=100)


def main(arguments: list[str] | None = None):
    """Measure and print a table; the figures are also written where asked."""
    parser = harness.make_parser(__doc__, rounds=5)
    harness.add_device_options(parser)
    harness.add_request_options(parser, new_tokens=30)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="requests at a time (default: 1 8)")
    parser.add_argument(
        "--static_cache",
        action="store_true",
        help="a cache of the answer's full length; those of all budgets of a batch size are in memory together",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the decoding for each budget and batch size, which takes its time; with a static cache",
    )
    parser.add_argument("--plot", type=Path, help="picture of times to the first token and of tokens per second")
    options = harness.parse_options(parser, arguments, {"new_tokens": 2, "text_tokens": 1, "batch_sizes": 1})

    decoding = "compiled" if options.compile else "static" if options.static_cache else "eager"
    request = Request(options.text_tokens, options.new_tokens, decoding, options.device, DTYPES[options.dtype])
    models = harness.make_models(SIZES[options.size], options.budgets, options.device, request.dtype)
    lengths = {"text_tokens": options.text_tokens, "new_tokens": options.new_tokens}
    report = {**harness.describe_run(options), "decoding": decoding, **lengths, "rows": []}
    num_turns = len(options.batch_sizes) * (1 + len(options.budgets)) * (2 + options.rounds)
    # Every cache length is compiled by itself, which may be more often than torch allows by default
    limit = torch.compiler.config.patch(recompile_limit=64) if decoding == "compiled" else nullcontext()
    with limit, tqdm(total=num_turns, unit="answer") as progress:
        for batch_size in options.batch_sizes:
            report["rows"] += measure(models, options.budgets, batch_size, request, options.rounds, progress)
    print(table(report))
    harness.write_report(report, options.output)
    if options.plot:
        draw(report, options.plot)


if __name__ == "__main__":
    main()
