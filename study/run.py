r"""
The paper's comparisons at the demo's scale, run for real: projectors, ablations, FastV, one elastic checkpoint against
one for each budget, and a model after LLaVA-Meteor's abstract.

```
python -m delta_llava.study.run --output_dir runs/study
```

Every run assembles the demo's backbones with a projector, trains both stages with the demo's recipes, but on fewer
rows, and answers the held-out questions at every budget. All runs have the same scenes, steps and
batches; a seed decides the projector's first weights and the order of rows and budgets, the same for all methods. Each
finished run is a row of `rows.jsonl`: an interrupted study goes on with the runs that have none. From the rows,
`RESULTS.md` and `RESULTS.png` are written, after every run anew.
"""

import argparse
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean, stdev

import datasets
import torch
import transformers
import yaml
from scipy.stats import ttest_rel
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback
from trl import SFTConfig

from ..demo.ask import answer
from ..demo.run import BUDGETS, majority_answers, score
from ..demo.scenes import write_scenes
from ..evaluation.fastv import fastv
from ..hub.assemble import assemble
from ..processing_delta_llava import DeltaLlavaProcessor
from ..train.batches import Collator, fit_rows
from ..train.data import load_llava_json
from ..train.trainer import DeltaLlavaTrainer
from ..turns import TEMPLATES
from .meteor import MeteorProcessor, meteor_from
from .projectors import AveragePoolingProjector, MlpProjector, ResamplerProjector, TokenPackerProjector


HERE = Path(__file__).parent
DEMO = HERE.parent / "demo"
ALL_PATCHES = max(BUDGETS)
COMPRESSED = BUDGETS[1:]
FASTV_LAYERS = (1, 2)
# A linear layer with weights of standard deviation 0.02 scales by 0.64 at CLIP-L's 1024 channels and by 0.23 at the
# demo's 128. With these it scales by 0.64 here, too, so that deep projectors do not start fainter than in the paper.
WIDE_INIT = 0.02 * (1024 / 128) ** 0.5
NO_DROP_PATH = {"attention_drop_path": 0.0, "convolution_drop_path": 0.0, "mlp_drop_path": 0.0}


@dataclass(frozen=True)
class Method:
    """
    What is trained: a projector of ours by fields of `DeltaLlavaConfig` (the released one without them), or another's,
    or the model of `meteor.py` by fields of `MeteorConfig`; and the budgets it learns.
    """

    title: str
    fields: dict = field(default_factory=dict)
    projector: type[nn.Module] | None = None
    meteor: dict | None = None
    budgets: tuple[int, ...] = BUDGETS


METHODS = {
    "delta": Method("Delta-LLaVA, as released"),
    "residual": Method("Delta added to pooled features (ours)", {"projector_variant": "residual"}),
    "delta-paper": Method("Delta-LLaVA, the paper's equations", {"projector_variant": "paper"}),
    "delta-area": Method("Delta-LLaVA, queries by area", {"query_pooling": "area"}),
    "no-delta-projection": Method("No DeltaProjection", {"use_delta_projection": False}),
    "no-self-attention": Method("No self-attention", {"use_self_attention": False}),
    "no-refinement-block": Method("No refinement block", {"use_refinement_block": False}),
    "average-pooling": Method("Average pooling + MLP (M3)", projector=AveragePoolingProjector),
    "tokenpacker": Method("TokenPacker", projector=TokenPackerProjector),
    "resampler": Method("Learnt queries (MQT)", projector=ResamplerProjector),
    "mlp": Method("MLP on all patches (LLaVA-1.5)", projector=MlpProjector, budgets=(ALL_PATCHES,)),
    "meteor": Method("After LLaVA-Meteor's abstract", meteor={}),
    "meteor-no-instruction": Method("After LLaVA-Meteor's abstract, no instruction", meteor={"use_instruction": False}),
    "meteor-no-local-summaries": Method("After LLaVA-Meteor's abstract, no local summaries", meteor={"scan": "window"}),
    "meteor-visual-expert": Method("After LLaVA-Meteor's abstract, visual expert alone", meteor={"experts": "visual"}),
    "meteor-native-expert": Method("After LLaVA-Meteor's abstract, native expert alone", meteor={"experts": "native"}),
    "delta-wide-init": Method("Delta-LLaVA, wider first weights", {"initializer_range": WIDE_INIT}),
    "delta-wide-init-no-drop-path": Method(
        "Delta-LLaVA, wider first weights, no drop path", {"initializer_range": WIDE_INIT, **NO_DROP_PATH}
    ),
    "average-pooling-wide-init": Method(
        "Average pooling + MLP, wider first weights", {"initializer_range": WIDE_INIT}, AveragePoolingProjector
    ),
    **{f"only-{budget}": Method(f"Delta-LLaVA for {budget} alone", budgets=(budget,)) for budget in BUDGETS},
}
# FastV needs no training: it is measured on the runs of "mlp"
LINES = {name: method.title for name, method in METHODS.items() if not name.startswith("only")}
LINES |= {f"fastv-{layer}": f"MLP and FastV after layer {layer} of 4" for layer in FASTV_LAYERS}
LINES["specialists"] = "Delta-LLaVA, a checkpoint for each budget"


@dataclass(frozen=True)
class Settings:
    """What all runs of a study share; learning rates and the rest are those of the demo's recipes."""

    train_scenes: int = 6000
    held_out_scenes: int = 80
    questions_per_scene: int = 5
    pretrain_steps: int = 400
    finetune_steps: int = 250
    batch_size: int = 8


def train(name: str, seed: int, settings: Settings, scenes: Path, folder: Path):
    """
    Assemble a model and train both stages.

    Args:
        name (`str`): Of `METHODS`.
        seed (`int`): Of the projector's first weights, the order of rows and the draws of budgets.
        settings ([`Settings`]): Steps and batch size.
        scenes (`Path`): What [`write_scenes`] has written.
        folder (`Path`): Empty folder for the checkpoint as assembled.

    Returns:
        The model in eval mode, its processor, and each stage's mean loss, in nats per token.
    """
    method = METHODS[name]
    backbones = {part: DEMO / "backbones" / part for part in ("vision_tower", "language_model")}
    overrides = {"projector_variant": "released", **method.fields}
    model = assemble(**backbones, output_dir=folder, num_visual_tokens=method.budgets, seed=seed, **overrides)
    if method.projector is not None:
        torch.manual_seed(seed)
        model.model.multi_modal_projector = method.projector(model.config).apply(model._init_weights)
    processor_class = DeltaLlavaProcessor
    if method.meteor is not None:
        torch.manual_seed(seed)
        model, processor_class = meteor_from(model, **method.meteor), MeteorProcessor
    processor = processor_class.from_pretrained(folder)
    losses = []
    for stage, template in (("pretrain", (TEMPLATES / "plain.jinja").read_text(encoding="utf-8")), ("finetune", None)):
        model.requires_grad_(stage == "finetune")
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        recipe = yaml.safe_load((DEMO / "recipes" / f"{stage}.yaml").read_text(encoding="utf-8"))
        for key in ("num_visual_tokens", "num_train_epochs", "per_device_train_batch_size"):
            del recipe[key]
        args = SFTConfig(
            **recipe,
            output_dir=folder / stage,
            max_steps=getattr(settings, f"{stage}_steps"),
            per_device_train_batch_size=settings.batch_size,
            seed=seed,
            assistant_only_loss=stage == "finetune",
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = load_llava_json(scenes / f"{stage}.json", scenes / "images")
        trainer = DeltaLlavaTrainer(
            model=model,
            args=args,
            data_collator=Collator(processor, args.max_length, template),
            train_dataset=fit_rows(rows, processor, ALL_PATCHES, args.max_length, template),  # cut alike for all
            processing_class=processor,
        )
        trainer.remove_callback(PrinterCallback)
        losses.append(trainer.train().training_loss)
    return model.eval(), processor, losses


def run(name: str, seed: int, settings: Settings, scenes: Path, threads: int) -> dict:
    """
    Train a method once and answer all held-out questions.

    Returns:
        `dict`: The run's row: `method`, `seed`, `settings`, `losses`, `seconds`, and `lines`, in which a line of the
        table has for each budget the shares of questions answered exactly, in all and by type.
    """
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    started = time.time()
    questions = json.loads((scenes / "held_out.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        model, processor, losses = train(name, seed, settings, scenes, Path(folder))

    def measure(num_visual_tokens):
        answers = []
        for first in range(0, len(questions), 100):
            part = questions[first : first + 100]
            images = [scenes / "images" / row["image"] for row in part]
            # No right answer is longer than four tokens
            asked = [row["question"] for row in part]
            answers += answer(model, processor, images, asked, num_visual_tokens, max_new_tokens=6)
        return score(questions, answers)

    line = "specialists" if name.startswith("only") else name
    lines = {line: {str(budget): measure(budget) for budget in METHODS[name].budgets}}
    if name == "mlp":
        for layer in FASTV_LAYERS:
            lines[f"fastv-{layer}"] = pruned = {}
            for budget in COMPRESSED:
                with fastv(model, budget, layer):
                    pruned[str(budget)] = measure(ALL_PATCHES)
    return {
        "method": name,
        "seed": seed,
        "settings": asdict(settings),
        "losses": losses,
        "seconds": round(time.time() - started, 1),
        "lines": lines,
    }


def end_with_parent():
    """For a worker: end when the study does, instead of finishing a run that nobody waits for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the study, which ends its workers

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def read_rows(file: Path, settings: Settings) -> list[dict]:
    """
    The rows of finished runs; a last line that was cut off in writing is taken out of the file.

    Raises:
        ValueError: A row was run with other settings, or a line is no row.
    """
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole, _, cut = text.rpartition("\n")
    if cut:
        file.write_text(whole + "\n" if whole else "", encoding="utf-8")
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    for row in rows:
        if row["settings"] != asdict(settings):
            raise ValueError(
                f"{file}: {row['method']} with seed {row['seed']} was run with {row['settings']}, not with "
                f"{asdict(settings)}. Name another --output_dir, or the same settings."
            )
    return rows


def study(output_dir: Path, methods: Iterable[str], seeds: Iterable[int], settings: Settings, jobs: int):
    """Run what has no row yet, `jobs` runs at a time, and write rows and report into `output_dir`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    file = output_dir / "rows.jsonl"
    rows = read_rows(file, settings)
    finished = {(row["method"], row["seed"]) for row in rows}
    # All methods of one seed before the next: an unfinished study compares what can be compared
    wanted = dict.fromkeys((name, seed) for seed in seeds for name in methods)
    missing = [which for which in wanted if which not in finished]
    print(f"{len(finished)} runs are finished in {file}, {len(missing)} are to be run, {jobs} at a time.", flush=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with tempfile.TemporaryDirectory() as scenes:
        scenes = Path(scenes)
        sizes = ("train_scenes", "held_out_scenes", "questions_per_scene")
        write_scenes(scenes, **{key: getattr(settings, key) for key in sizes})
        for stage in ("pretrain", "finetune"):
            load_llava_json(scenes / f"{stage}.json", scenes / "images")  # checked once, then found in the cache
        questions = json.loads((scenes / "held_out.json").read_text(encoding="utf-8"))
        majority = score(questions, majority_answers(questions))["accuracy"]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=end_with_parent) as pool:
            runs = {pool.submit(run, *which, settings, scenes, threads): which for which in missing}
            failures = []
            progress = tqdm(total=len(runs), unit="run", disable=not runs)
            try:
                for done in as_completed(runs):
                    progress.set_postfix_str("{} {}".format(*runs[done]), refresh=False)
                    progress.update()
                    if done.exception():
                        failures.append(done)
                        continue
                    rows.append(done.result())
                    with file.open("a", encoding="utf-8") as rows_file:
                        rows_file.write(json.dumps(rows[-1]) + "\n")
                    write_report(rows, majority, settings, output_dir)
            except BaseException:
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise
    if failures:
        name, seed = runs[failures[0]]
        raise RuntimeError(
            f"{len(failures)} of {len(runs)} runs failed, such as {name} with seed {seed}; {file} has the others."
        ) from failures[0].exception()
    if rows:
        write_report(rows, majority, settings, output_dir)
        print((output_dir / "RESULTS.md").read_text(encoding="utf-8"))
        print(f"written: {output_dir / 'RESULTS.md'} and {output_dir / 'RESULTS.png'}")


def write_report(rows: list[dict], majority: float, settings: Settings, output_dir: Path):
    """Write `RESULTS.md` and `RESULTS.png` of the rows there are; `majority` is what a blind guesser reaches."""
    # {line: {budget: {seed: scores}}}
    scores = {}
    for row in rows:
        for line, budgets in row["lines"].items():
            for budget, of_seed in budgets.items():
                scores.setdefault(line, {}).setdefault(int(budget), {})[row["seed"]] = of_seed
    scores = {line: scores[line] for line in LINES if line in scores}
    shares = _percent(scores, lambda of_seed: of_seed["accuracy"])
    digits = _percent(scores, lambda of_seed: of_seed["by_type"]["digit"])
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    kept = ", ".join(
        f"{mean_tokens(layer, max(COMPRESSED)):.1f} to {mean_tokens(layer, 1):.1f} after layer {layer}"
        for layer in FASTV_LAYERS
    )
    differences = {
        line: {budget: compare(by_seed, shares["delta"][budget]) for budget, by_seed in budgets.items()}
        for line, budgets in shares.items()
        if line != "delta" and "delta" in shares
    }
    text = [
        "# Study",
        f"Written by `python -m delta_llava.study.run`: {len(rows)} runs, seeds {seeds}, "
        f"{mean(row['seconds'] for row in rows) / 60:.1f} minutes a run on the mean. Settings: "
        + ", ".join(f"{key} {value}" for key, value in asdict(settings).items())
        + ". Figures are percent of held-out questions answered exactly, as the mean over seeds ± standard deviation; "
        f"the most frequent answer of each type would give {100 * majority:.1f}.",
        "![Accuracy against visual tokens](RESULTS.png)",
        "## All questions",
        _table(shares, lambda line, budget: _spread(shares[line].get(budget, {}))),
        "## Digits alone",
        "Handwritten ones, of scans that no training has met: the one type of question that takes long to learn.",
        _table(digits, lambda line, budget: _spread(digits[line].get(budget, {}))),
        "## All questions: difference to Delta-LLaVA, as released",
        "Points, seed by seed, as the mean and half the width of its 95 % interval (Student's t). It tells of "
        "chance in training alone: the questions are the same for all. Bold: the interval leaves zero out, as one in "
        "twenty does by chance.",
        _table(differences, lambda line, budget: str(differences[line].get(budget) or "")),
        "## What held of the paper's claims here",
        f"{_in_words(shares)} Each is one comparison, of each seed's mean over the budgets named; ahead and behind are "
        "said only where the interval leaves zero out.",
        "| | visual tokens | the paper | here | points |\n|---|---|---|---|---|\n"
        + "\n".join(claim.row(shares) for claim in CLAIMS),
        "## To be known",
        "\n".join(
            f"- {note}"
            for note in (
                "In the released projector the shared weight can express what the low-rank update does. Without "
                "DeltaProjection it is learnt otherwise, but not another function.",
                f"At {ALL_PATCHES} visual tokens each query of the released projector sees one patch. What makes the "
                "queries, self-attention and refinement block included, changes no token there, so the claims leave "
                "that budget out.",
                "FastV computes all tokens in its first layers: with "
                f"{max(COMPRESSED)} to 1 kept, {kept} is the mean number of visual tokens in a layer. Published models "
                "have 32 layers and drop tokens after the second.",
                "What is after LLaVA-Meteor's abstract is our reading of that abstract, no reproduction: its figures "
                "say nothing of the original.",
                "The pair with wider first weights was added after the first seed's results were seen, to find their "
                "reason, and the line without drop path after all others were.",
            )
        ),
    ]
    (output_dir / "RESULTS.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    draw(shares, differences, majority, output_dir / "RESULTS.png")


def mean_tokens(layer: int, num_visual_tokens: int) -> float:
    """Visual tokens in a layer of the demo's four, on the mean, if FastV keeps so many after layer `layer`."""
    return (layer * ALL_PATCHES + (4 - layer) * num_visual_tokens) / 4


def _percent(scores: dict, share) -> dict:
    return {
        line: {
            budget: {seed: 100 * share(of_seed) for seed, of_seed in by_seed.items()}
            for budget, by_seed in budgets.items()
        }
        for line, budgets in scores.items()
    }


def _table(lines: Iterable[str], cell) -> str:
    """A Markdown table with a column for each budget."""
    head = ["| visual tokens | " + " | ".join(map(str, BUDGETS)) + " |", "|---" * (len(BUDGETS) + 1) + "|"]
    return "\n".join(
        head + [f"| {LINES[line]} | " + " | ".join(cell(line, budget) for budget in BUDGETS) + " |" for line in lines]
    )


def _spread(by_seed: dict[int, float]) -> str:
    if len(by_seed) < 2:
        return "".join(f"{value:.1f}" for value in by_seed.values())
    return f"{mean(by_seed.values()):.1f} ± {stdev(by_seed.values()):.1f}"


@dataclass(frozen=True)
class Difference:
    """
    Mean over seeds of what one has more than another, in points, and half the width of its 95 % interval; `None` where
    there is none: with one seed, or with seeds that all differ by the same.
    """

    points: float
    half_width: float | None

    @property
    def sign(self) -> int:
        """1 or -1 if the interval leaves zero out, else 0."""
        if self.half_width is None or abs(self.points) <= self.half_width:
            return 0
        return 1 if self.points > 0 else -1

    def __str__(self) -> str:
        text = f"{self.points:+.1f}" + ("" if self.half_width is None else f" ± {self.half_width:.1f}")
        return f"**{text}**" if self.sign else text


def compare(ours: dict[int, float], theirs: dict[int, float]) -> Difference | None:
    """Percent by seed, of the seeds that both have; `None` where there is none."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    a, b = ([line[seed] for seed in seeds] for line in (ours, theirs))
    points = [x - y for x, y in zip(a, b, strict=True)]
    if max(points) - min(points) < 1e-9:
        return Difference(mean(points), None)
    low, high = ttest_rel(a, b).confidence_interval(0.95)
    return Difference(mean(points), (high - low) / 2)


@dataclass(frozen=True)
class Claim:
    """
    A comparison of means over cells of the table, (line, budget): `ours` against `theirs`.

    The paper's word on it is "ahead (…)" where it claims that `ours` is.
    """

    text: str
    paper: str
    ours: tuple[tuple[str, int], ...]
    theirs: tuple[tuple[str, int], ...]

    def compare(self, shares: dict) -> Difference | None:
        """Of `{line: {budget: {seed: percent}}}`; `None` where no seed has all the cells."""
        return compare(*(_mean_over(cells, shares) for cells in (self.ours, self.theirs)))

    def row(self, shares: dict) -> str:
        """Of the table, with no more said than the seeds allow."""
        difference = self.compare(shares)
        here = "not measured" if difference is None else ("cannot tell", "ahead", "behind")[difference.sign]
        budgets = (dict.fromkeys(str(budget) for _, budget in cells) for cells in (self.ours, self.theirs))
        places = " against ".join(dict.fromkeys(", ".join(names) for names in budgets))
        return f"| {self.text} | {places} | {self.paper} | {here} | {difference or ''} |"


def _in_words(shares: dict) -> str:
    """How many of the paper's claims held."""
    claims = [claim for claim in CLAIMS if claim.paper.startswith("ahead")]
    found = Counter(None if d is None else d.sign for d in (claim.compare(shares) for claim in claims))
    return (
        f"Of {len(claims)} comparisons in which the paper is ahead, {found[1]} came out so here, {found[-1]} the other "
        f"way, and {found[0]} cannot be told from these seeds"
        + (f"; {found[None]} are not measured." if found[None] else ".")
    )


def _mean_over(cells: tuple[tuple[str, int], ...], shares: dict) -> dict[int, float]:
    """By seed, of those that have all the cells."""
    found = [shares.get(line, {}).get(budget, {}) for line, budget in cells]
    seeds = set.intersection(*(set(by_seed) for by_seed in found))
    return {seed: mean(by_seed[seed] for by_seed in found) for seed in seeds}


def _cells(line: str, budgets: Iterable[int] = COMPRESSED) -> tuple[tuple[str, int], ...]:
    return tuple((line, budget) for budget in budgets)


def _lines(text: str, paper: str, ours: str, theirs: str, budgets: Iterable[int] = COMPRESSED) -> Claim:
    return Claim(text, paper, _cells(ours, budgets), _cells(theirs, budgets))


def _affordable(layer: int) -> list[int]:
    """For each number of tokens that FastV keeps, the largest budget with no more tokens in a layer on the mean."""
    return [max(b for b in BUDGETS if b <= mean_tokens(layer, kept)) for kept in COMPRESSED]


ALL_PATCHES_CELL = (("mlp", ALL_PATCHES),)
CLAIMS = (
    _lines("Delta-LLaVA against TokenPacker", "ahead (table 1)", "delta", "tokenpacker"),
    _lines("Delta-LLaVA against average pooling", "ahead (of M3, table 1)", "delta", "average-pooling"),
    _lines("Delta-LLaVA against learnt queries", "ahead (of MQT, table 1)", "delta", "resampler"),
    *(
        Claim("Delta-LLaVA against all patches (MLP)", "loses little (table 1)", (("delta", b),), ALL_PATCHES_CELL)
        for b in COMPRESSED
    ),
    _lines("With DeltaProjection against without", "ahead (table 3)", "delta", "no-delta-projection"),
    _lines("With self-attention against without", "ahead (table 3)", "delta", "no-self-attention"),
    _lines("With the refinement block against without", "ahead (table 3)", "delta", "no-refinement-block"),
    _lines("No self-attention against no DeltaProjection", "ahead (§6.2)", "no-self-attention", "no-delta-projection"),
    _lines(
        "No refinement block against no DeltaProjection", "ahead (§6.2)", "no-refinement-block", "no-delta-projection"
    ),
    *(
        _lines(
            f"Delta-LLaVA against FastV after layer {k}, as many tokens kept", "ahead (table 6)", "delta", f"fastv-{k}"
        )
        for k in FASTV_LAYERS
    ),
    *(
        Claim(
            f"Delta-LLaVA against FastV after layer {k}, no more tokens in a layer on the mean",
            "not asked",
            _cells("delta", _affordable(k)),
            _cells(f"fastv-{k}"),
        )
        for k in FASTV_LAYERS
    ),
    *(
        _lines(
            "Delta added to pooled features against average pooling", "not asked", "residual", "average-pooling", [b]
        )
        for b in BUDGETS
    ),
    _lines("Delta added to pooled features against Delta-LLaVA as released", "not asked", "residual", "delta"),
    *(
        _lines(f"After LLaVA-Meteor's abstract against {name}", "not asked", "meteor", other)
        for name, other in (
            ("Delta-LLaVA as released", "delta"),
            ("Delta added to pooled features", "residual"),
            ("average pooling", "average-pooling"),
            ("the same without the instruction", "meteor-no-instruction"),
            ("the same without local summaries", "meteor-no-local-summaries"),
            ("the same with the visual expert alone", "meteor-visual-expert"),
            ("the same with the native expert alone", "meteor-native-expert"),
        )
    ),
    _lines("One checkpoint for all budgets against one for each", "not asked", "delta", "specialists", BUDGETS),
    _lines("The released projector against the paper's equations", "not asked", "delta", "delta-paper"),
    _lines("Bilinear queries against queries by area", "not asked", "delta", "delta-area"),
    _lines("Wider first weights against those as released", "not asked", "delta-wide-init", "delta"),
    _lines(
        "No drop path against drop path, both with wider first weights",
        "not asked",
        "delta-wide-init-no-drop-path",
        "delta-wide-init",
    ),
    _lines(
        "Delta-LLaVA against average pooling, both with wider first weights",
        "not asked",
        "delta-wide-init",
        "average-pooling-wide-init",
    ),
)


def draw(shares: dict, differences: dict, majority: float, file: Path):
    """Draw accuracy against visual tokens, and what the parts and the training for one budget change."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 10), layout="constrained")
    axes = figure.subplots(2, 2)
    wide = ("delta-wide-init", "average-pooling-wide-init")
    panels = {
        "Projectors, one elastic checkpoint each": (
            "delta", "residual", "tokenpacker", "average-pooling", "resampler", "mlp", "meteor", *wide,
        ),
        "Few tokens made by the projector, or dropped in the language model": (
            "delta", "mlp", *(f"fastv-{layer}" for layer in FASTV_LAYERS),
        ),
        "Variants and ablations: difference to Delta-LLaVA, as released": (
            "delta-paper", "delta-area", "no-delta-projection", "no-self-attention", "no-refinement-block",
        ),
        "A checkpoint for each budget: difference to one for all": ("specialists",),
    }  # fmt: skip
    places = {budget: place for place, budget in enumerate(sorted(BUDGETS))}
    for number, (axis, (title, lines)) in enumerate(zip(axes.flat, panels.items(), strict=True)):
        lines = [line for line in lines if line in (shares if number < 2 else differences)]
        axis.set_visible(bool(lines))
        for index, line in enumerate(lines):
            shift = 0.05 * (index - (len(lines) - 1) / 2)
            base = line.removesuffix("-wide-init")
            if number < 2:
                points = {
                    budget: (mean(by_seed.values()), stdev(by_seed.values()) if len(by_seed) > 1 else 0)
                    for budget, by_seed in shares[line].items()
                }
            else:
                found = differences[line].items()
                points = {budget: (d.points, d.half_width or 0) for budget, d in found if d is not None}
            budgets = sorted(points)
            axis.errorbar(
                [places[budget] + shift for budget in budgets],
                [points[budget][0] for budget in budgets],
                [points[budget][1] for budget in budgets],
                marker="o",
                markersize=4,
                capsize=2,
                label=LINES[line],
                linewidth=2 if line == "delta" else 1,
                linestyle="-" if line == base else "--",
                color="black" if base == "delta" else f"C{list(LINES).index(base) % 10}",
            )
        if number < 2:
            axis.axhline(100 * majority, color="grey", linestyle=":", label="most frequent answer")
            axis.set(ylabel="answered exactly, % (bars: standard deviation)")
        else:
            axis.axhline(0, color="black", linewidth=2)
            axis.set(ylabel="points (bars: 95 % interval)")
        axis.set(title=title, xlabel="visual tokens", xticks=list(places.values()), xticklabels=list(places))
        if lines:
            axis.legend(fontsize=8)
    figure.savefig(file, dpi=100)


def main(arguments: list[str] | None = None):
    """Command line of [`study`]."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE, help="rows and report; by default beside this file")
    names = f"of {', '.join(METHODS)} (default: all)"
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=names)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="from three on, spreads mean something")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time; each has cores / jobs")
    for setting in fields(Settings):
        parser.add_argument(f"--{setting.name}", type=int, default=setting.default, help="(default: %(default)s)")
    options = vars(parser.parse_args(arguments))
    settings = Settings(**{setting.name: options.pop(setting.name) for setting in fields(Settings)})
    try:
        study(**options, settings=settings)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted: the same command goes on with the runs that have no row yet") from None


if __name__ == "__main__":
    main()
