"""What the benchmarks share measures what it says, of models of the sizes that it names."""

from pathlib import Path

import pytest
import torch
import yaml

from delta_llava.benchmarks import harness, inference, projector, serving, training
from delta_llava.costs import parameter_counts


CPU = torch.device("cpu")
TINY = harness.SIZES["tiny"]


@pytest.fixture(scope="module")
def models():
    return harness.make_models(TINY, [144, 36, 1], CPU, torch.float32)


def test_weights_made_without_memory_first_are_random_and_buffers_those_of_a_new_model(models):
    for model in models:
        for name, weight in model.named_parameters():
            assert weight.abs().max() < 2, name
            assert weight.ndim == 1 or weight.std() > 0.01, name
        buffers = dict(type(model)(model.config).named_buffers())
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, buffers[name]), name


def test_both_models_have_one_language_model_and_read_as_many_tokens(models):
    llava, ours = models
    assert llava.lm_head is ours.lm_head and llava.model.language_model is ours.model.language_model
    for model in models:
        inputs = harness.make_inputs(model.config, 144, harness.Batch(2, text_tokens=5, labels=3), CPU)
        assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [144, 144]
        assert inputs["input_ids"].shape == (2, 144 + 5) and (inputs["labels"] != -100).sum(1).tolist() == [3, 3]
        assert inputs.get("num_visual_tokens") == (144 if model is ours else None)


def test_the_7b_has_the_shapes_of_its_backbones_and_the_rows_of_its_recipes():
    size = harness.SIZES["7b"]
    llava, ours = models = harness.make_models(size, size.budgets, torch.device("meta"), torch.bfloat16)
    assert {(weight.device.type, weight.dtype) for model in models for weight in model.parameters()} == {
        ("meta", torch.bfloat16)
    }
    assert ours.num_parameters() == sum(parameter_counts(ours.config).values())
    assert llava.num_parameters() == 7_062_902_784
    # Ours is trimmed, as an assembled checkpoint is
    assert [len(model.model.vision_tower.encoder.layers) for model in models] == [24, 23]
    recipes = Path(harness.__file__).parents[1] / "train/recipes/vicuna-7b"
    for stage, name in [(1, "pretrain.yaml"), (2, "finetune.yaml")]:
        recipe = yaml.safe_load((recipes / name).read_text())
        assert size.batches[stage].rows == recipe["per_device_train_batch_size"]


def test_peak_memory_is_what_one_counts_by_hand():
    def step():
        first = torch.zeros(1_000_000)
        second = first + 1  # the peak: both
        del first
        return torch.cat([second, torch.zeros(500_000)[:10]])[:1].sum()

    held = torch.zeros(250_000)
    peak = harness.peak_bytes(step, CPU, [held, held[:10], 36])
    # `second`, its concatenation with ten numbers, and what those ten are a view of
    assert peak == pytest.approx(4 * (250_000 + 1_000_000 + 1_000_000 + 500_000), abs=1_000)


def test_a_ratio_is_the_median_of_the_rounds_own():
    assert harness.median_ratio([1, 9, 4], [1, 1, 2]) == 2


REFUSED = {
    "--rounds 0": ((inference, training, projector, serving), "--rounds 0: at least 1"),
    "--batch_size 0": ((projector,), "--batch_size 0: at least 1"),
    "--device cuda": ((inference, projector), "--device cuda: torch finds no CUDA GPU here"),
    "--size 7b": ((inference, training, serving), "--size 7b needs a CUDA GPU"),
    "--new_tokens 1": ((inference,), "--new_tokens 1: at least 2"),
    "--new_tokens 0": ((serving,), "--new_tokens 0: at least 1"),
    "--text_tokens 0": ((inference, serving), "--text_tokens 0: at least 1"),
    "--batch_sizes 1 0": ((inference,), "--batch_sizes 0: at least 1"),
    "--concurrency 4 0": ((serving,), "--concurrency 0: at least 1"),
    "--batch_sizes 8 8": ((inference,), "--batch_sizes 8 8: name each once"),
    "--concurrency 4 4": ((serving,), "--concurrency 4 4: name each once"),
    "--budgets 4 4": ((inference, serving), "--budgets 4 4: name each once"),
    "--budgets 64": ((inference, serving), "--budgets: num_visual_tokens=64 does not fit a grid of 12x12"),
    "--output nowhere/a.json": ((training, serving), "--output nowhere/a.json: there is no folder nowhere"),
    "--plot nowhere/a.png": ((inference, training), "--plot nowhere/a.png: there is no folder nowhere"),
    "": ((serving,), "this needs vLLM, which has an environment of its own: `make .venv-vllm/installed`"),
}


@pytest.mark.parametrize(
    ("script", "options"), [(script, options) for options, (scripts, _) in REFUSED.items() for script in scripts]
)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, script, options):
    monkeypatch.setattr(script, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        script.main(["--size", "tiny", *options.split()])
    assert REFUSED[options][1] in capsys.readouterr().err
