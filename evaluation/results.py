"""Files of results, `results/tokens-*.json`: one for each number of visual tokens, in the form that the card takes."""

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


FIELDS = {"num_visual_tokens", "toolkit", "date", "commit", "weights", "results"}
# All of a result that tells what was measured.
WHAT = ("task", "name", "dataset", "config", "split", "metric", "unit", "prompt_variant")


def results_file(output_dir: Path, num_visual_tokens: int | None, fastv_layer: int | None = None) -> Path:
    """
    Where the results at a number of visual tokens lie, those of a cascade where it is `None`. What is no model card's
    lies apart: FastV and cascades.
    """
    folder = output_dir / "results"
    if num_visual_tokens is None:
        return folder / "cascade.json"
    if fastv_layer is not None:
        folder /= f"fastv-{fastv_layer}"
    return folder / f"tokens-{num_visual_tokens}.json"


def read_results(file: Path, toolkit: str, commit: str | None, weights: dict[str, str]) -> list[dict[str, Any]]:
    """
    Reads what an earlier run has left.

    Args:
        file (`Path`): The file, which may be missing.
        toolkit (`str`): Name and version of what will measure the rest, and the dtype of the weights.
        commit (`str` or None): What will be measured, if it is on the Hub.
        weights (`dict[str, str]`): SHA-256 of each file of the weights that will be measured.

    Returns:
        `list[dict]`: Its results, none where there is no file.

    Raises:
        ValueError: If it is no such file, or is about other weights or another commit, or of another toolkit or dtype.
    """
    if not file.exists():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.keys() != FIELDS:
            raise ValueError(f"it holds {sorted(content)} instead of {sorted(FIELDS)}")
        _ = [what(record) for record in content["results"]]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no file of results: {error!r}") from error
    if content["weights"] != weights:
        raise ValueError(f"{file} is about other weights than these: delete it, or name another --output_dir.")
    for name, now in (("commit", commit), ("toolkit", toolkit)):
        if content[name] != now:
            raise ValueError(
                f"{file} is of {name} {content[name]!r}, and this is {now!r}: delete it, or name another --output_dir."
            )
    return content["results"]


def what(record: dict[str, Any]) -> tuple:
    """All of a result, or of a suite's task, that tells what is measured."""
    return tuple(record[name] for name in WHAT)


def result(entry: dict[str, Any], value: float, num_samples: int) -> dict[str, Any]:
    """
    One record of a file of results, as a model's card takes it.

    Args:
        entry (`dict`): The task, of a suite.
        value (`float`): As lmms-eval gives it.
        num_samples (`int`): Over so many.

    Returns:
        `dict`: The record.

    Raises:
        ValueError: If the value is no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{entry['task']}: {entry['metric']} is {value!r} instead of a number.")
    record = {key: entry[key] for key in ("task", "name", "dataset", "config", "split", "metric")}
    record["value"] = round(value * entry["scale"], 4)
    return {**record, "unit": entry["unit"], "prompt_variant": entry["prompt_variant"], "num_samples": num_samples}


def write_results(
    file: Path,
    num_visual_tokens: int | None,
    toolkit: str,
    commit: str | None,
    weights: dict[str, str],
    results: list[dict[str, Any]],
):
    """
    Writes a file of results, whole or not at all, with today's date in UTC.

    Args:
        file (`Path`): The file; its folder is made.
        num_visual_tokens (`int` or None): Budget of each image, if there is one for all.
        toolkit (`str`): Name and version of what has measured, and the dtype of the weights.
        commit (`str` or None): What was measured, if it is on the Hub.
        weights (`dict[str, str]`): SHA-256 of each file of weights.
        results (`list[dict]`): Records of [`result`].
    """
    content = {
        "num_visual_tokens": num_visual_tokens,
        "toolkit": toolkit,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "weights": weights,
        "results": results,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, file)
