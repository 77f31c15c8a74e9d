"""The whole of Delta-LLaVA on two CPU cores: from rendered scenes to answers about pictures never seen.

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
    """Run `python -m delta_llava.NAME …` as a user would, offline, and stop the demo where it fails."""
    command = [sys.executable, "-m", f"delta_llava.{name}", *map(str, arguments)]
    for option, value in options.items():
        command += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    print("\n$ " + " ".join(["python", *command[1:]]), flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run(command, check=True, env=environment)


def score(questions, answers):
    """Exact match over all questions and by type: `{"accuracy": …, "by_type": {…}}`."""
    right, total = Counter(), Counter(question["type"] for question in questions)
    for question, given in zip(questions, answers, strict=True):
        right[question["type"]] += given == question["answer"]
    by_type = {name: right[name] / total[name] for name in scenes.QUESTION_TYPES}
    return {"accuracy": right.total() / total.total(), "by_type": by_type}


def majority_answers(questions):
    """The most frequent held-out answer of each question's type: what a blind guesser can reach at best."""
    counts = {
        name: Counter(row["answer"] for row in questions if row["type"] == name) for name in scenes.QUESTION_TYPES
    }
    return [counts[row["type"]].most_common(1)[0][0] for row in questions]


def table(report, flops):
    """The report as lines of text."""
    names = scenes.QUESTION_TYPES
    lines = ["visual tokens     all" + "".join(f"{name:>9}" for name in names) + "   MFLOPs"]

    def line(label, scores, end=""):
        cells = [scores["accuracy"], *(scores["by_type"][name] for name in names)]
        lines.append(f"{label:<13}" + "".join(f"{cell:>9.1%}" for cell in cells).replace("  ", " ", 1) + end)

    for budget, scores in report["budgets"].items():
        line(budget, scores, f"{flops[budget] / 1e6:>9.0f}")
    digits = ", ".join(f"{scores['by_type']['digit']:.1%} at {budget}" for budget, scores in report["budgets"].items())
    lines.append(f"handwritten digits, scans never seen: {digits}")
    lines.append(f"most frequent answer of each type: {report['majority_baseline']:.1%}")
    lines.append(f"untrained projector (as assembled, before stage 1): {report['untrained_projector']:.1%}")
    return "\n".join(lines)


def draw(report, flops, questions, answers, folder):
    """Write `report.png`: scenes with answers at three budgets, and accuracy and FLOPs against visual tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    chosen = []
    for name in scenes.QUESTION_TYPES:
        shown = {questions[index]["image"] for index in chosen}
        of_type = (i for i, row in enumerate(questions) if row["type"] == name and row["image"] not in shown)
        chosen.append(next(of_type))
    for axis, index in zip(upper.subplots(1, len(chosen)), chosen, strict=True):
        row = questions[index]
        axis.imshow(Image.open(folder / "scenes" / "images" / row["image"]))
        axis.set_axis_off()
        axis.set_title(row["question"], fontsize=9)
        said = [f"{budget} visual tokens: {answers[str(budget)][index]}" for budget in (144, 9)]
        said.append(f"1 visual token: {answers['1'][index]}")
        axis.text(0.5, -0.04, "\n".join(said), transform=axis.transAxes, ha="center", va="top", fontsize=9)
    budgets = [int(budget) for budget in report["budgets"]]
    left, right = lower.subplots(1, 2)
    for name in scenes.QUESTION_TYPES:
        left.plot(budgets, [report["budgets"][str(b)]["by_type"][name] for b in budgets], alpha=0.5, label=name)
    left.plot(budgets, [report["budgets"][str(b)]["accuracy"] for b in budgets], "ko-", label="all")
    left.axhline(report["majority_baseline"], color="grey", linestyle=":", label="most frequent answer")
    left.set(xscale="log", ylim=(0, 1.02), ylabel="exact match on held-out questions")
    left.legend(fontsize=8)
    right.plot(budgets, [flops[str(b)] / 1e6 for b in budgets], "ko-")
    right.set(xscale="log", ylim=(0, 1.05 * max(flops.values()) / 1e6), ylabel="MFLOPs: tower, projector, prefill")
    for axis in (left, right):
        axis.set(xlabel="visual tokens", xticks=budgets, xticklabels=budgets)
        axis.minorticks_off()
    figure.savefig(folder / "report.png", dpi=100)


def main():
    """Run the demo from the beginning; an earlier result in the output folder is replaced."""
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

    questions = json.loads((data / "held_out.json").read_text(encoding="utf-8"))
    results = {
        model: json.loads((folder / f"answers_{model}.json").read_text(encoding="utf-8"))
        for model in ("untrained", "checkpoint")
    }
    flops = {budget: result["flops"] for budget, result in results["checkpoint"].items()}
    answers = {budget: result["answers"] for budget, result in results["checkpoint"].items()}
    report = {
        "budgets": {budget: score(questions, given) for budget, given in answers.items()},
        "majority_baseline": score(questions, majority_answers(questions))["accuracy"],
        # The better of two budgets, so that the comparison with the baseline is not too kind.
        "untrained_projector": max(
            score(questions, result["answers"])["accuracy"] for result in results["untrained"].values()
        ),
        "flops": flops,
    }
    draw(report, flops, questions, answers, folder)
    report["seconds"] = {**seconds, "total": round(time.time() - started, 1)}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n" + table(report, flops))
    print(
        f"{len(questions)} held-out questions; {report['seconds']['total']:.0f} s: "
        + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())
    )
    print(f"written: {folder / 'report.json'} and {folder / 'report.png'}")


if __name__ == "__main__":
    main()
