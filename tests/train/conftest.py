"""A tiny checkpoint and tiny data in LLaVA's format, made in place."""

import json
import random

import pytest
import torch
from PIL import Image

from delta_llava import DeltaLlavaForConditionalGeneration


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_config, tiny_processor):
    """An untrained Delta-LLaVA as `hub.assemble` leaves it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = tiny_processor()
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    config = tiny_config(visual_token_budgets=[36], image_token_id=processor.image_token_id)
    DeltaLlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Twelve coloured rectangles, half of them asked about in two turns: the JSON file and the image folder."""
    folder = tmp_path_factory.mktemp("data")
    draw, records = random.Random(0), []
    for index in range(12):
        colour = draw.choice(["red", "green", "blue"])
        Image.new("RGB", (draw.randint(20, 60), draw.randint(20, 60)), colour).save(folder / f"{index}.png")
        conversations = [
            {"from": "human", "value": "<image>\nWhich colour?" if index % 3 else "Which colour?\n<image>"},
            {"from": "gpt", "value": f"It is {colour}."},
        ]
        if index % 2:
            conversations += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
        records.append({"id": f"scene-{index}", "image": f"{index}.png", "conversations": conversations})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json", folder
