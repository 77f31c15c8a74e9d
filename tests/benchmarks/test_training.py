"""The training benchmark measures the steps that we train by, of both models alike, and prints what it measured."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from delta_llava.benchmarks import training


CPU = torch.device("cpu")
TINY = training.SIZES["tiny"]
BUDGETS = [144, 36, 16, 9, 4, 1]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of one run at the tiny size: the raw figures, and the cells of both tables."""
    folder = tmp_path_factory.mktemp("report")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        training.main(
            ["--size", "tiny", "--rounds", "3", "--output", str(folder / "a.json"), "--plot", str(folder / "a.png")]
        )
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    lines = [line for line in output.getvalue().splitlines() if line.startswith(("| LLaVA", "| Delta"))]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return json.loads((folder / "a.json").read_text()), [rows[: len(rows) // 2], rows[len(rows) // 2 :]]


def test_every_row_is_printed_in_order_with_ratios_of_the_raw_figures(report):
    raw, tables = report
    assert [measured["stage"] for measured in raw["stages"]] == [1, 2]
    for measured, table in zip(raw["stages"], tables, strict=True):
        rows = measured["rows"]
        assert [(row["model"], row["num_visual_tokens"]) for row in rows] == [
            ("LLaVA-1.5", 144),
            *(("Delta-LLaVA", budget) for budget in BUDGETS),
        ]
        assert [row[:2] for row in table] == [[row["model"], str(row["num_visual_tokens"])] for row in rows]
        text_tokens = measured["batch"]["text_tokens"]
        for row, cells in zip(rows, table, strict=True):
            seconds, baseline = median(row["seconds"]), median(rows[0]["seconds"])
            assert len(row["seconds"]) == 3
            assert cells[4] == ""  # the paper has another grid
            assert row["tokens"] == 2 * (row["num_visual_tokens"] + text_tokens)
            assert float(cells[3]) == pytest.approx(seconds / baseline, abs=0.006)
            assert float(cells[6]) == pytest.approx(row["tokens"] / rows[0]["tokens"] * baseline / seconds, abs=0.006)
            assert float(cells[8]) == pytest.approx(row["peak_bytes"] / rows[0]["peak_bytes"], abs=0.006)
            utilisation = row["flops"] / seconds / raw["peak_flops_per_second"]
            assert float(cells[10].rstrip("%")) == pytest.approx(100 * utilisation, abs=0.6)


def test_fewer_visual_tokens_take_fewer_flops_and_less_memory(report):
    for measured in report[0]["stages"]:
        for name in ("flops", "peak_bytes"):
            figures = [row[name] for row in measured["rows"][1:]]
            assert figures == sorted(figures, reverse=True)


def test_the_paper_stands_beside_its_own_budgets_only():
    rows = [
        {"model": model, "num_visual_tokens": count, "tokens": 1, "flops": 1, "peak_bytes": 1, "seconds": [1.0]}
        for model, count in [("LLaVA-1.5", 576), ("Delta-LLaVA", 576), ("Delta-LLaVA", 144), ("Delta-LLaVA", 36)]
    ]
    report = {"size": "7b", "device": "H200", "torch": "2", "threads": 1, "peak_flops_per_second": 1.0}
    for stage, ratio in [(1, "0.40"), (2, "0.73")]:
        measured = {"stage": stage, "batch": vars(TINY.batches[stage]), "trained_dtype": "float32", "rows": rows}
        lines = training.table(report, measured).splitlines()[-4:]
        assert [line.split("|")[5].strip() for line in lines] == ["", "", ratio, ""]


def test_rows_take_turns_and_recompute_as_in_training(monkeypatch):
    turns = []

    def seconds_of(step, device):
        contestant = step.__self__
        assert all(layer.gradient_checkpointing for layer in contestant.model.model.language_model.layers)
        assert not contestant.model.model.vision_tower.encoder.layers[0].gradient_checkpointing
        turns.append((contestant.name, contestant.inputs.get("num_visual_tokens")))
        return 1.0

    monkeypatch.setattr(training, "seconds_of", seconds_of)
    training.measure(TINY, 1, CPU, rounds=2, progress=tqdm(disable=True))
    assert turns == 2 * [("LLaVA-1.5", None), *(("Delta-LLaVA", budget) for budget in BUDGETS)]


@pytest.mark.parametrize(
    ("stage", "trained"),
    [(1, {"multi_modal_projector"}), (2, {"multi_modal_projector", "language_model", "lm_head"})],
)
def test_a_step_moves_what_the_stage_trains_and_nothing_else(stage, trained):
    for contestant in training.make_contestants(TINY, stage, CPU)[:2]:
        before = {name: weight.clone() for name, weight in contestant.model.named_parameters()}
        contestant.step()
        moved = [
            name.removeprefix("model.").split(".")[0]
            for name, weight in contestant.model.named_parameters()
            if not torch.equal(weight, before[name])
        ]
        assert set(moved) == trained


@pytest.mark.parametrize("which", [0, 2], ids=["LLaVA-1.5", "Delta-LLaVA"])
def test_the_loss_at_labels_only_has_the_gradients_of_the_models_own(which):
    contestant = training.make_contestants(TINY, 2, CPU)[which]
    contestant.model.eval()  # no drop path
    contestant.backward(contestant.inputs)
    gradients = {name: weight.grad for name, weight in contestant.model.named_parameters()}
    contestant.model.zero_grad()
    contestant.model(**contestant.inputs).loss.backward()
    for name, weight in contestant.model.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-6)


def test_the_frozen_tower_keeps_nothing_for_a_backward_pass():
    for contestant in training.make_contestants(TINY, 1, CPU)[:2]:
        outputs = []
        contestant.model.model.vision_tower.register_forward_hook(lambda *args, kept=outputs: kept.append(args[2]))
        contestant.step()
        assert not outputs[0].last_hidden_state.requires_grad


def count(stage, which):
    """Of a contestant at stage 2's batch: its FLOPs, and what torch counts on the whole batch with fused attention."""
    size = replace(TINY, batches=dict.fromkeys((1, 2), TINY.batches[2]))
    contestant = training.make_contestants(size, stage, CPU)[which]
    flops = training.model_flops(contestant)
    with FlopCounterMode(display=False) as counter:
        contestant.backward(contestant.inputs)
    return flops, counter.get_total_flops()


@pytest.mark.parametrize("which", [0, 3], ids=["LLaVA-1.5", "Delta-LLaVA"])
def test_training_the_language_model_adds_the_flops_of_its_weights_gradients(which):
    batch, text_config = TINY.batches[2], TINY.text_config
    tokens = batch.rows * (batch.text_tokens + {0: 144, 3: 16}[which])
    width, inner = text_config.hidden_size, text_config.intermediate_size
    products = tokens * text_config.num_hidden_layers * (4 * width**2 + 3 * width * inner)
    head = batch.rows * batch.labels * width * text_config.vocab_size
    assert count(2, which)[0] - count(1, which)[0] == 2 * (products + head)


def test_flops_are_those_of_the_whole_batch_with_all_of_its_attention():
    flops, without_fused_attention = count(1, 0)
    batch, tower, text_config = TINY.batches[2], TINY.vision_config, TINY.text_config
    # Scores and their sum of values, two FLOPs each; backwards, twice as much, through the language model alone
    in_tower = tower.num_hidden_layers * 4 * (144 + 1) ** 2 * tower.hidden_size
    in_language_model = 3 * text_config.num_hidden_layers * 4 * (144 + batch.text_tokens) ** 2 * text_config.hidden_size
    assert flops - without_fused_attention == batch.rows * (in_tower + in_language_model)


def test_peak_memory_is_what_one_counts_by_hand():
    def step():
        first = torch.zeros(1_000_000)
        second = first + 1  # the peak: both
        del first
        return torch.cat([second, torch.zeros(500_000)[:10]])[:1].sum()

    held = torch.zeros(250_000)
    peak = training.peak_bytes(step, CPU, [held, held[:10]])
    # `second`, its concatenation with ten numbers, and what those ten are a view of
    assert peak == pytest.approx(4 * (250_000 + 1_000_000 + 1_000_000 + 500_000), abs=1_000)


def test_peak_memory_of_a_training_step_has_weights_states_gradients_and_activations():
    layer = nn.Linear(1_000, 500, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    images = torch.ones(200, 1_000)

    def step():
        layer(images).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    peak = training.peak_bytes(step, CPU, [*layer.parameters(), *states, images])
    weight, inputs, output = 4 * 500_000, 4 * 200_000, 4 * 100_000
    assert peak == pytest.approx(3 * weight + inputs + weight + output, rel=0.01)


def test_7b_without_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        training.main(["--size", "7b"])
    assert "--size 7b needs a CUDA GPU" in capsys.readouterr().err


def test_the_7b_has_the_rows_of_its_recipes():
    recipes = Path(training.__file__).parents[1] / "train" / "recipes" / "vicuna-7b"
    for stage, name in [(1, "pretrain.yaml"), (2, "finetune.yaml")]:
        recipe = yaml.safe_load((recipes / name).read_text())
        assert training.SIZES["7b"].batches[stage].rows == recipe["per_device_train_batch_size"]


@pytest.mark.parametrize(("gigabytes", "dtype"), [(80, torch.bfloat16), (150, torch.float32)])
def test_7b_is_trained_in_float32_where_that_fits(monkeypatch, gigabytes, dtype):
    memory = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    vicuna = nn.Linear(67_000, 100_000, device="meta")
    assert training.language_dtype(vicuna, torch.device("cuda")) == dtype


def test_no_round_is_refused(capsys):
    with pytest.raises(SystemExit):
        training.main(["--size", "tiny", "--rounds", "0"])
    assert "--rounds 0" in capsys.readouterr().err
