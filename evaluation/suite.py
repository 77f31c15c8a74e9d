"""
A suite: the tasks to measure and the published figures to compare with, read from YAML; and the table of both.

```
include_path: tasks                    # optional: folder of further tasks, relative to this file
tasks:
  - task: gqa                          # lmms-eval's name
    name: GQA                          # heading of the column
    dataset: lmms-lab-encoder/GQA
    config: testdev_balanced_instructions   # or null
    split: testdev
    metric: exact_match                # lmms-eval's name
    scale: 100                         # lmms-eval's value times this is in the unit
    unit: percent                      # or points
    prompt_variant: default
    note: ...                          # optional: what to know when comparing the figure
published:                             # optional
  - {model: Delta-LLaVA 7B, source: table 1, num_visual_tokens: 144, values: {GQA: 62.34}}
```
"""

from pathlib import Path
from typing import Any

import yaml

from ..results import MEASUREMENT, check_fields, check_measurement


TASK = {**MEASUREMENT, "scale": (int, float)}
PUBLISHED = {"model": str, "source": str, "num_visual_tokens": int, "values": dict}


def read_suite(file: str | Path, tasks: list[str] | None = None) -> dict[str, Any]:
    """
    Reads a suite.

    Args:
        file (`str` or `Path`): The YAML file.
        tasks (`list[str]`, *optional*): lmms-eval's names of the tasks to keep. By default all.

    Returns:
        `dict`: `include_path` (`str` or None), the kept `tasks`, and `published` as in the file.

    Raises:
        ValueError: If the file cannot be read, is not as described above or lacks a task of `tasks`.
    """
    file = Path(file)
    try:
        suite = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The suite {file} cannot be read: {error}") from error
    if not isinstance(suite, dict) or not suite.keys() <= {"include_path", "tasks", "published"}:
        raise ValueError(f"{file} must hold tasks, and may hold include_path and published, but nothing else.")
    entries, published = suite.get("tasks") or [], suite.get("published") or []
    for index, entry in enumerate(entries):
        check_measurement(entry, TASK, f"{file}, tasks[{index}]", {"note"})
    names = [entry["name"] for entry in entries]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{file} must have at least one task, and each name once, but has {names}.")
    for index, row in enumerate(published):
        where = f"{file}, published[{index}]"
        check_fields(row, PUBLISHED, where)
        if not row["values"].keys() <= set(names):
            raise ValueError(f"{where}: values of {sorted(row['values'].keys() - set(names))}, which no task has.")
    if unknown := sorted(set(tasks or ()) - {entry["task"] for entry in entries}):
        raise ValueError(f"tasks={unknown} are not in {file}, which has {[entry['task'] for entry in entries]}.")
    include_path = suite.get("include_path")
    return {
        "include_path": include_path and str(file.parent / include_path),
        "tasks": [entry for entry in entries if not tasks or entry["task"] in tasks],
        "published": published,
    }


def table(
    suite: dict[str, Any],
    model: str,
    values: dict[int, dict[str, float]],
    cascade: tuple[float, dict[str, float]] | None = None,
) -> str:
    """
    The table of measured and published figures, in Markdown.

    Args:
        suite (`dict`): As [`read_suite`] returns it.
        model (`str`): Name of what was measured.
        values (`dict[int, dict[str, float]]`): Figures by number of visual tokens, then by task name.
        cascade (`tuple[float, dict[str, float]]`, *optional*): A cascade's mean number of visual tokens, and its
            figures.

    Returns:
        `str`: A row for each number of visual tokens, the largest first, followed by the published rows of that number
        with a figure for these tasks; then each task's split, metric, unit, prompt and note. "-" stands for no figure.
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
