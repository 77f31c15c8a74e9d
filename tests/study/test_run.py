"""The study runs what it says, goes on where it stopped, and says of its figures what they allow to say."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from delta_llava import DeltaLlavaConfig, DeltaProjector
from delta_llava.demo.run import BUDGETS
from delta_llava.demo.scenes import write_scenes
from delta_llava.study import run as study_run
from delta_llava.study.projectors import TokenPackerProjector
from delta_llava.study.run import LINES, METHODS, Settings, main, read_rows, run, train, write_report
from delta_llava.train.trainer import DeltaLlavaTrainer


TINY = Settings(train_scenes=12, held_out_scenes=2, pretrain_steps=2, finetune_steps=2, batch_size=4)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, TINY.train_scenes, TINY.held_out_scenes)
    return folder


def test_every_ablation_lacks_what_its_name_says_and_nothing_else():
    def parameters(name):
        with torch.device("meta"):
            return set(DeltaProjector(DeltaLlavaConfig(**METHODS[name].fields)).state_dict())

    everything = parameters("delta")
    for name, part in (
        ("no-delta-projection", ("projection.U", "projection.V")),
        ("no-self-attention", "refinement_block.attention."),
        ("no-refinement-block", "refinement_block."),
    ):
        missing = {key for key in everything if key.endswith(part) or key.startswith(part)}
        assert missing and parameters(name) == everything - missing


def test_every_line_of_the_report_has_runs_that_fill_it():
    filled = {"specialists" if name.startswith("only") else name for name in METHODS}
    assert filled | {f"fastv-{layer}" for layer in study_run.FASTV_LAYERS} == set(LINES)


def test_runs_of_a_seed_train_the_same_batches_and_start_from_the_same_language_model(scenes, tmp_path, monkeypatch):
    seen = {}

    class Watched(DeltaLlavaTrainer):
        def training_step(self, model, inputs, *args):
            pixels, embedding = inputs["pixel_values"].sum().item(), model.lm_head.weight.sum().item()
            seen.setdefault(name, []).append((inputs["input_ids"].tolist(), pixels, embedding))
            return super().training_step(model, inputs, *args)

    monkeypatch.setattr(study_run, "DeltaLlavaTrainer", Watched)
    for name, projector in (("delta", DeltaProjector), ("tokenpacker", TokenPackerProjector)):
        model, _, losses = train(name, 1, TINY, scenes, tmp_path / name)
        assert type(model.model.multi_modal_projector) is projector
        assert not model.training
        assert len(losses) == 2
    assert len(seen["delta"]) == TINY.pretrain_steps + TINY.finetune_steps
    frozen = TINY.pretrain_steps + 1  # steps that are computed before the language model learns
    assert seen["delta"][:frozen] == seen["tokenpacker"][:frozen]
    assert [step[:2] for step in seen["delta"]] == [step[:2] for step in seen["tokenpacker"]]


def test_a_run_answers_at_every_budget_and_the_mlp_by_fastv_too(scenes):
    row = run("mlp", 0, TINY, scenes, threads=1)
    assert {line: list(map(int, budgets)) for line, budgets in row["lines"].items()} == {
        "mlp": [144],
        "fastv-1": [36, 16, 9, 4, 1],
        "fastv-2": [36, 16, 9, 4, 1],
    }
    assert row["settings"] == asdict(TINY)


def test_meteor_is_trained_in_both_stages_and_answers_at_every_budget(scenes, monkeypatch):
    learnt = []

    class Watched(DeltaLlavaTrainer):
        def train(self):
            before = {name: weight.clone() for name, weight in self.model.state_dict().items()}
            output = super().train()
            changed = {
                name for name, weight in self.model.state_dict().items() if not torch.equal(weight, before[name])
            }
            learnt.append({name.removeprefix("model.multi_modal_projector.") for name in changed})
            return output

    monkeypatch.setattr(study_run, "DeltaLlavaTrainer", Watched)
    row = run("meteor", 0, replace(TINY, pretrain_steps=3, finetune_steps=3), scenes, threads=1)
    assert list(map(int, row["lines"]["meteor"])) == list(BUDGETS)
    pretrained, finetuned = learnt
    fusion = {"fusion.mixer.in_proj.weight", "fusion.mixer.A_log", "fusion.mixer.out_proj.weight", "mlp.2.weight"}
    assert fusion <= pretrained and fusion <= finetuned
    # The first stage has nothing but captions to read
    text = {"fusion.text_projection.0.weight", "lm_head.weight"}
    assert not text & pretrained and text <= finetuned
    assert not any("vision_tower" in name for name in pretrained | finetuned)


def test_a_study_goes_on_where_it_stopped(tmp_path, capfd):
    options = [f"--{name}={value}" for name, value in asdict(TINY).items()]
    options += ["--methods", "only-1", "--jobs", "1", "--output_dir", str(tmp_path)]

    def study(*seeds):
        main([*options, "--seeds", *seeds])
        return capfd.readouterr().out, (tmp_path / "rows.jsonl").read_text()

    _, first = study("0")
    (tmp_path / "rows.jsonl").write_text(first + '{"method": "only-1", "se')  # killed while it wrote
    output, both = study("0", "1")
    assert "1 runs are finished" in output and "1 are to be run" in output
    assert both.startswith(first) and [json.loads(row)["seed"] for row in both.splitlines()] == [0, 1]
    assert "Delta-LLaVA, a checkpoint for each budget" in output


def test_rows_of_other_settings_are_not_mixed_in(tmp_path):
    row = {"method": "delta", "seed": 2, "settings": asdict(TINY)}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert read_rows(tmp_path / "rows.jsonl", TINY) == [row]
    with pytest.raises(SystemExit, match=r"delta with seed 2 was run with .*'batch_size': 4.* Name another"):
        main(["--output_dir", str(tmp_path)])


def rows_of(**shares):
    """Rows of seeds, of whose questions a share is answered right at every budget alike, by line."""
    return [
        {
            "method": name,
            "seed": seed,
            "settings": {},
            "losses": [1, 1],
            "seconds": 60,
            "lines": {
                name.replace("_", "-"): {
                    str(budget): {"accuracy": share, "by_type": {"digit": share / 2}} for budget in BUDGETS
                }
            },
        }
        for name, of_seeds in shares.items()
        for seed, share in enumerate(of_seeds)
    ]


def report_of(folder, **shares):
    write_report(rows_of(**shares), 0.264, TINY, folder)
    return (folder / "RESULTS.md").read_text()


def test_the_report_tells_means_and_spreads(tmp_path):
    text = report_of(tmp_path, delta=(0.80, 0.81, 0.82), mlp=(0.9,))
    everything, digits = text.split("## Digits alone")
    assert "| Delta-LLaVA, as released | 81.0 ± 1.0 |" in everything
    assert "| Delta-LLaVA, as released | 40.5 ± 0.5 |" in digits
    assert "| MLP on all patches (LLaVA-1.5) | 90.0 |" in everything  # of one seed there is no spread
    assert "most frequent answer of each type would give 26.4" in text
    assert "LLaVA-Meteor's abstract is our reading of that abstract, no reproduction" in text
    picture = Image.open(tmp_path / "RESULTS.png")
    assert picture.width > 1000 and len(picture.convert("L").getcolors()) > 10


def test_a_claim_holds_only_where_its_interval_leaves_zero_out(tmp_path):
    # Delta-LLaVA less the other, seed by seed: 10, 11 and 12 points; -5, -4 and -3; -3, 0 and 3
    text = report_of(
        tmp_path,
        delta=(0.80, 0.81, 0.82),
        tokenpacker=(0.70, 0.70, 0.70),
        average_pooling=(0.85, 0.85, 0.85),
        resampler=(0.83, 0.81, 0.79),
        no_self_attention=(0.75, 0.76, 0.77),
        delta_paper=(0.5,),
    )
    # t(0.975, 2) = 4.3027 standard errors, of 1/√3 and 3/√3 points
    few = "36, 16, 9, 4, 1"
    assert f"| Delta-LLaVA against TokenPacker | {few} | ahead (table 1) | ahead | **+11.0 ± 2.5** |" in text
    assert f"| Delta-LLaVA against average pooling | {few} | ahead (of M3, table 1) | behind | **-4.0 ± 2.5** |" in text
    assert (
        f"| Delta-LLaVA against learnt queries | {few} | ahead (of MQT, table 1) | cannot tell | +0.0 ± 7.5 |" in text
    )
    assert "| TokenPacker | **-11.0 ± 2.5** |" in text
    # Where all seeds differ by the same, or there is but one, nothing can be said of chance
    assert f"| With self-attention against without | {few} | ahead (table 3) | cannot tell | +5.0 |" in text
    assert f"| The released projector against the paper's equations | {few} | not asked | cannot tell | +30.0 |" in text
    assert f"| With DeltaProjection against without | {few} | ahead (table 3) | not measured |  |" in text
    assert "Of 10 comparisons in which the paper is ahead, 1 came out so here, 1 the other way, and 2 cannot" in text


def test_fastv_is_compared_at_equal_tokens_in_a_layer_too():
    assert study_run.mean_tokens(1, 36) == (144 + 3 * 36) / 4
    claim = next(claim for claim in study_run.CLAIMS if "no more tokens in a layer" in claim.text)
    assert claim.theirs[0] == ("fastv-1", 36)
    assert [budget for _, budget in claim.ours] == [36, 36, 36, 36, 36]  # of means 63, 48, 42.75, 39 and 36.75
