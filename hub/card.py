"""
The card of a published checkpoint: `model_card.md`, filled from the checkpoint's own records.

Nothing in it is typed. What the model is made of stands in `config.json` and `training/sources.yaml`, how it was
trained in `training/` (`delta_llava.train` writes it), what it costs `delta_llava.costs` computes, and what it reaches
stands in evaluation results, `results/*.json`, one file for each number of visual tokens:

```
{
  "num_visual_tokens": 144,
  "toolkit": "lmms-eval 0.7.3",
  "date": "2026-11-21",
  "commit": "<what was evaluated, if it is on the Hub>" or null,
  "results": [
    {
      "task": "gqa", "name": "GQA", "dataset": "lmms-lab/GQA", "config": "testdev_balanced_instructions" or null,
      "split": "testdev", "metric": "exact_match", "value": 61.9, "prompt_variant": "default", "num_samples": 12578
    }
  ]
}
```
"""

import json
import math
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined, UndefinedError, meta

from .. import costs
from ..configuration_delta_llava import DeltaLlavaConfig


TEMPLATE = Path(__file__).parents[1] / "model_card.md"
FAMILY = Path(__file__).parent / "checkpoints.yaml"
TEXT_TOKENS, NEW_TOKENS = 68, 30  # of the paper's figure 3
RESULT_FILE = {"num_visual_tokens": int, "toolkit": str, "date": str, "commit": (str, type(None)), "results": list}
RESULT = {
    "task": str,
    "name": str,
    "dataset": str,
    "config": (str, type(None)),
    "split": str,
    "metric": str,
    "value": (int, float),
    "prompt_variant": str,
    "num_samples": int,
}


def build_card(
    checkpoint: str | Path,
    repo_id: str,
    revision: str | None = None,
    num_visual_tokens: int | None = None,
    base_model: list[str] | None = None,
    datasets: list[str] | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    Fill the card of a checkpoint.

    Args:
        checkpoint (`str` or `Path`): Its folder.
        repo_id (`str`): `ORG/NAME` that it will have.
        revision (`str`, *optional*, defaults to `main`): Branch that it will lie on.
        num_visual_tokens (`int`, *optional*, defaults to the checkpoint's): Default budget on that branch.
        base_model (`list[str]`, *optional*): `ORG/NAME` of tower and language model, where `training/sources.yaml` does
            not tell.
        datasets (`list[str]`, *optional*): `ORG/NAME` of the data sets, where the recipes do not tell.
        license (`str`, *optional*): The language model's, where `hub/checkpoints.yaml` does not tell.

    Returns:
        `ModelCard`: With metadata.

    Raises:
        ValueError: A field is unfilled (the message says what to give), or a file of results is not as described above.
    """
    checkpoint = Path(checkpoint)
    config = DeltaLlavaConfig.from_pretrained(checkpoint)
    num_visual_tokens = num_visual_tokens or config.num_visual_tokens
    family = yaml.safe_load(FAMILY.read_text(encoding="utf-8"))
    sources = _sources(checkpoint, base_model)
    stages = _stages(checkpoint)
    results = _results(checkpoint, config)
    language_model = sources["language_model"]
    license = license or family["licenses"].get(language_model)
    if not license:
        raise ValueError(f"The license of {language_model} is unknown: name it as the Hub does, by --license.")

    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["delta-llava", "vision-language", "visual-token-compression"],
        base_model=list(filter(_is_repository, sources.values())),
        datasets=datasets or _datasets(stages, family["datasets"], "converted_from" in sources),
        model_name=repo_id.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=result["dataset"],
                dataset_name=result["name"],
                dataset_config=result["config"],
                dataset_split=result["split"],
                metric_type=result["metric"],
                metric_name=f"{result['metric']}, {num_visual_tokens} visual tokens, prompt {result['prompt_variant']}",
                metric_value=result["value"],
                source_name=results[num_visual_tokens]["toolkit"],
                source_url=f"{constants.ENDPOINT}/{repo_id}/blob/{revision or 'main'}/"
                f"results/{results[num_visual_tokens]['file']}",
            )
            for result in results.get(num_visual_tokens, {"results": ()})["results"]
        ]
        or None,
    )
    fields = {
        "repo_id": repo_id,
        "revision": revision,
        "num_visual_tokens": num_visual_tokens,
        "config": config,
        "sources": sources,
        "stages": stages,
        "results": results,
        "result_rows": _result_rows(results),
        "costs": _costs(config, num_visual_tokens),
        "text_tokens": TEXT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "license": license,
    }
    return _render(data, fields)


def _render(data: ModelCardData, fields: dict[str, Any]) -> ModelCard:
    template = TEMPLATE.read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, autoescape=False)
    for name in sorted(meta.find_undeclared_variables(environment.parse(template)) - {"card_data", "revision"}):
        if fields.get(name) in (None, ""):
            raise ValueError(f"The card's field {name} is unfilled.")
    try:
        environment.from_string(template).render(card_data="", **fields)
    except UndefinedError as error:
        raise ValueError(f"The card has an unfilled field: {error}.") from error
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **fields)


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _sources(checkpoint: Path, base_model: list[str] | None) -> dict[str, str]:
    file = checkpoint / "training" / "sources.yaml"
    sources = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    if base_model:
        if len(base_model) != 2:
            raise ValueError(f"base_model={base_model} must name two: the vision tower and the language model.")
        sources |= zip(("vision_tower", "language_model"), base_model, strict=True)
    for part in ("vision_tower", "language_model"):
        if not _is_repository(sources.get(part) or ""):
            raise ValueError(
                f"{file} names {sources.get(part)!r} as the {part.replace('_', ' ')}, which is no repository of the "
                "Hub: name vision tower and language model as ORG/NAME, by --base_model."
            )
    return sources


def _stages(checkpoint: Path) -> list[dict[str, Any]]:
    """Recipe and log of every stage behind the checkpoint, in their order."""
    files = [file for file in (checkpoint / "training").glob("*.yaml") if file.name != "sources.yaml"]
    stages = []
    for file in sorted(files, key=lambda file: (not file.stem.startswith("pretrain"), file.stem)):
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        data = recipe.get("stream") or recipe.get("json_path")
        if data is None:
            raise ValueError(f"{file} names neither json_path nor stream: it is no recipe of delta_llava.train.")
        log = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        losses = [entry["loss"] for entry in log["log_history"] if "loss" in entry]
        stages.append(
            {
                "name": file.stem,
                "recipe": recipe,
                "data": data,
                "num_rows": log["num_rows"],
                "num_steps": max((entry.get("step", 0) for entry in log["log_history"]), default=0),
                "batch_size": recipe.get("per_device_train_batch_size", 8)
                * recipe.get("gradient_accumulation_steps", 1)
                * log["num_processes"],
                "loss": losses[-1] if losses else None,
                "versions": log["versions"],
            }
        )
    return stages


def _datasets(stages: list[dict[str, Any]], known: dict[str, str], is_converted: bool) -> list[str] | None:
    names = {stage["data"]: known.get(stage["data"], stage["data"]) for stage in stages}
    unknown = sorted(data for data, name in names.items() if not _is_repository(name))
    if unknown or (is_converted and not stages):
        told = f"of {unknown}" if unknown else "that the converted weights were trained on"
        raise ValueError(f"The data sets {told} are unknown: name them as ORG/NAME, by --datasets.")
    return list(names.values()) or None


def _results(checkpoint: Path, config: DeltaLlavaConfig) -> dict[int, dict[str, Any]]:
    """Files of evaluation results by their number of visual tokens, the largest first."""
    results = {}
    for file in sorted((checkpoint / "results").glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        _check_fields(content, RESULT_FILE, str(file))
        budget = content["num_visual_tokens"]
        if budget not in config.valid_visual_token_counts:
            raise ValueError(
                f"{file}: num_visual_tokens is {budget}, but must be one of {config.valid_visual_token_counts}."
            )
        if budget in results:
            raise ValueError(f"{file} and {results[budget]['file']} both have results at {budget} tokens: keep one.")
        for index, result in enumerate(content["results"]):
            _check_fields(result, RESULT, f"{file}, results[{index}]")
            if not math.isfinite(result["value"]):
                raise ValueError(f"{file}, results[{index}]: value is {result['value']}, but must be finite.")
        results[budget] = {**content, "file": file.name}
    return dict(sorted(results.items(), reverse=True))


def _check_fields(found: Any, expected: dict[str, Any], where: str):
    if not isinstance(found, dict) or found.keys() != expected.keys():
        raise ValueError(f"{where}: found {list(found)}, but exactly {list(expected)} are expected.")
    for name, kind in expected.items():
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise ValueError(f"{where}: {name} is {found[name]!r}, which is of a wrong type.")


def _result_rows(results: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task, split, metric and prompt, with its value at each budget that it was measured at."""
    rows = {}
    for budget, content in results.items():
        for result in content["results"]:
            told = {name: result[name] for name in ("name", "split", "metric", "prompt_variant", "num_samples")}
            rows.setdefault(tuple(told.values()), {**told, "values": {}})["values"][budget] = result["value"]
    return list(rows.values())


def _costs(config: DeltaLlavaConfig, num_visual_tokens: int) -> dict[str, Any]:
    """Parameters of each part, and FLOPs and bytes of one answer at this budget and at all patches."""
    if config.text_config.model_type not in costs.KNOWN_DECODERS:
        return {"parameters": None, "unknown": config.text_config.model_type}
    budgets = sorted({num_visual_tokens, config.patch_grid_size**2})
    flops = {budget: costs.inference_costs(config, budget, TEXT_TOKENS, NEW_TOKENS) for budget in budgets}
    largest = max(flops[budgets[-1]][part] for part in costs.FLOP_PARTS)
    exponent, unit = (12, "TFLOPs") if largest > 1e11 else (9, "GFLOPs") if largest > 1e8 else (6, "MFLOPs")
    return {
        "parameters": costs.parameter_counts(config),
        "unit": unit,
        "parts": costs.FLOP_PARTS,
        "rows": {
            budget: {
                "flops": {part: values[part] / 10**exponent for part in costs.FLOP_PARTS},
                "kv_cache_megabytes": values["kv_cache_bytes"] / 1e6,
            }
            for budget, values in flops.items()
        },
    }
