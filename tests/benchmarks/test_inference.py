"""The inference benchmark times whole answers of both models alike, part by part, and prints what it measured."""

import json
from dataclasses import replace

import pytest
import torch
from tqdm import tqdm

from delta_llava.benchmarks import inference
from delta_llava.benchmarks.inference import PARTS, Request


CPU = torch.device("cpu")
TINY = inference.SIZES["tiny"]
BUDGETS = [144, 36, 1]
CONTESTANTS = [("LLaVA-1.5", 144), *(("Delta-LLaVA", budget) for budget in BUDGETS)]
EAGER = Request(text_tokens=5, new_tokens=4, decoding="eager", device=CPU, dtype=torch.float32)
STATIC, COMPILED = replace(EAGER, decoding="static"), replace(EAGER, decoding="compiled")


@pytest.fixture(scope="module")
def models():
    return inference.harness.make_models(TINY, BUDGETS, CPU, torch.float32)


def make_contestants(models, request=EAGER, batch_size=2, budgets=BUDGETS):
    torch.manual_seed(0)
    return inference.make_contestants(models, budgets, batch_size, request)


def measure(models, request=EAGER, rounds=1):
    return inference.measure(models, BUDGETS, 2, request, rounds, tqdm(disable=True))


def test_every_contestant_has_a_row_with_a_peak_above_its_weights_and_cache(models, tmp_path, capsys, cells):
    arguments = "--size tiny --budgets 144 36 1 --batch_sizes 1 3 --text_tokens 5 --new_tokens 4 --rounds 3".split()
    inference.main([*arguments, "--output", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["decoding"], report["device"], report["dtype"]) == ("eager", "cpu", "float32")
    expected = [(batch_size, *contestant) for batch_size in (1, 3) for contestant in CONTESTANTS]
    assert [(row["batch_size"], row["model"], row["num_visual_tokens"]) for row in report["rows"]] == expected
    assert [(int(row[0]), row[1], int(row[2])) for row in cells(capsys.readouterr().out)] == expected
    for row in report["rows"]:
        assert all(len(row["seconds"][part]) == 3 and min(row["seconds"][part]) > 0 for part in PARTS)
        weights = sum(weight.nbytes for weight in models[row["model"] == "Delta-LLaVA"].parameters())
        assert row["peak_bytes"] > weights + row["kv_cache_bytes"]


def test_the_table_has_medians_and_the_papers_ratio_beside_its_own_figures_only(tmp_path, cells):
    def row(batch_size, model, tokens, seconds=None, slowness=(1, 3, 2), gigabytes=2):
        seconds = seconds and {
            part: [slow * each for slow in slowness] for part, each in zip(PARTS, seconds, strict=True)
        }
        return {
            "batch_size": batch_size,
            "model": model,
            "num_visual_tokens": tokens,
            "kv_cache_bytes": 12_345_678,
            "out_of_memory": seconds is None,
            "peak_bytes": gigabytes * 10**9,
            "seconds": seconds,
        }

    ours = ("Delta-LLaVA", 1, (0.1, 0.05, 0.05, 0.2), (1, 2, 2), 1)
    rows = [
        row(1, "LLaVA-1.5", 576, (0.1, 0.1, 0.2, 0.6)),
        row(1, "Delta-LLaVA", 144),
        row(1, *ours),
        row(8, "LLaVA-1.5", 576),
        row(8, *ours),
    ]
    report = {"size": "7b", "device": "H200", "dtype": "bfloat16", "decoding": "compiled", "torch": "2", "threads": 1}
    report |= {"text_tokens": 68, "new_tokens": 31, "rounds": 3, "rows": rows}
    baseline = "200 200 400 1200 800 1.00 25 1.00 15.5 1.00 1.00 0.5 2 1.00 12.35".split()
    measured = "200 100 100 400 400 0.50 75 3.00 38.75 2.50 1.55 1.25 1 0.50 12.35".split()
    alone = ["200", "100", "100", "400", "400", "", "600", "", "310", "", "", "10", "1", "", "12.35"]
    assert cells(inference.table(report)) == [
        ["1", "LLaVA-1.5", "576", *baseline],
        ["1", "Delta-LLaVA", "144", "out of memory", *[""] * 13, "12.35"],
        ["1", "Delta-LLaVA", "1", *measured],
        ["8", "LLaVA-1.5", "576", "out of memory", *[""] * 13, "12.35"],
        ["8", "Delta-LLaVA", "1", *alone],
    ]
    for row in rows:  # another grid than the paper's
        row["num_visual_tokens"] = min(row["num_visual_tokens"], 144)
    assert [row[13] for row in cells(inference.table(report))] == [""] * 5
    inference.draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("request_", [EAGER, STATIC], ids=["eager", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_that_is_held_has_the_bytes_that_are_reported(dtype, request_):
    request_ = replace(request_, dtype=dtype)
    models = inference.harness.make_models(TINY, BUDGETS, CPU, dtype)
    for contestant, row in zip(make_contestants(models, request_), measure(models, request_), strict=True):
        cache = contestant.answer()[1]
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert row["kv_cache_bytes"] == held > 0
        assert int(cache.get_seq_length()) == contestant.num_visual_tokens + 5 + 3


@pytest.mark.parametrize("request_", [EAGER, STATIC], ids=["eager", "static"])
def test_an_answer_has_the_tokens_that_generate_gives_and_no_end(models, request_):
    for contestant in make_contestants(models, request_):
        tokens, _, seconds = contestant.answer()
        again, _, _ = contestant.answer()
        mask = torch.ones_like(contestant.inputs["input_ids"])
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        expected = contestant.model.generate(**contestant.inputs, attention_mask=mask, **options)
        assert tokens.tolist() == again.tolist() == expected[:, -4:].tolist()
        assert tokens.shape == (2, 4) and tuple(seconds) == PARTS


def test_decoding_is_compiled_whole_once_for_each_cache_and_says_the_same(models, monkeypatch):
    compiled, graphs, torch_compile = [], [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_without_inductor(model, *, mode, **kwargs):
        compiled.append((model, mode))
        return torch_compile(model, backend=backend, **kwargs)

    monkeypatch.setattr(torch, "compile", compile_without_inductor)
    eager = [contestant.answer()[0] for contestant in make_contestants(models)[2:]]
    contestants = make_contestants(models, COMPILED)[2:]
    assert compiled == [(model, "reduce-overhead") for model in models]
    for contestant, tokens in zip(contestants, eager, strict=True):
        for _ in range(2):
            assert contestant.answer()[0].tolist() == tokens.tolist()
    assert len(graphs) == len(contestants)


def test_a_cache_more_than_torch_compiles_by_default_is_compiled_too(monkeypatch):
    limits = []
    monkeypatch.setattr(inference, "measure", lambda *_: limits.append(torch.compiler.config.recompile_limit) or [])
    monkeypatch.setattr(inference, "table", lambda _: "")
    for option in ("--compile", "--static_cache"):
        inference.main(["--size", "tiny", "--batch_sizes", "1", option])
    assert limits[0] > 1 + len(inference.SIZES["7b"].budgets) and limits[0] > limits[1]


def test_parts_end_where_the_projector_does(models, monkeypatch):
    ticks, log = iter(range(100)), []
    monkeypatch.setattr(inference.time, "perf_counter", lambda: log.append("time") or next(ticks))
    for contestant in make_contestants(models):
        parts = contestant.model.model
        named = {"tower": parts.vision_tower, "projector": parts.multi_modal_projector, "text": parts.language_model}
        handles = [part.register_forward_hook(lambda *_, name=name: log.append(name)) for name, part in named.items()]
        log.clear()
        _, _, seconds = contestant.answer()
        for handle in handles:
            handle.remove()
        # Hooks that were there before the answer's own come first
        assert log == ["time", "tower", "time", "projector", "time", "text", "time", *["text"] * 3, "time"]
        assert seconds == dict.fromkeys(PARTS, 1)


def test_contestants_take_turns_until_memory_does_not_suffice(models, monkeypatch):
    turns, made, answer, make = [], [], inference.Contestant.answer, inference.make_contestants
    too_large = {}

    def out_of_memory(*_):
        if turns[-1] in too_large:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def noted(self):
        turns.append((self.name, self.num_visual_tokens))
        return answer(self)

    monkeypatch.setattr(inference.Contestant, "answer", noted)
    monkeypatch.setattr(inference, "make_contestants", lambda *_: made.extend(make(*_)) or made)
    measure(models, rounds=2)
    assert turns == 4 * CONTESTANTS

    turns.clear(), made.clear()
    too_large = CONTESTANTS[2:3]
    handle = models[1].model.language_model.register_forward_pre_hook(out_of_memory)
    rows = measure(models, STATIC, rounds=2)
    handle.remove()
    assert turns == CONTESTANTS + 3 * [each for each in CONTESTANTS if each not in too_large]
    for contestant, row in zip(made, rows, strict=True):
        is_out = row["num_visual_tokens"] == 36
        assert (row["out_of_memory"], row["seconds"] is None, row["peak_bytes"] is None) == (is_out,) * 3
        assert (contestant.static_cache is None) == is_out
        projector = contestant.model.model.multi_modal_projector
        assert not projector._forward_hooks and not projector._forward_pre_hooks
