"""The study trains at the rates that its search finds, measures what it says, and goes on where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from delta_llava import DeltaLlavaConfig, DeltaProjector
from delta_llava.cascade import generate
from delta_llava.costs import FLOP_PARTS, inference_costs
from delta_llava.demo import scenes as demo_scenes
from delta_llava.demo.run import BUDGETS
from delta_llava.demo.scenes import write_scenes
from delta_llava.study import report
from delta_llava.study import run as study_run
from delta_llava.study.memory import StudyTrainer
from delta_llava.study.methods import DEMO, FASTV_LAYERS, LINES, METHODS, RATES, SEARCH_SEED, line_of
from delta_llava.study.projectors import TokenPackerProjector
from delta_llava.study.run import Questions, Run, Settings, execute, main, measure_cascades, train, world


TINY = Settings(
    train_scenes=12, validation_scenes=2, held_out_scenes=2, pretrain_steps=2, finetune_steps=2, batch_size=4
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, TINY.train_scenes, TINY.held_out_scenes)
    write_scenes(folder / "validation", 0, TINY.validation_scenes, seed=1)
    return folder


@pytest.fixture
def untrained(scenes, tmp_path, monkeypatch):
    """A model as assembled, whose images sway what it says, its processor, and each stage's settings."""
    stages = []

    class Idle(StudyTrainer):
        def train(self):
            stages.append(self.args)
            return SimpleNamespace(training_loss=0.0)

    def make(run):
        monkeypatch.setattr(study_run, "StudyTrainer", Idle)
        model, processor, _ = train(run, TINY, scenes, tmp_path / run.method)
        with torch.no_grad():
            model.model.multi_modal_projector.mlp[-1].weight.mul_(50)
        return model, processor, stages

    return make


@pytest.mark.parametrize("parent", ["delta", "residual"])
def test_every_ablation_differs_by_what_its_name_says_and_nothing_else(parent):
    def parameters(name):
        method = METHODS[name]
        assert method.family == parent
        with torch.device("meta"):
            return set((method.projector or DeltaProjector)(DeltaLlavaConfig(**method.fields)).state_dict())

    everything = parameters(parent)
    parts = {
        "no-delta-projection": ("projection.U", "projection.V"),
        "no-self-attention": ("refinement_block.attention.",),
        "no-refinement-block": ("refinement_block.",),
        **({"gated": ("text_projection.",), "gate-one": ("text_projection.",)} if parent == "residual" else {}),
    }
    for ablation, left_out in parts.items():
        name = ablation if parent == "delta" else f"residual-{ablation}"
        missing = {key for key in everything if key.endswith(left_out) or key.startswith(left_out)}
        added = {"gate"} if ablation == "gated" else set()
        assert missing and parameters(name) == (everything - missing) | added


def test_every_method_has_a_family_that_is_searched_by_itself():
    families = {method.family for method in METHODS.values()}
    assert families == {
        *("delta", "delta-paper", "residual", "average-pooling", "tokenpacker", "resampler", "mlp", "meteor")
    }
    assert all(METHODS[family].family == family for family in families)
    for name, method in METHODS.items():
        parent = METHODS[method.family]
        assert (method.meteor is None) == (parent.meteor is None), name
        assert method.fields.get("projector_variant") == parent.fields.get("projector_variant"), name


def test_every_line_of_the_report_has_runs_that_fill_it():
    assert {*map(line_of, METHODS), *(f"fastv-{layer}" for layer in FASTV_LAYERS)} == set(LINES)


def test_runs_of_a_seed_train_the_same_batches_and_start_from_the_same_language_model(scenes, tmp_path, monkeypatch):
    seen = {}

    class Watched(StudyTrainer):
        def training_step(self, model, inputs, *args):
            pixels, embedding = inputs["pixel_values"].sum().item(), model.lm_head.weight.sum().item()
            seen.setdefault(name, []).append((inputs["input_ids"].tolist(), pixels, embedding))
            return super().training_step(model, inputs, *args)

    monkeypatch.setattr(study_run, "StudyTrainer", Watched)
    for name, projector, rate in (("delta", DeltaProjector, 1), ("tokenpacker", TokenPackerProjector, 3)):
        model, _, losses = train(Run(name, 1, rate), TINY, scenes, tmp_path / name)
        assert type(model.model.multi_modal_projector) is projector
        assert not model.training
        assert len(losses) == 2
    assert len(seen["delta"]) == TINY.pretrain_steps + TINY.finetune_steps
    frozen = TINY.pretrain_steps + 1  # steps that are computed before the language model learns
    assert seen["delta"][:frozen] == seen["tokenpacker"][:frozen]
    assert [step[:2] for step in seen["delta"]] == [step[:2] for step in seen["tokenpacker"]]


def test_a_run_multiplies_the_recipes_rates_and_the_steps_of_both_stages(untrained):
    *_, stages = untrained(Run("average-pooling", 0, 1 / 3, 2))
    recipes = [yaml.safe_load((DEMO / "recipes" / f"{stage}.yaml").read_text()) for stage in ("pretrain", "finetune")]
    expected = [recipe["learning_rate"] / 3 for recipe in recipes]
    assert [stage.learning_rate for stage in stages] == pytest.approx(expected)
    assert [stage.max_steps for stage in stages] == [2 * TINY.pretrain_steps, 2 * TINY.finetune_steps]


def test_a_run_answers_at_every_budget_and_the_mlp_by_fastv_too(scenes):
    row = execute(Run("mlp", 0, 1), TINY, scenes, threads=1)
    assert {line: list(map(int, budgets)) for line, budgets in row["lines"].items()} == {
        "mlp": [144],
        "fastv-1": [36, 16, 9, 4, 1],
        "fastv-2": [36, 16, 9, 4, 1],
    }
    assert row["settings"] == asdict(TINY)
    cells = [cell for budgets in row["lines"].values() for cell in budgets.values()]
    assert all(cell["by_size"].keys() == {"small", "big"} and 0 <= cell["design"] <= 1 for cell in cells)
    flops = {line: [cell["flops"] for cell in budgets.values()] for line, budgets in row["lines"].items()}
    assert flops["mlp"] + flops["fastv-1"] == sorted(flops["mlp"] + flops["fastv-1"], reverse=True)
    assert all(early < late for early, late in zip(flops["fastv-1"], flops["fastv-2"], strict=True))


def test_a_run_of_the_search_answers_the_validation_split_alone(scenes, monkeypatch):
    monkeypatch.setattr(study_run, "train", lambda *_: (None, None, [0, 0]))
    asked = []
    monkeypatch.setattr(
        Questions, "answer", lambda self, *_: (asked.append(self.images), [row["answer"] for row in self.rows])[::-1]
    )
    row = execute(Run("mlp", SEARCH_SEED, 3), TINY, scenes, threads=1)
    assert asked == [scenes / "validation" / "images"]
    assert row["validation"] == {"144": 1.0} and row["rate"] == 3 and "lines" not in row


@pytest.mark.parametrize("method", ["tokenpacker", "resampler", "residual-gated", "residual-gate-one"])
def test_every_projector_is_trained_and_measured(scenes, method):
    row = execute(Run(method, 0, 1), TINY, scenes, threads=1)
    assert all(cell["flops"] > 0 for cell in row["lines"][method].values()) and len(row["lines"][method]) == len(
        BUDGETS
    )


def test_meteor_is_trained_in_both_stages_and_answers_at_every_budget(scenes, monkeypatch):
    learnt = []

    class Watched(StudyTrainer):
        def train(self):
            before = {name: weight.clone() for name, weight in self.model.state_dict().items()}
            output = super().train()
            changed = {
                name for name, weight in self.model.state_dict().items() if not torch.equal(weight, before[name])
            }
            learnt.append({name.removeprefix("model.multi_modal_projector.") for name in changed})
            return output

    monkeypatch.setattr(study_run, "StudyTrainer", Watched)
    row = execute(Run("meteor", 0, 1), replace(TINY, pretrain_steps=3, finetune_steps=3), scenes, threads=1)
    assert list(map(int, row["lines"]["meteor"])) == list(BUDGETS)
    pretrained, finetuned = learnt
    fusion = {"fusion.mixer.in_proj.weight", "fusion.mixer.A_log", "fusion.mixer.out_proj.weight", "mlp.2.weight"}
    assert fusion <= pretrained and fusion <= finetuned
    # The first stage has nothing but captions to read
    text = {"fusion.text_projection.0.weight", "lm_head.weight"}
    assert not text & pretrained and text <= finetuned
    assert not any("vision_tower" in name for name in pretrained | finetuned)


def test_flops_are_those_of_the_whole_answer(untrained, scenes):
    model, processor, _ = untrained(Run("residual", 0))
    questions = Questions(scenes / "held_out.json")
    row = questions.rows[0]
    new_tokens = len(processor.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) + 1
    prompt = questions.inputs(processor, [row], 36)["input_ids"].shape[1]
    costs = inference_costs(model.config, 36, prompt - 36, new_tokens)
    expected = sum(costs[part] for part in FLOP_PARTS)
    assert questions.count_flops(model, processor, 36) == pytest.approx(expected, rel=0.01)


def test_a_cascade_is_measured_as_the_package_runs_it(untrained, scenes, monkeypatch):
    model, processor, _ = untrained(Run("residual", 0))
    monkeypatch.setattr(study_run, "CASCADES", ((4, 36),))
    monkeypatch.setattr(Questions, "answer_length", staticmethod(lambda *_: 3))
    questions = Questions(scenes / "held_out.json")
    questions.rows = questions.rows[:9]
    answered = {budget: questions.answer(model, processor, budget) for budget in (4, 36)}
    (small, scores), (large, _) = answered.values()
    assert small != large
    # The third of which the model is least sure is right at the larger budget alone
    for index, place in enumerate(np.argsort(scores)):
        questions.rows[place]["answer"] = (small if index >= 3 else large)[place]
    measured = measure_cascades(model, processor, questions, questions, answered)["4-36"]
    assert measured["accuracy"] == 1 and 4 < measured["visual_tokens"] <= 4 + 36 / 3
    inputs = questions.inputs(processor, questions.rows, 4)
    options = {"budgets": (4, 36), "threshold": measured["threshold"]}
    output = generate(model, **inputs, **options, max_new_tokens=3, do_sample=False)
    assert output.visual_tokens_used.double().mean() == measured["visual_tokens"]
    texts = processor.batch_decode(output.sequences, skip_special_tokens=True)
    assert all(questions.grade([text.strip() for text in texts]))


SKETCHED = replace(TINY, validation_scenes=8, held_out_scenes=8)


def row_of(run, settings=SKETCHED):
    """As [`execute`] returns it, of a method that is best at thrice the recipes' rates, or else at one and a third."""
    share = 0.8 if run.rate == (3 if METHODS[run.method].family == "average-pooling" else 1 / 3) else 0.5
    cell = {"accuracy": share, "by_size": {"small": share, "big": share}, "design": share, "flops": 10**6}
    budgets = METHODS[run.method].budgets
    row = {**run._asdict(), "settings": asdict(settings), "world": world(), "losses": [1, 1], "seconds": 60}
    if run.seed == SEARCH_SEED:
        return {**row, "validation": {str(budget): share for budget in budgets}}
    cascade = {"accuracy": share, "visual_tokens": 8, "threshold": -1}
    lines = {line_of(run.method): {str(budget): cell for budget in budgets}}
    return {**row, "lines": lines, "cascades": {"4-36": cascade, "16-144": cascade}}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The command, with runs that train nothing and pictures that show nothing; it returns what was run."""
    drawn, done = [], []

    class Pool(ThreadPoolExecutor):
        def __init__(self, jobs, context, initializer):
            super().__init__(1)

    def render(layout, *_):
        drawn.append(layout)
        return np.zeros((8, 8, 3), np.uint8)

    def start(*options, settings=SKETCHED, broken=None):
        drawn.clear()
        done.clear()

        def execute(run, settings, *_):
            done.append(run)
            if run == broken:
                raise OSError("no space left")
            return row_of(run, settings)

        monkeypatch.setattr(study_run, "execute", execute)
        sizes = [f"--{name}={value}" for name, value in asdict(settings).items()]
        main([*sizes, "--output_dir", str(tmp_path), *options])
        return list(done)

    monkeypatch.setattr(study_run, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(demo_scenes, "render", render)
    monkeypatch.setattr(report, "draw", lambda *_: None)
    start.folder, start.drawn = tmp_path, drawn
    return start


FEW = ("--methods", "delta", "no-self-attention", "average-pooling", "--seeds", "0", "1")


def test_a_study_searches_each_familys_rate_and_runs_all_of_the_family_at_the_best(study):
    done = study(*FEW)
    search, runs = done[:8], done[8:]
    assert set(search) == {Run(family, SEARCH_SEED, rate) for family in ("delta", "average-pooling") for rate in RATES}
    assert set(runs) == {
        Run("average-pooling", SEARCH_SEED, 3, times_steps=2),
        *(Run(name, seed, 1 / 3) for name in ("delta", "no-self-attention") for seed in (0, 1)),
        *(Run("average-pooling", seed, 3) for seed in (0, 1)),
    }
    searched, rows = ((study.folder / name).read_text().splitlines() for name in ("rates.jsonl", "rows.jsonl"))
    assert [len(searched), len(rows)] == [9, 6]
    assert {json.loads(row)["rate"] for row in rows} == {1 / 3, 3}


def test_the_validation_split_shares_no_layout_with_what_is_measured(study):
    defaults = Settings()
    study(*FEW, settings=replace(defaults, train_scenes=12))
    measured, validation = np.split(np.arange(len(study.drawn))[12:], [2 * defaults.held_out_scenes])
    assert len(validation) == 2 * defaults.validation_scenes
    assert not {study.drawn[place] for place in measured} & {study.drawn[place] for place in validation}
    assert all(demo_scenes.is_held_out(study.drawn[place]) for place in validation)


def test_a_study_goes_on_where_it_stopped(study, capsys):
    everything = set(study(*FEW))
    kept = {}
    for name in ("rates.jsonl", "rows.jsonl"):
        text = (study.folder / name).read_text()
        kept[name] = text[: text[:-1].rindex("\n") + 1]
        (study.folder / name).write_text(text[:-20])  # killed while it wrote
    done = study(*FEW)
    assert len(done) == 2 and set(done) < everything
    assert all((study.folder / name).read_text().startswith(text) for name, text in kept.items())
    assert "6 of 6 runs are finished" in capsys.readouterr().out
    assert study(*FEW) == []
    assert study(*FEW, "--seeds", "0", "1", "2") == [
        Run(name, 2, rate) for name, rate in (("delta", 1 / 3), ("no-self-attention", 1 / 3), ("average-pooling", 3))
    ]


def test_a_failed_run_is_named_and_the_others_are_kept(study):
    with pytest.raises(RuntimeError, match=r"1 of 7 runs failed, such as Run\(method='delta', seed=1, .* the others"):
        study(*FEW, broken=Run("delta", 1, 1 / 3))
    assert "5 of 6 runs are finished" in (study.folder / "RESULTS.md").read_text()
    assert study(*FEW) == [Run("delta", 1, 1 / 3)]


def test_rows_of_other_settings_worlds_or_rates_are_not_mixed_in(study, monkeypatch):
    study(*FEW)
    other = replace(SKETCHED, batch_size=5)
    with pytest.raises(SystemExit, match=r"rates.jsonl, line 1: .* seed 100 was run .*'batch_size': 4.* Name another"):
        study(*FEW, settings=other)
    rates = (study.folder / "rates.jsonl").rename(study.folder / "moved")
    with pytest.raises(SystemExit, match=r"rows.jsonl, line 1: .* seed [01] was run .*'batch_size': 4.* Name another"):
        study(*FEW, settings=other)
    rates.rename(study.folder / "rates.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(study_run, "world", lambda: "another")
        with pytest.raises(SystemExit, match=r"line 1: .* was run with .*, not .*'another'"):
            study(*FEW)
    with (study.folder / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps(row_of(Run("no-refinement-block", 0, 1))) + "\n")
    with pytest.raises(SystemExit, match=r"no-refinement-block with seed 0 was run at 1 times .* chose 0.33"):
        study(*FEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seeds", "100"), "seed 100 is that of the search"),
        (("--jobs", "0"), "jobs=0 must be at least 1"),
        (("--held_out_scenes", "1"), r"held_out.json has no question of these types or sizes: .*Draw more scenes"),
    ],
)
def test_what_no_study_can_be_made_of_is_refused(study, options, message):
    with pytest.raises(SystemExit, match=message):
        study(*FEW, *options)


@pytest.mark.parametrize("line", ["5", "{}", '{"method": "gone", "seed": 0}', "{"])
def test_a_line_that_is_not_a_row_is_named(study, line):
    (study.folder / "rows.jsonl").write_text(f"{line}\n")
    with pytest.raises(SystemExit, match=r"rows.jsonl, line 1 is not a row of this study"):
        study(*FEW)


def test_workers_train_and_the_command_prints_the_report(tmp_path, capfd):
    settings = replace(SKETCHED, pretrain_steps=1, finetune_steps=1)
    search = [row_of(Run("delta", SEARCH_SEED, rate), settings) for rate in RATES]
    (tmp_path / "rates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in search))
    options = [f"--{name}={value}" for name, value in asdict(settings).items()]
    main([*options, "--methods", "only-1", "--seeds", "0", "--jobs", "1", "--output_dir", str(tmp_path)])
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["rate"] == 1 / 3 and list(row["lines"]["specialists"]) == ["1"]
    assert "Delta-LLaVA, a checkpoint for each budget" in capfd.readouterr().out


@pytest.mark.slow
def test_an_interrupted_study_ends_its_workers_and_goes_on(tmp_path):
    settings = replace(SKETCHED, train_scenes=8, pretrain_steps=100, finetune_steps=1)
    options = [f"--{name}={value}" for name, value in asdict(settings).items()]
    options += ["--methods", "average-pooling", "--seeds", "0", "--jobs", "2", "--output_dir", str(tmp_path)]
    command = [sys.executable, "-m", "delta_llava.study.run", *options]
    study = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    searched = tmp_path / "rates.jsonl"
    while study.poll() is None and not searched.is_file():
        time.sleep(0.1)
    study.send_signal(signal.SIGINT)
    assert study.wait(timeout=30) == 1 and "the same command goes on" in study.stderr.read()
    until = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):  # of its workers, none is left either
        while time.monotonic() < until:
            os.killpg(study.pid, 0)
            time.sleep(0.1)
    kept = searched.read_text()
    main([*options, "--jobs", "1"])
    assert searched.read_text().startswith(kept) and len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1
