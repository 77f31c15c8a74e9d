"""Training continues from a LLaVA-1.5: what it lacks is learnt next to what it knows."""

import json
import random

import pytest
import torch
from llava_records import record
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from delta_llava import DeltaLlavaForConditionalGeneration
from delta_llava.hub.convert import convert
from delta_llava.train import finetune


@pytest.fixture(scope="module")
def llava(tmp_path_factory, tiny_processor):
    """A toy LLaVA-1.5 in llava-hf's layout, converted: weights wide enough for its images to sway what it says."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = tiny_processor().tokenizer
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
    language_model = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=48, patch_size=4, initializer_factor=3.0),
        text_config=LlamaConfig(**language_model, vocab_size=320, initializer_range=0.1),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        initializer_range=0.15,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder / "llava-hf")
    tokenizer.save_pretrained(folder / "llava-hf")
    tiny_processor().image_processor.save_pretrained(folder / "llava-hf")
    convert(folder / "llava-hf", folder / "converted")
    return folder / "converted"


@pytest.fixture
def corners(tmp_path):
    """Pictures of four coloured corners, each asked about its first: the JSON file and the image folder."""
    draw, records = random.Random(0), []
    for index in range(64):
        picture = Image.new("RGB", (48, 48))
        colours = draw.choices(["red", "green", "blue"], k=4)
        for corner, colour in enumerate(colours):
            left, top = 24 * (corner % 2), 24 * (corner // 2)
            picture.paste(colour, (left, top, left + 24, top + 24))
        picture.save(tmp_path / f"{index}.png")
        records.append(record("<image>\nTop left?", colours[0], image=f"{index}.png"))
    (tmp_path / "corners.json").write_text(json.dumps(records))
    return tmp_path / "corners.json", tmp_path


def test_a_branch_that_learns_beats_one_held_at_zero(run, llava, corners):
    """At one token, where the mean of all patches says little of the first corner."""
    last_losses = {}
    for rate in (0.0, 0.01):
        folder = run(
            finetune,
            f"rate-{rate}",
            model_name_or_path=str(llava),
            json_path=str(corners[0]),
            image_folder=str(corners[1]),
            num_visual_tokens=1,
            learning_rate=3e-4,
            branch_learning_rate=rate,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            max_steps=160,
            logging_steps=40,
        )
        history = json.loads((folder / "training" / "finetune.json").read_text())["log_history"]
        last_losses[rate] = [entry["loss"] for entry in history if "loss" in entry][-1]
        projector = DeltaLlavaForConditionalGeneration.from_pretrained(folder).model.multi_modal_projector
        assert bool(projector.text_projection.weight.any()) is (rate > 0)
    assert last_losses[0.01] < 0.98 * last_losses[0.0]
