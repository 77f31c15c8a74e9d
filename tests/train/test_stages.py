"""Both stages train what they shall, end in a checkpoint that loads, and go on where a killed run has stopped."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, LlavaImageProcessor

from delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel, DeltaLlavaProcessor
from delta_llava.train import finetune, pretrain


RECIPES = sorted((Path(pretrain.__file__).parent / "recipes").glob("*/*.yaml"))


@pytest.fixture
def run(checkpoint, data, tmp_path):
    """Runs a stage on the tiny data with a recipe that is written to a file, and returns the output folder."""

    def run(stage, output_dir="out", arguments=(), **changes):
        stage.main([*recipe(output_dir, **changes), *arguments])
        return tmp_path / output_dir

    def recipe(output_dir, **changes):
        values = {
            "model_name_or_path": str(checkpoint),
            "json_path": str(data[0]),
            "image_folder": str(data[1]),
            "output_dir": str(tmp_path / output_dir),
            "bf16": False,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "max_steps": 2,
            "save_strategy": "no",
            "logging_steps": 1,
            **changes,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        return ["--config", str(tmp_path / "recipe.yaml")]

    run.recipe = recipe
    return run


def changed_parts(before, after):
    """Of which parts the weights differ, and whether all of theirs do."""
    before, after = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {}
    for name, weight in before.items():
        part = name.split(".")[1] if name.startswith("model.") else name.split(".")[0]
        changed.setdefault(part, []).append(not torch.equal(weight, after[name]))
    return {part: all(values) for part, values in changed.items() if any(values)}


def test_the_projector_alone_moves_in_stage_1(run, checkpoint):
    assert changed_parts(checkpoint, run(pretrain, max_steps=4)) == {"multi_modal_projector": True}


def test_projector_and_language_model_move_in_stage_2(run, checkpoint):
    # not every embedding: some tokens do not occur
    expected = {"multi_modal_projector": True, "language_model": True, "lm_head": True}
    assert changed_parts(checkpoint, run(finetune, max_steps=4)) == expected


def test_the_result_is_a_checkpoint_for_the_next_stage_and_for_the_hub(run, checkpoint, tmp_path):
    stage_1 = run(pretrain, "stage-1", ["--num_visual_tokens", "1", "4", "144"], save_strategy="steps", save_steps=1)
    stage_2 = run(finetune, "stage-2", model_name_or_path=str(stage_1))
    files = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "configuration_delta_llava.py",
        "modeling_delta_llava.py",
        "processing_delta_llava.py",
        "processor_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in stage_1.iterdir()} == files | {"checkpoint-1", "checkpoint-2"}
    assert {path.name for path in stage_2.iterdir()} == files
    for folder, image_processor in [(stage_1, CLIPImageProcessor), (stage_2, LlavaImageProcessor)]:
        config = json.loads((folder / "config.json").read_text())
        # 36, the default of the model that stage 1 started from, was not trained: the largest that was is
        assert (config["visual_token_budgets"], config["num_visual_tokens"]) == ([1, 4, 144], 144)
        processor = DeltaLlavaProcessor.from_pretrained(folder)
        assert processor.num_visual_tokens == 144
        assert isinstance(processor.image_processor, image_processor)
        assert processor.chat_template == DeltaLlavaProcessor.from_pretrained(checkpoint).chat_template
    assert processor.image_processor.do_pad

    fresh = subprocess.run(
        [sys.executable, "-c", ANSWER, stage_2],
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout.startswith("transformers_modules.")


ANSWER = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(images=Image.new("RGB", (9, 5)), text="<image>?", return_tensors="pt")
model.generate(**inputs, max_new_tokens=2)
print(type(model).__module__)
"""


def test_each_batch_is_seen_at_one_of_the_budgets(run, monkeypatch):
    seen = []

    def watch(self, pixel_values, num_visual_tokens, original=DeltaLlavaModel.get_image_features, **kwargs):
        seen.append(set(num_visual_tokens.tolist()))
        return original(self, pixel_values, num_visual_tokens, **kwargs)

    monkeypatch.setattr(DeltaLlavaModel, "get_image_features", watch)
    run(finetune, num_visual_tokens=[1, 4], max_steps=6)
    assert len(seen) == 12
    assert all(len(budgets) == 1 for budgets in seen)
    assert set.union(*seen) == {1, 4}


BAD_RECIPES = {
    "unknown key": ({"num_visual_token": 4}, "num_visual_token"),
    "budget of no grid": ({"num_visual_tokens": [4, 25]}, r"num_visual_tokens=25 .*\[1, 4, 9, 16, 36, 144\]"),
    "missing json": ({"json_path": "none.json"}, "json_path=none.json is not a file"),
    "missing folder": ({"image_folder": "none"}, "image_folder=none is not a folder"),
    "packing": ({"packing": True}, "packing=True.* must be left at False"),
    "grouping": ({"train_sampling_strategy": "group_by_length"}, "=group_by_length must be left"),
    "nothing to resume": ({"resume_from_checkpoint": True}, "no complete checkpoint"),
    "no latest to resume": ({"resume_from_checkpoint": "latest"}, "no complete checkpoint"),
    "no such checkpoint": (
        {"resume_from_checkpoint": "checkpoint-3"},
        "resume_from_checkpoint=checkpoint-3 is not a complete",
    ),
    "too short for the images": ({"max_length": 20, "num_visual_tokens": 144}, "image tokens beyond max_length=20"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_RECIPES.values(), ids=BAD_RECIPES)
@pytest.mark.parametrize("stage", [pretrain, finetune])
def test_a_bad_recipe_is_refused_before_any_weight_is_loaded(run, monkeypatch, stage, changes, message):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(DeltaLlavaForConditionalGeneration, "from_pretrained", load)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(stage, **changes)


def test_bad_data_stops_the_run_and_its_list_lies_in_the_output_folder(run, data, tmp_path):
    records = json.loads(data[0].read_text())
    records[3]["image"] = "none.png"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match="1 of the 12 records"):
        run(pretrain, json_path=str(tmp_path / "bad.json"))
    assert json.loads((tmp_path / "out" / "bad_records.jsonl").read_text())["id"] == "scene-3"
    output_dir = run(pretrain, json_path=str(tmp_path / "bad.json"), skip_bad_records=True)
    assert (output_dir / "model.safetensors").exists()


ELASTIC = {
    "num_visual_tokens": [1, 4, 16],
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 9,
    "dataloader_num_workers": 1,
}

# Step 6 is the end of the second epoch of six batches, each step takes two
KILLED_BETWEEN_CHECKPOINTS = """
import os, signal, sys
from delta_llava.train import finetune, trainer
def training_step(self, *args, original=trainer.SFTTrainer.training_step, **kwargs):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
trainer.DeltaLlavaTrainer.training_step = training_step
finetune.main(sys.argv[1:])
"""
KILLED_IN_A_CHECKPOINT = """
import os, signal, sys
from delta_llava.train import finetune, trainer
def save_rng_state(self, output_dir, original=trainer.SFTTrainer._save_rng_state):
    if self.state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, output_dir)
trainer.DeltaLlavaTrainer._save_rng_state = save_rng_state
finetune.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return tmp_path_factory.mktemp("unbroken")


@pytest.mark.parametrize(
    ("killed_run", "left", "complete"),
    [(KILLED_BETWEEN_CHECKPOINTS, [2, 4], 4), (KILLED_IN_A_CHECKPOINT, [2, 4, 6, 8], 6)],
    ids=["killed between checkpoints", "killed in a checkpoint"],
)
def test_a_killed_run_resumes_to_the_weights_of_an_unbroken_one(run, unbroken, tmp_path, killed_run, left, complete):
    if not any(unbroken.iterdir()):
        shutil.copytree(run(finetune, "unbroken", **ELASTIC), unbroken, dirs_exist_ok=True)

    arguments = [sys.executable, "-c", killed_run, *run.recipe("killed", **ELASTIC)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [f"checkpoint-{step}" for step in left]

    resumed = run(finetune, "killed", ["--resume_from_checkpoint", "latest"], **ELASTIC)
    logged = json.loads((resumed / "checkpoint-9" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logged if "loss" in entry] == list(range(1, 10))
    assert not (resumed / "bad_records.jsonl").exists()
    for step in range(complete + 2, 9, 2):
        assert (resumed / f"checkpoint-{step}" / "trainer_state.json").exists()
    assert (resumed / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


@pytest.mark.parametrize("recipe", RECIPES, ids=[f"{path.parent.name}/{path.stem}" for path in RECIPES])
def test_recipes_have_the_batch_size_of_llava(recipe):
    values = yaml.safe_load(recipe.read_text())
    batch_size = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * 8
    assert batch_size == {"pretrain": 256, "finetune": 128}[recipe.stem]
