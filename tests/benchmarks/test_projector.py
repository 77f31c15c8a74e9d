"""The projectors' benchmark times what it says, ours against the same function, and prints what it measured."""

import json

import pytest
import torch

from delta_llava import DeltaLlavaConfig
from delta_llava.benchmarks import projector as benchmark
from delta_llava.benchmarks.projector import METEOR, PASSES, POOLING, RELEASED, RESIDUAL, TOKEN_PACKER, TORCHS


CPU = torch.device("cpu")
TINY = benchmark.SIZES["tiny"]
BUDGETS = [144, 36, 16, 9, 4, 1]
NAMES = (RESIDUAL, RELEASED, TOKEN_PACKER, POOLING, METEOR, TORCHS)


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


def test_every_projector_has_a_row_and_backward_holds_its_gradients(projectors, tmp_path, capsys, cells):
    benchmark.main(["--size", "tiny", "--rounds", "2", "--output", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    expected = [[str(budget), name] for budget in BUDGETS for name in NAMES]
    assert [row[:2] for row in cells(capsys.readouterr().out)] == expected
    assert [[str(row["num_visual_tokens"]), row["projector"]] for row in rows] == expected
    for row in rows:
        assert all(len(row[kind]["seconds"]) == 2 for kind in PASSES)
        module = projectors[RELEASED if row["projector"] == TORCHS else row["projector"]]
        gradients = 4 * sum(weight.numel() for weight in module.parameters())
        assert row[PASSES[1]]["peak_bytes"] > max(gradients, row[PASSES[0]]["peak_bytes"])


def test_the_table_has_the_medians_of_rounds_and_of_their_ratios(cells):
    rounds = {RESIDUAL: (0.2, 0.6, 0.3), TOKEN_PACKER: (0.1, 0.2, 0.3), TORCHS: (0.4, 0.6, 0.9)}
    rows = [
        {
            "projector": name,
            "num_visual_tokens": 36,
            PASSES[0]: {"seconds": seconds, "peak_bytes": 5_000_000},
            PASSES[1]: {"seconds": [2 * each for each in seconds], "peak_bytes": 2_340_000},
        }
        for name, seconds in rounds.items()
    ]
    report = {"size": "7b", "device": "cpu", "dtype": "float32", "torch": "2", "threads": 1, "rows": rows}
    assert cells(benchmark.table({**report, "batch_size": 1, "rounds": 3})) == [
        ["36", RESIDUAL, "300", "2.00", "0.50", "5", "600", "2.00", "0.50", "2.34"],
        ["36", TOKEN_PACKER, "200", "1.00", "0.33", "5", "400", "1.00", "0.33", "2.34"],
        ["36", TORCHS, "600", "3.00", "1.00", "5", "1200", "3.00", "1.00", "2.34"],
    ]


@pytest.mark.parametrize("budget", BUDGETS)
def test_torchs_attention_has_our_tokens_and_our_gradients(projectors, features, budget):
    ours = projectors[RELEASED].train()  # in inference, what cannot matter is left out and gets no gradient
    torch.manual_seed(1)
    for weight in ours.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    wanted = torch.randn(2, budget, 64)
    tokens = ours(*features, budget)
    tokens.backward(wanted)
    gradients = {name: weight.grad for name, weight in ours.named_parameters()}
    ours.zero_grad()
    others = benchmark.with_torchs_attention(ours, *features, budget)
    others.backward(wanted)
    torch.testing.assert_close(tokens, others, rtol=1e-4, atol=1e-4)
    for name, weight in ours.named_parameters():
        scale = weight.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=name)


@pytest.mark.parametrize("dtype", benchmark.TOLERANCES)
def test_agreement_is_checked_at_the_precision_of_the_dtype(projectors, features, dtype):
    ours, inputs = projectors[RELEASED].to(dtype), tuple(tensor.to(dtype) for tensor in features)
    assert benchmark.check_agreement(ours, inputs, 9) <= benchmark.TOLERANCES[dtype]


def test_nothing_is_timed_where_the_two_disagree(config, monkeypatch):
    others = benchmark.with_torchs_attention
    monkeypatch.setattr(benchmark, "with_torchs_attention", lambda *inputs: 1.1 * others(*inputs))
    monkeypatch.setattr(benchmark.harness, "seconds_of", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match=r"At num_visual_tokens=36 .* differ by 0\.09"):
        next(benchmark.measure(config, (36, 9), 1, CPU, torch.float32, rounds=1))


def test_projectors_take_turns(config, monkeypatch):
    turns, make_steps = [], benchmark.make_steps

    def noted(*arguments):
        steps = make_steps(*arguments)
        names = {step: key for key, step in steps.items()}
        monkeypatch.setattr(benchmark.harness, "seconds_of", lambda step, device: turns.append(names[step]) or 1.0)
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
