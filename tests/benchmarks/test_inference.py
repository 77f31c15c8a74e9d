"""The inference benchmark times whole answers of both models alike, part by part, and prints what it measured."""

import contextlib
import io
import json
from dataclasses import replace
from statistics import median

import pytest
import torch
from tqdm import tqdm

from delta_llava.benchmarks import inference
from delta_llava.benchmarks.inference import PARTS, Request
from delta_llava.costs import parameter_counts


CPU = torch.device("cpu")
TINY = inference.SIZES["tiny"]
BUDGETS = [144, 36, 1]
CONTESTANTS = [("LLaVA-1.5", 144), *(("Delta-LLaVA", budget) for budget in BUDGETS)]
EAGER = Request(text_tokens=5, new_tokens=4, decoding="eager", device=CPU, dtype=torch.float32)
STATIC, COMPILED = replace(EAGER, decoding="static"), replace(EAGER, decoding="compiled")


@pytest.fixture(scope="module")
def models():
    return inference.make_models(TINY, BUDGETS, CPU, torch.float32)


def make_contestants(models, request=EAGER, batch_size=2, budgets=BUDGETS):
    torch.manual_seed(0)
    return inference.make_contestants(models, budgets, batch_size, request)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of one run at the tiny size: the raw figures, and the table's cells."""
    folder = tmp_path_factory.mktemp("report")
    arguments = ["--size", "tiny", "--device", "cpu", "--budgets", *map(str, BUDGETS), "--batch_sizes", "1", "3"]
    arguments += ["--text_tokens", "5", "--new_tokens", "4", "--rounds", "3"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        inference.main([*arguments, "--output", str(folder / "a.json"), "--plot", str(folder / "a.png")])
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "a.json").read_text()), cells_of(output.getvalue())


def cells_of(table):
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_every_row_is_printed_with_ratios_of_the_raw_figures(report):
    raw, table = report
    assert raw["decoding"] == "eager" and raw["dtype"] == "float32"
    expected = [(batch_size, *contestant) for batch_size in (1, 3) for contestant in CONTESTANTS]
    assert [(row["batch_size"], row["model"], row["num_visual_tokens"]) for row in raw["rows"]] == expected
    assert [(int(cells[0]), cells[1], int(cells[2])) for cells in table] == expected
    for index, (row, cells) in enumerate(zip(raw["rows"], table, strict=True)):
        rows, baseline = row["batch_size"], raw["rows"][index - index % len(CONTESTANTS)]
        for part, cell in zip(PARTS, cells[3:7], strict=True):
            assert len(row["seconds"][part]) == 3 and min(row["seconds"][part]) > 0
            assert float(cell) == pytest.approx(1e3 * median(row["seconds"][part]), rel=0.001)

        def rounds(row, parts):
            return [sum(seconds) for seconds in zip(*(row["seconds"][part] for part in parts), strict=True)]

        def ratio(parts, row=row, baseline=baseline):
            pairs = zip(rounds(row, parts), rounds(baseline, parts), strict=True)
            return median(ours / theirs for ours, theirs in pairs)

        first, whole = rounds(row, PARTS[:3]), rounds(row, PARTS)
        assert float(cells[7]) == pytest.approx(1e3 * median(first), rel=0.001)
        assert float(cells[8]) == pytest.approx(ratio(PARTS[:3]), abs=0.006)
        assert float(cells[9]) == pytest.approx(rows * 3 / median(row["seconds"]["decode"]), rel=0.001)
        assert float(cells[10]) == pytest.approx(1 / ratio(["decode"]), abs=0.006)
        assert float(cells[11]) == pytest.approx(rows * 4 / median(whole), rel=0.001)
        assert float(cells[12]) == pytest.approx(1 / ratio(PARTS), abs=0.006)
        assert cells[13] == ""  # the paper has another grid
        assert float(cells[14]) == pytest.approx(rows / median(whole), rel=0.001)
        assert float(cells[15]) == pytest.approx(row["peak_bytes"] / 1e9, rel=0.01)
        assert float(cells[16]) == pytest.approx(row["peak_bytes"] / baseline["peak_bytes"], abs=0.006)
        assert float(cells[17]) == pytest.approx(row["kv_cache_bytes"] / 1e6, rel=0.001)


def test_a_peak_holds_the_models_weights_and_the_cache(report, models):
    for row in report[0]["rows"]:
        model = models[row["model"] == "Delta-LLaVA"]
        weights = sum(weight.nbytes for weight in model.parameters())
        assert row["peak_bytes"] > weights + row["kv_cache_bytes"]


@pytest.mark.parametrize("request_", [EAGER, STATIC], ids=["eager", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_that_is_held_has_the_bytes_that_are_told(dtype, request_):
    request_ = replace(request_, dtype=dtype)
    models = inference.make_models(TINY, [4], CPU, dtype)
    rows = inference.measure(models, [4], 2, request_, rounds=1, progress=tqdm(disable=True))
    for contestant, row in zip(make_contestants(models, request_, budgets=[4]), rows, strict=True):
        cache = contestant.answer()[1]
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert row["kv_cache_bytes"] == held > 0
        assert int(cache.get_seq_length()) == contestant.num_visual_tokens + 5 + 3


@pytest.mark.parametrize("request_", [EAGER, STATIC], ids=["eager", "static"])
def test_an_answer_has_the_tokens_that_generate_gives_and_no_end(models, request_):
    for contestant in make_contestants(models, request_):
        tokens, _, seconds = contestant.answer()
        again, _, _ = contestant.answer()
        expected = contestant.model.generate(
            **contestant.inputs,
            attention_mask=torch.ones_like(contestant.inputs["input_ids"]),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
        )
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
    for arguments in (["--compile"], ["--static_cache"]):
        inference.main(["--size", "tiny", "--device", "cpu", "--batch_sizes", "1", *arguments])
    assert limits[0] > 1 + len(inference.SIZES["7b"].budgets) and limits[0] > limits[1]


def test_parts_end_where_the_projector_does(models, monkeypatch):
    ticks, log = iter(range(100)), []
    monkeypatch.setattr(inference.time, "perf_counter", lambda: log.append("time") or next(ticks))
    for contestant in make_contestants(models):
        parts = contestant.model.model
        layers = {
            "tower": parts.vision_tower,
            "projector": parts.multi_modal_projector,
            "language": parts.language_model,
        }
        handles = [
            layer.register_forward_hook(lambda *_, name=name: log.append(name)) for name, layer in layers.items()
        ]
        log.clear()
        _, _, seconds = contestant.answer()
        for handle in handles:
            handle.remove()
        # Hooks that were there before the answer's own come first
        assert log == ["time", "tower", "time", "projector", "time", "language", "time", *["language"] * 3, "time"]
        assert seconds == dict.fromkeys(PARTS, 1)
        assert not parts.multi_modal_projector._forward_hooks and not parts.multi_modal_projector._forward_pre_hooks


def test_the_projector_is_left_as_it_was_when_memory_does_not_suffice(models):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for contestant in make_contestants(models):
        handle = contestant.model.model.language_model.register_forward_pre_hook(out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            contestant.answer()
        handle.remove()
        projector = contestant.model.model.multi_modal_projector
        assert not projector._forward_hooks and not projector._forward_pre_hooks


def test_contestants_take_turns(models, monkeypatch):
    turns, answer = [], inference.Contestant.answer

    def noted(self):
        turns.append((self.name, self.num_visual_tokens))
        return answer(self)

    monkeypatch.setattr(inference.Contestant, "answer", noted)
    progress = tqdm(total=4 * len(CONTESTANTS), disable=True)
    inference.measure(models, BUDGETS, 1, EAGER, rounds=2, progress=progress)
    assert turns == 4 * CONTESTANTS


def test_ours_with_all_patches_reads_as_many_tokens_as_the_baseline(models):
    llava, ours = make_contestants(models)[:2]
    assert llava.model.lm_head is ours.model.lm_head
    assert llava.model.model.language_model is ours.model.model.language_model
    assert llava.inputs["input_ids"].shape == ours.inputs["input_ids"].shape == (2, 144 + 5)
    # Ours is trimmed, as an assembled checkpoint is
    towers = [contestant.model.model.vision_tower for contestant in (llava, ours)]
    num_layers = [sum(weight.numel() for weight in tower.encoder.layers.parameters()) for tower in towers]
    assert num_layers[1] == num_layers[0] * ours.model.config.vision_config.num_hidden_layers // 2 < num_layers[0]


def test_weights_made_without_memory_first_are_random_and_buffers_those_of_a_new_model(models):
    for model in models:
        for name, weight in model.named_parameters():
            assert weight.abs().max() < 2, name
            assert weight.ndim == 1 or weight.std() > 0.01, name
        buffers = dict(type(model)(model.config).named_buffers())
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, buffers[name]), name


def test_the_7b_has_the_shapes_of_its_backbones():
    size = inference.SIZES["7b"]
    llava, delta_llava = inference.make_models(size, list(size.budgets), torch.device("meta"), torch.bfloat16)
    counts = parameter_counts(delta_llava.config)
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        part = delta_llava.model.get_submodule(name)
        assert sum(weight.numel() for weight in part.parameters()) == counts[name]
    assert len(delta_llava.model.vision_tower.encoder.layers) == 23
    assert len(llava.model.vision_tower.encoder.layers) == 24
    assert sum(weight.numel() for weight in llava.parameters()) == 7_062_902_784
    for model in (llava, delta_llava):
        assert {(weight.device.type, weight.dtype) for weight in model.parameters()} == {("meta", torch.bfloat16)}


def out_of_memory_at(monkeypatch, fails):
    """Has answers run out of memory whose contestant `fails` names, and tells of each in the list it returns."""
    answer, failed = inference.Contestant.answer, []

    def limited(self):
        contestant = (self.name, self.num_visual_tokens, len(self.inputs["input_ids"]))
        if contestant in fails:
            failed.append(contestant)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return answer(self)

    monkeypatch.setattr(inference.Contestant, "answer", limited)
    return failed


@pytest.mark.parametrize(
    ("fails", "compared"),
    [([("Delta-LLaVA", 144, 3)], True), ([("LLaVA-1.5", 144, 3), ("Delta-LLaVA", 36, 3)], False)],
    ids=["ours", "baseline"],
)
def test_what_does_not_fit_says_so_and_the_rest_goes_on(monkeypatch, tmp_path, capsys, fails, compared):
    failed = out_of_memory_at(monkeypatch, fails)
    arguments = ["--size", "tiny", "--device", "cpu", "--budgets", "144", "36", "--batch_sizes", "1", "3"]
    arguments += ["--text_tokens", "5", "--new_tokens", "2", "--rounds", "1", "--static_cache"]
    inference.main([*arguments, "--plot", str(tmp_path / "a.png"), "--output", str(tmp_path / "a.json")])
    assert failed == fails  # once each: they are not tried again
    table = cells_of(capsys.readouterr().out)
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == len(table) == 6
    for row, cells in zip(rows, table, strict=True):
        is_out = (row["model"], row["num_visual_tokens"], row["batch_size"]) in fails
        assert row["out_of_memory"] == is_out == (row["seconds"] is None) == (row["peak_bytes"] is None)
        assert len(cells) == 18 and float(cells[17]) > 0
        if is_out:
            assert cells[3] == "out of memory" and not any(cells[4:17])
        else:
            has_ratios = row["batch_size"] == 1 or compared
            assert all(bool(cells[column]) == has_ratios for column in (8, 10, 12, 16))
            assert all(float(cells[column]) > 0 for column in (3, 4, 5, 6, 7, 9, 11, 14, 15))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_static_cache_that_did_not_fit_is_given_up(models, monkeypatch):
    made, make = [], inference.make_contestants
    monkeypatch.setattr(inference, "make_contestants", lambda *_: made.extend(make(*_)) or made)
    out_of_memory_at(monkeypatch, [("Delta-LLaVA", 36, 2)])
    inference.measure(models, BUDGETS, 2, STATIC, rounds=1, progress=tqdm(disable=True))
    assert [contestant.num_visual_tokens for contestant in made if contestant.static_cache is None] == [36]


def test_the_paper_stands_beside_its_own_figures_only():
    def table(num_patches, batch_size):
        names = [("LLaVA-1.5", num_patches), *(("Delta-LLaVA", count) for count in (576, 144, 1))]
        rows = [
            {
                "model": model,
                "num_visual_tokens": count,
                "batch_size": batch_size,
                "kv_cache_bytes": 1,
                "out_of_memory": False,
                "peak_bytes": 1,
                "seconds": {part: [1.0] for part in PARTS},
            }
            for model, count in names
        ]
        lengths = {"text_tokens": 68, "new_tokens": 30, "rounds": 1, "rows": rows}
        report = {"size": "7b", "device": "H200", "dtype": "bfloat16", "decoding": "compiled", **lengths}
        return [cells[13] for cells in cells_of(inference.table({**report, "torch": "2", "threads": 1}))]

    assert table(576, 1) == ["1.00", "1.00", "", "1.55"]
    assert table(576, 8) == table(144, 1) == [""] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "tiny", "--rounds", "0"], "--rounds 0: at least 1"),
        (["--size", "tiny", "--new_tokens", "1"], "--new_tokens 1: at least 2"),
        (["--size", "tiny", "--text_tokens", "0"], "--text_tokens 0: at least 1"),
        (["--size", "tiny", "--batch_sizes", "1", "0"], "--batch_sizes 0: at least 1"),
        (["--size", "tiny", "--batch_sizes", "8", "8"], "--batch_sizes 8 8: each may stand there once"),
        (["--size", "tiny", "--budgets", "4", "4"], "--budgets 4 4: each may stand there once"),
        (["--size", "tiny", "--budgets", "64"], "--budgets: num_visual_tokens=64 does not fit a grid of 12x12"),
        (["--size", "tiny", "--plot", "nowhere/a.png"], "--plot nowhere/a.png: there is no folder nowhere"),
        (["--size", "tiny", "--device", "cuda"], "torch finds no CUDA GPU"),
        (["--size", "7b"], "--size 7b needs a CUDA GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(inference, "make_models", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        inference.main(arguments)
    assert message in capsys.readouterr().err
