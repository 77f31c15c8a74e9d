"""The training benchmark measures the steps that we train by, of both models alike, and prints what it measured."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from delta_llava.benchmarks import training


CPU = torch.device("cpu")
TINY = training.SIZES["tiny"]
BUDGETS = [144, 36, 16, 9, 4, 1]
CONTESTANTS = [("LLaVA-1.5", 144), *(("Delta-LLaVA", budget) for budget in BUDGETS)]


def test_every_contestant_has_a_row_and_fewer_visual_tokens_take_less(tmp_path, capsys, cells):
    files = ["--output", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    training.main(["--size", "tiny", "--rounds", "2", *files])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "a.json").read_text())
    assert [(row[0], int(row[1])) for row in cells(capsys.readouterr().out)] == 2 * CONTESTANTS
    assert [measured["stage"] for measured in report["stages"]] == [1, 2]
    for measured in report["stages"]:
        rows, text_tokens = measured["rows"], measured["batch"]["text_tokens"]
        assert [(row["model"], row["num_visual_tokens"]) for row in rows] == CONTESTANTS
        assert all(row["tokens"] == 2 * (row["num_visual_tokens"] + text_tokens) for row in rows)
        assert all(len(row["seconds"]) == 2 for row in rows)
        for name in ("flops", "peak_bytes"):
            figures = [row[name] for row in rows[1:]]
            assert figures == sorted(figures, reverse=True)


def test_the_table_has_medians_and_the_papers_ratio_beside_its_own_budgets_only(cells):
    rows = [
        {"model": model, "num_visual_tokens": count, "tokens": tokens, "flops": 3 * 10**12, "seconds": seconds}
        for model, count, tokens, seconds in [
            ("LLaVA-1.5", 576, 600, [1.0, 9.0, 2.0]),
            ("Delta-LLaVA", 144, 200, [0.5, 0.4, 9.0]),
            ("Delta-LLaVA", 36, 100, [0.1, 0.1, 9.0]),
        ]
    ]
    for row, gigabytes in zip(rows, (8, 4, 2), strict=True):
        row["peak_bytes"] = gigabytes * 10**9
    report = {"size": "7b", "device": "H200", "dtype": "bfloat16", "torch": "2", "threads": 1, "rounds": 3}
    report["peak_flops_per_second"] = 6e13
    for stage, ratio in [(1, "0.40"), (2, "0.73")]:
        measured = {"stage": stage, "batch": vars(TINY.batches[stage]), "trained_dtype": "float32", "rows": rows}
        assert cells(training.table(report, measured)) == [
            ["LLaVA-1.5", "576", "2", "1.00", "", "300", "1.00", "8", "1.00", "3", "2%"],
            ["Delta-LLaVA", "144", "0.5", "0.25", ratio, "400", "1.33", "4", "0.50", "3", "10%"],
            ["Delta-LLaVA", "36", "0.1", "0.05", "", "1000", "3.33", "2", "0.25", "3", "50%"],
        ]
        measured["rows"] = [{**row, "num_visual_tokens": min(row["num_visual_tokens"], 144)} for row in rows]
        assert [row[4] for row in cells(training.table(report, measured))] == ["", "", ""]


def test_rows_take_turns_and_recompute_as_in_training(monkeypatch):
    turns = []

    def seconds_of(step, device):
        contestant = step.__self__
        assert all(layer.gradient_checkpointing for layer in contestant.model.model.language_model.layers)
        assert not contestant.model.model.vision_tower.encoder.layers[0].gradient_checkpointing
        turns.append((contestant.name, contestant.inputs.get("num_visual_tokens", 144)))
        return 1.0

    monkeypatch.setattr(training.harness, "seconds_of", seconds_of)
    training.measure(TINY, 1, CPU, rounds=2, progress=tqdm(disable=True))
    assert turns == 2 * CONTESTANTS


@pytest.mark.parametrize(
    ("stage", "trained"),
    [(1, {"multi_modal_projector"}), (2, {"multi_modal_projector", "language_model", "lm_head"})],
)
def test_a_step_moves_what_the_stage_trains_and_nothing_else(stage, trained):
    for contestant in training.make_contestants(TINY, stage, CPU)[:2]:
        outputs = []
        contestant.model.model.vision_tower.register_forward_hook(lambda *args, kept=outputs: kept.append(args[2]))
        before = {name: weight.clone() for name, weight in contestant.model.named_parameters()}
        contestant.step()
        moved = [
            name.removeprefix("model.").split(".")[0]
            for name, weight in contestant.model.named_parameters()
            if not torch.equal(weight, before[name])
        ]
        assert set(moved) == trained
        assert not outputs[0].last_hidden_state.requires_grad  # the tower keeps nothing for a backward pass


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


def test_flops_are_those_of_the_whole_batch_with_all_of_its_attention():
    contestant, batch = training.make_contestants(TINY, 2, CPU)[0], TINY.batches[2]
    flops, tower, text_config = training.model_flops(contestant), TINY.vision_config, TINY.text_config
    with FlopCounterMode(display=False) as counter:  # it does not count the fused attention of a CPU
        contestant.backward(contestant.inputs)
    # Scores and their sum of values, two FLOPs each; backwards, twice as much, through the language model alone
    in_tower = tower.num_hidden_layers * 4 * (144 + 1) ** 2 * tower.hidden_size
    in_language_model = 3 * text_config.num_hidden_layers * 4 * (144 + batch.text_tokens) ** 2 * text_config.hidden_size
    assert flops - counter.get_total_flops() == batch.rows * (in_tower + in_language_model)


@pytest.mark.parametrize(("gigabytes", "dtype"), [(80, torch.bfloat16), (150, torch.float32)])
def test_7b_is_trained_in_float32_where_that_fits(monkeypatch, gigabytes, dtype):
    memory = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    vicuna = nn.Linear(67_000, 100_000, device="meta")
    assert training.language_dtype(vicuna, torch.device("cuda")) == dtype
