"""The README's memory table: every recipe on every machine."""

import pytest
import yaml

from delta_llava.costs import TRAINABLE_PARTS, recipe_config, training_memory
from delta_llava.train import memory


@pytest.fixture
def recipe(tmp_path):
    """`recipe(stage, **values)`: a recipe's file for Vicuna-7B."""

    def write(stage, **values):
        values = {"num_visual_tokens": 144, "per_device_train_batch_size": 4, "max_length": 1024, **values}
        file = tmp_path / "vicuna-7b" / f"{stage}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
        return file

    return write


def test_every_recipe_has_a_row_and_what_exceeds_the_budget_is_marked(capsys, monkeypatch):
    monkeypatch.setattr(memory, "recipe_memory", lambda file: {"1 GPU": 60 * 2**30, "2 GPUs": 70 * 2**30})
    memory.main(["--budget_gib", "65"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(list(memory.RECIPES.glob("*/*.yaml")))
    vicuna = [row for row in rows if row.startswith("| vicuna-7b/")]
    assert vicuna[0] == "| vicuna-7b/pretrain | 32 x 2048 | 60.0 | 70.0 ✗ |"


def test_a_recipe_needs_what_its_values_say(recipe):
    size = {"num_images": 4, "num_rows": 4, "sequence_length": 1024}
    vicuna, projector = recipe_config("vicuna-7b"), ["multi_modal_projector"]

    full = training_memory(vicuna, 144, num_labels=4 * 880, trained_parts=TRAINABLE_PARTS, **size)
    assert memory.recipe_memory(recipe("finetune"))["1 GPU"] == full["total"]

    sharded = {"num_gpus": 8, "sharding": "fsdp2", "gradient_checkpointing": False}
    several = training_memory(vicuna, 576, num_labels=4 * 448, trained_parts=projector, **size, **sharded)
    file = recipe("pretrain", num_visual_tokens=[576, 1, "auto"], gradient_checkpointing=False)
    assert memory.recipe_memory(file)["8 GPUs, FSDP2"] == several["total"]

    adapted = {"lora_rank": 8, "load_in_4bit": True}
    quantized = training_memory(vicuna, 144, num_labels=4 * 880, trained_parts=projector, **size, **adapted)
    file = recipe("finetune-qlora", use_peft=True, lora_r=8, load_in_4bit=True)
    assert memory.recipe_memory(file)["1 GPU"] == quantized["total"]


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("finetune", {"max_length": None}, r"finetune\.yaml lacks \['max_length'\]"),
        ("finetune-lora", {"use_peft": True}, r"finetune-lora\.yaml lacks \['lora_r'\]"),
        ("pretrain", {"num_visual_tokens": 25}, "num_visual_tokens=25 does not fit"),
        ("pretrain", {"num_visual_tokens": "auto"}, r"pretrain\.yaml names no number in num_visual_tokens"),
    ],
)
def test_a_recipe_that_cannot_be_computed_is_refused(recipe, stage, changes, message):
    with pytest.raises(ValueError, match=message):
        memory.recipe_memory(recipe(stage, **changes))
