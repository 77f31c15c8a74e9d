"""A run measures what is missing, and leaves files that a card takes. What needs lmms-eval is in test_lmms.py."""

import json
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import yaml
from transformers import LlavaConfig

from delta_llava.evaluation import run as module
from delta_llava.evaluation.checkpoint import locate
from delta_llava.evaluation.suite import read_suite, table
from delta_llava.hub.card import build_card
from delta_llava.results import new_result, read_results, results_file, write_results


ENTRY = {
    "task": "gqa",
    "name": "GQA",
    "dataset": "org/GQA",
    "config": None,
    "split": "testdev",
    "metric": "exact_match",
    "scale": 100,
    "unit": "percent",
    "prompt_variant": "default",
}
POPE = {**ENTRY, "task": "pope", "name": "POPE", "metric": "pope_f1_score", "note": "F1."}
RECALL = {**POPE, "name": "POPE recall", "metric": "pope_recall"}
PUBLISHED = {"model": "Delta-LLaVA 7B", "source": "table 1", "num_visual_tokens": 144, "values": {"POPE": 86.77}}


@pytest.fixture
def suite(tmp_path):
    """`suite(tasks, published)`: a suite's file."""

    def write(tasks=(ENTRY, POPE, RECALL), published=(PUBLISHED,), **more):
        content = {"tasks": list(tasks), "published": list(published), **more}
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "suite.yaml"

    return write


@pytest.fixture
def measured(monkeypatch):
    """What a run has had measured, by a toolkit that finds 0.5 on 3 documents everywhere."""
    calls = []

    def measure(lmms, task, metrics, num_visual_tokens, limit):
        calls.append((task, num_visual_tokens, limit))
        samples = [{metric: {} for metric in metrics} for _ in range(3)]
        results = {task: {f"{metric},none": 0.5 for metric in metrics}}
        return {"results": results, "samples": {task: samples}, "mean_visual_tokens": 8.25}

    monkeypatch.setattr(module, "version", lambda name: "0.7.3")
    monkeypatch.setattr(module, "_load", lambda *arguments: {"model": SimpleNamespace(rank=0)})
    monkeypatch.setattr(module, "_measure", measure)
    return calls


def test_the_papers_suite_reads_and_lies_beside_the_tasks_that_it_adds():
    suite = read_suite(module.SUITE)
    rows = [(row["model"], row["source"], row["num_visual_tokens"]) for row in suite["published"]]
    assert len(set(rows)) == len(rows) and {source for _, source, _ in rows} == {f"table {n}" for n in (1, 2, 3, 5, 6)}
    added = (module.SUITE.parent / "tasks").glob("*.yaml")
    assert suite["include_path"] == str(module.SUITE.parent / "tasks")
    assert {file.stem for file in added} == {"textvqa_val_ocr"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": [{**ENTRY, "scale": "100"}]}, r"tasks\[0\]: scale is '100'"),
        ({"tasks": [{**ENTRY, "unit": "%"}]}, r"tasks\[0\]: unit is '%'"),
        ({"tasks": [{**ENTRY, "extra": 1}]}, r"tasks\[0\]: unknown are \['extra'\]"),
        ({"tasks": [{k: v for k, v in ENTRY.items() if k != "split"}]}, r"missing are \['split'\]"),
        ({"tasks": ["gqa"]}, "found 'gqa' instead of"),
        ({"tasks": [ENTRY, ENTRY]}, "each name once"),
        ({"tasks": []}, "at least one task"),
        ({"published": [{**PUBLISHED, "values": {"QGA": 1}}]}, r"values of \['QGA'\], which no task has"),
        ({"paper": []}, "but nothing else"),
    ],
)
def test_a_wrong_suite_is_refused_by_name_and_place(suite, change, message):
    file = suite(**{"published": (), **change})
    with pytest.raises(ValueError, match=message):
        read_suite(file)


def test_tasks_are_chosen_by_name(suite):
    assert [entry["name"] for entry in read_suite(suite(), ["pope"])["tasks"]] == ["POPE", "POPE recall"]
    with pytest.raises(ValueError, match=r"tasks=\['mmbench'\] are not in .*\['gqa', 'pope', 'pope'\]"):
        read_suite(suite(), ["pope", "mmbench"])


def test_the_table_sets_the_papers_rows_below_what_was_measured_at_the_same_budget(suite):
    rows = [PUBLISHED, {**PUBLISHED, "num_visual_tokens": 36, "values": {"POPE": 85.7}}]
    file = suite(published=[*reversed(rows), {**PUBLISHED, "values": {"GQA": 62.34}}])
    text = table(read_suite(file, ["pope"]), "mine", {4: {"POPE": 80.0}, 36: {"POPE": 81.234}})
    assert text.splitlines() == [
        "| model | source | visual tokens | POPE | POPE recall |",
        "| --- | --- | --: | --: | --: |",
        "| Delta-LLaVA 7B | table 1 | 144 | 86.77 | - |",
        "| mine | measured | 36 | 81.23 | - |",
        "| Delta-LLaVA 7B | table 1 | 36 | 85.70 | - |",
        "| mine | measured | 4 | 80.00 | - |",
        "",
        "- POPE: pope, testdev, pope_f1_score, percent, prompt default. F1.",
        "- POPE recall: pope, testdev, pope_recall, percent, prompt default. F1.",
    ]


def test_a_run_leaves_results_that_the_card_takes(checkpoint, suite, measured, capsys):
    text = module.run(checkpoint, [36, 4], suite=suite())
    # One run of a task gives all its metrics
    assert measured == [("gqa", 36, None), ("pope", 36, None), ("gqa", 4, None), ("pope", 4, None)]
    assert "| measured | 36 | 50.00 | 50.00 | 50.00 |" in text and "| table 1 | 144 | - | 86.77 | - |" in text
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("[1 of 4] gqa at 36 visual tokens") and "left" in said[3]
    content = json.loads(results_file(checkpoint, 4).read_text())
    assert content["toolkit"] == "lmms-eval 0.7.3, bfloat16" and content["commit"] is None
    record = {key: value for key, value in ENTRY.items() if key != "scale"}
    assert content["results"][0] == {**record, "value": 50.0, "num_samples": 3}

    card = build_card(checkpoint, "org/name", base_model=["org/tower", "org/lm"], license="mit", datasets=["org/data"])
    assert "| 50.0 % | 50.0 % |" in card.text and "lmms-eval 0.7.3, bfloat16" in card.text
    (index,) = card.data.to_dict()["model-index"]
    metrics = [metric["type"] for result in index["results"] for metric in result["metrics"]]
    assert metrics == ["exact_match", "pope_f1_score", "pope_recall"]


def test_what_is_measured_already_is_not_measured_again(checkpoint, suite, measured):
    module.run(checkpoint, [36], suite=suite(), tasks=["gqa"])
    text = module.run(checkpoint, [36, 4], suite=suite())
    assert measured == [("gqa", 36, None), ("pope", 36, None), ("gqa", 4, None), ("pope", 4, None)]
    assert "| measured | 36 | 50.00 | 50.00 | 50.00 |" in text
    # Another prompt is another task, and both stay
    module.run(checkpoint, [36], suite=suite([{**ENTRY, "prompt_variant": "terse"}], ()))
    variants = [r["prompt_variant"] for r in json.loads(results_file(checkpoint, 36).read_text())["results"]]
    assert measured[4:] == [("gqa", 36, None)] and variants == ["default"] * 3 + ["terse"]


def test_what_an_interruption_left_is_whole(checkpoint, suite, measured, monkeypatch):
    measure = module._measure

    def interrupted(lmms, task, *arguments):
        if task == "pope":
            raise KeyboardInterrupt
        return measure(lmms, task, *arguments)

    monkeypatch.setattr(module, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.run(checkpoint, [36], suite=suite())
    (file,) = (checkpoint / "results").iterdir()
    assert [record["task"] for record in json.loads(file.read_text())["results"]] == ["gqa"]


def test_a_limited_run_writes_nothing_and_takes_nothing_for_done(checkpoint, suite, measured):
    module.run(checkpoint, [36], suite=suite())
    before = results_file(checkpoint, 36).read_bytes()
    text = module.run(checkpoint, [36, 4], suite=suite(), limit=2)
    assert measured[2:] == [("gqa", 36, 2), ("pope", 36, 2), ("gqa", 4, 2), ("pope", 4, 2)]
    assert "| measured | 4 | 50.00 |" in text
    assert results_file(checkpoint, 36).read_bytes() == before and not results_file(checkpoint, 4).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"model.safetensors": "0" * 64}}, "about other weights"),
        (
            {"toolkit": "lmms-eval 0.7.2, bfloat16"},
            "of toolkit 'lmms-eval 0.7.2, .*, and this is 'lmms-eval 0.7.3, ",
        ),
        ({"toolkit": "lmms-eval 0.7.3, float32"}, "of toolkit '.*, float32', and this is '.*, bfloat16'"),
        ({"commit": "c0ffee"}, "of commit 'c0ffee', and this is None: delete it"),
        ({"results": [{"task": "gqa"}]}, r"results\[0\]: .*missing are \['config', "),
        ({"dtype": "float32"}, r"unknown are \['dtype'\]"),
    ],
)
def test_results_of_something_else_are_not_mixed_in(checkpoint, suite, measured, change, message):
    module.run(checkpoint, [36], suite=suite())
    file = results_file(checkpoint, 36)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        module.run(checkpoint, [4, 36], suite=suite())
    assert len(measured) == 2  # of the first run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_visual_tokens": [36, 7]}, r"num_visual_tokens=\[7\] must be among \[1, 4, 9, 16, 36, 144\]"),
        ({"limit": 0}, "limit=0 must be 1 or more"),
        ({"dtype": "auto"}, r"dtype=auto must be one of \('float32', 'bfloat16', 'float16'\)"),
        ({"revision": "main"}, "is a folder, which has no revision"),
        ({"checkpoint": "no such/folder at all"}, "neither a folder nor a repository"),
        ({"suite": "missing.yaml"}, "missing.yaml cannot be read"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(checkpoint, suite, measured, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        module.run(**{"checkpoint": checkpoint, "num_visual_tokens": [36], "suite": suite(), **arguments})
    assert not measured


def test_results_of_a_hub_checkpoint_need_a_place_and_name_the_commit(
    checkpoint, suite, measured, monkeypatch, tmp_path
):
    monkeypatch.setattr(module, "locate", lambda name, revision: (checkpoint, "c0ffee"))
    with pytest.raises(ValueError, match="org/name is on the Hub: name an --output_dir"):
        module.run("org/name", [36], suite=suite())
    module.run("org/name", [36], suite=suite(), output_dir=tmp_path / "out")
    assert json.loads(results_file(tmp_path / "out", 36).read_text())["commit"] == "c0ffee"
    monkeypatch.setattr(module, "locate", lambda name, revision: (checkpoint, "facade"))
    with pytest.raises(ValueError, match="of commit 'c0ffee', and this is 'facade'"):
        module.run("org/name", [36], suite=suite(), output_dir=tmp_path / "out")
    assert not (checkpoint / "results").exists()


def test_what_is_on_the_hub_is_known_by_its_commit(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        return str(tmp_path / "snapshots/c0ffee")

    monkeypatch.setattr("delta_llava.evaluation.checkpoint.snapshot_download", snapshot_download)
    assert locate("org/name", "tokens-36") == (tmp_path / "snapshots/c0ffee", "c0ffee")
    assert asked == [("org/name", "tokens-36")]
    assert locate(tmp_path) == (tmp_path, None)


def test_what_fastv_cannot_do_is_said_first(tiny_config, tmp_path):
    config = tiny_config()
    backbones = {"vision_config": config.vision_config, "text_config": config.text_config}
    LlavaConfig(**backbones, image_seq_length=144).save_pretrained(tmp_path)
    for wrong, message in (
        ({"num_visual_tokens": [144, 145, 0], "fastv_layer": 1}, r"num_visual_tokens=\[145, 0\] must be from 1 to 144"),
        ({"num_visual_tokens": [144], "fastv_layer": 0}, "fastv_layer=0 must be from 1 to 1"),
        ({"num_visual_tokens": [144], "fastv_layer": 2}, "fastv_layer=2 must be from 1 to 1"),
        ({"num_visual_tokens": [144]}, "model_type='llava', but must have delta_llava without fastv_layer"),
    ):
        with pytest.raises(ValueError, match=message):
            module.run(tmp_path, **wrong)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type='delta_llava', but .* or llava \(LLaVA-1.5\) with it"):
        module.run(tmp_path, [36], fastv_layer=1)


def test_a_cascade_is_a_row_more_and_of_its_calibration(checkpoint, suite, measured):
    calibration = {"num_visual_tokens": [4, 36], "threshold": -0.25}
    (checkpoint / "cascade.json").write_text(json.dumps(calibration))
    text = module.run(checkpoint, [36], suite=suite(), cascade=True)
    assert measured == [("gqa", 36, None), ("pope", 36, None), ("gqa", None, None), ("pope", None, None)]
    assert f"| {checkpoint}, cascade | measured | 8.2 | 50.00 | 50.00 | 50.00 |" in text
    content = json.loads((checkpoint / "results/cascade.json").read_text())
    assert content["toolkit"] == "lmms-eval 0.7.3, bfloat16, 4 visual tokens, and 36 below -0.25 nats"
    assert [record["mean_visual_tokens"] for record in content["results"]] == [8.25] * 3
    assert module.run(checkpoint, [36], suite=suite(), cascade=True) == text and len(measured) == 4
    (checkpoint / "cascade.json").write_text(json.dumps({**calibration, "threshold": -0.5}))
    with pytest.raises(ValueError, match=r"below -0\.25 nats', and this is .* below -0\.5 nats': delete it"):
        module.run(checkpoint, [36], suite=suite(), cascade=True)


def test_results_with_fastv_lie_apart_by_layer(tmp_path):
    assert results_file(tmp_path, 36) == tmp_path / "results/tokens-36.json"
    assert results_file(tmp_path, 36, fastv_layer=2) == tmp_path / "results/fastv-2/tokens-36.json"


def test_without_lmms_eval_the_command_says_what_to_install(checkpoint, suite, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    with pytest.raises(SystemExit, match="error: lmms-eval is missing here: install the extra `lmms`"):
        module.main(["--checkpoint", str(checkpoint), "--num_visual_tokens", "36", "--suite", str(suite())])


@pytest.mark.parametrize("value", [float("nan"), None, "N/A", True])
def test_a_value_that_is_no_number_is_no_result(value):
    with pytest.raises(ValueError, match=r"gqa: exact_match is .* instead of a number"):
        new_result(ENTRY, value, 3)


def test_an_unfinished_write_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "results/tokens-36.json"
    arguments = (file, 36, "lmms-eval 0.7.3, float32", None, {"model.safetensors": "0"})
    write_results(*arguments, [new_result(ENTRY, 0.5, 3)])
    with pytest.raises(TypeError):
        write_results(*arguments, [object()])
    assert [result["value"] for result in read_results(file)["results"]] == [50.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"dataset_path": "org/other"}, "gqa: dataset is 'org/other' in lmms-eval, and 'org/GQA' in the suite"),
        ({"dataset_name": "lite"}, "gqa: config is 'lite'"),
        ({"test_split": "test"}, "gqa: split is 'test'"),
        ({"metric_list": [{"metric": "submission"}]}, r"gqa: metric is 'exact_match' .* \['submission'\]"),
    ],
)
def test_a_suite_must_say_what_lmms_eval_does(change, message):
    task = {"dataset_path": "org/GQA", "test_split": "testdev", "metric_list": [{"metric": "exact_match"}], **change}
    if message is None:
        module.check_task(ENTRY, task)
    else:
        with pytest.raises(ValueError, match=message):
            module.check_task(ENTRY, task)
