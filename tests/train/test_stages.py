"""Both stages train what they shall, end in a checkpoint that loads, and go on where a killed run has stopped."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, LlavaImageProcessor

from delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel, DeltaLlavaProcessor
from delta_llava.train import finetune, pretrain


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
        "training_curves.png",
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
    "packing": ({"packing": True}, "packing=True.* must be False"),
    "sequential": ({"train_sampling_strategy": "sequential"}, "=sequential must be .*'group_by_length'"),
    "no data": ({"json_path": None, "image_folder": None}, "json_path=None.* name the first two"),
    "two sources": ({"stream": "org/data", "max_steps": 2}, "stream=org/data: name the first two"),
    "endless stream": ({"json_path": None, "image_folder": None, "stream": "org/data", "max_steps": -1}, "max_steps"),
    "no model": ({"model_name_or_path": None}, "model_name_or_path is missing"),
    "validation without rows": ({"eval_strategy": "steps"}, "num_eval_rows=0 and eval_strategy=.*steps"),
    "validation of all rows": ({"eval_strategy": "steps", "num_eval_rows": 12}, "leaves nothing of the 12 rows"),
    "quantized without adapters": ({"load_in_4bit": True}, "need use_peft"),
    "nothing to resume": ({"resume_from_checkpoint": True}, "no complete checkpoint"),
    "no latest to resume": ({"resume_from_checkpoint": "latest"}, "no complete checkpoint"),
    "no such checkpoint": (
        {"resume_from_checkpoint": "checkpoint-3"},
        "resume_from_checkpoint=checkpoint-3 is not a complete",
    ),
    "too short for the images": (
        {"max_length": 20, "num_visual_tokens": 144},
        "All 12 rows are longer than max_length=20 at 144",
    ),
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
