"""The whole of Delta-LLaVA on two CPU cores: from rendered scenes to answers about unseen pictures.

    python -m delta_llava.demo.run

Renders scenes, assembles a model from the demo's two backbones, runs both training stages by their own scripts,
loads the result in a new process through `trust_remote_code`, answers the held-out questions at every budget,
prints a table and writes `report.json` and `report.png` to the output folder.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from PIL import Image

from . import scenes


HERE = Path(__file__).parent
BUDGETS = (144, 36, 16, 9, 4, 1)


def run_module(name, *arguments, **options):
    """Run `python -m delta_llava.NAME …` as a user would, offline, and stop the demo if it fails."""
    command = [sys.executable, "-m", f"delta_llava.{name}", *map(str, arguments)]
    for option, value in options.items():
        command += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    print("\n$ " + " ".join(["python", *command[1:]]), flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run(command, check=True, env=environment)


def grade(questions, answers):
    """Which answers are right: those that match exactly."""
    return [given == question["answer"] for question, given in zip(questions, answers, strict=True)]


def score(questions, answers):
    """Exact match, `{"accuracy": …, "by_type": {type: …}, "by_size": {"small": …, "big": …}}`."""
    right = grade(questions, answers)

    def share(key, value):
        of_value = [got for question, got in zip(questions, right, strict=True) if question[key] == value]
        return sum(of_value) / len(of_value)

    return {
        "accuracy": sum(right) / len(right),
        "by_type": {name: share("type", name) for name in scenes.QUESTION_TYPES},
        "by_size": {size: share("size", size) for size in ("small", "big")},
    }


def majority_answers(questions):
    """The most frequent held-out answer of each question's type: the best that blind guessing can reach."""
    counts = {
        name: Counter(row["answer"] for row in questions if row["type"] == name) for name in scenes.QUESTION_TYPES
    }
    return [counts[row["type"]].most_common(1)[0][0] for row in questions]


def table(report):
    """The report as lines of text."""
    columns = ["all", *scenes.QUESTION_TYPES, "small", "big", "new design", "MFLOPs"]
    lines = [f"{'visual tokens':<22}" + "".join(f"{name:>11}" for name in columns)]

    def line(label, scores, new_design=None, flops=None):
        shares = [scores["accuracy"], *scores["by_type"].values(), *scores["by_size"].values()]
        shares += [] if new_design is None else [new_design["accuracy"]]
        cells = [f"{share:.1%}" for share in shares] + ([] if flops is None else [f"{flops / 1e6:.0f}"])
        lines.append(f"{label:<22}" + "".join(f"{cell:>11}" for cell in cells))

    for budget, of_budget in report["budgets"].items():
        line(budget, of_budget["held_out"], of_budget["held_out_design"], of_budget["flops"])
    line("most frequent answer", report["majority_baseline"])
    line("untrained projector", report["untrained_projector"])
    lines.append(
        "small, big: questions about things of one place, of a quadrant; new design: OpenMoji, which no training sees"
    )
    return "\n".join(lines)


def shown_questions(questions, answers):
    """Questions for the picture: of each of five types and sizes, the first that one visual token gets wrong.

    Returns:
        Indices into `questions`, each about a different scene; if one token gets all of a type right, its first one.
    """
    chosen = []
    for name, size in (("thing", "small"), ("place", "small"), ("beside", None), ("thing", "big"), ("place", "big")):
        rows = [
            index
            for index, row in enumerate(questions)
            if (row["type"], row["size"]) == (name, size)
            and row["image"] not in {questions[other]["image"] for other in chosen}
        ]
        wrong = [index for index in rows if answers[min(answers, key=int)][index] != questions[index]["answer"]]
        chosen += (wrong or rows)[:1]
    return chosen


def draw(report, questions, answers, folder):
    """Write `report.png`: one question about each of some scenes at four budgets; accuracy and FLOPs against tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    chosen = shown_questions(questions, answers)
    title = "A question about each picture at four budgets: the first that one visual token gets wrong"
    upper.suptitle(title, fontsize=11)
    pictures, texts = upper.subplots(2, len(chosen), height_ratios=(2.4, 1), squeeze=False)
    for picture, text, index in zip(pictures, texts, chosen, strict=True):
        row = questions[index]
        picture.imshow(Image.open(folder / "scenes" / "images" / row["image"]))
        picture.set_title(row["question"], fontsize=11)
        for line, budget in enumerate(("144", "16", "4", "1")):
            given = answers[budget][index]
            right = given == row["answer"]
            said = f"{budget} token{'s' * (budget != '1')}: {given} {'✓' if right else '✗'}"
            text.text(0.5, 0.95 - 0.25 * line, said, color="#1a7f37" if right else "#cf222e", ha="center", va="top")
        for axis in (picture, text):
            axis.set_axis_off()
    budgets = list(report["budgets"])
    ticks = range(len(budgets))
    left, right = lower.subplots(1, 2, width_ratios=(1.6, 1))
    lines = {
        "all questions, also counting": ("ko-", lambda of_budget: of_budget["held_out"]["accuracy"]),
        "about small things": ("C0s-", lambda of_budget: of_budget["held_out"]["by_size"]["small"]),
        "about big things": ("C1D-", lambda of_budget: of_budget["held_out"]["by_size"]["big"]),
        "all questions, unseen design": ("k^:", lambda of_budget: of_budget["held_out_design"]["accuracy"]),
    }
    for label, (style, share) in lines.items():
        left.plot(ticks, [100 * share(report["budgets"][budget]) for budget in budgets], style, label=label)
    majority = 100 * report["majority_baseline"]["accuracy"]
    left.axhline(majority, color="grey", linestyle="--", linewidth=1, label="most frequent answer")
    left.set(ylim=(0, 103), ylabel="answered exactly, %", title="What a budget buys")
    left.legend(fontsize=9, loc="lower left")
    flops = [report["budgets"][budget]["flops"] / 1e6 for budget in budgets]
    bars = right.bar(ticks, flops, color="C2")
    right.bar_label(bars, [f"{value:.0f}" for value in flops], fontsize=9)
    right.set(title="What it costs", ylabel="MFLOPs: tower, projector, prefill")
    for axis in (left, right):
        axis.set(xlabel="visual tokens", xticks=ticks, xticklabels=budgets)
    figure.savefig(folder / "report.png", dpi=100)


def main():
    """Run the demo from the beginning, replacing earlier results in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "out")
    folder = parser.parse_args().output_dir
    started, seconds = time.time(), {}
    for name in ("scenes", "untrained", "stage1", "checkpoint"):
        shutil.rmtree(folder / name, ignore_errors=True)

    def timed(name, *arguments, **options):
        begun = time.time()
        run_module(*arguments, **options)
        seconds[name] = seconds.get(name, 0) + round(time.time() - begun, 1)

    data = folder / "scenes"
    timed("scenes", "demo.scenes", output_dir=data)
    backbones = {name: HERE / "backbones" / name for name in ("vision_tower", "language_model")}
    timed("assemble", "hub.assemble", **backbones, output_dir=folder / "untrained", num_visual_tokens=BUDGETS)
    for stage, script, model, output in (
        ("stage1", "pretrain", "untrained", "stage1"),
        ("stage2", "finetune", "stage1", "checkpoint"),
    ):
        recipe = HERE / "recipes" / f"{script}.yaml"
        files = {"json_path": data / f"{script}.json", "image_folder": data / "images"}
        paths = {"model_name_or_path": folder / model, **files, "output_dir": folder / output}
        timed(stage, f"train.{script}", "--config", recipe, **paths)
    for model, budgets in (("untrained", (144, 36)), ("checkpoint", BUDGETS)):
        paths = {"checkpoint": folder / model, "scenes": data, "output": folder / f"answers_{model}.json"}
        timed("evaluate", "demo.evaluate", **paths, num_visual_tokens=budgets)

    results = {
        model: json.loads((folder / f"answers_{model}.json").read_text(encoding="utf-8"))
        for model in ("untrained", "checkpoint")
    }
    questions = {
        name: json.loads((data / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("held_out", "held_out_design")
    }
    known, answers = questions["held_out"], {b: result["held_out"] for b, result in results["checkpoint"].items()}
    report = {
        "budgets": {
            budget: {**{name: score(rows, result[name]) for name, rows in questions.items()}, "flops": result["flops"]}
            for budget, result in results["checkpoint"].items()
        },
        "majority_baseline": score(known, majority_answers(known)),
        # The better of two budgets, so that the baseline is not made too weak.
        "untrained_projector": max(
            (score(known, result["held_out"]) for result in results["untrained"].values()),
            key=lambda scores: scores["accuracy"],
        ),
    }
    draw(report, known, answers, folder)
    report["seconds"] = {**seconds, "total": round(time.time() - started, 1)}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n" + table(report))
    print(
        f"{len(known)} held-out questions; {report['seconds']['total']:.0f} s: "
        + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())
    )
    print(f"written: {folder / 'report.json'} and {folder / 'report.png'}")


if __name__ == "__main__":
    main()
