"""A dry run says what a run would be, at any size, and loads, trains and saves nothing."""

import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig, CLIPImageProcessor

from delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from delta_llava.costs import recipe_config
from delta_llava.train import finetune, pretrain


TRAIN = Path(pretrain.__file__).parent
RECIPES = sorted((TRAIN / "recipes").glob("*/*.yaml"))


@pytest.fixture
def dry_run(run, tmp_path, monkeypatch, capsys):
    """What a dry run prints; loading weights is an error."""

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(DeltaLlavaForConditionalGeneration, "from_pretrained", load)

    def dry_run(stage, arguments=None, **changes):
        capsys.readouterr()
        stage.main([*(arguments or run.recipe("dry", **changes)), "--dry_run"])
        assert not (tmp_path / "dry").exists()
        return capsys.readouterr().out

    return dry_run


def numbers(output, part):
    (row,) = re.findall(rf"^\| {part} \|(.*)\|$", output, re.MULTILINE)
    return [float(cell.replace(",", "").replace("%", "")) for cell in row.split("|")]


def test_a_dry_run_counts_what_is_there(dry_run, data):
    options = {"json_path": str(data[1] / "mixed.json"), "num_visual_tokens": [1, 36], "max_steps": -1}
    output = dry_run(finetune, bf16=True, num_train_epochs=3, **options)
    assert numbers(output, "vision_tower")[1] == 0
    parts = {part: numbers(output, part) for part in ("multi_modal_projector", "language_model", "lm_head")}
    assert all(total == trained > 0 for total, trained in parts.values())
    assert numbers(output, "all")[1] == sum(trained for _, trained in parts.values())
    assert "20 rows, 12 images, 8 rows without one" in output
    assert "20 of them make a valid batch" in output
    assert "15 steps of 4 rows: 2 on each of 1 processes, 2 accumulated" in output
    # 12 of 20 rows have an image, of 36 tokens instead of one
    assert numbers(output, "36")[0] - numbers(output, "1")[0] == pytest.approx(4 * 12 / 20 * 35, abs=1)
    assert numbers(output, "36")[2] > numbers(output, "1")[2] > 0
    assert "  context <image> x 36\n  context '\\nWhich colour? ASSISTANT:'\n  learnt  ' It is " in output
    assert output.count("learnt ") == 1
    assert output.rstrip().endswith("nothing was trained or saved.")

    short = dry_run(finetune, dataloader_drop_last=True, num_train_epochs=3, **options, per_device_train_batch_size=16)
    assert "3 steps of 32 rows: 16 on each" in short  # one whole batch an epoch

    grouped = dry_run(finetune, train_sampling_strategy="group_by_length", **options)
    assert numbers(grouped, "36")[1] < numbers(output, "36")[1]  # less padding


def test_a_dry_run_says_what_it_ignores_and_repeats(dry_run, data, tmp_path):
    records = json.loads((data[1] / "mixed.json").read_text())
    records = [{**record, "model": "m", **({"topic": "t"} if index else {})} for index, record in enumerate(records)]
    (tmp_path / "noted.json").write_text(json.dumps(records[:13]))
    options = {"json_path": str(tmp_path / "noted.json"), "train_sampling_strategy": "group_by_length", "max_steps": -1}
    output = dry_run(finetune, **options, per_device_train_batch_size=8, num_train_epochs=1)
    assert "Keys that nothing here reads, and how many records have them: 'model' in 13, 'topic' in 12." in output
    assert "In an epoch, 3 rows occur twice" in output
    assert "the 1 rows of one kind would not fill half of a batch of 8" in output
    assert "1 steps of 16 rows" in output
    for plain in (dry_run(finetune), dry_run(finetune, train_sampling_strategy="group_by_length")):
        assert not re.search("Keys that nothing|occur twice|share batches", plain)


def test_a_dry_run_of_stage_1_and_of_adapters(dry_run):
    output = dry_run(pretrain)
    assert numbers(output, "language_model")[1] == numbers(output, "lm_head")[1] == 0
    assert numbers(output, "all")[1] == numbers(output, "multi_modal_projector")[0]
    assert "  context '<s>'\n  context <image> x 36\n  learnt  'It is " in output
    adapted = dry_run(finetune, use_peft=True, lora_r=4, load_in_4bit=True)
    assert numbers(adapted, "multi_modal_projector") == numbers(output, "multi_modal_projector")
    added = numbers(adapted, "language_model")[0] - numbers(output, "language_model")[0]
    assert added == numbers(adapted, "language_model")[1] > 0


@pytest.mark.parametrize("recipe", RECIPES, ids=[f"{path.parent.name}/{path.stem}" for path in RECIPES])
def test_every_recipe_makes_a_run_at_full_size(dry_run, data, tmp_path, backbones, tiny_processor, recipe):
    values, stage = yaml.safe_load(recipe.read_text()), pretrain if recipe.stem == "pretrain" else finetune
    batch_size = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * 8
    assert batch_size == (256 if stage is pretrain else 128)  # LLaVA's, on 8 GPUs

    budgets, backbone = values["num_visual_tokens"], recipe_config(recipe.parent.name)
    towers = [("clip-vit-large-patch14-336", budgets if isinstance(budgets, list) else [budgets])]
    # the two lines that another tower changes
    others = re.findall(r"-(clip-224|siglip)/assembled +num_visual_tokens: (\d+)", recipe.read_text())
    names = {"clip-224": "clip-vit-large-patch14", "siglip": "siglip-so400m-patch14-384"}
    towers += [(names[name], [int(budget)]) for name, budget in others]
    assert len(towers) == (3 if stage is pretrain else 1)
    for tower, budgets in towers:
        processor = tiny_processor()
        config = DeltaLlavaConfig(
            vision_config=AutoConfig.from_pretrained(backbones / tower),
            text_config=backbone.text_config,
            vision_feature_select_strategy="full" if "siglip" in tower else "default",
            projector_variant="residual",
            image_token_id=processor.image_token_id,
        )
        side = config.vision_config.image_size
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        processor.image_processor = CLIPImageProcessor(**size)
        processor.adopt_budgets(config)
        for part in (config, processor):
            part.save_pretrained(tmp_path / tower)

        options = {
            "config": recipe,
            "model_name_or_path": tmp_path / tower,
            "json_path": data[0],
            "image_folder": data[1],
            "output_dir": tmp_path / "dry",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        output = dry_run(stage, list(map(str, [*arguments, "--num_visual_tokens", *budgets])))
        size = {"vicuna-7b": 6.7e9, "vicuna-13b": 13.0e9, "qwen2.5-7b": 7.6e9}[recipe.parent.name]
        language_model, head = numbers(output, "language_model"), numbers(output, "lm_head")
        assert language_model[0] + head[0] == pytest.approx(size, rel=0.06)
        assert numbers(output, "multi_modal_projector")[1] > 35e6
        assert (language_model[1] > 6e9) == (recipe.stem in ("finetune", "finetune-from-llava"))
        for budget in budgets:
            assert numbers(output, str(budget))[3] > 4  # GiB


def test_accelerate_reads_every_configuration():
    for file in (TRAIN / "accelerate").glob("*.yaml"):
        config = load_config_from_file(str(file))  # refuses unknown keys
        kinds = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}
        assert (config.distributed_type.value, config.mixed_precision) == (kinds.get(file.stem, "DEEPSPEED"), "bf16")
        if file.stem.startswith("zero"):
            assert config.deepspeed_config["zero_stage"] == int(file.stem[-1])
