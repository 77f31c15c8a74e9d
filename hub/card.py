"""
The card of a published checkpoint: `model_card.md`, filled from the checkpoint's own records.

Nothing in it is typed by hand. What the model is made of comes from `config.json` and `training/sources.yaml`, how it
was trained from `training/`, which `delta_llava.train` writes, its costs from `delta_llava.costs`, and its scores from
`results/tokens-*.json`, which `delta_llava.results` describes. Results of weights other than those beside them are
refused.
"""

import json
import traceback
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from .. import costs
from ..configuration_delta_llava import DeltaLlavaConfig
from ..llava import GAP, NO_GAP
from ..results import measurement, read_results
from ..turns import TEMPLATES
from ..weights import weight_digests
from .client import is_repository


TEMPLATE = Path(__file__).parents[1] / "model_card.md"
FAMILY = Path(__file__).parent / "checkpoints.yaml"
TEXT_TOKENS, NEW_TOKENS = 68, 30  # of the paper's figure 3
LOG = {"num_rows", "num_processes", "batch_size", "versions", "log_history"}
DATA_FILES = (".json", ".jsonl", ".parquet")


def build_card(
    checkpoint: str | Path,
    repo_id: str,
    revision: str | None = None,
    num_visual_tokens: int | None = None,
    base_model: list[str] | None = None,
    datasets: list[str] | None = None,
    license: str | None = None,
    family: str | Path = FAMILY,
) -> ModelCard:
    """
    Fills the card of a checkpoint.

    Args:
        checkpoint (`str` or `Path`): Its folder.
        repo_id (`str`): `ORG/NAME` that it will be published as.
        revision (`str`, *optional*, defaults to `main`): Branch that it will be published on.
        num_visual_tokens (`int`, *optional*, defaults to the checkpoint's): Default budget on that branch.
        base_model (`list[str]`, *optional*): `ORG/NAME` of tower and language model, if `training/sources.yaml` does
            not have them.
        datasets (`list[str]`, *optional*): Training data, if the recipes do not have it: `ORG/NAME` of data sets on the
            Hub, and descriptions of others.
        license (`str`, *optional*): The language model's, if `family` does not have it.
        family (`str` or `Path`, *optional*, defaults to `hub/checkpoints.yaml`): Licenses and data sets by name.

    Returns:
        `ModelCard`: Text and metadata.

    Raises:
        ValueError: A field is unfilled (the message says what to give), a record or a file of results cannot be read,
            or the checkpoint was not trained for the budget.
    """
    checkpoint = Path(checkpoint)
    config = DeltaLlavaConfig.from_pretrained(checkpoint)
    num_visual_tokens = num_visual_tokens or config.num_visual_tokens
    if num_visual_tokens not in config.visual_token_budgets:
        raise ValueError(
            f"num_visual_tokens={num_visual_tokens} must be one of {config.visual_token_budgets}, which {checkpoint} "
            "was trained for."
        )
    family = yaml.safe_load(Path(family).read_text(encoding="utf-8"))
    for name in datasets or ():
        if not name.strip() or not name.isprintable() or "huggingface.co/" in name or name.startswith(("/", "~", ".")):
            raise ValueError(
                f"datasets={name!r} must be one line: ORG/NAME of a data set on the Hub, without the address, or a "
                "description of other data, not its path."
            )
    sources = _sources(checkpoint, base_model)
    stages = _stages(checkpoint)
    datasets = datasets or _datasets(stages, family["datasets"], "converted_from" in sources)
    results = _results(checkpoint, config)
    license = _license(sources["language_model"], family["licenses"], license)

    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["delta-llava", "vision-language", "visual-token-compression"],
        base_model=list(dict.fromkeys(filter(is_repository, sources.values()))),
        base_model_relation="finetune",  # without it the Hub takes two base models for a merge
        datasets=list(filter(is_repository, datasets)) or None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=result["dataset"],
                dataset_name=result["name"],
                dataset_config=result["config"],
                dataset_split=result["split"],
                metric_type=result["metric"],
                metric_name=f"{result['name']}, {result['metric']}, {num_visual_tokens} visual tokens, prompt "
                f"{result['prompt_variant']}",  # the Hub groups results on a split under one name
                metric_value=result["value"],
                source_name=results[num_visual_tokens]["toolkit"],
                source_url=f"https://huggingface.co/{repo_id}/blob/{revision or 'main'}/"
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
        "is_assembled": (checkpoint / "training" / "sources.yaml").exists(),
        "is_padded": _is_padded(checkpoint),
        "is_vicuna": _is_vicuna(checkpoint),
        "stages": stages,
        "own_data": [name for name in datasets if not is_repository(name)],
        "results": results,
        "result_rows": _result_rows(results),
        "costs": _costs(config),
        "text_tokens": TEXT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "license": license,
    }
    return _render(data, fields)


def eval_results_yaml(card: ModelCard) -> str:
    """
    A card's results as a file of `.eval_results/`, where the Hub's benchmarks read them, beside the card's own
    `model-index`. A data set that was asked with several prompts has one entry here, that of the first.
    """
    entries = {}
    for result in card.data.eval_results or ():
        entry = EvalResultEntry(
            dataset_id=result.dataset_type,
            task_id=result.dataset_config or "default",
            value=result.metric_value,
            source_url=result.source_url,
            source_name=result.source_name,
            notes=result.metric_name,
        )
        entries.setdefault((entry.dataset_id, entry.task_id), entry)
    return yaml.safe_dump(eval_result_entries_to_yaml(list(entries.values())), sort_keys=False)


def _render(data: ModelCardData, fields: dict[str, Any]) -> ModelCard:
    """Fills the template, first so that an undefined, None or empty field is an error: `from_template` omits it."""
    loader = FileSystemLoader(TEMPLATE.parent, encoding="utf-8")
    environment = Environment(loader=loader, undefined=StrictUndefined, finalize=_filled)
    try:
        environment.get_template(TEMPLATE.name).render(card_data=data.to_yaml(), **fields)
    except UndefinedError as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(TEMPLATE)]
        raise ValueError(
            f"{TEMPLATE.name}, line {frames[-1].lineno}, has a field that build_card does not fill: {error}. "
            f"The line: {frames[-1].line}"
        ) from error
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **fields)


def _filled(value: Any) -> Any:
    if value is None or (isinstance(value, (str, list, tuple, dict)) and not value):
        raise UndefinedError(f"it is {value!r}")
    return value


def _sources(checkpoint: Path, base_model: list[str] | None) -> dict[str, str]:
    file = checkpoint / "training" / "sources.yaml"
    sources = _read(file) if file.exists() else {}
    if base_model:
        if len(base_model) != 2:
            raise ValueError(f"base_model={base_model} must name two: the vision tower, then the language model.")
        sources |= zip(("vision_tower", "language_model"), base_model, strict=True)
    for part in ("vision_tower", "language_model"):
        if not is_repository(sources.get(part) or ""):
            raise ValueError(
                f"{file} names {sources.get(part)!r} as the {part.replace('_', ' ')}, which is not a repository of the "
                "Hub: name vision tower and language model as ORG/NAME, with --base_model."
            )
    return sources


def _is_padded(checkpoint: Path) -> bool:
    """Whether the processor pads images to squares."""
    file = checkpoint / "processor_config.json"
    return file.exists() and bool(_read(file).get("image_processor", {}).get("do_pad"))


def _is_vicuna(checkpoint: Path) -> bool:
    """Whether the chat template is `templates/vicuna-v1.jinja`, with or without the spaces of `llava.fit_spaces`."""
    file, template = checkpoint / "chat_template.jinja", (TEMPLATES / "vicuna-v1.jinja").read_text(encoding="utf-8")
    return file.exists() and file.read_text(encoding="utf-8") in (template, template.replace(NO_GAP, GAP))


def _license(language_model: str, known: dict[str, str], license: str | None) -> str:
    if license and license != known.get(language_model, license):
        raise ValueError(f"license={license}, but that of {language_model} is {known[language_model]}.")
    license = license or known.get(language_model)
    if not license:
        raise ValueError(f"The license of {language_model} is unknown: give the Hub's name of it with --license.")
    if license == "other":
        raise ValueError("license=other needs a name and a link, and the card has no place for them.")
    return license


def _read(file: Path) -> dict[str, Any]:
    """A record, in YAML or JSON."""
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold names and values, but holds {content!r}.")
    return content


def _stages(checkpoint: Path) -> list[dict[str, Any]]:
    """Recipe and log of every stage that the checkpoint went through, in their order."""
    folder = checkpoint / "training"
    stages = []
    for stage in ("pretrain", "finetune"):
        for file in sorted(folder.glob(f"{stage}*.yaml"), key=lambda file: (len(file.stem), file.stem)):
            recipe, log = _read(file), _read(file.with_suffix(".json"))
            if missing := LOG - log.keys():
                raise ValueError(f"{file.with_suffix('.json')} lacks {sorted(missing)}.")
            data = recipe.get("stream") or recipe.get("json_path")
            if not data:
                raise ValueError(f"{file} names neither json_path nor stream: it is not a recipe of delta_llava.train.")
            history = log["log_history"]
            if not history or "train_runtime" not in history[-1]:
                raise ValueError(f"{file.with_suffix('.json')} is the log of a run that has not ended.")
            stages.append(
                {
                    "name": file.stem,
                    "recipe": recipe,
                    "data": data,
                    "num_steps": history[-1]["step"],
                    "loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
                    "seconds": history[-1]["train_runtime"],
                    "has_curves": file.with_suffix(".png").exists(),
                    **{name: log[name] for name in ("num_rows", "num_processes", "batch_size", "versions")},
                }
            )
    return stages


def _datasets(stages: list[dict[str, Any]], known: dict[str, str], is_converted: bool) -> list[str]:
    names, unknown = [], []
    for stage in stages:
        # LLaVA's files may have been cleaned: llava_v1_5_mix665k.clean.json
        name = known.get(stage["data"].partition(".")[0])
        # drawings/train.json, a file in a folder, has the form of a repository's name
        if name is None and is_repository(stage["data"]) and Path(stage["data"]).suffix not in DATA_FILES:
            name = stage["data"]
        (unknown if name is None else names).append(name or stage["data"])
    if unknown or (is_converted and not stages):
        which = f"of {sorted(set(unknown))}" if unknown else "that the converted weights were trained on"
        raise ValueError(
            f"The data sets {which} are unknown: name them with --datasets, as ORG/NAME if they are on the Hub, or "
            "describe them in words, as in --datasets 'Our own drawings'."
        )
    return list(dict.fromkeys(names))


def _results(checkpoint: Path, config: DeltaLlavaConfig) -> dict[int, dict[str, Any]]:
    """Files of evaluation results by number of visual tokens, the largest first."""
    results, weights = {}, None
    for file in sorted((checkpoint / "results").glob("tokens-*.json")):
        content = read_results(file)
        budget = content["num_visual_tokens"]
        if budget not in config.valid_visual_token_counts:
            raise ValueError(
                f"{file}: num_visual_tokens is {budget}, but must be one of {config.valid_visual_token_counts}."
            )
        if budget in results:
            raise ValueError(f"{file} and {results[budget]['file']} both have results at {budget} tokens: keep one.")
        weights = weights or weight_digests(checkpoint)
        if content["weights"] != weights:
            raise ValueError(f"{file} is about other weights than those in {checkpoint}: evaluate these.")
        results[budget] = {**content, "file": file.name}
    return dict(sorted(results.items(), reverse=True))


def _result_rows(results: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each measurement and number of samples, with its value at each budget."""
    rows = {}
    for budget, content in results.items():
        for result in content["results"]:
            row = rows.setdefault((*measurement(result), result["num_samples"]), {**result, "values": {}})
            row["values"][budget] = result["value"]
    return list(rows.values())


def _costs(config: DeltaLlavaConfig) -> dict[str, Any]:
    """Parameters of each part, and FLOPs and bytes of one answer at each trained budget and at all patches."""
    budgets = sorted({*config.visual_token_budgets, config.patch_grid_size**2}, reverse=True)
    try:
        answers = {budget: costs.inference_costs(config, budget, TEXT_TOKENS, NEW_TOKENS) for budget in budgets}
    except ValueError as error:  # a backbone that torch cannot count
        return {"parameters": None, "unknown": str(error)}
    return {"parameters": costs.parameter_counts(config), "table": costs.costs_table(answers)}
