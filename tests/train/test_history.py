"""Every result carries the recipes, logs and curves of all its stages, and nothing about the machine they ran on."""

import json
import shutil

import pytest
import yaml
from PIL import Image

from delta_llava.train import finetune, pretrain
from delta_llava.train.recipe import parse_recipe


@pytest.fixture
def assembled(checkpoint, tmp_path):
    """The tiny checkpoint, with the names of its parts."""
    folder = tmp_path / "models" / "assembled"
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "training").mkdir()
    (folder / "training/sources.yaml").write_text("vision_tower: org/tower\n")
    return folder


def test_recipe_log_and_curves_of_both_stages_travel_with_the_result(run, assembled, tmp_path):
    arguments = ["--hub_token", "hf_secret", "--seed=3", "--weight-decay", "0.5", "--no_gradient_checkpointing"]
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
    assert (recipe["weight_decay"], recipe["gradient_checkpointing"]) == (0.5, False)
    assert yaml.safe_load((folder / "finetune-2.yaml").read_text())["model_name_or_path"] == "stage-2"
    log = json.loads((folder / "pretrain.json").read_text())
    assert (log["num_rows"], log["num_processes"], log["batch_size"]) == (12, 1, 4)
    assert {"torch", "transformers"} < log["versions"].keys()
    assert [entry["step"] for entry in log["log_history"] if "loss" in entry] == [1, 2, 3]
    with Image.open(folder / "finetune.png") as picture:
        assert picture.size == (900, 700)
    for file in folder.glob("*.[yj]*"):
        text = file.read_text()
        assert str(tmp_path) not in text and "hf_secret" not in text


def test_a_repository_of_the_hub_keeps_its_whole_name_and_another_path_its_last():
    stream = ["--stream", "org/dataset", "--model_name_or_path", "org/model", "--max_steps", "1", "--bf16", "false"]
    cache = ["--model_init_kwargs", '{"cache_dir": "/home/me/cache"}']
    recipe = parse_recipe([*stream, *cache, "--output_dir", "runs/of/mine", "--eval_strategy", "steps"]).named
    assert recipe == {
        "stream": "org/dataset",
        "model_name_or_path": "org/model",
        "max_steps": 1,
        "bf16": False,
        "output_dir": "mine",
        "eval_strategy": "steps",
        "model_init_kwargs": {"cache_dir": "cache"},
    }


def test_the_log_is_that_of_the_weights_beside_it(run, assembled, monkeypatch, tmp_path):
    def end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt

    def history():
        folder = tmp_path / "run/training"
        log = json.loads((folder / "finetune.json").read_text()) if (folder / "finetune.json").exists() else None
        steps = log and [entry["step"] for entry in log["log_history"] if "loss" in entry]
        return yaml.safe_load((folder / "finetune.yaml").read_text())["learning_rate"], steps

    options = {"save_strategy": "steps", "save_steps": 1, "model_name_or_path": str(assembled)}
    with monkeypatch.context() as patch:
        patch.setattr("delta_llava.train.trainer.SaveOnSigterm.on_epoch_end", end)
        with pytest.raises(KeyboardInterrupt):
            run(finetune, "run", **options, max_steps=-1, num_train_epochs=1)
    assert history() == (0.01, None)  # no weights yet
    assert (tmp_path / "run/training/finetune.png").exists()
    resume = ["--resume_from_checkpoint", "latest", "--allow_changes"]
    run(finetune, "run", resume, **options, max_steps=4, learning_rate=0.5)
    assert history() == ("0.01, from step 3 on 0.5", [1, 2, 3, 4])
    with monkeypatch.context() as patch:
        patch.setattr("delta_llava.train.trainer.SaveOnSigterm.on_epoch_end", end)
        with pytest.raises(KeyboardInterrupt):
            run(finetune, "run", resume, **options, max_steps=6, learning_rate=0.5)
    assert history() == ("0.01, from step 3 on 0.5", [1, 2, 3, 4])


def test_a_run_into_a_used_folder_leaves_no_history_of_the_earlier_one(run, assembled):
    stage_1 = run(pretrain, "stage-1", model_name_or_path=str(assembled))
    stage_2 = run(finetune, "stage-2", model_name_or_path=str(stage_1))
    run(finetune, "used", model_name_or_path=str(stage_2))
    folder = run(finetune, "used", model_name_or_path=str(stage_1))
    assert not list((folder / "training").glob("finetune-2.*"))
    with pytest.raises(ValueError, match="holds the model to start from"):
        run(finetune, "used", model_name_or_path=str(folder))


def test_a_run_leaves_alone_what_no_run_has_written(run, assembled, tmp_path):
    (tmp_path / "out/training").mkdir(parents=True)
    foreign = ["training/notes.txt", "training/finetune_notes.yaml", "training/finetune-2.txt", "README.md", "a.json"]
    for name in foreign:
        (tmp_path / "out" / name).write_text(name)
    lora = {"use_peft": True, "lora_r": 2, "model_name_or_path": str(assembled)}
    for options in ({"model_name_or_path": str(assembled)}, lora):  # an adapter takes the whole model's place
        folder = run(finetune, **options, max_steps=1)
        assert all((folder / name).read_text() == name for name in foreign)
    assert (folder / "adapter_model.safetensors").exists() and not list(folder.glob("model*.safetensors"))
    assert not (folder / "config.json").exists()


@pytest.mark.parametrize("name", ["training/finetune.yaml", "training/pretrain-2.png", "training/sources.yaml"])
def test_a_run_does_not_replace_what_no_run_has_written(run, tmp_path, name):
    (tmp_path / "out/training").mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ValueError, match=f"output_dir=.* holds {name}, which no run has written"):
        run(finetune)
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_run_does_not_replace_another_model(run, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds .*config\.json, .*model\.safetensors, .* name another folder"):
        run(finetune)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_a_history_that_links_out_of_the_model_is_not_copied(run, assembled, tmp_path):
    (tmp_path / "private.png").write_text("private")
    (assembled / "training/pretrain.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(ValueError, match=r"pretrain\.png leads out of its folder"):
        run(finetune, model_name_or_path=str(assembled))


def test_a_model_without_a_history_is_named(run, caplog):
    run(pretrain)
    assert "does not say what the model was made from" in caplog.text
