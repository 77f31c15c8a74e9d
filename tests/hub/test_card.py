"""A card says what the checkpoint's records say, all of it, and nothing else."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import AutoConfig

from delta_llava import costs
from delta_llava.hub import card as module
from delta_llava.hub.card import build_card
from delta_llava.results import results_file, write_results
from delta_llava.weights import weight_digests


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
    "unit": "percent",
    "prompt_variant": "default",
    "num_samples": 12578,
}


def write(file, content):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content) if file.suffix == ".json" else yaml.safe_dump(content, sort_keys=False))


def write_log(file, *history, **changes):
    log = {"num_rows": 558128, "num_processes": 7, "batch_size": 105, "versions": {"torch": "2.13.0"}}
    write(file, {**log, "log_history": list(history), **changes})


def evaluate(folder, budget, *results):
    write_results(results_file(folder, budget), budget, "lmms-eval 0.7.3", None, weight_digests(folder), list(results))


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
        recipe |= {"max_steps": steps} if "stream" in recipe else {}
        write(folder / f"training/{stage}.yaml", recipe)
        history = {"step": steps, "loss": 1.25}, {"step": steps, "train_runtime": 9000.0, "train_loss": 9.0}
        changes = {"num_rows": None} if "stream" in recipe else {}
        write_log(folder / f"training/{stage}.json", *history, **changes)
        noise(1)[0].save(folder / f"training/{stage}.png")
    for budget, value in ((36, 61.25), (4, 50.5)):
        evaluate(folder, budget, {**RESULT, "value": value})
    noise(1)[0].save(tmp_path / "image.jpg")
    return folder


def section(card, heading):
    return card.text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def table(card, heading):
    """Rows of the tables under a heading, as lists of cells."""
    rows = re.findall(r"^\|(.*)\|$", section(card, heading), flags=re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows if set(row) != set("-|")]


def test_metadata_are_the_records_and_survive_the_file(checkpoint):
    card = build_card(checkpoint, REPO)
    data = ModelCard(str(card)).data.to_dict()
    assert data == card.data.to_dict()
    assert data["base_model"] == list(SOURCES.values())
    assert data["datasets"] == ["liuhaotian/LLaVA-Pretrain", "org/stream"]
    about = [data[name] for name in ("license", "library_name", "pipeline_tag")]
    assert about == ["llama2", "transformers", "image-text-to-text"]
    (index,) = data["model-index"]
    (result,) = index["results"]  # those of its own budget alone
    assert index["name"] == "delta-llava-7b-elastic"
    assert result["metrics"][0]["value"] == 61.25
    assert result["metrics"][0]["name"] == "GQA, exact_match, 36 visual tokens, prompt default"
    assert result["source"]["url"].endswith(f"{REPO}/blob/main/results/tokens-36.json")


def test_the_text_is_that_of_its_branch_and_budget(checkpoint):
    card = build_card(checkpoint, REPO, revision="tokens-4", num_visual_tokens=4)
    assert card.data.to_dict()["model-index"][0]["results"][0]["metrics"][0]["value"] == 50.5
    assert card.text.count(', revision="tokens-4", trust_remote_code=True') == 3
    assert card.text.count('"num_visual_tokens": 4}') == 2
    header, row = table(card, "Results")
    assert header[-2:] == ["36", "4"] and row[-2:] == ["61.25 %", "50.5 %"]
    stages = {name: values for name, *values in table(card, "Training")}
    assert stages["rows"] == ["558,128", "streamed"]
    assert stages["length"] == [f"{steps} steps of 105 rows, on 7 processes" for steps in (11, 22)]
    assert stages["last loss"] == ["1.2500", "1.2500"] and stages["visual tokens"] == ["4, 36", "4, 36"]
    assert stages["hours since the last start"] == ["2.5", "2.5"] and stages["peak learning rate"] == ["0.002"] * 2
    links = set(re.findall(r"\]\(((?:training|results)/\S+)\)", card.text))
    assert links == {
        *(f"training/{stage}.{suffix}" for stage in ("pretrain", "finetune") for suffix in ("yaml", "json", "png")),
        "results/tokens-36.json",
        "results/tokens-4.json",
    }


@pytest.mark.parametrize("tower", ["tiny", "clip-vit-large-patch14-336"])
def test_costs_are_those_that_the_command_beside_them_prints(checkpoint, backbones, capsys, tower):
    if tower != "tiny":  # of the full size, without weights
        module.DeltaLlavaConfig(
            vision_config=AutoConfig.from_pretrained(backbones / tower),
            text_config=AutoConfig.from_pretrained(backbones / "vicuna-7b-v1.5"),
            visual_token_budgets=[4, 36],
            num_visual_tokens=36,
        ).save_pretrained(checkpoint)
    header, rule, *rows = re.findall(r"^\|.*\|$", section(build_card(checkpoint, REPO), "What it costs"), re.MULTILINE)
    command = re.search(r"python -m delta_llava.costs --config FOLDER (.*?)`", build_card(checkpoint, REPO).text)[1]
    costs.main(["--config", str(checkpoint), *command.split()])
    printed = capsys.readouterr().out.splitlines()
    if tower == "tiny":
        assert "GFLOPs | KV cache, MB" in header
        assert not any(float(cell) == 0 for row in rows for cell in row.strip("|").split("|"))
    else:
        assert len(rows) == 3 and {header, rule, *rows} < set(printed)


@pytest.mark.parametrize(("revision", "budget"), [(None, 36), ("tokens-4", 4)])
def test_its_snippets_run(checkpoint, monkeypatch, tmp_path, capsys, revision, budget):
    card = build_card(checkpoint, str(checkpoint), revision, budget)
    snippets = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert len(snippets) == 2
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for snippet in snippets:
        exec(snippet, namespace)
    assert capsys.readouterr().out.strip() and namespace["inputs"]["num_visual_tokens"].tolist() == [budget]


def test_a_checkpoint_without_training_or_results_says_so(checkpoint):
    for file in [*checkpoint.glob("training/[pf]*"), *checkpoint.glob("results/*")]:
        file.unlink()
    card = build_card(checkpoint, REPO)
    assert "the projector's weights are random" in card.text and "has not been evaluated yet" in card.text
    assert not {"model-index", "datasets"} & card.data.to_dict().keys()
    write(checkpoint / "training/sources.yaml", {**SOURCES, "converted_from": "org/published"})
    with pytest.raises(ValueError, match=r"data sets that the converted weights .* with --datasets"):
        build_card(checkpoint, REPO)
    card = build_card(checkpoint, REPO, datasets=["org/data"])
    assert "weights were converted from org/published" in card.text
    assert card.data.base_model == [*SOURCES.values(), "org/published"] and card.data.datasets == ["org/data"]
    (checkpoint / "training/sources.yaml").unlink()  # weights that nothing is known about are not called random
    text = build_card(checkpoint, REPO, base_model=list(SOURCES.values())).text
    assert "How these weights were trained is not recorded." in text and "random" not in text


def test_an_unfilled_field_is_refused_and_the_arguments_fill_it(checkpoint):
    with pytest.raises(ValueError, match=r"num_visual_tokens=9 must be one of \[4, 36\]"):
        build_card(checkpoint, REPO, num_visual_tokens=9)
    write(checkpoint / "training/sources.yaml", {"vision_tower": "tower", "language_model": "org/language"})
    with pytest.raises(ValueError, match=r"names 'tower' as the vision tower.* with --base_model"):
        build_card(checkpoint, REPO)
    with pytest.raises(ValueError, match="must name two"):
        build_card(checkpoint, REPO, base_model=["org/language"])
    with pytest.raises(ValueError, match=r"license of org/language is unknown.* with --license"):
        build_card(checkpoint, REPO, base_model=["org/tower", "org/language"])
    write(checkpoint / "training/pretrain.yaml", {"learning_rate": 1})
    with pytest.raises(ValueError, match=r"pretrain.yaml names neither json_path nor stream"):
        build_card(checkpoint, REPO, base_model=["org/tower", "org/language"])
    write(checkpoint / "training/pretrain.yaml", {"json_path": "mine.json"})
    with pytest.raises(ValueError, match=r"data sets of \['mine.json'\] are unknown: .* with --datasets"):
        build_card(checkpoint, REPO, base_model=["org/tower", "org/language"], license="mit")
    for wrong in ("", "two\nlines", "https://huggingface.co/datasets/org/mine", "/home/me/mine", "~/mine", "../mine"):
        with pytest.raises(ValueError, match=r"datasets=.* must be one line: ORG/NAME"):
            build_card(checkpoint, REPO, datasets=[wrong])
    write(checkpoint / "training/pretrain.yaml", {"json_path": "drawings/mine.json"})  # looks like a repository's name
    with pytest.raises(ValueError, match=r"data sets of \['drawings/mine.json'\] are unknown: .* in words"):
        build_card(checkpoint, REPO, base_model=["org/tower", "org/language"], license="mit")
    given = {"base_model": ["org/tower", "org/language"], "license": "mit", "datasets": ["org/mine"]}
    card = build_card(checkpoint, REPO, **given)
    assert (card.data.base_model, card.data.license, card.data.datasets) == tuple(given.values())
    card = build_card(checkpoint, REPO, **{**given, "datasets": ["Our drawings."]})
    assert "Trained on data that is not on the Hub: Our drawings.\n" in section(card, "Training")
    assert card.data.datasets is None and "not on the Hub" not in build_card(checkpoint, REPO, **given).text
    assert table(card, "Training") == table(build_card(checkpoint, REPO, **given), "Training")


def test_a_license_that_is_not_the_language_models_is_refused(checkpoint):
    notice = (
        "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
        "All Rights Reserved."
    )
    text = section(build_card(checkpoint, REPO, license="llama2"), "License")
    assert notice in text and "https://ai.meta.com/llama/license/" in text
    with pytest.raises(ValueError, match=r"license=mit, but that of lmsys/vicuna-7b-v1.5 is llama2"):
        build_card(checkpoint, REPO, license="mit")
    base_model = ["org/tower", "org/language"]
    assert notice not in build_card(checkpoint, REPO, base_model=base_model, license="mit").text
    with pytest.raises(ValueError, match="license=other"):
        build_card(checkpoint, REPO, base_model=base_model, license="other")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sources.yaml", "a: [", "sources.yaml cannot be read"),
        ("finetune.yaml", "- a", "finetune.yaml must hold names and values"),
        ("finetune.json", "{", "finetune.json cannot be read"),
        ("finetune.json", None, "finetune.json cannot be read"),
        ("finetune.json", '{"num_rows": 1}', r"finetune.json lacks \['batch_size', 'log_history', "),
    ],
)
def test_a_record_that_is_missing_or_broken_is_named(checkpoint, file, content, message):
    if content is None:
        (checkpoint / "training" / file).unlink()
    else:
        (checkpoint / "training" / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        build_card(checkpoint, REPO)


def test_what_a_run_has_not_left_is_not_made_up(checkpoint):
    (checkpoint / "training/finetune.png").unlink()
    file = checkpoint / "training/finetune.json"
    write_log(file, {"step": 1})
    with pytest.raises(ValueError, match=r"finetune.json is the log of a run that has not ended"):
        build_card(checkpoint, REPO)
    write_log(file, {"step": 1, "train_runtime": 1.0}, num_rows=None, num_processes=1, batch_size=2)
    write(checkpoint / "training/finetune.yaml", {"stream": "org/stream", "use_peft": True})
    card = build_card(checkpoint, REPO)
    stages = {name: values[1] for name, *values in table(card, "Training")}
    assert stages["last loss"] == "not logged" and stages["length"] == "1 steps of 2 rows, on 1 process"
    assert stages["trained"] == "projector and LoRA" and stages["visual tokens"] == "the model's"
    assert "training/pretrain.png" in card.text and "training/finetune.png" not in card.text


@pytest.mark.parametrize(
    "field",
    [
        "{{ more }}",
        "{{ config.more }}",
        "{% for row in more %}{% endfor %}",
        "{% if more %}{% endif %}",
        "{{ revision }}",  # None
        "{{ stages[0].recipe.nothing }}",
        "{{ stages[0].versions }}",
    ],
)
def test_a_field_that_nobody_fills_is_refused_by_name(checkpoint, monkeypatch, tmp_path, field):
    write(checkpoint / "training/pretrain.yaml", {"json_path": "blip_laion_cc_sbu_558k.json", "nothing": ""})
    write_log(checkpoint / "training/pretrain.json", {"step": 1, "train_runtime": 1.0}, versions={})
    (tmp_path / "card.md").write_text(module.TEMPLATE.read_text() + f"More: {field}\n")
    monkeypatch.setattr(module, "TEMPLATE", tmp_path / "card.md")
    num_lines = len((tmp_path / "card.md").read_text().splitlines())
    with pytest.raises(ValueError, match=rf"card.md, line {num_lines}, .* The line: More: {re.escape(field)}$"):
        build_card(checkpoint, REPO)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_visual_tokens": 25}, "num_visual_tokens is 25, but must be one of"),
        ({"num_visual_tokens": 4}, "and tokens-36.json both have results at 4"),
        ({"toolkit": None}, "toolkit is None"),
        ({"extra": 1}, r"unknown are \['extra'\], missing are \[\]"),
        ({"results": [{**RESULT, "value": float("nan")}]}, r"results\[0\]: value is nan"),
        ({"results": [{**RESULT, "value": "61.25"}]}, r"results\[0\]: value is '61.25'"),
        ({"results": [RESULT, {**RESULT, "value": 1}]}, r"results\[1\]: measures what results\[0\] measures"),
        ({"results": []}, r"results is \[\], but must be .* not empty"),
        ({"weights": {"model.safetensors": "0"}}, "is about other weights than those in"),
        ({"results": [{**RESULT, "unit": "fraction"}]}, r"results\[0\]: unit is 'fraction'"),
        ({"results": [3]}, r"results\[0\]: found 3"),
        ({"results": [{**RESULT, "num_samples": 0}]}, r"results\[0\]: num_samples is 0"),
        ({"results": [{**RESULT, "prompt_variant": "a | b"}]}, r"results\[0\]: prompt_variant is 'a \| b'"),
        ({"results": [dict(list(RESULT.items())[1:])]}, r"results\[0\]: .*missing are \['task'\]"),
    ],
)
def test_results_that_are_not_as_they_must_be_are_refused_by_name(checkpoint, changes, message):
    evaluate(checkpoint, 36, RESULT)
    file = checkpoint / "results/tokens-36.json"
    write(file, {**json.loads(file.read_text()), **changes})
    with pytest.raises(ValueError, match=f"results/tokens-.*{message}"):
        build_card(checkpoint, REPO)


def test_all_that_was_measured_is_shown_once(checkpoint):
    """Also what differs in its prompt, its name or its samples alone."""
    others = [{**RESULT, "prompt_variant": "short", "value": 7}, {**RESULT, "task": "b", "name": "B", "value": 8}]
    others[1]["unit"] = "points"
    evaluate(checkpoint, 36, RESULT, *others)
    evaluate(checkpoint, 4, {**RESULT, "num_samples": 12, "value": 9})
    card = build_card(checkpoint, REPO)
    _, *rows = table(card, "Results")
    assert [row[-3:] for row in rows] == [
        ["12,578", "61.25 %", "-"],
        ["12,578", "7 %", "-"],
        ["12,578", "8", "-"],
        ["12", "-", "9 %"],
    ]
    names = {
        f"{name}, exact_match, 36 visual tokens, prompt {prompt}": value
        for name, prompt, value in (("GQA", "default", 61.25), ("GQA", "short", 7), ("B", "default", 8))
    }
    assert {result.metric_name: result.metric_value for result in ModelCard(str(card)).data.eval_results} == names
    entries = parse_eval_result_entries(yaml.safe_load(module.eval_results_yaml(card)))
    # One for each data set and task of the Hub, which says nothing of prompts
    ((name, value), *_) = names.items()
    found = [(entry.dataset_id, entry.task_id, entry.notes, entry.value) for entry in entries]
    assert found == [("lmms-lab/GQA", "default", name, value)]


def test_costs_of_an_unknown_language_model_are_not_guessed(checkpoint, monkeypatch):
    def unknown(*_):
        raise ValueError("The costs of text_config.model_type='llama' are unknown")

    monkeypatch.setattr(costs, "inference_costs", unknown)
    text = section(build_card(checkpoint, REPO), "What it costs")
    assert "Not computed. The costs of text_config.model_type='llama' are unknown" in text and "|" not in text
