r"""
The paper's comparisons at the demo's scale, run for real: projectors, ablations, FastV, one elastic checkpoint against
one for each budget, a cascade, and a model after LLaVA-Meteor's abstract.

```
python -m delta_llava.study.run --output_dir runs/study
```

First, the learning rates: every family of methods trains at a ninth, a third, one and three times the rates of the
demo's recipes, and the best on a validation split is taken for all of the family. Then the runs: each assembles the
demo's backbones with a projector, trains both stages with the demo's recipes, but on fewer rows, and answers the
held-out questions at every budget. All runs have the same scenes, steps and batches; a seed decides the projector's
first weights and the order of rows and budgets, the same for all methods.

Each finished run is a row, of `rates.jsonl` in the search and of `rows.jsonl` afterwards: an interrupted study
continues with the runs that have none. After every run, `RESULTS.md` and `RESULTS.png` are written anew.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
import transformers
import yaml
from tqdm import tqdm
from transformers import PrinterCallback
from trl import SFTConfig

from ..cascade import generate_scored
from ..demo.ask import prepare
from ..demo.evaluate import count_flops
from ..demo.run import grade, score
from ..demo.scenes import QUESTION_TYPES, write_scenes
from ..evaluation.calibrate import cascades, choose
from ..evaluation.fastv import fastv
from ..hub.assemble import assemble
from ..processing_delta_llava import DeltaLlavaProcessor
from ..train.data import load_llava_json
from ..turns import TEMPLATES
from .memory import StudyTrainer, remembered_tower, rows_of, widen
from .meteor import MeteorProcessor, meteor_from
from .methods import (
    ALL_PATCHES,
    BACKBONES,
    CASCADE_METHODS,
    CASCADES,
    COMPRESSED,
    DEMO,
    FASTV_LAYERS,
    METHODS,
    RATES,
    SEARCH_SEED,
    choose_rates,
    line_of,
)
from .report import write_report


HERE = Path(__file__).parent


@dataclass(frozen=True)
class Settings:
    """What all runs of a study share; the rest is in the demo's recipes."""

    train_scenes: int = 3200
    validation_scenes: int = 60
    held_out_scenes: int = 80
    questions_per_scene: int = 8
    pretrain_steps: int = 400
    finetune_steps: int = 250
    batch_size: int = 8


@cache
def world() -> str:
    """Digest of what rows depend on beside the settings: backbones, recipes, drawings, and what draws the scenes."""
    digest = hashlib.sha256()
    for pattern in ("scenes.py", "atlases/*.webp", "backbones/*/*.safetensors", "recipes/*.yaml"):
        for file in sorted(DEMO.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Run(NamedTuple):
    """
    A training to be done.

    Args:
        method (`str`): Of `METHODS`.
        seed (`int`): Of the projector's first weights, the order of rows and the draws of budgets; `SEARCH_SEED` in the
            search for learning rates.
        rate (`float`): By which the recipes' learning rates are multiplied.
        times_steps (`int`): By which the steps of both stages are multiplied.
    """

    method: str
    seed: int
    rate: float = 1
    times_steps: int = 1


def train(run: Run, settings: Settings, scenes: Path, folder: Path):
    """
    Assemble a model and train both stages.

    Args:
        run ([`Run`]): What to train.
        settings ([`Settings`]): Steps and batch size.
        scenes (`Path`): What [`write_scenes`] has written.
        folder (`Path`): Empty folder for the checkpoint as assembled.

    Returns:
        The model in eval mode, its processor, and each stage's mean loss, in nats per token.
    """
    method = METHODS[run.method]
    overrides = {"projector_variant": "released", **method.fields}
    model = assemble(**BACKBONES, output_dir=folder, num_visual_tokens=method.budgets, seed=run.seed, **overrides)
    if method.projector is not None:
        torch.manual_seed(run.seed)
        model.model.multi_modal_projector = method.projector(model.config).apply(model._init_weights)
    processor_class = DeltaLlavaProcessor
    if method.meteor is not None:
        torch.manual_seed(run.seed)
        model, processor_class = meteor_from(model, **method.meteor), MeteorProcessor
        # The same function, in three quarters of the time without Mamba's kernels
        model.model.multi_modal_projector.fusion.mixer.chunk_size = 32
    processor = processor_class.from_pretrained(folder)
    losses = []
    for stage, template in (("pretrain", (TEMPLATES / "plain.jinja").read_text(encoding="utf-8")), ("finetune", None)):
        model.requires_grad_(stage == "finetune")
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        recipe = yaml.safe_load((DEMO / "recipes" / f"{stage}.yaml").read_text(encoding="utf-8"))
        for key in ("num_visual_tokens", "num_train_epochs", "per_device_train_batch_size"):
            del recipe[key]
        recipe["learning_rate"] *= run.rate
        args = SFTConfig(
            **recipe,
            output_dir=folder / stage,
            max_steps=run.times_steps * getattr(settings, f"{stage}_steps"),
            per_device_train_batch_size=settings.batch_size,
            seed=run.seed,
            assistant_only_loss=stage == "finetune",
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = rows_of(scenes, stage, processor, args.max_length, template)
        trainer = StudyTrainer(rows, model=model, args=args, processing_class=processor)
        trainer.remove_callback(PrinterCallback)
        losses.append(trainer.train().training_loss)
    # No gradients either: what counts FLOPs follows those of learnt queries
    return model.eval().requires_grad_(False), processor, losses


class Questions:
    """
    Questions of [`write_scenes`] that a model answers.

    Args:
        file (`Path`): `held_out.json` or `held_out_design.json`; the images are beside it.
    """

    def __init__(self, file: Path):
        self.rows = json.loads(file.read_text(encoding="utf-8"))
        self.images = file.parent / "images"
        self.prepared = {}  # by class of processor and first row

    def answer(self, model, processor, num_visual_tokens: int) -> tuple[list[str], list[float]]:
        """Greedy answers, and their mean log-probabilities in nats."""
        length = self.answer_length(processor, self.rows)
        answers, log_probabilities = [], []
        for first in range(0, len(self.rows), 100):
            key = type(processor), first
            if key not in self.prepared:
                self.prepared[key] = self.inputs(processor, self.rows[first : first + 100], 1)
            inputs = widen(self.prepared[key], processor.image_token_id, num_visual_tokens)
            with remembered_tower(model):
                tokens, scores = generate_scored(model, **inputs, do_sample=False, max_new_tokens=length)
            answers += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
            log_probabilities += scores.tolist()
        return answers, log_probabilities

    def grade(self, answers: list[str]) -> list[bool]:
        """Which answers are right."""
        return grade(self.rows, answers)

    def count_flops(self, model, processor, num_visual_tokens: int) -> int:
        """FLOPs of an answer as long as the right one to the first question, as torch counts them in what runs."""
        rows = self.rows[:1]
        length = self.answer_length(processor, rows)
        inputs = self.inputs(processor, rows, num_visual_tokens)
        options = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length}
        return count_flops(lambda: model.generate(**inputs, **options))

    def inputs(self, processor, rows: list[dict], num_visual_tokens: int):
        """What the model reads of some of the rows."""
        images = [self.images / row["image"] for row in rows]
        return prepare(processor, images, [row["question"] for row in rows], num_visual_tokens)

    @staticmethod
    def answer_length(processor, rows: list[dict]) -> int:
        """Tokens of the longest right answer, the one that ends it included."""
        answers = processor.tokenizer([row["answer"] for row in rows], add_special_tokens=False)["input_ids"]
        return 1 + max(map(len, answers))


questions_of = cache(Questions)  # read and prepared once in a process


def execute(run: Run, settings: Settings, scenes: Path, threads: int) -> dict:
    """
    Train a method once; in the search answer the validation questions, otherwise all held-out ones.

    Returns:
        `dict`: The run's row: the fields of [`Run`], `settings`, [`world`], `losses`, `seconds`, and in the search
        `validation`, the share of questions answered exactly at each budget. Otherwise `lines`, in which a line of the
        report has for each budget what [`score`] returns for new layouts, `design`, the share for the held-out design,
        and `flops`, of one answer; and `cascades`, as [`measure_cascades`] returns them.
    """
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    started = time.time()
    files = ("validation/held_out.json", "held_out.json", "held_out_design.json")
    validation, held_out, design = (questions_of(scenes / file) for file in files)
    with tempfile.TemporaryDirectory() as folder:
        model, processor, losses = train(run, settings, scenes, Path(folder))
    answered = {}

    def measure(num_visual_tokens):
        answered[num_visual_tokens] = held_out.answer(model, processor, num_visual_tokens)
        of_design, _ = design.answer(model, processor, num_visual_tokens)
        return {
            **score(held_out.rows, answered[num_visual_tokens][0]),
            "design": score(design.rows, of_design)["accuracy"],
            "flops": held_out.count_flops(model, processor, num_visual_tokens),
        }

    budgets = METHODS[run.method].budgets
    if run.seed == SEARCH_SEED:
        answers = {budget: validation.answer(model, processor, budget)[0] for budget in budgets}
        found = {
            "validation": {str(budget): score(validation.rows, given)["accuracy"] for budget, given in answers.items()}
        }
    else:
        lines = {line_of(run.method): {str(budget): measure(budget) for budget in budgets}}
        found = {"lines": lines, "cascades": {}}
        if run.method in CASCADE_METHODS:
            found["cascades"] = measure_cascades(model, processor, validation, held_out, answered)
        if run.method == "mlp":
            for layer in FASTV_LAYERS:
                lines[f"fastv-{layer}"] = pruned = {}
                for budget in COMPRESSED:
                    with fastv(model, budget, layer):
                        pruned[str(budget)] = measure(ALL_PATCHES)
    return {
        **run._asdict(),
        "settings": asdict(settings),
        "world": world(),
        "losses": losses,
        "seconds": round(time.time() - started, 1),
        **found,
    }


def measure_cascades(model, processor, validation: Questions, held_out: Questions, answered: dict) -> dict:
    """
    What `delta_llava.cascade` reaches: the smaller budget's answer where the model is sure of it, else the larger
    one's. The threshold is the most accurate one on the validation split that costs at most half of the larger budget.

    Args:
        validation, held_out ([`Questions`]): To choose the threshold, and to measure what it reaches.
        answered (`dict`): What `held_out.answer` has returned at each budget.

    Returns:
        `dict`: By cascade, such as `"4-36"`: `accuracy` on the held-out questions, `visual_tokens`, the mean of both
        passes together, and `threshold` in nats.
    """
    results = {}
    for small, large in CASCADES:
        of_small, scores = validation.answer(model, processor, small)
        of_large, _ = validation.answer(model, processor, large)
        graded = (validation.grade(of_small), scores), validation.grade(of_large)
        chosen = choose(cascades(*graded, [1] * len(scores), (small, large)), target_tokens=large / 2)
        asked_again = [score < chosen.threshold for score in answered[small][1]]
        given = [
            second if again else first
            for first, second, again in zip(answered[small][0], answered[large][0], asked_again, strict=True)
        ]
        results[f"{small}-{large}"] = {
            "accuracy": sum(held_out.grade(given)) / len(given),
            "visual_tokens": small + large * sum(asked_again) / len(asked_again),
            "threshold": chosen.threshold,
        }
    return results


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
        ValueError: A row was run with other settings or in another world, or a line is not a row.
    """
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole, _, cut = text.rpartition("\n")
    if cut:
        file.write_text(whole + "\n" if whole else "", encoding="utf-8")
    rows, wanted = [], (asdict(settings), world())
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            name, found = f"{row['method']} with seed {row['seed']}", (row["settings"], row["world"])
            METHODS[row["method"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}, line {number} is not a row of this study: {error!r}") from error
        if found != wanted:
            raise ValueError(
                f"{file}, line {number}: {name} was run with (settings, digest of backbones, recipes and scenes) = "
                f"{found}, not {wanted}. Name another --output_dir, or the same settings."
            )
        rows.append(row)
    return rows


def check_rates(file: Path, rows: Iterable[dict], rates: dict[str, float]):
    """Raises a `ValueError` for a row of `rows.jsonl` that was not run at its family's rate."""
    for row in rows:
        chosen = rates.get(METHODS[row["method"]].family)
        if row["rate"] != chosen:
            raise ValueError(
                f"{file}: {row['method']} with seed {row['seed']} was run at {row['rate']:.2g} times the recipes' "
                f"learning rates, but the search chose {'none' if chosen is None else f'{chosen:.2g}'}. Name another "
                "--output_dir, or take its rows out."
            )


def study(output_dir: Path, methods: Iterable[str], seeds: Iterable[int], settings: Settings, jobs: int):
    """
    Run what has no row yet, `jobs` runs at a time, and write rows and report into `output_dir`.

    Raises:
        ValueError: A row there was run with other settings or at another rate, a seed is that of the search, or the
            scenes are too few.
        RuntimeError: A run failed. The others of the search, or of what follows it, have rows.
    """
    if SEARCH_SEED in seeds:
        raise ValueError(f"seed {SEARCH_SEED} is that of the search for learning rates: name others.")
    for name, value in {"jobs": jobs, **asdict(settings)}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    output_dir.mkdir(parents=True, exist_ok=True)
    files = search_file, rows_file = output_dir / "rates.jsonl", output_dir / "rows.jsonl"
    search, rows = (read_rows(file, settings) for file in files)
    families = dict.fromkeys(METHODS[name].family for name in methods)
    # All methods of one seed before the next: an unfinished study compares what can be compared
    wanted = dict.fromkeys((name, seed) for seed in seeds for name in methods)
    planned = len(wanted.keys() | {(row["method"], row["seed"]) for row in rows})
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with tempfile.TemporaryDirectory() as scenes:
        scenes = Path(scenes)
        sizes = {key: getattr(settings, key) for key in ("train_scenes", "held_out_scenes", "questions_per_scene")}
        write_scenes(scenes, **sizes)
        write_scenes(scenes / "validation", train_scenes=0, held_out_scenes=settings.validation_scenes, seed=1)
        for stage in ("pretrain", "finetune"):
            load_llava_json(scenes / f"{stage}.json", scenes / "images")  # checked once, then found in the cache
        asked = {file: Questions(scenes / file).rows for file in ("held_out.json", "validation/held_out.json")}
        for file, questions in asked.items():
            found = {value for row in questions for value in (row["type"], row["size"])}
            if missing := {*QUESTION_TYPES, "small", "big"} - found:
                raise ValueError(f"{file} has no question of these types or sizes: {missing}. Draw more scenes.")

        def report():
            write_report(search, rows, planned, asked["held_out.json"], asdict(settings), output_dir)

        def finish(pool: ProcessPoolExecutor, runs: Iterable[Run]):
            done = {tuple(row[name] for name in Run._fields) for row in search + rows}
            missing = [run for run in runs if run not in done]
            running = {pool.submit(execute, run, settings, scenes, threads): run for run in missing}
            failures = []
            progress = tqdm(total=len(running), unit="run", disable=not running)
            try:
                for future in as_completed(running):
                    progress.set_postfix_str("{} {}".format(*running[future]), refresh=False)
                    progress.update()
                    if future.exception():
                        failures.append(future)
                        continue
                    is_search = running[future].seed == SEARCH_SEED
                    (search if is_search else rows).append(future.result())
                    with (search_file if is_search else rows_file).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(future.result()) + "\n")
                    report()
            except BaseException:
                for worker in multiprocessing.active_children():
                    worker.kill()  # SIGTERM would make a trainer save, and the worker go on to the next run
                raise
            if failures:
                raise RuntimeError(
                    f"{len(failures)} of {len(running)} runs failed, such as {running[failures[0]]}; {output_dir} has "
                    "the others."
                ) from failures[0].exception()

        trials = [Run(family, SEARCH_SEED, rate) for rate in RATES for family in families]
        print(f"{len(search)} runs of the search for learning rates are finished in {search_file}.", flush=True)
        # The same workers for all runs, which share what they remember
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
            finish(pool, trials)
            rates = choose_rates(search)
            chosen = ", ".join(f"{name} {rate:.2g}" for name, rate in rates.items())
            print(f"Learning rates, times the recipes': {chosen}")
            check_rates(rows_file, rows, rates)
            print(f"{len(rows)} of {planned} runs are finished in {rows_file}; {jobs} run at a time.", flush=True)
            twice = [Run(name, SEARCH_SEED, rates[name], 2) for name in families if name == "average-pooling"]
            finish(pool, [*twice, *(Run(name, seed, rates[METHODS[name].family]) for name, seed in wanted)])
            report()
    print((output_dir / "RESULTS.md").read_text(encoding="utf-8"))
    print(f"written: {output_dir / 'RESULTS.md'} and {output_dir / 'RESULTS.png'}")


def main(arguments: list[str] | None = None):
    """Command line of [`study`]."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE, help="rows and report; by default beside this file")
    names = f"of {', '.join(METHODS)} (default: all)"
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=names)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="from three on, spreads mean something")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each on cores / jobs and in about 3 GB"
    )
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
