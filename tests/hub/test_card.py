"""A card says what the checkpoint's records say, all of it, and nothing else."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from delta_llava import costs
from delta_llava.hub import card as module
from delta_llava.hub.card import build_card


REPO = "org/delta-llava-7b-elastic"
SOURCES = {"vision_tower": "openai/clip-vit-large-patch14-336", "language_model": "lmsys/vicuna-7b-v1.5"}
RESULT = {
    "task": "gqa",
    "name": "GQA",
    "dataset": "lmms-lab/GQA",
    "config": None,
    "split": "testdev",
    "metric": "exact_match",
    "value": 61.25,
    "prompt_variant": "default",
    "num_samples": 12578,
}
RESULTS = {"num_visual_tokens": 36, "toolkit": "lmms-eval 0.7.3", "date": "2026-11-21", "commit": None}


def write(file, content):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content) if file.suffix == ".json" else yaml.safe_dump(content, sort_keys=False))


@pytest.fixture
def checkpoint(tiny_model, tiny_processor, noise, tmp_path):
    """A checkpoint for 4 and 36 visual tokens after both stages, with results at both."""
    folder = tmp_path / "checkpoint"
    tiny_model(visual_token_budgets=[4, 36]).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    write(folder / "training/sources.yaml", SOURCES)
    for stage, data, steps in (("pretrain", "blip_laion_cc_sbu_558k.json", 11), ("finetune", "org/stream", 22)):
        recipe = {"json_path" if data.endswith("json") else "stream": data, "learning_rate": 0.002}
        recipe |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "num_visual_tokens": [4, 36]}
        write(folder / f"training/{stage}.yaml", recipe)
        history = [{"step": steps, "loss": 1.25}, {"step": steps, "train_loss": 9.0}]
        log = {"num_processes": 7, "versions": {"torch": "2.13.0"}, "log_history": history}
        write(folder / f"training/{stage}.json", {"num_rows": None if "stream" in recipe else 558128, **log})
    for budget, value in ((36, 61.25), (4, 50.5)):
        results = [{**RESULT, "value": value}]
        write(folder / f"results/tokens-{budget}.json", {**RESULTS, "num_visual_tokens": budget, "results": results})
    noise(1)[0].save(tmp_path / "image.jpg")
    return folder


def table(card, heading):
    """Rows of the first table under a heading, as lists of cells."""
    text = card.text.partition(f"## {heading}")[2]
    rows = re.findall(r"^\| (.*) \|\s*$", text.partition("\n## ")[0], flags=re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def test_metadata_are_the_records_and_survive_the_file(checkpoint):
    card = build_card(checkpoint, REPO)
    data = ModelCard(str(card)).data.to_dict()
    assert data == card.data.to_dict()
    assert data["base_model"] == list(SOURCES.values())
    assert data["datasets"] == ["liuhaotian/LLaVA-Pretrain", "org/stream"]
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "llama2",
        "transformers",
        "image-text-to-text",
    )
    (index,) = data["model-index"]
    (result,) = index["results"]  # those of its own budget alone
    assert index["name"] == "delta-llava-7b-elastic"
    assert result["metrics"][0]["value"] == 61.25 and "36 visual tokens" in result["metrics"][0]["name"]
    assert result["source"]["url"].endswith(f"{REPO}/blob/main/results/tokens-36.json")


def test_the_text_is_that_of_its_branch_and_budget(checkpoint):
    card = build_card(checkpoint, REPO, revision="tokens-4", num_visual_tokens=4)
    assert card.data.to_dict()["model-index"][0]["results"][0]["metrics"][0]["value"] == 50.5
    assert card.text.count('revision="tokens-4"') == 3 and '"num_visual_tokens": 4}' in card.text
    config = module.DeltaLlavaConfig.from_pretrained(checkpoint)
    header, *rows = table(card, "What it costs")
    assert [row[0] for row in rows] == ["4", "144 (all patches)"]
    for row, budget in zip(rows, (4, 144), strict=True):
        values = costs.inference_costs(config, budget, 68, 30)
        shown = dict(zip(header, row, strict=True))
        for part in costs.FLOP_PARTS:
            assert float(shown[part]) == pytest.approx(values[part] / 1e6, abs=5e-4)
        assert shown["keys and values"] == f"{values['kv_cache_bytes'] / 1e6:.3g} MB"
    header, row = table(card, "Results")
    assert header[-2:] == ["36", "4"] and row[-2:] == ["61.25", "50.5"]
    stages = {name: values for name, *values in table(card, "Training")}
    assert stages["rows"] == ["558,128", "streamed"]
    assert stages["steps of a batch"] == ["11 of 105", "22 of 105"]
    assert stages["last loss"] == ["1.2500", "1.2500"] and stages["visual tokens"] == ["4, 36", "4, 36"]
    assert "Copyright (c) Meta\nPlatforms" in card.text


def test_its_snippets_run(checkpoint, monkeypatch, tmp_path, capsys):
    card = build_card(checkpoint, str(checkpoint))
    snippets = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert len(snippets) == 2
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for snippet in snippets:
        exec(snippet, namespace)
    assert capsys.readouterr().out.strip()


def test_a_checkpoint_without_training_or_results_says_so(checkpoint):
    for file in [
        *checkpoint.glob("training/*tune.*"),
        *checkpoint.glob("training/pre*"),
        *checkpoint.glob("results/*"),
    ]:
        file.unlink()
    card = build_card(checkpoint, REPO)
    assert "the projector's weights are random" in card.text and "has not been evaluated yet" in card.text
    assert not {"model-index", "datasets"} & card.data.to_dict().keys()
    write(checkpoint / "training/sources.yaml", {**SOURCES, "converted_from": "org/published"})
    with pytest.raises(ValueError, match=r"data sets that the converted weights .* by --datasets"):
        build_card(checkpoint, REPO)
    card = build_card(checkpoint, REPO, datasets=["org/data"])
    assert "weights were converted from org/published" in card.text
    assert card.data.base_model == [*SOURCES.values(), "org/published"] and card.data.datasets == ["org/data"]


def test_an_unfilled_field_is_refused_and_the_arguments_fill_it(checkpoint):
    write(checkpoint / "training/sources.yaml", {"vision_tower": "tower", "language_model": "org/language"})
    with pytest.raises(ValueError, match=r"names 'tower' as the vision tower.* by --base_model"):
        build_card(checkpoint, REPO)
    with pytest.raises(ValueError, match="must name two"):
        build_card(checkpoint, REPO, base_model=["org/language"])
    with pytest.raises(ValueError, match=r"license of org/language is unknown.* by --license"):
        build_card(checkpoint, REPO, base_model=["org/tower", "org/language"])
    write(checkpoint / "training/pretrain.yaml", {"learning_rate": 1})
    with pytest.raises(ValueError, match=r"pretrain.yaml names neither json_path nor stream"):
        build_card(checkpoint, REPO, base_model=["org/tower", "org/language"])
    write(checkpoint / "training/pretrain.yaml", {"json_path": "mine.json"})
    with pytest.raises(ValueError, match=r"data sets of \['mine.json'\] are unknown: .* by --datasets"):
        build_card(checkpoint, REPO, base_model=["org/tower", "org/language"], license="mit")
    given = {"base_model": ["org/tower", "org/language"], "license": "mit", "datasets": ["org/mine"]}
    card = build_card(checkpoint, REPO, **given)
    assert (card.data.base_model, card.data.license, card.data.datasets) == tuple(given.values())


@pytest.mark.parametrize("field", ["{{ more }}", "{{ config.more }}", "{% for row in more %}{% endfor %}"])
def test_a_field_that_nobody_fills_is_refused(checkpoint, monkeypatch, tmp_path, field):
    (tmp_path / "card.md").write_text(module.TEMPLATE.read_text() + field)
    monkeypatch.setattr(module, "TEMPLATE", tmp_path / "card.md")
    with pytest.raises(ValueError, match="unfilled"):
        build_card(checkpoint, REPO)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_visual_tokens": 25}, "num_visual_tokens is 25, but must be one of"),
        ({"num_visual_tokens": 4}, "and tokens-36.json both have results at 4"),
        ({"toolkit": None}, "toolkit is None"),
        ({"extra": 1}, "but exactly"),
        ({"results": [{**RESULT, "value": float("nan")}]}, r"results\[0\]: value is nan"),
        ({"results": [{**RESULT, "value": "61.25"}]}, r"results\[0\]: value is '61.25'"),
        ({"results": [{key: RESULT[key] for key in RESULT if key != "split"}]}, r"results\[0\]: found"),
    ],
)
def test_results_that_are_not_as_they_must_be_are_refused_by_name(checkpoint, changes, message):
    write(checkpoint / "results/tokens-36.json", {**RESULTS, "results": [RESULT], **changes})
    with pytest.raises(ValueError, match=f"results/tokens-.*{message}"):
        build_card(checkpoint, REPO)


def test_costs_of_an_unknown_language_model_are_not_guessed(checkpoint, monkeypatch):
    monkeypatch.setattr(costs, "KNOWN_DECODERS", ("qwen2",))
    assert "does not know language models of type llama" in build_card(checkpoint, REPO).text
