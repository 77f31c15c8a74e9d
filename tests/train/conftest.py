"""A tiny checkpoint and tiny data in LLaVA's format, made in place."""

import json
import random

import pytest
import torch
import yaml
from PIL import Image

from delta_llava import DeltaLlavaForConditionalGeneration


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_config, tiny_processor):
    """An untrained Delta-LLaVA as `hub.assemble` leaves it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = tiny_processor()
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    overrides = {"projector_variant": "residual", "visual_token_budgets": [36]}
    config = tiny_config(**overrides, image_token_id=processor.image_token_id)
    DeltaLlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def still_checkpoint(tmp_path_factory, tiny_config, tiny_processor):
    """A residual one without drop path, whose training is the same in however many processes it is done."""
    folder = tmp_path_factory.mktemp("still-checkpoint")
    tiny_processor().save_pretrained(folder)
    no_drop_path = {"attention_drop_path": 0.0, "convolution_drop_path": 0.0, "mlp_drop_path": 0.0}
    torch.manual_seed(0)
    config = tiny_config(projector_variant="residual", visual_token_budgets=[36], **no_drop_path)
    DeltaLlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """
    Twelve coloured rectangles, each asked about once: the JSON file and the image folder.

    Beside it, `mixed.json` asks half of them twice, and has eight more records without an image.
    """
    folder = tmp_path_factory.mktemp("data")
    draw, records = random.Random(0), []
    for index in range(12):
        colour = draw.choice(["red", "green", "blue"])
        Image.new("RGB", (draw.randint(20, 60), draw.randint(20, 60)), colour).save(folder / f"{index}.png")
        conversations = [
            {"from": "human", "value": "<image>\nWhich colour?" if index % 3 else "Which colour?\n<image>"},
            {"from": "gpt", "value": f"It is {colour}."},
        ]
        records.append({"id": f"scene-{index}", "image": f"{index}.png", "conversations": conversations})
    (folder / "data.json").write_text(json.dumps(records))
    for record in records[1::2]:
        record["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    for index in range(8):
        turns = [{"from": "human", "value": "Count! " * (index + 1)}, {"from": "gpt", "value": f"{index + 1} times."}]
        records.append({"id": f"text-{index}", "conversations": turns})
    (folder / "mixed.json").write_text(json.dumps(records))
    return folder / "data.json", folder


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
