"""
What is measured, and beside which published figures: a suite, read from YAML and checked, and its table.

```
include_path: tasks                    # of tasks that lmms-eval does not have, beside this file; may be left out
tasks:
  - task: gqa                          # lmms-eval's name
    name: GQA                          # the column's
    dataset: lmms-lab-encoder/GQA
    config: testdev_balanced_instructions   # or null
    split: testdev
    metric: exact_match                # lmms-eval's name
    scale: 100                         # from its value to the unit
    unit: percent                      # or points
    prompt_variant: default
    note: ...                          # what must be known when the figure is compared; may be left out
published:                             # may be left out
  - {model: Delta-LLaVA 7B, source: table 1, num_visual_tokens: 144, values: {GQA: 62.34}}
```
"""

from pathlib import Path
from typing import Any

import yaml


TASK = {"task": str, "name": str, "dataset": str, "config": (str, type(None)), "split": str, "metric": str}
TASK |= {"scale": (int, float), "unit": str, "prompt_variant": str}
PUBLISHED = {"model": str, "source": str, "num_visual_tokens": int, "values": dict}
UNITS = ("percent", "points")


def read_suite(file: str | Path, tasks: list[str] | None = None) -> dict[str, Any]:
    """
    Reads a suite.

    Args:
        file (`str` or `Path`): The YAML file.
        tasks (`list[str]`, *optional*): Names of the tasks that are wanted, as lmms-eval has them. By default all.

    Returns:
        `dict`: `include_path` (`str` or None), `tasks` and `published` as in the file, as far as they are wanted.

    Raises:
        ValueError: If the file cannot be read or is not as described above, or has no such task.
    """
    file = Path(file)
    try:
        suite = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The suite {file} cannot be read: {error}") from error
    if not isinstance(suite, dict) or not suite.keys() <= {"include_path", "tasks", "published"}:
        raise ValueError(f"{file} must hold tasks, and may hold include_path and published, but no more.")
    entries, published = suite.get("tasks") or [], suite.get("published") or []
    for index, entry in enumerate(entries):
        where = f"{file}, tasks[{index}]"
        _check(entry, TASK, where, {"note"})
        if entry["unit"] not in UNITS:
            raise ValueError(f"{where}: unit is {entry['unit']!r}, but must be one of {UNITS}.")
    names = [entry["name"] for entry in entries]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{file} must have at least one task, and each name once: {names}")
    for index, row in enumerate(published):
        where = f"{file}, published[{index}]"
        _check(row, PUBLISHED, where)
        if not row["values"].keys() <= set(names):
            raise ValueError(f"{where}: values of {sorted(row['values'].keys() - set(names))}, which no task has.")
    if unknown := sorted(set(tasks or ()) - {entry["task"] for entry in entries}):
        raise ValueError(f"tasks={unknown} are none of {file}: {[entry['task'] for entry in entries]}")
    include_path = suite.get("include_path")
    return {
        "include_path": include_path and str(file.parent / include_path),
        "tasks": [entry for entry in entries if not tasks or entry["task"] in tasks],
        "published": published,
    }


def _check(found: Any, expected: dict[str, Any], where: str, optional: set[str] = frozenset()):
    if not isinstance(found, dict):
        raise ValueError(f"{where}: found {found!r} instead of {list(expected)}.")
    unknown, missing = sorted(found.keys() - expected.keys() - optional), sorted(expected.keys() - found.keys())
    if unknown or missing:
        raise ValueError(f"{where}: unknown are {unknown}, missing are {missing}.")
    for name, kind in expected.items():
        if not isinstance(found[name], kind) or isinstance(found[name], bool) or found[name] in ("", {}):
            raise ValueError(f"{where}: {name} is {found[name]!r}, but must be of type {kind}, and not empty.")


def table(
    suite: dict[str, Any],
    model: str,
    values: dict[int, dict[str, float]],
    cascade: tuple[float, dict[str, float]] | None = None,
) -> str:
    """
    Sets what was measured beside what was published, in Markdown.

    Args:
        suite (`dict`): As [`read_suite`] returns it.
        model (`str`): Name of what was measured.
        values (`dict[int, dict[str, float]]`): By number of visual tokens and name of the task.
        cascade (`tuple[float, dict[str, float]]`, *optional*): A cascade's mean of visual tokens, and what it reached.

    Returns:
        `str`: A row for each number of visual tokens, the largest first, and below it each published row of that number
        with a figure of these tasks; then the tasks with split, metric, prompt and note. What is unknown is "-".
    """
    entries = suite["tasks"]
    names = [entry["name"] for entry in entries]
    rows = [(model, "measured", budget, figures) for budget, figures in values.items()]
    rows += [(f"{model}, cascade", "measured", *cascade)] if cascade else []
    rows += [tuple(row[key] for key in PUBLISHED) for row in suite["published"] if row["values"].keys() & set(names)]
    rows.sort(key=lambda row: row[2], reverse=True)
    lines = [["model", "source", "visual tokens", *names], ["---", "---", *["--:"] * (len(names) + 1)]]
    for row_model, source, budget, figures in rows:
        cells = (f"{figures[name]:.2f}" if name in figures else "-" for name in names)
        lines.append([row_model, source, str(budget) if isinstance(budget, int) else f"{budget:.1f}", *cells])
    text = ["| " + " | ".join(line) + " |" for line in lines]
    notes = [
        f"- {entry['name']}: {entry['task']}, {entry['split']}, {entry['metric']}, {entry['unit']}, prompt "
        f"{entry['prompt_variant']}. {entry.get('note', '')}".rstrip()
        for entry in entries
    ]
    return "\n".join([*text, "", *notes])
