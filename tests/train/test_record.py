"""Every result carries the recipes, logs and curves of all stages behind it, and nothing of the machine it ran on."""

import json

import pytest
import yaml
from PIL import Image

from delta_llava.train import finetune, pretrain
from delta_llava.train.recipe import parse_recipe


@pytest.fixture
def assembled(checkpoint, tmp_path):
    """The tiny checkpoint, knowing what it was made from."""
    folder = tmp_path / "models" / "assembled"
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "training").mkdir()
    (folder / "training/sources.yaml").write_text("vision_tower: org/tower\n")
    return folder


def test_recipe_log_and_curves_of_both_stages_travel_with_the_result(run, assembled, tmp_path):
    arguments = ["--hub_token", "hf_secret", "--seed=3"]
    stage_1 = run(pretrain, "stage-1", arguments, model_name_or_path=str(assembled), max_steps=3)
    stage_2 = run(finetune, "stage-2", model_name_or_path=str(stage_1))
    stage_3 = run(finetune, "stage-3", model_name_or_path=str(stage_2))
    files = {f"{stage}.{kind}" for stage in ("pretrain", "finetune", "finetune-2") for kind in ("yaml", "json", "png")}
    folder = stage_3 / "training"
    assert {file.name for file in folder.iterdir()} == files | {"sources.yaml"}
    for earlier in (assembled, stage_1, stage_2):
        for file in (earlier / "training").iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes()

    recipe = yaml.safe_load((folder / "pretrain.yaml").read_text())
    assert recipe["model_name_or_path"] == "assembled" and recipe["json_path"] == "data.json"
    assert (recipe["seed"], recipe["max_steps"], recipe["learning_rate"]) == (3, 3, 0.01)
    assert yaml.safe_load((folder / "finetune-2.yaml").read_text())["model_name_or_path"] == "stage-2"
    log = json.loads((folder / "pretrain.json").read_text())
    assert (log["num_rows"], log["num_processes"]) == (12, 1) and {"torch", "transformers"} < log["versions"].keys()
    assert [entry["step"] for entry in log["log_history"] if "loss" in entry] == [1, 2, 3]
    with Image.open(folder / "finetune.png") as picture:
        assert picture.size == (900, 700)
    for file in folder.glob("*.[yj]*"):
        text = file.read_text()
        assert str(tmp_path) not in text and "hf_secret" not in text


def test_a_repository_of_the_hub_keeps_its_whole_name_and_another_path_its_last():
    stream = ["--stream", "org/dataset", "--model_name_or_path", "org/model", "--max_steps", "1", "--bf16", "false"]
    *_, recipe = parse_recipe([*stream, "--output_dir", "runs/of/mine", "--eval_strategy", "steps"])
    assert recipe == {
        "stream": "org/dataset",
        "model_name_or_path": "org/model",
        "max_steps": 1,
        "bf16": False,
        "output_dir": "mine",
        "eval_strategy": "steps",
    }


def test_a_killed_run_has_its_record_up_to_the_last_checkpoint_and_a_resumed_one_all_of_it(run, monkeypatch, tmp_path):
    def end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt

    def losses():
        log = json.loads((tmp_path / "run/training/finetune.json").read_text())
        return [entry["step"] for entry in log["log_history"] if "loss" in entry]

    options = {"save_strategy": "steps", "save_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr("delta_llava.train.trainer.SaveOnSigterm.on_epoch_end", end)
        with pytest.raises(KeyboardInterrupt):
            run(finetune, "run", **options, max_steps=-1, num_train_epochs=1)
    assert losses() == [1, 2, 3]
    run(finetune, "run", ["--resume_from_checkpoint", "latest"], **options, max_steps=4)
    assert losses() == [1, 2, 3, 4]
