"""A tiny checkpoint and a tiny data set in LLaVA's format, made in place."""

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, CLIPVisionConfig, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor


TEMPLATES = Path(__file__).parents[2] / "templates"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    special_tokens = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(special_tokens + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special_tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def make_checkpoint(folder: Path, template: str = "vicuna-v1") -> Path:
    """An untrained Delta-LLaVA of 16 patches, for budgets of 1, 4 and 16."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = DeltaLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_rank=2,
    )
    model = DeltaLlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    DeltaLlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        num_visual_tokens=config.num_visual_tokens,
        patch_grid_size=config.patch_grid_size,
        chat_template=(TEMPLATES / f"{template}.jinja").read_text(),
    ).save_pretrained(folder)
    return folder


def make_data(folder: Path, num_records: int = 12) -> tuple[Path, Path]:
    """Coloured rectangles, half of them asked about in two turns. Returns the JSON file and the image folder."""
    draw, records = random.Random(0), []
    (folder / "images").mkdir(parents=True)
    for index in range(num_records):
        colour = draw.choice(["red", "green", "blue"])
        Image.new("RGB", (draw.randint(20, 60), draw.randint(20, 60)), colour).save(folder / f"images/{index}.png")
        conversations = [
            {"from": "human", "value": "<image>\nWhich colour?" if index % 3 else "Which colour?\n<image>"},
            {"from": "gpt", "value": f"It is {colour}."},
        ]
        if index % 2:
            conversations += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
        records.append({"id": f"scene-{index}", "image": f"{index}.png", "conversations": conversations})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json", folder / "images"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> tuple[Path, Path]:
    return make_data(tmp_path_factory.mktemp("data"))
