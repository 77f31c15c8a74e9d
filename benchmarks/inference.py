"""What an answer of Delta-LLaVA costs at each budget, beside LLaVA-1.5 with all its patches in the same run.

    python -m delta_llava.benchmarks.inference --size small --output inference.json --plot inference.png
    python -m delta_llava.benchmarks.inference --size 7b --batch_sizes 1 8 32 128
    python -m delta_llava.benchmarks.inference --size 7b --batch_sizes 1 8 32 --compile

Both models have the same tower, ours without the layers behind the last one that it reads, one and the same language
model, and random weights; LLaVA-1.5 is transformers' own. A request is an image and a prompt in every row of the batch.
Its prefill yields the first token, each further one takes a forward pass with the KV cache and an argmax: generate's
greedy decoding without its logits processors and stopping criteria, so that the model is measured and nothing ends an
answer early. Times are taken at the projector's two ends, at the first token and at the last, in one and the same pass;
a GPU is waited for at each.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, Cache, DynamicCache, LlavaConfig, PreTrainedModel, StaticCache

from ..configuration_delta_llava import DeltaLlavaConfig, query_grid_size
from ..costs import inference_costs
from .projector import DTYPES
from .training import BASELINE, SIZES, Batch, Size, make_inputs, peak_bytes


FIRST_TOKEN_PARTS = ("vision", "projector", "prefill")
PARTS = (*FIRST_TOKEN_PARTS, "decode")
DECODINGS = {
    "eager": "eager decoding with a growing cache",
    "static": "eager decoding with a static cache",
    "compiled": "compiled decoding (reduce-overhead) with a static cache",
}
# Section 6.5 of the paper: tokens per second at the two visual token counts of which it tells the figure
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
        """
        Answers the batch once.

        Returns:
            `tuple`: the new tokens (`torch.Tensor` of shape `(batch_size, new_tokens)`, int64), the cache as the answer
            leaves it, and the wall-clock seconds of each of `PARTS`.
        """
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

    def tensors(self) -> list[torch.Tensor]:
        """What lies in memory between two answers."""
        layers = [] if self.static_cache is None else self.static_cache.layers
        cached = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        tensors = chain(self.model.parameters(), self.model.buffers(), self.inputs.values(), cached)
        return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]


def make_models(
    size: Size, budgets: list[int], device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """
    LLaVA-1.5 and Delta-LLaVA with one language model between them.

    Args:
        size (`Size`): The backbones.
        budgets (`list[int]`): Numbers of visual tokens that ours is made for.
        device (`torch.device`), dtype (`torch.dtype`): Of the weights, which are random; on `meta` there are none.

    Returns:
        `tuple[PreTrainedModel, PreTrainedModel]`: transformers' model and ours, in eval mode.
    """
    configs = {"vision_config": size.vision_config, "text_config": size.text_config}
    image_token_id = size.text_config.vocab_size - 1
    # Without weights at first, because two language models would not fit where one does
    with torch.device("meta"):
        llava, delta_llava = (
            AutoModelForImageTextToText.from_config(config, dtype=dtype)
            for config in (
                LlavaConfig(**configs, image_token_index=image_token_id),
                DeltaLlavaConfig(**configs, image_token_id=image_token_id, visual_token_budgets=budgets),
            )
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


def make_contestants(
    models: tuple[PreTrainedModel, PreTrainedModel], budgets: list[int], batch_size: int, request: Request
) -> list[Contestant]:
    """LLaVA-1.5 with all patches, then Delta-LLaVA at every budget, with random pixels and tokens."""
    llava, delta_llava = models
    calls = {model: model for model in models}
    if request.decoding == "compiled":
        # What was compiled for another batch size is not needed any more
        torch.compiler.reset()
        calls = {model: torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False) for model in models}
    num_patches = delta_llava.config.patch_grid_size**2
    contestants = []
    for name, model, count in [(BASELINE, llava, num_patches), *(("Delta-LLaVA", delta_llava, v) for v in budgets)]:
        batch = make_inputs(model.config, count, Batch(batch_size, request.text_tokens, labels=1), request.device)
        inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"].to(request.dtype)}
        if model is delta_llava:
            inputs["num_visual_tokens"] = count
        cache = None
        if request.decoding != "eager":
            # The last token is never an input
            cache = StaticCache(model.config, max_cache_len=count + request.text_tokens + request.new_tokens - 1)
        contestants.append(Contestant(name, model, count, inputs, request, calls[model], cache))
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
    Measures all contestants at a batch size. One for which the GPU's memory does not suffice takes no further turn.

    Args:
        models (`tuple[PreTrainedModel, PreTrainedModel]`): See [`make_models`].
        budgets (`list[int]`), batch_size (`int`), request (`Request`): See [`make_contestants`].
        rounds (`int`): How often each answer is timed; in a round every contestant takes its turn.
        progress (`tqdm`): Advanced `2 + rounds` times for each contestant.

    Returns:
        `list[dict]`: for each contestant `model`, `num_visual_tokens`, `batch_size`, `kv_cache_bytes` at the answer's
        end, `out_of_memory`, `peak_bytes` of an answer, and `seconds`, a list for each of `PARTS`; the last two are
        `None` where memory did not suffice.
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
        row["peak_bytes"] = peak_bytes(contestant.answer, request.device, contestant.tensors())

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


def time_to_first_token(row: dict) -> list[float]:
    """Seconds in each round."""
    return [sum(parts) for parts in zip(*(row["seconds"][part] for part in FIRST_TOKEN_PARTS), strict=True)]


def request_seconds(row: dict) -> list[float]:
    """Seconds of the whole request in each round."""
    return [sum(parts) for parts in zip(*row["seconds"].values(), strict=True)]


def decode_seconds(row: dict) -> list[float]:
    """Seconds between the first token and the last in each round."""
    return row["seconds"]["decode"]


def ratio(row: dict, other: dict, seconds: Callable[[dict], list[float]]) -> float:
    """The median of the rounds' ratios: what slows one turn down, slows the next one too."""
    return median(a / b for a, b in zip(seconds(row), seconds(other), strict=True))


def caption(report: dict) -> str:
    """What was held equal, and what the columns mean."""
    on_gpu = report["device"] != "cpu"
    sentences = (
        f"Size {report['size']} on {report['device']}, {report['dtype']}, {DECODINGS[report['decoding']]}, torch",
        f"{report['torch']}, {report['threads']} CPU thread(s). Held equal: an image and {report['text_tokens']} text",
        f"tokens in each row, answers of {report['new_tokens']} tokens, the language model, the tower's shape (ours",
        f"without the layers that it does not read), random weights. Times are medians of {report['rounds']}",
        f"interleaved rounds, a ratio the median of the rounds' own, to {BASELINE} at the same batch size; of a speed,",
        "above 1 is faster. TTFT, the time to the first token, is tower, projector and prefill. Decode tokens/s counts",
        "the tokens after the first and the time after it, request tokens/s all tokens and the whole time, as images/s",
        "do. The paper's ratio is of its tokens/s to those with 576 visual tokens; it tells neither which of the two",
        "they are, nor the batch size, taken as 1, nor the machine. Peak memory is what",
        f"{'the GPU' if on_gpu else 'the CPU'} allocator had given out for the row's own model, cache included.",
    )
    return " ".join(sentences)


def table(report: dict) -> str:
    """The report in Markdown."""
    columns = [
        "batch",
        "model",
        "visual tokens",
        *(f"{part}, ms" for part in PARTS),
        "TTFT, ms",
        "ratio",
        "decode tokens/s",
        "ratio",
        "request tokens/s",
        "ratio",
        "paper's ratio",
        "images/s",
        "peak GB",
        "ratio",
        "KV cache, MB",
    ]
    lines = [caption(report), "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    baselines = {row["batch_size"]: row for row in report["rows"] if row["model"] == BASELINE}
    for row in report["rows"]:
        baseline, cached = baselines[row["batch_size"]], f"{row['kv_cache_bytes'] / 1e6:.4g}"
        cells = [str(row["batch_size"]), row["model"], str(row["num_visual_tokens"])]
        if row["out_of_memory"]:
            cells += ["out of memory", *[""] * (len(columns) - len(cells) - 2), cached]
            lines.append(f"| {' | '.join(cells)} |")
            continue
        # Where there is none to compare with, ratios stay empty
        has_baseline = not baseline["out_of_memory"]
        cells += [f"{1e3 * median(row['seconds'][part]):.4g}" for part in PARTS]
        cells += [
            f"{1e3 * median(time_to_first_token(row)):.4g}",
            f"{ratio(row, baseline, time_to_first_token):.2f}" if has_baseline else "",
        ]
        for tokens, seconds in ((report["new_tokens"] - 1, decode_seconds), (report["new_tokens"], request_seconds)):
            cells += [
                f"{row['batch_size'] * tokens / median(seconds(row)):.4g}",
                f"{ratio(baseline, row, seconds):.2f}" if has_baseline else "",
            ]
        paper = PAPER_TOKENS_PER_SECOND.get(row["num_visual_tokens"])
        is_the_papers = paper and row["batch_size"] == 1 and baseline["num_visual_tokens"] == 576
        cells += [
            f"{paper / PAPER_TOKENS_PER_SECOND[576]:.2f}" if is_the_papers else "",
            f"{row['batch_size'] / median(request_seconds(row)):.4g}",
            f"{row['peak_bytes'] / 1e9:.3g}",
            f"{row['peak_bytes'] / baseline['peak_bytes']:.2f}" if has_baseline else "",
            cached,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(report: dict, file: Path):
    """A row of two pictures for each batch size: what the first token waits for, and tokens per second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batch_sizes = list(dict.fromkeys(row["batch_size"] for row in report["rows"]))
    figure, axes = plt.subplots(
        len(batch_sizes), 2, figsize=(13, 3.6 * len(batch_sizes)), layout="constrained", squeeze=False
    )
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
        for color, label, tokens, seconds in (
            ("C0", "decoding", report["new_tokens"] - 1, decode_seconds),
            ("C1", "whole request", report["new_tokens"], request_seconds),
        ):
            speeds = [batch_size * tokens / median(seconds(row)) for row in ours]
            right.plot(budgets, speeds, "o-", color=color, label=f"Delta-LLaVA, {label}")
            if not baseline["out_of_memory"]:
                speed = batch_size * tokens / median(seconds(baseline))
                right.axhline(speed, color=color, linestyle="--", label=f"{BASELINE}, {label}")
        right.set(title=f"batch {batch_size}: tokens per second", xlabel="visual tokens", xscale="log")
        right.set(xticks=budgets, xticklabels=budgets)
        right.minorticks_off()
        right.set_ylim(bottom=0)
        right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=100)
    plt.close(figure)


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace, lowest: dict[str, int]):
    """
    Ends with a sentence where an option cannot be.

    Args:
        parser (`argparse.ArgumentParser`): To end by.
        options (`argparse.Namespace`): With `size`, `budgets`, `output`, perhaps `plot`, and what `lowest` names.
        lowest (`dict[str, int]`): The least that is allowed for a number, or for each of a list.
    """
    for name, least in lowest.items():
        value = getattr(options, name)
        given = min(value) if isinstance(value, list) else value
        if given < least:
            parser.error(f"--{name} {given}: at least {least} is needed.")
    for name in ("budgets", *lowest):
        values = getattr(options, name)
        if isinstance(values, list) and len(set(values)) < len(values):
            parser.error(f"--{name} {' '.join(map(str, values))}: each may stand there once.")
    for name in ("output", "plot"):
        file = getattr(options, name, None)
        if file and not file.parent.is_dir():
            parser.error(f"--{name} {file}: there is no folder {file.parent}.")
    vision_config = SIZES[options.size].vision_config
    try:
        for budget in options.budgets or ():
            query_grid_size(budget, vision_config.image_size // vision_config.patch_size)
    except ValueError as error:
        parser.error(f"--budgets: {error}")


def main(arguments: list[str] | None = None):
    """Measure and print a table; the figures are also written where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True, help="tiny and small for a CPU, 7b for a CUDA GPU")
    parser.add_argument("--budgets", type=int, nargs="+", help="visual tokens of ours (default: the size's own)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="requests at a time (default: 1 8)")
    parser.add_argument("--new_tokens", type=int, default=30, help="of each answer (default: 30)")
    parser.add_argument("--text_tokens", type=int, default=68, help="of each prompt, beside the visual (default: 68)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each answer is timed (default: 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch finds it")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on a CPU")
    parser.add_argument(
        "--static_cache",
        action="store_true",
        help="a cache of the answer's full length, which every budget of a batch size keeps at the same time",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the decoding, for every budget and batch size alone, which takes its time; with a static cache",
    )
    parser.add_argument("--output", type=Path, help="JSON file for the raw figures")
    parser.add_argument("--plot", type=Path, help="picture of times to the first token and of tokens per second")
    options = parser.parse_args(arguments)
    check_options(parser, options, {"new_tokens": 2, "text_tokens": 1, "rounds": 1, "batch_sizes": 1})
    budgets = options.budgets or list(SIZES[options.size].budgets)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here. Leave it out, or take --device cpu.")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.size == "7b" and device.type == "cpu":
        parser.error("--size 7b needs a CUDA GPU. On a CPU take --size small.")
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")

    size = SIZES[options.size]
    decoding = "compiled" if options.compile else "static" if options.static_cache else "eager"
    request = Request(options.text_tokens, options.new_tokens, decoding, device, DTYPES[dtype])
    models = make_models(size, budgets, device, request.dtype)
    report = {
        "size": options.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": dtype,
        "decoding": decoding,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "text_tokens": options.text_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "rows": [],
    }
    num_turns = len(options.batch_sizes) * (1 + len(budgets)) * (2 + options.rounds)
    # Every cache length is compiled for itself, which may be more often than torch allows by default
    limit = torch.compiler.config.patch(recompile_limit=64) if decoding == "compiled" else nullcontext()
    with limit, tqdm(total=num_turns, unit="answer") as progress:
        for batch_size in options.batch_sizes:
            report["rows"] += measure(models, budgets, batch_size, request, options.rounds, progress)
    print(table(report))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {options.output}")
    if options.plot:
        draw(report, options.plot)
        print(f"written: {options.plot}")


if __name__ == "__main__":
    main()
