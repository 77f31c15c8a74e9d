"""Both stages train what they should, end in a checkpoint that loads, and refuse bad recipes before loading weights."""

import json
import runpy
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, LlavaImageProcessor

from delta_llava import (
    DeltaLlavaConfig,
    DeltaLlavaForConditionalGeneration,
    DeltaLlavaModel,
    DeltaLlavaProcessor,
    train,
)
from delta_llava.hub.merge_adapter import merge_adapter
from delta_llava.train import batches, finetune, pretrain, trainer


@pytest.mark.parametrize(
    ("stage", "parts"),
    # not every embedding in stage 2: some tokens do not occur
    [(pretrain, {"multi_modal_projector"}), (finetune, {"multi_modal_projector", "language_model", "lm_head"})],
)
def test_the_trained_parts_move_and_nothing_else(run, checkpoint, stage, parts):
    before = load_file(checkpoint / "model.safetensors")
    after = load_file(run(stage, max_steps=4) / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        part = name.removeprefix("model.").split(".")[0]
        assert torch.equal(weight, after[name]) != (part in parts), name


def test_the_result_is_a_checkpoint_for_the_next_stage_and_for_the_hub(run, checkpoint, in_fresh_process):
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
        "training",
    }
    assert {path.name for path in stage_1.iterdir()} == files | {"checkpoint-1", "checkpoint-2"}
    assert {path.name for path in stage_2.iterdir()} == files
    for folder, image_processor in [(stage_1, CLIPImageProcessor), (stage_2, LlavaImageProcessor)]:
        config = json.loads((folder / "config.json").read_text())
        # 36, the default of the model that stage 1 started from, was not trained: the largest that was is
        assert (config["visual_token_budgets"], config["num_visual_tokens"]) == ([1, 4, 144], 144)
        processor = DeltaLlavaProcessor.from_pretrained(folder)
        assert (processor.visual_token_budgets, processor.num_visual_tokens) == ([1, 4, 144], 144)
        assert isinstance(processor.image_processor, image_processor)
        assert processor.chat_template == DeltaLlavaProcessor.from_pretrained(checkpoint).chat_template
    assert processor.image_processor.do_pad
    # There it would win over what a branch of another budget says
    assert "num_visual_tokens" not in (stage_2 / "tokenizer_config.json").read_text()

    assert in_fresh_process(ANSWER.format(folder=str(stage_2))).startswith("transformers_modules.")


ANSWER = """
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({folder!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({folder!r}, trust_remote_code=True)
inputs = processor(images=Image.new("RGB", (9, 5)), text="<image>?", return_tensors="pt")
model.generate(**inputs, max_new_tokens=2)
print(type(model).__module__)
"""


@pytest.fixture
def seen(monkeypatch):
    """The budgets of each batch of images that the model sees."""
    budgets = []

    def watch(self, pixel_values, num_visual_tokens, original=DeltaLlavaModel.get_image_features, **kwargs):
        budgets.append(tuple(num_visual_tokens.tolist()))
        return original(self, pixel_values, num_visual_tokens, **kwargs)

    monkeypatch.setattr(DeltaLlavaModel, "get_image_features", watch)
    return budgets


def test_each_batch_is_seen_at_one_of_the_budgets(run, seen):
    run(finetune, num_visual_tokens=[1, 4], max_steps=6)
    assert len(seen) == 12
    assert set(seen) == {(1, 1), (4, 4)}


def test_a_batch_that_draws_auto_gives_each_image_the_budget_of_its_size(run, data, tmp_path, seen):
    folder = shutil.copytree(data[1], tmp_path / "sizes")
    for number in range(0, 12, 2):
        Image.new("RGB", (8, 5)).save(folder / f"{number}.png")  # of two patches, the others of five and more
    out = run(finetune, "out", ["--num_visual_tokens", "16", "auto", "4"], image_folder=str(folder), max_steps=6)
    assert {(4, 4), (16, 16)} < set(seen) <= {(4, 4), (4, 16), (16, 4), (16, 16)}
    assert json.loads((out / "config.json").read_text())["visual_token_budgets"] == [4, 16]
    recipe = yaml.safe_load((out / "training/finetune.yaml").read_text())
    assert recipe["num_visual_tokens"] == [16, "auto", 4]
    seen.clear()
    run(finetune, "again", model_name_or_path=str(out), num_visual_tokens="auto", max_steps=3)
    assert set(seen) <= {(4, 4), (16, 16)}  # of the model's own budgets


BAD_RECIPES = {
    "unknown key": ({"num_visual_token": 4}, "num_visual_token"),
    "budget of no grid": ({"num_visual_tokens": [4, 25]}, r"num_visual_tokens=25 .*\[1, 4, 9, 16, 36, 144\]"),
    "auto of nothing": (
        {"num_visual_tokens": [144, "auto", 36]},
        r"=\[36, 144, 'auto'\]: 'auto' would be 36 for every",
    ),
    "no budget": ({"num_visual_tokens": [4, "Auto"]}, r"num_visual_tokens=Auto .*\[1, 4, 9, 16, 36, 144\]"),
    "missing json": ({"json_path": "none.json"}, "json_path=none.json is not a file"),
    "missing folder": ({"image_folder": "none"}, "image_folder=none is not a folder"),
    "packing": ({"packing": True}, "packing=True.* must be left out"),
    "padding to multiples": ({"pad_to_multiple_of": 8}, "pad_to_multiple_of=8 must be left out"),
    "sequential": ({"train_sampling_strategy": "sequential"}, "=sequential must be 'random' or 'group_by_length'"),
    "no data": ({"json_path": None, "image_folder": None}, "json_path=None.* name the first two"),
    "two sources": ({"stream": "org/data", "max_steps": 2}, "stream=org/data: name the first two"),
    "endless stream": ({"json_path": None, "image_folder": None, "stream": "org/data", "max_steps": -1}, "max_steps"),
    "no model": ({"model_name_or_path": None}, "model_name_or_path is missing"),
    "no such model": ({"model_name_or_path": "runs/vicuna/stage1"}, "runs/vicuna/stage1 is not a folder: name what"),
    "validation without rows": ({"eval_strategy": "steps"}, "num_eval_rows=0 and eval_strategy=.*steps"),
    "two validations": (
        {"eval_strategy": "steps", "num_eval_rows": 2, "eval_json_path": "eval.json"},
        "eval_json_path=eval.json and num_eval_rows=2: name one",
    ),
    "a configuration of a file": ({"dataset_config": "one"}, "dataset_config=one has no effect on .*data.json"),
    "validation of all rows": (
        {"eval_strategy": "steps", "num_eval_rows": 12},
        "num_eval_rows=12 leaves none of the 12 rows with images",
    ),
    "quantized without adapters": ({"load_in_4bit": True}, "need use_peft"),
    "rank without adapters": ({"lora_r": 64}, "lora_r=64 has no effect without use_peft"),
    "quantization type without quantization": (
        {"use_peft": True, "bnb_4bit_quant_type": "fp4"},
        "bnb_4bit_quant_type=fp4 has no effect without load_in_4bit",
    ),
    "validation steps without validation": ({"eval_steps": 5}, "eval_steps=5 has no effect without eval_strategy"),
    "loss on all tokens": ({"assistant_only_loss": False}, "only on answers"),
    "no training": ({"do_train": False}, "A run trains"),
    "dtype of its own": ({"dtype": "bfloat16"}, "dtype=bfloat16, but bf16 and fp16 decide it: float32"),
    "one best metric": ({"save_strategy": "best", "metric_for_best_model": "loss"}, "metric_for_best_model=loss would"),
    "a plateau of one metric": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "num_eval_rows": 2, "eval_strategy": "steps", "eval_steps": 1},
        "need one metric",
    ),
    "best model": (
        {
            "load_best_model_at_end": True,
            "num_eval_rows": 2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
        },
        "load_best_model_at_end=True would have no effect",
    ),
    "push": ({"push_to_hub": True}, "python -m delta_llava.hub.push"),
    "template that is none": ({"chat_template_path": "org/model"}, r"chat_template_path=org/model must be a file"),
    **{
        f"{name} without effect": ({name: value}, f"{name}=.* would have no effect: .*Leave it out")
        for name, value in {
            "completion_only_loss": True,
            "dataloader_in_order": False,
            "eos_token": "</s>",
            "hub_model_id": "org/model",
            "include_for_metrics": ["loss"],
            "model_init_kwargs": {"dtype": "float16"},
            "pad_token": "<unk>",
            "shuffle_dataset": True,
            "use_liger_kernel": True,
        }.items()
    },
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
def test_a_bad_recipe_is_refused_before_any_weight_is_loaded(run, monkeypatch, changes, message):
    monkeypatch.setattr("delta_llava.train.stage.load_model", None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(finetune, **changes)


@pytest.mark.parametrize("changes", [{"use_peft": True}, {"chat_template_path": "plain.jinja"}])
def test_stage_1_has_neither_adapters_nor_a_template_of_its_own(run, tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.jinja").touch()
    monkeypatch.setattr("delta_llava.train.stage.load_model", None)
    with pytest.raises(ValueError, match=f"{next(iter(changes))} has no place in stage 1"):
        run(pretrain, **changes)


@pytest.mark.parametrize("stage", [pretrain, finetune])
def test_a_stage_that_is_started_as_a_file_names_its_command(stage):
    with pytest.raises(SystemExit, match=f"python -m {stage.__name__}$"):
        runpy.run_path(stage.__file__, run_name="__main__")


def test_training_without_its_packages_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "delta-llava\[train\]"'):
        runpy.run_path(train.__file__)


def test_bad_data_stops_the_run_and_its_list_lies_in_the_output_folder(run, data, tmp_path):
    records = json.loads(data[0].read_text())
    records[3]["image"] = "none.png"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match="1 of the 12 records"):
        run(pretrain, json_path=str(tmp_path / "bad.json"))
    assert json.loads((tmp_path / "out" / "bad_records.jsonl").read_text())["id"] == "scene-3"
    output_dir = run(pretrain, json_path=str(tmp_path / "bad.json"), skip_bad_records=True)
    assert (output_dir / "model.safetensors").exists()


def test_stage_1_refuses_a_second_question(run, data):
    with pytest.raises(ValueError, match=r"14 of the 20 records.*\n.*scene-1.*one question and one answer"):
        run(pretrain, json_path=str(data[1] / "mixed.json"))


def test_fully_sharded_training_refuses_batches_with_and_without_images(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.DeltaLlavaTrainer, "_is_fully_sharded", lambda self: True)
    records = json.loads((data[1] / "mixed.json").read_text())
    (tmp_path / "few.json").write_text(json.dumps(records[:13]))
    options = {"json_path": str(tmp_path / "few.json"), "per_device_train_batch_size": 4}
    for strategy in ("random", "group_by_length"):
        with pytest.raises(ValueError, match=r"1 of 13 rows have no image\. FSDP .* at least half of a batch of 4"):
            run(finetune, **options, train_sampling_strategy=strategy)
    with pytest.raises(ValueError, match=r"num_visual_tokens=\[4, 36, 'auto'\]: FSDP and ZeRO-3 wait forever"):
        run(finetune, num_visual_tokens=[4, 36, "auto"])


def test_a_validation_file_of_ones_own_is_validated_on(run, data, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("delta_llava.train.stage.logger.warning", warnings.append)
    options = {"eval_strategy": "steps", "eval_steps": 1, "num_visual_tokens": [4, 36], "save_strategy": "steps"}
    output_dir = run(finetune, **options, eval_json_path=str(data[1] / "mixed.json"), save_steps=2)
    history = json.loads((output_dir / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_4_loss" in entry for entry in history) == sum("eval_36_loss" in entry for entry in history) == 2
    assert [warning for warning in warnings if "8 of the 20 rows in" in warning and "have no image" in warning]
    records = json.loads(data[0].read_text())
    (tmp_path / "bad.json").write_text(json.dumps([{**records[0], "image": "none.png"}, *records]))
    with pytest.raises(ValueError, match=r"1 of the 13 records in .*bad\.json are bad"):
        run(finetune, "bad", **options, eval_json_path=str(tmp_path / "bad.json"))
    assert json.loads((tmp_path / "bad" / "bad_eval_records.jsonl").read_text())["index"] == 0


def test_mixed_precision_trains_in_float32_and_saves_in_bfloat16(run, monkeypatch):
    seen = {}

    def training_step(self, model, *args, original=trainer.SFTTrainer.training_step, **kwargs):
        for name, weight in model.named_parameters():
            seen[name] = (weight.requires_grad, weight.dtype)
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer.SFTTrainer, "training_step", training_step)
    for stage in (pretrain, finetune):
        folder = run(stage, stage.__name__, bf16=True, use_cpu=True)
        assert set(seen.values()) == {(True, torch.float32), (False, torch.bfloat16)}
        assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_validation_is_at_every_budget_on_rows_with_images_that_are_not_trained_on(run, data, monkeypatch):
    seen, phase = {"train": [], "evaluate": []}, ["train"]

    def collate(self, rows, original=batches.Collator.__call__):
        seen[phase[-1]] += [(str([image.size for image in row["images"]]), row["num_visual_tokens"]) for row in rows]
        return original(self, rows)

    def evaluate(self, *args, original=trainer.SFTTrainer.evaluate, **kwargs):
        phase.append("evaluate")
        result = original(self, *args, **kwargs)
        phase.pop()
        return result

    monkeypatch.setattr(batches.Collator, "__call__", collate)
    monkeypatch.setattr(trainer.SFTTrainer, "evaluate", evaluate)
    options = {"num_eval_rows": 4, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    options |= {"max_steps": 4, "num_visual_tokens": [1, 16], "json_path": str(data[1] / "mixed.json")}
    folder = run(finetune, **options)
    trained, validated = ({sizes for sizes, _ in rows} for rows in seen.values())
    assert len(validated) == 4
    assert "[]" in trained and "[]" not in validated
    assert not trained & validated
    assert {budget for _, budget in seen["evaluate"]} == {1, 16}
    history = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses = {key for entry in history for key in entry if key.endswith("_loss")}
    assert losses == {"eval_1_loss", "eval_16_loss"}
    with Image.open(folder / "training/finetune.png") as picture:
        assert picture.size == (900, 700)


@pytest.mark.parametrize("branch_rate", [None, 0.02])
def test_projector_and_branch_may_have_learning_rates(run, monkeypatch, branch_rate):
    groups = []

    def create_optimizer(self, model=None, original=trainer.DeltaLlavaTrainer.create_optimizer):
        optimizer = original(self, model)
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        for group in optimizer.param_groups:
            assert group["params"]
            for weight in group["params"]:
                groups.append((names[id(weight)], group["lr"], group["weight_decay"]))
        return optimizer

    monkeypatch.setattr(trainer.DeltaLlavaTrainer, "create_optimizer", create_optimizer)
    run(finetune, projector_learning_rate=0.003, branch_learning_rate=branch_rate, weight_decay=0.1)
    prefix = "model.multi_modal_projector."
    assert len({name for name, *_ in groups}) == len(groups)
    for name, rate, _ in groups:
        is_branch = name.startswith(prefix) and not name.startswith(prefix + "mlp.")
        expected = (branch_rate if is_branch else None) or (0.003 if name.startswith(prefix) else 0.01)
        assert rate == expected, name
    decays = {name: decay for name, _, decay in groups}
    assert decays["model.language_model.norm.weight"] == 0.0
    assert decays[prefix + "attention.in_proj_weight"] == decays["lm_head.weight"] == 0.1


def test_a_rate_of_the_branch_needs_a_branch(run, tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path / "released")
    with pytest.raises(ValueError, match=r"branch_learning_rate=0\.1 needs .*='residual'.* is 'released'"):
        run(finetune, model_name_or_path=str(tmp_path / "released"), branch_learning_rate=0.1)


def test_an_adapter_is_not_taken_for_a_model(run, tmp_path):
    adapter = run(finetune, use_peft=True, lora_r=2, max_steps=1, save_strategy="steps", save_steps=1)
    for folder in (adapter, adapter / "checkpoint-1"):
        for stage in (pretrain, finetune):
            with pytest.raises(ValueError, match=r"holds no config\.json.*adapter.* by delta_llava\.hub\.merge"):
                run(stage, "next", model_name_or_path=str(folder))
        with pytest.raises(ValueError, match=r"checkpoint by delta_llava\.hub"):
            DeltaLlavaConfig.from_pretrained(folder)


def test_a_chat_template_is_that_of_the_run_the_dry_run_and_the_result(run, checkpoint, tmp_path, capsys):
    template = DeltaLlavaProcessor.from_pretrained(checkpoint).chat_template.replace("ASSISTANT:", "ROBOT:")
    (tmp_path / "own.jinja").write_text(template)
    run(finetune, "dry", ["--dry_run"], chat_template_path=str(tmp_path / "own.jinja"))
    assert "ROBOT:' " in (output := capsys.readouterr().out).replace("\n", " ") and "ASSISTANT:" not in output
    folder = run(finetune, chat_template_path=str(tmp_path / "own.jinja"))
    assert (folder / "chat_template.jinja").read_text() == template


def test_the_result_stops_at_the_end_of_turn_of_the_template_that_it_learns(run, templates, tmp_path):
    template = {"chat_template_path": str(templates / "chatml.jinja")}
    merge_adapter(run(finetune, "adapter", use_peft=True, lora_r=4, **template), tmp_path / "merged")
    for folder in (run(finetune, **template), tmp_path / "merged"):
        end_of_turn = DeltaLlavaProcessor.from_pretrained(folder).tokenizer.convert_tokens_to_ids("<|im_end|>")
        model = DeltaLlavaForConditionalGeneration.from_pretrained(folder)
        assert sorted(model.generation_config.eos_token_id) == [2, end_of_turn]


def test_a_finished_run_that_is_resumed_gives_its_result_again(run):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": -1, "num_train_epochs": 1}
    folder = run(finetune, "run", **options)
    result = (folder / "model.safetensors").read_bytes()
    log = json.loads((folder / "training" / "finetune.json").read_text())
    (folder / "model.safetensors").unlink()
    (folder / "training" / "finetune.json").unlink()  # as if it had been killed before
    run(finetune, "run", ["--resume_from_checkpoint", "latest"], **options)
    assert (folder / "model.safetensors").read_bytes() == result
    again = json.loads((folder / "training" / "finetune.json").read_text())
    assert again["log_history"].pop() == {"train_runtime": 0.0, "step": 3}
    log["log_history"].pop()
    assert again == log
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_options_are_not_guessed_from_their_beginnings(run):
    with pytest.raises(ValueError, match="--learning_rat"):
        run(finetune, "run", ["--learning_rat", "0.1"])
