"""The projectors' benchmark times what it says, ours against the same function, and prints what it measured."""

import contextlib
import io
import json
from statistics import median

import pytest
import torch

from delta_llava import DeltaLlavaConfig
from delta_llava.benchmarks import projector as benchmark
from delta_llava.benchmarks.projector import METEOR, PASSES, PLAIN, POOLING, RELEASED, RESIDUAL, TOKEN_PACKER


CPU = torch.device("cpu")
TINY = benchmark.SIZES["tiny"]
BUDGETS = [144, 36, 16, 9, 4, 1]
NAMES = (RESIDUAL, RELEASED, TOKEN_PACKER, POOLING, METEOR, PLAIN)
ROWS = [(name, budget) for budget in BUDGETS for name in NAMES]


@pytest.fixture(scope="module")
def config():
    return DeltaLlavaConfig(vision_config=TINY.vision_config, text_config=TINY.text_config)


@pytest.fixture(scope="module")
def features(config):
    torch.manual_seed(0)
    return torch.randn(2, 144, 32), torch.randn(2, 144, 32 * len(config.memory_feature_layers))


@pytest.fixture
def projectors(config):
    return benchmark.make_projectors(config, CPU, torch.float32)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of one run at the tiny size: the raw figures, and the table's cells."""
    file = tmp_path_factory.mktemp("report") / "projector.json"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        benchmark.main(["--size", "tiny", "--device", "cpu", "--rounds", "3", "--output", str(file)])
    lines = [line for line in output.getvalue().splitlines() if line.startswith("| ")]
    return json.loads(file.read_text()), [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_every_row_is_printed_with_ratios_of_the_raw_figures(report):
    raw, table = report
    rows = {(row["projector"], row["num_visual_tokens"]): row for row in raw["rows"]}
    assert set(rows) == set(ROWS) and len(raw["rows"]) == len(ROWS)
    assert [(cells[1], int(cells[0])) for cells in table] == list(rows)
    for (_, budget), row, cells in zip(rows, rows.values(), table, strict=True):
        for kind, first in zip(PASSES, (2, 6), strict=True):
            seconds = row[kind]["seconds"]
            assert len(seconds) == 3
            assert float(cells[first]) == pytest.approx(1e3 * median(seconds), rel=0.01)
            for column, other in ((first + 1, TOKEN_PACKER), (first + 2, PLAIN)):
                pairs = zip(seconds, rows[other, budget][kind]["seconds"], strict=True)
                assert float(cells[column]) == pytest.approx(median(a / b for a, b in pairs), abs=0.006)
            assert float(cells[first + 3]) == pytest.approx(row[kind]["peak_bytes"] / 1e6, rel=0.01)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_plain_implementation_has_our_tokens_and_our_gradients(projectors, features, budget):
    ours = projectors[RELEASED].train()  # in inference, what cannot matter is left out and gets no gradient
    torch.manual_seed(1)
    for weight in ours.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    wanted = torch.randn(2, budget, 64)
    tokens = ours(*features, budget)
    tokens.backward(wanted)
    gradients = {name: weight.grad for name, weight in ours.named_parameters()}
    ours.zero_grad()
    plain = benchmark.plain_projector(ours, *features, budget)
    plain.backward(wanted)
    torch.testing.assert_close(tokens, plain, rtol=1e-4, atol=1e-4)
    for name, weight in ours.named_parameters():
        scale = weight.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=name)


@pytest.mark.parametrize("dtype", benchmark.TOLERANCES)
def test_agreement_is_checked_at_the_precision_of_the_dtype(projectors, features, dtype):
    ours, inputs = projectors[RELEASED].to(dtype), tuple(tensor.to(dtype) for tensor in features)
    assert benchmark.check_agreement(ours, inputs, 9) <= benchmark.TOLERANCES[dtype]


def test_nothing_is_timed_where_the_two_disagree(config, monkeypatch):
    plain = benchmark.plain_projector
    monkeypatch.setattr(benchmark, "plain_projector", lambda *inputs: 1.1 * plain(*inputs))
    monkeypatch.setattr(benchmark, "seconds_of", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match=r"At num_visual_tokens=36 the projector's tokens differ .* by 0\.09"):
        next(benchmark.measure(config, (36, 9), 1, CPU, torch.float32, rounds=1))


def test_projectors_take_turns(config, monkeypatch):
    turns, make_steps = [], benchmark.make_steps

    def noted(*arguments):
        steps = make_steps(*arguments)
        names = {step: key for key, step in steps.items()}
        monkeypatch.setattr(benchmark, "seconds_of", lambda step, device: turns.append(names[step]) or 1.0)
        return steps

    monkeypatch.setattr(benchmark, "make_steps", noted)
    list(benchmark.measure(config, (9,), 1, CPU, torch.float32, rounds=2))
    assert turns == 2 * [(name, kind) for name in NAMES for kind in PASSES]


def test_forward_alone_keeps_nothing_and_backward_leaves_no_gradients(projectors, features):
    seen = []
    ours = projectors[RELEASED]
    ours.register_forward_hook(lambda module, inputs, tokens: seen.append(tokens.requires_grad))
    ours.mlp[0].weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.any().item()))
    for kind in PASSES:
        benchmark.make_steps(projectors, features, 9)[RELEASED, kind]()
    assert seen == [False, True, True]
    assert all(weight.grad is None for weight in ours.parameters())


def test_a_backward_pass_holds_the_gradients_of_its_projector(report, projectors):
    for row in report[0]["rows"]:
        module = projectors[RELEASED if row["projector"] == PLAIN else row["projector"]]
        gradients = 4 * sum(weight.numel() for weight in module.parameters())
        assert row[PASSES[1]]["peak_bytes"] > max(gradients, row[PASSES[0]]["peak_bytes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--device", "cuda"], "torch finds no CUDA GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main(["--size", "tiny", *arguments])
    assert message in capsys.readouterr().err
