"""
Evaluation results: `results/tokens-*.json` in a checkpoint's folder, one file for each number of visual tokens.

```
{
  "num_visual_tokens": 144,
  "toolkit": "lmms-eval 0.7.3, bfloat16",
  "date": "2026-11-21",
  "commit": "<what was evaluated, if it is on the Hub>" or null,
  "weights": {"model-00001-of-00003.safetensors": "<SHA-256 of the file, in hexadecimal>", ...},
  "results": [
    {
      "task": "gqa", "name": "GQA", "dataset": "lmms-lab-encoder/GQA",
      "config": "testdev_balanced_instructions" or null,
      "split": "testdev", "metric": "exact_match", "value": 61.9, "unit": "percent" or "points",
      "prompt_variant": "default", "num_samples": 12578
    }
  ]
}
```

Every key is required, and no other is allowed. A file has each task, dataset, split, metric and prompt variant once. A
cascade has no budget of its own: its file, `results/cascade.json`, has null there, and each of its results adds
`mean_visual_tokens`, the mean per image.
"""

import json
import math
import os
from collections.abc import Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


UNITS = ("percent", "points")
# What is measured: the fields that a result shares with the task of a suite that asks for it
MEASUREMENT = {"task": str, "name": str, "dataset": str, "config": (str, type(None)), "split": str, "metric": str}
MEASUREMENT |= {"unit": str, "prompt_variant": str}
RESULT = {**MEASUREMENT, "value": (int, float), "num_samples": int}
RESULTS_FILE = {"num_visual_tokens": (int, type(None)), "toolkit": str, "date": str, "commit": (str, type(None))}
RESULTS_FILE |= {"weights": dict, "results": list}


def results_file(output_dir: Path, num_visual_tokens: int | None, fastv_layer: int | None = None) -> Path:
    """
    The file of the results at a number of visual tokens, or of a cascade where that is `None`. FastV and cascades have
    files apart, which no model card reads.
    """
    folder = output_dir / "results"
    if num_visual_tokens is None:
        return folder / "cascade.json"
    if fastv_layer is not None:
        folder /= f"fastv-{fastv_layer}"
    return folder / f"tokens-{num_visual_tokens}.json"


def read_results(file: Path) -> dict[str, Any]:
    """
    The content of a file of results.

    Raises:
        ValueError: If the file cannot be read or is not as described above; the message names the place.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    check_fields(content, RESULTS_FILE, str(file))
    seen = {}
    for index, result in enumerate(content["results"]):
        where = f"{file}, results[{index}]"
        check_measurement(result, RESULT, where, {"mean_visual_tokens"})
        if not math.isfinite(result["value"]):
            raise ValueError(f"{where}: value is {result['value']}, but must be finite.")
        if result["num_samples"] < 1:
            raise ValueError(f"{where}: num_samples is {result['num_samples']}, but must be 1 or more.")
        if (first := seen.setdefault(measurement(result), index)) != index:
            raise ValueError(f"{where}: measures what results[{first}] measures: keep one.")
    return content


def measurement(entry: dict[str, Any]) -> tuple:
    """The fields of a result, or of a suite's task, that say what is measured."""
    return tuple(entry[name] for name in MEASUREMENT)


def check_measurement(entry: Any, fields: dict[str, Any], where: str, optional: Set[str] = frozenset()):
    """[`check_fields`] of a result or of a suite's task, whose unit must be one of `UNITS`."""
    check_fields(entry, fields, where, optional)
    if entry["unit"] not in UNITS:
        raise ValueError(f"{where}: unit is {entry['unit']!r}, but must be one of {UNITS}.")


def check_fields(entry: Any, fields: dict[str, Any], where: str, optional: Set[str] = frozenset()):
    """
    Checks the fields of an entry in a file, at the place `where`: the types of the required ones by their names, and
    that only `optional` ones are there too. Text must fit the cell of a Markdown table.

    Raises:
        ValueError: If a field is missing, unknown, empty or of another type, or text has more than one line or a "|".
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: found {entry!r} instead of {list(fields)}.")
    unknown, missing = sorted(entry.keys() - fields.keys() - optional), sorted(fields.keys() - entry.keys())
    if unknown or missing:
        raise ValueError(f"{where}: unknown are {unknown}, missing are {missing}.")
    for name, kind in fields.items():
        value = entry[name]
        if not isinstance(value, kind) or isinstance(value, bool) or value in ("", [], {}):
            raise ValueError(f"{where}: {name} is {value!r}, but must be of type {kind}, and not empty.")
        if isinstance(value, str) and set("|\r\n") & set(value):
            raise ValueError(f"{where}: {name} is {value!r}, but must be one line without '|', as a table's cell.")


def new_result(task: dict[str, Any], value: float, num_samples: int) -> dict[str, Any]:
    """
    One result of a file: the suite's task, what lmms-eval measured, and the number of documents that it measured it on.

    Raises:
        ValueError: If the value is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{task['task']}: {task['metric']} is {value!r} instead of a number.")
    value = round(value * task["scale"], 4)
    return {**{name: task[name] for name in MEASUREMENT}, "value": value, "num_samples": num_samples}


def write_results(
    file: Path,
    num_visual_tokens: int | None,
    toolkit: str,
    commit: str | None,
    weights: dict[str, str],
    results: list[dict[str, Any]],
):
    """
    Writes a file of results, whole or not at all, with today's date in UTC; its folder is created.

    Args:
        num_visual_tokens (`int` or None): Budget of each image, if it is the same for all.
        toolkit (`str`): Name and version of the tool that measured, and the dtype of the weights.
        commit (`str` or None): What was measured, if it is on the Hub.
        weights (`dict[str, str]`): From [`~delta_llava.weights.weight_digests`].
        results (`list[dict]`): From [`new_result`].
    """
    date = datetime.now(UTC).date().isoformat()
    content = dict(zip(RESULTS_FILE, (num_visual_tokens, toolkit, date, commit, weights, results), strict=True))
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, file)
