"""Converting: small checkpoints of every layout, written as others write them, come out with the same logits."""

import json
import pickle
import re
import shutil
from itertools import chain

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from parity import published_weights
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    SeedOssConfig,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from delta_llava import DeltaLlavaForConditionalGeneration
from delta_llava.hub import convert as hub
from delta_llava.hub import layouts
from delta_llava.hub.card import build_card
from delta_llava.hub.convert import convert, main
from delta_llava.hub.push import prepare


CODE_FILES = {"configuration_delta_llava.py", "modeling_delta_llava.py", "processing_delta_llava.py"}
SIZE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and"
    " polite answers to the user's questions."
)
LLAVA_HF_TEMPLATE = (
    "{% for message in messages %}{{ message.role.upper() + ': ' }}{% for part in message.content %}"
    "{{ '<image>\n' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def save_weights(weights, folder, suffix=".safetensors", num_shards=1):
    """As transformers saves them: in one file, or in several with an index."""
    folder.mkdir(exist_ok=True)
    stem = {".safetensors": "model", ".bin": "pytorch_model"}[suffix]
    names, weight_map = sorted(weights), {}
    for shard in range(num_shards):
        file = f"{stem}-{shard + 1:05}-of-{num_shards:05}{suffix}" if num_shards > 1 else stem + suffix
        part = {name: weights[name].contiguous() for name in names[shard::num_shards]}
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if num_shards > 1:
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def tower_config():
    """Six layers, of which the last is read by nothing."""
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, image_size=48, patch_size=4
    )


@pytest.fixture
def source(tiny_model, tower_config):
    """What was published: a model, and a CLIP with its whole tower."""

    def make(text_config=None):
        model = tiny_model(vision_config=tower_config, text_config=text_config or LlamaConfig(**SIZE))
        config = tower_config.to_dict()
        text_half = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        clip = CLIPModel(CLIPConfig(vision_config=config, text_config=text_half, projection_dim=8)).eval()
        clip.vision_model.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
        return model, clip

    return make


@pytest.fixture
def tower_folder(tiny_processor, tmp_path):
    """Saves a CLIP model, as its repository has it."""

    def save(clip):
        clip.save_pretrained(tmp_path / "tower")
        tiny_processor().image_processor.save_pretrained(tmp_path / "tower")
        return str(tmp_path / "tower")

    return save


@pytest.fixture
def whole(source, tower_folder, tiny_tokenizer, tmp_path):
    """Saves a whole checkpoint of the LLaVA code base; returns its model, its folder and its weights."""

    def save(text_config=None, tower_inside=True, model_type="llava_llama", settings=(), **files):
        model, clip = source(text_config)
        tower = tower_folder(clip)
        text = model.config.text_config.to_diff_dict()
        folder = tmp_path / "whole"
        folder.mkdir(exist_ok=True)
        config = {
            **text,
            "model_type": model_type,
            "architectures": ["LlavaLlamaForCausalLM"],
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "torch_dtype": "float32",
            "max_length": 4096,
            "mm_vision_tower": tower,
            "mm_projector_type": "delatallava",
            "mm_hidden_size": 32,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_patch_merge_type": "flat",
            "mm_use_im_start_end": False,
            "image_aspect_ratio": "pad",
            "scale_factor": 2,
            "tokenizer_padding_side": "right",
            "use_mm_proj": True,
            **dict(settings),
        }
        (folder / "config.json").write_text(json.dumps(config))
        tiny_tokenizer(image_token=None, pad_token="<unk>").save_pretrained(folder)
        projector = published_weights(model.model.multi_modal_projector)
        weights = {
            **{f"model.{name}": weight for name, weight in model.model.language_model.state_dict().items()},
            **{f"model.mm_projector.{name}": weight for name, weight in projector.items()},
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
        }
        if not model.config.tie_word_embeddings:
            weights["lm_head.weight"] = model.lm_head.weight.detach()
        if tower_inside:
            for name, weight in clip.vision_model.state_dict().items():
                weights[f"model.vision_tower.vision_tower.vision_model.{name}"] = weight
            position_ids = torch.arange(145)[None]  # as older transformers saved them
            weights["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = position_ids
        save_weights(weights, folder, **files)
        return model, folder, weights

    return save


def load(folder):
    """The converted model, of which nothing may be missing or too much."""
    model, info = DeltaLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_no_path(path, folder):
    """Nothing that is published names a path of the machine that it was made on."""
    for file in folder.rglob("*"):
        assert file.is_dir() or str(path).encode() not in file.read_bytes(), file


@torch.no_grad()
def assert_same_logits(folder, source, noise, num_visual_tokens=36):
    """On an image and a question, of the tokens that the source knows; `<image>` is a new token with a new id."""
    converted, processor = load(folder), AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=noise(1), text="USER: <image> What?", return_tensors="pt")
    budget = inputs.pop("num_visual_tokens")
    assert budget.tolist() == [num_visual_tokens]
    ours = converted(**inputs).logits
    embeddings = source.get_input_embeddings()
    images = source.get_image_features(inputs["pixel_values"], budget).pooler_output[0]
    is_image = inputs["input_ids"] == processor.image_token_id
    embedded = embeddings(inputs["input_ids"].masked_fill(is_image, 0))
    embedded[is_image] = images
    hidden = source.model.language_model(
        inputs_embeds=embedded, attention_mask=inputs["attention_mask"]
    ).last_hidden_state
    theirs = source.lm_head(hidden)
    assert ours.shape[-1] == 320 and theirs.shape[-1] == 300
    assert torch.equal(ours[..., :300], theirs)
    # New tokens are the mean of the old ones
    torch.testing.assert_close(
        converted.get_input_embeddings().weight[300:], embeddings.weight.mean(0).expand(20, -1), rtol=0, atol=1e-4
    )
    mean = theirs.mean(-1, keepdim=True).expand(*theirs.shape[:-1], 20)
    torch.testing.assert_close(ours[..., 300:], mean, rtol=0, atol=1e-3)
    return converted, processor


@pytest.mark.parametrize("tower_inside", [True, False])
@pytest.mark.parametrize(
    "files", [{}, {"num_shards": 3}, {"suffix": ".bin"}, {"suffix": ".bin", "num_shards": 3}], ids=str
)
def test_a_whole_checkpoint_keeps_every_logit(whole, tmp_path, noise, tower_inside, files):
    model, folder, weights = whole(tower_inside=tower_inside, **files)
    out = tmp_path / "out"
    conversion = convert(folder, out)
    converted, processor = assert_same_logits(out, model, noise)

    assert converted.config.num_visual_tokens == 36 and converted.config.visual_token_budgets == [36]  # (12 / 2)²
    assert (processor.num_visual_tokens, processor.visual_token_budgets, processor.patch_grid_size) == (36, [36], 12)
    assert converted.config.vision_config.num_hidden_layers == 5
    # Every tensor of every file is accounted for, once
    tensors = [*chain(*conversion.used.values()), *conversion.left]
    assert sorted(tensor.name for tensor in tensors if tensor.file.parent == folder) == sorted(weights)
    assert not conversion.fresh
    reasons = {tensor.name: reason for tensor, reason in conversion.left.items()}
    assert "computed" in reasons["model.layers.0.self_attn.rotary_emb.inv_freq"]
    beginning = "model.vision_tower.vision_tower." if tower_inside else ""
    assert "after the tower's layer 5" in reasons[f"{beginning}vision_model.encoder.layers.5.mlp.fc1.weight"]
    assert ("text_projection.weight" in reasons) is not tower_inside


def test_the_folder_is_a_hub_repository(whole, tmp_path):
    _, folder, _ = whole()
    out = tmp_path / "out"
    convert(folder, out)
    assert CODE_FILES == {path.name for path in out.glob("*.py")}
    assert {path.suffix for path in out.iterdir() if path.is_file()} == {".json", ".jinja", ".py", ".safetensors"}
    config = json.loads((out / "config.json").read_text())
    assert len(config["auto_map"]) == 5 and config["architectures"] == ["DeltaLlavaForConditionalGeneration"]
    assert AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True).dtype == torch.float32
    # Fields of LLaVA's code base among the language model's are not kept, nor are this machine's paths
    assert "mm_" not in json.dumps(config) and "max_length" not in json.dumps(config)
    assert_no_path(tmp_path, out)
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    sources = yaml.safe_load((out / "training/sources.yaml").read_text())
    assert sources == {"vision_tower": "tower", "language_model": "lmsys/vicuna-7b-v1.5", "converted_from": "whole"}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    ("model_type", "config"),
    [("llava_qwen2", Qwen2Config), ("llava_qwen", Qwen2Config), ("llava_seed_oss", SeedOssConfig)],
)
def test_other_language_models(whole, tmp_path, templates, noise, model_type, config, tie):
    text_config = config(**SIZE, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tie)
    model, folder, _ = whole(text_config, model_type=model_type)
    template = templates / "chatml.jinja" if model_type == "llava_seed_oss" else None
    if template:
        with pytest.raises(ValueError, match=r"type 'seed_oss'.*--chat_template"):
            convert(folder, tmp_path / "out")
    convert(folder, tmp_path / "out", chat_template=template)
    converted, processor = assert_same_logits(tmp_path / "out", model, noise)
    assert converted.config.text_config.model_type == config.model_type
    assert (converted.lm_head.weight is converted.get_input_embeddings().weight) is tie
    assert processor.chat_template == (templates / "chatml.jinja").read_text()


def test_a_tied_head_that_is_stored_too(whole, tmp_path):
    text_config = LlamaConfig(**SIZE, tie_word_embeddings=True)
    model, folder, weights = whole(text_config)
    weights["lm_head.weight"] = model.lm_head.weight.detach().clone()
    save_weights(weights, folder)
    conversion = convert(folder, tmp_path / "out")
    assert "tied to the embeddings" in {tensor.name: why for tensor, why in conversion.left.items()}["lm_head.weight"]
    weights["lm_head.weight"][0, 0] += 1
    save_weights(weights, folder)
    with pytest.raises(ValueError, match=r"lm_head\.weight of .* differs from the embeddings, though tie_word_"):
        convert(folder, tmp_path / "again")


def test_images_are_padded_where_training_padded_them(whole, tmp_path, noise):
    _, folder, _ = whole()
    convert(folder, tmp_path / "padded")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_aspect_ratio": "square"}))
    convert(folder, tmp_path / "cropped")
    image = noise(1, size=(48, 96))[0]
    pixels = {}
    for name in ("padded", "cropped"):
        processor = AutoProcessor.from_pretrained(tmp_path / name, trust_remote_code=True)
        pixels[name] = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"][0]
        assert pixels[name].shape == (3, 48, 48)
    # A frame in the mean colour above and below, and the whole width in between
    assert pixels["padded"][:, :8].abs().max() < 0.02 and pixels["padded"][:, -8:].abs().max() < 0.02
    assert pixels["cropped"][:, :8].abs().mean() > 0.2


@pytest.fixture
def stage1(source, tower_folder, tiny_tokenizer, tmp_path):
    """Saves what stage 1 of the LLaVA code base leaves, and the language model and the tower that it had."""

    def save(prefix="model.mm_projector."):
        model, clip = source()
        tower = tower_folder(clip)
        language = AutoModelForCausalLM.from_config(model.config.text_config)
        language.model.load_state_dict(model.model.language_model.state_dict())
        language.lm_head.load_state_dict(model.lm_head.state_dict())
        language.save_pretrained(tmp_path / "vicuna")
        tiny_tokenizer(image_token=None, pad_token=None).save_pretrained(tmp_path / "vicuna")
        folder = tmp_path / "stage1"
        folder.mkdir()
        projector = published_weights(model.model.multi_modal_projector)
        torch.save({prefix + name: weight for name, weight in projector.items()}, folder / "mm_projector.bin")
        settings = {"model_type": "llava_llama", "mm_vision_tower": tower, "scale_factor": 4}
        (folder / "config.json").write_text(json.dumps(settings))
        return model, folder, str(tmp_path / "vicuna"), tower

    return save


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector."])
def test_a_stage_1_projector_and_its_language_model(stage1, tmp_path, noise, prefix):
    model, folder, language_model, _ = stage1(prefix)
    convert(folder, tmp_path / "out", language_model=language_model)
    _, processor = assert_same_logits(tmp_path / "out", model, noise, num_visual_tokens=9)
    assert processor.tokenizer.pad_token == "<pad>"
    sources = yaml.safe_load((tmp_path / "out/training/sources.yaml").read_text())
    assert sources == {"vision_tower": "tower", "language_model": "vicuna", "converted_from": "stage1"}
    assert_no_path(tmp_path, tmp_path / "out")


def test_a_projector_file_alone(stage1, tmp_path, noise):
    model, folder, language_model, tower = stage1()
    file, out = folder / "mm_projector.bin", tmp_path / "out"
    with pytest.raises(ValueError, match="does not name its vision tower: name it with --vision_tower"):
        convert(file, out, language_model=language_model)
    with pytest.raises(ValueError, match=r"mm_projector\.bin .*name the language model .* with --language_model"):
        convert(file, out, vision_tower=tower)
    with pytest.raises(ValueError, match=r"no scale_factor in a config\.json: .*--num_visual_tokens"):
        convert(file, out, language_model=language_model, vision_tower=tower)
    convert(file, out, language_model=language_model, vision_tower=tower, num_visual_tokens=[16])
    assert_same_logits(out, model, noise, num_visual_tokens=16)


class Attack:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("save", [torch.save, lambda weights, file: file.write_bytes(pickle.dumps(weights))])
def test_a_file_that_could_run_code_is_refused(stage1, tmp_path, save):
    _, folder, language_model, _ = stage1()
    file = folder / "mm_projector.bin"
    weights = torch.load(file, weights_only=True)
    save({**weights, "model.mm_projector.mlp.0.weight": Attack(tmp_path / "attacked")}, file)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} (is refused.*weights_only=True|cannot be read)"):
        convert(folder, tmp_path / "out", language_model=language_model)
    assert not (tmp_path / "attacked").exists() and not (tmp_path / "out").exists()


@pytest.fixture
def llava_hf(tower_config, tiny_tokenizer, tmp_path):
    """Saves a LLaVA-1.5 of transformers, whose image features are large enough to change its answers."""

    def save(vision_config=tower_config, text_config=None, tokenizer=None, dtype=torch.float32, **settings):
        torch.manual_seed(0)
        text_config = text_config or LlamaConfig(**SIZE)
        config = LlavaConfig(
            **{"vision_config": vision_config, "text_config": text_config, "image_token_index": 299, **settings}
        )
        model = LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for weight in model.model.multi_modal_projector.parameters():
                weight.normal_(std=0.5)
        model.to(dtype).save_pretrained(tmp_path / "llava")
        size = {"height": 48, "width": 48}
        image_processor = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=size)
        if vision_config.model_type == "siglip_vision_model":
            image_processor = SiglipImageProcessor(size=size)
        tokenizer = tokenizer or tiny_tokenizer(image_token=None, pad_token="</s>")
        LlavaProcessor(image_processor, tokenizer, patch_size=4).save_pretrained(tmp_path / "llava")
        return model.float(), tmp_path / "llava"

    return save


@torch.no_grad()
def test_llava_gives_its_tower_and_language_model_to_a_fresh_projector(llava_hf, tmp_path, noise):
    model, folder = llava_hf()
    out = tmp_path / "out"
    conversion = convert(folder, out, seed=1, projector_variant="released")
    converted, processor = load(out), AutoProcessor.from_pretrained(out, trust_remote_code=True)

    pixels = processor(images=noise(1), text="<image>", return_tensors="pt")["pixel_values"]
    theirs = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    _, query, memory = converted.model._run_vision_tower(pixels)
    assert converted.config.memory_feature_layers == [3, 4, 5] and converted.config.query_feature_layer == 5
    assert torch.equal(query, theirs[5][:, 1:])
    assert torch.equal(memory, torch.cat([theirs[layer][:, 1:] for layer in (3, 4, 5)], dim=-1))
    tokens = torch.arange(280)[None]
    assert torch.equal(converted(tokens).logits[..., :300], model(tokens).logits)

    assert len([why for why in conversion.left.values() if "a fresh one replaces it" in why]) == 4
    assert_no_path(tmp_path, out)
    assert set(conversion.fresh) == converted.model.multi_modal_projector.state_dict().keys()
    convert(folder, tmp_path / "same", seed=1, projector_variant="released")
    convert(folder, tmp_path / "other", seed=2, projector_variant="released")
    same, other = load(tmp_path / "same").state_dict(), load(tmp_path / "other").state_dict()
    name = "model.multi_modal_projector.mlp.0.weight"
    assert torch.equal(same[name], converted.state_dict()[name]) and not torch.equal(same[name], other[name])


def test_the_head_of_a_siglip_tower_is_left(llava_hf, tower_config, tmp_path):
    size = {name: getattr(tower_config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    _, folder = llava_hf(SiglipVisionConfig(**size, num_attention_heads=4, image_size=48, patch_size=4))
    conversion = convert(folder, tmp_path / "out", projector_variant="paper", num_visual_tokens=[16, 36])
    assert load(tmp_path / "out").config.vision_feature_select_strategy == "full"
    assert conversion.config.visual_token_budgets == [16, 36] and conversion.config.num_visual_tokens == 36
    assert any("head.probe" in tensor.name and "pooling head" in why for tensor, why in conversion.left.items())


def test_llava_of_transformers_has_its_own_parts(llava_hf, tmp_path):
    _, folder = llava_hf()
    with pytest.raises(ValueError, match="holds its own parts: leave out language_model=x/y and vision_tower=None"):
        convert(folder, tmp_path / "out", language_model="x/y")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights: model\.safetensors, pytorch_model\.bin or an index"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize("code_base", [False, True])
def test_a_llava_without_a_projector_needs_a_fresh_one_to_be_asked_for(llava_hf, tower_folder, tmp_path, code_base):
    llava, folder = llava_hf()
    weights = {name: weight for name, weight in llava.state_dict().items() if "projector" not in name}
    if code_base:
        clip = CLIPModel(
            CLIPConfig(vision_config=llava.config.vision_config.to_dict(), text_config={"hidden_size": 16})
        )
        settings = {"mm_vision_tower": tower_folder(clip), "mm_projector_type": "mlp2x_gelu", "model_type": "llava"}
        text = {name: value for name, value in llava.config.text_config.to_dict().items() if value is not None}
        (folder / "config.json").write_text(json.dumps(text | settings))
        weights = {name: weight for part in in_code_base_naming(weights) for name, weight in part.items()}
    save_weights(weights, folder)
    for variant in (None, "residual"):
        with pytest.raises(ValueError, match=r"nothing was found for projector\.mlp\.0\.weight; .*mlp\.2\.bias"):
            convert(folder, tmp_path / "out", projector_variant=variant)
    convert(folder, tmp_path / "out", projector_variant="released")


def test_a_tokenizer_without_its_vocabulary_is_named(llava_hf, tmp_path):
    _, folder = llava_hf()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ValueError, match=rf"{folder} lacks the vocabulary of its tokenizer: .*tokenizer\.json"):
        convert(folder, tmp_path / "out")


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 48, "patch_size": 4}
LLAVAS = {
    "as published": {},
    "grouped queries, other layers": {
        "vision_config": CLIPVisionConfig(**SMALL, num_hidden_layers=4),
        "text_config": LlamaConfig(**SIZE | {"num_key_value_heads": 1, "num_hidden_layers": 3}),
        "vision_feature_layer": -1,
        "image_token_index": 7,
    },
    "tied": {
        "text_config": LlamaConfig(**SIZE, tie_word_embeddings=True),
        "vision_feature_layer": 3,
        "tie_word_embeddings": True,
    },
    "SigLIP, Qwen": {
        "vision_config": SiglipVisionConfig(**SMALL, num_hidden_layers=3),
        "text_config": Qwen2Config(**SIZE, bos_token_id=1, eos_token_id=2),
        "vision_feature_select_strategy": "full",
        "image_token_index": 340,
    },
    "SigLIP's last layer, one patch in a row more": {
        "vision_config": SiglipVisionConfig(**SMALL | {"hidden_size": 40, "patch_size": 16}, num_hidden_layers=1),
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": [-1],
    },
    "half precision": {"dtype": torch.float16},
}


@torch.no_grad()
def assert_is_llava(folder, llava, noise, all_patches=144):
    """All patches: LLaVA's logits. Fewer tokens: those of a LLaVA that is fed with features, pooled before its MLP."""
    converted, processor = load(folder).float(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    config, vocab_size = converted.config, llava.config.text_config.vocab_size
    assert config.projector_variant == "residual"
    assert not converted.model.multi_modal_projector.text_projection.weight.any()
    assert config.visual_token_budgets == [all_patches] and config.num_visual_tokens == all_patches
    assert processor.num_visual_tokens == all_patches
    pixels = processor(images=noise(2), text=["<image>"] * 2, return_tensors="pt")["pixel_values"]
    layer = llava.config.vision_feature_layer
    layer = layer if isinstance(layer, int) else layer[0]
    features = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
    features = features[:, llava.config.vision_feature_select_strategy == "default" :]
    words = torch.tensor([[5, 6, 8, 11], [12, 13, 14, 15]])

    def ids(image_token_id, count):
        return torch.cat([words[:, :2], torch.full((2, count), image_token_id), words[:, 2:]], dim=1)

    for budget in config.valid_visual_token_counts:
        ours = converted(ids(config.image_token_id, budget), pixel_values=pixels, num_visual_tokens=budget).logits
        grid = features.transpose(1, 2).unflatten(-1, (config.patch_grid_size, config.patch_grid_size))
        pooled = torch.nn.functional.adaptive_avg_pool2d(grid, int(budget**0.5)).flatten(2).transpose(1, 2)
        images = llava.model.multi_modal_projector(pooled)
        embedded = llava.get_input_embeddings()(words)
        embedded = torch.cat([embedded[:, :2], images, embedded[:, 2:]], dim=1)
        theirs = llava(inputs_embeds=embedded).logits
        torch.testing.assert_close(ours[..., :vocab_size], theirs, rtol=0, atol=1e-5)
    blind = converted(ids(5, all_patches)).logits[..., :vocab_size]
    assert (blind - ours[..., :vocab_size]).abs().max() > 0.1
    if llava.config.image_token_index < vocab_size:
        theirs = llava(ids(llava.config.image_token_index, all_patches), pixel_values=pixels).logits
        torch.testing.assert_close(ours[..., :vocab_size], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", LLAVAS.values(), ids=LLAVAS)
def test_without_training_it_is_llava(llava_hf, tmp_path, noise, settings):
    llava, folder = llava_hf(**settings)
    dtype = settings.get("dtype", torch.float32)
    conversion = convert(folder, tmp_path / "out")
    patches = (48 // llava.config.vision_config.patch_size) ** 2
    assert_is_llava(tmp_path / "out", llava, noise, patches)
    weights = load_file(tmp_path / "out/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert {tensor.name for tensor in conversion.used["projector"]} == {
        f"multi_modal_projector.linear_{layer}.{name}" for layer in (1, 2) for name in ("weight", "bias")
    }
    assert not [name for name in conversion.fresh if name.startswith("mlp")]
    assert "text_projection.weight" in conversion.fresh


def in_code_base_naming(weights):
    """`LlavaForConditionalGeneration`'s weights under the names of the LLaVA code base, those of its tower apart."""
    beginnings = {
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
    }
    renamed = {}
    for name, weight in weights.items():
        beginning = next(beginning for beginning in beginnings if name.startswith(beginning))
        renamed[beginnings[beginning] + name.removeprefix(beginning)] = weight
    tower = {name for name in renamed if name.startswith("model.vision_tower.")}
    return {name: renamed[name] for name in renamed.keys() - tower}, {name: renamed[name] for name in tower}


@pytest.mark.parametrize("layout", ["old", "new", ".bin", "own tower", "named tower", "mm_projector.bin"])
def test_llava_in_every_layout(llava_hf, tower_folder, tmp_path, noise, layout):
    llava, folder = llava_hf()
    weights, options = dict(llava.state_dict()), {}
    rest, tower = in_code_base_naming(weights)
    clip = CLIPModel(CLIPConfig(vision_config=llava.config.vision_config.to_dict(), text_config={"hidden_size": 16}))
    clip.vision_model.load_state_dict(llava.model.vision_tower.state_dict())
    settings = {"mm_vision_tower": tower_folder(clip), "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}
    (folder / "model.safetensors").unlink()
    if layout in ("old", "new", ".bin"):
        if layout == "old":
            renamed = {
                "model.language_model.": "language_model.model.",
                "model.vision_tower.": "vision_tower.vision_model.",
                "model.multi_modal_projector.": "multi_modal_projector.",
                "lm_head.": "language_model.lm_head.",
            }
            for ours, theirs in renamed.items():
                weights = {re.sub(f"^{re.escape(ours)}", theirs, name): w for name, w in weights.items()}
        save_weights(weights, folder, suffix=".bin" if layout == ".bin" else ".safetensors", num_shards=3)
    elif layout == "mm_projector.bin":
        projector = {name: weight for name, weight in rest.items() if "mm_projector" in name}
        save_weights({name: weight for name, weight in rest.items() if name not in projector}, folder)
        (folder / "config.json").write_text(json.dumps(llava.config.text_config.to_dict()))
        (tmp_path / "stage1").mkdir()
        torch.save(projector, tmp_path / "stage1/mm_projector.bin")
        (tmp_path / "stage1/config.json").write_text(json.dumps({"model_type": "llava", **settings}))
        options = {"language_model": str(folder)}
        folder = tmp_path / "stage1"
    else:
        settings |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "_name_or_path": "x/vicuna"}
        text = {name: value for name, value in llava.config.text_config.to_dict().items() if value is not None}
        (folder / "config.json").write_text(json.dumps({**text, "model_type": "llava", **settings}))
        weights = rest | tower if layout == "own tower" else rest
        save_weights(weights, folder, suffix=".bin", num_shards=2)
        torch.save({"model.mm_projector.0.weight": torch.zeros(2)}, folder / "mm_projector.bin")  # not read
    conversion = convert(folder, tmp_path / "out", **options)
    assert_is_llava(tmp_path / "out", llava, noise)
    stored = [*chain(*conversion.used.values()), *conversion.left]
    assert len(stored) >= len(weights) and len(set(map(str, stored))) == len(stored)
    if layout == "named tower":
        conversion = convert(folder, tmp_path / "fresh", projector_variant="released", **options)
        assert not conversion.used["projector"] and load(tmp_path / "fresh").config.projector_variant == "released"
        assert sum("a fresh one replaces it" in why for why in conversion.left.values()) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projector_hidden_act": "gelu_pytorch_tanh"}, "projector_hidden_act='gelu_pytorch_tanh'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
        ({"vision_feature_layer": [-2, -3]}, r"vision_feature_layer=\[-2, -3\]"),
        ({"vision_feature_layer": 0}, "names layer 0"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full' .* 'default'"),
    ],
    ids=str,
)
def test_a_llava_that_the_residual_projector_cannot_be_is_named(llava_hf, tmp_path, settings, message):
    _, folder = llava_hf(**settings)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    convert(folder, tmp_path / "out", projector_variant="released")


def test_options_that_contradict_the_projector(llava_hf, whole, tmp_path):
    _, folder = llava_hf()
    with pytest.raises(
        ValueError, match=r"num_visual_tokens=\[36\] contradicts .* trained for every patch.* 144 tokens"
    ):
        convert(folder, tmp_path / "out", num_visual_tokens=[36])
    _, folder, _ = whole()
    with pytest.raises(
        ValueError, match=r"projector_variant=residual contradicts .*whole, which holds Delta-LLaVA's own"
    ):
        convert(folder, tmp_path / "out", projector_variant="residual")


@pytest.mark.parametrize("weight", ["multi_modal_projector.linear_2.bias", "language_model.model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named(llava_hf, tmp_path, weight):
    _, folder = llava_hf()
    weights = load_file(folder / "model.safetensors")
    weights[weight][3] = torch.inf
    save_weights(weights, folder)
    with pytest.raises(ValueError, match=rf"{re.escape(weight)} in .*model\.safetensors holds NaN or infinite values"):
        convert(folder, tmp_path / "out")


@pytest.fixture(scope="session")
def sentencepiece_tokenizer():
    """A Llama tokenizer as SentencePiece makes them, of bytes where it knows no piece, new at every call."""
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    lines = [SYSTEM_PROMPT, "USER: What is it? ASSISTANT: It is a red circle."] * 3
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=420, special_tokens=special))
    model = json.loads(trained.to_str())["model"]

    def make(legacy):
        merges = [tuple(merge) for merge in model["merges"]]
        return LlamaTokenizer(vocab=dict(model["vocab"]), merges=merges, legacy=legacy)

    return make


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not legacy"])
@pytest.mark.parametrize("image_token", [None, {}, {"lstrip": True, "rstrip": True}], ids=["new", "known", "greedy"])
def test_the_prompt_has_the_token_ids_of_llavas_code(
    llava_hf, sentencepiece_tokenizer, tmp_path, legacy, image_token, noise
):
    tokenizer, reference = sentencepiece_tokenizer(legacy), sentencepiece_tokenizer(legacy)
    if image_token is not None:
        tokenizer.add_tokens(AddedToken("<image>", **image_token), special_tokens=True)
    # Saving a tokenizer forgets whether it is legacy; those of llava-hf say it
    tokenizer.init_kwargs["legacy"] = legacy
    tokenizer.chat_template = LLAVA_HF_TEMPLATE
    _, folder = llava_hf(text_config=LlamaConfig(**SIZE | {"vocab_size": 500}), tokenizer=tokenizer)
    convert(folder, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    processor.save_pretrained(tmp_path / "again")  # as training does
    processor = AutoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)

    image = {"type": "image", "image": noise(1)[0]}
    chat = [
        {"role": "user", "content": [image, image, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is a red circle."}]},
        {"role": "user", "content": [{"type": "text", "text": "Is it?"}]},
    ]
    prompt = (
        SYSTEM_PROMPT + " USER: <image>\n<image>\nWhat is it? ASSISTANT: It is a red circle.</s>USER: Is it? ASSISTANT:"
    )
    expected = [reference.bos_token_id]
    for index, piece in enumerate(prompt.split("<image>")):
        expected += ["<image>"] * 4 * (index > 0) + reference(piece, add_special_tokens=False).input_ids
    ids = processor.apply_chat_template(
        chat,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"num_visual_tokens": 4},
    )["input_ids"][0]
    assert [processor.image_token_id if token == "<image>" else token for token in expected] == list(ids)


@pytest.mark.parametrize("siglip", [False, True])
def test_pixels_are_those_of_llavas_code(llava_hf, tmp_path, noise, siglip):
    settings = LLAVAS["SigLIP, Qwen"] if siglip else {}
    _, folder = llava_hf(**settings)
    convert(folder, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    # `expand2square` of LLaVA's code, then its image processor
    original = AutoImageProcessor.from_pretrained(folder)
    color = tuple(int(channel * 255) for channel in original.image_mean)
    for size in ((90, 40), (40, 90), (48, 48), (13, 50)):
        image = noise(1, size)[0]
        square = Image.new("RGB", (max(size),) * 2, color)
        square.paste(image, tuple((max(size) - side) // 2 for side in image.size))
        square = np.asarray(square.resize((48, 48), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        expected = ((square - original.image_mean) / original.image_std).transpose(2, 0, 1)
        pixels = processor(images=image, text="<image>", return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-5)


def test_the_card_calls_other_budgets_untrained_and_says_what_to_expect(llava_hf, tmp_path):
    _, folder = llava_hf()
    names = {"base_model": ["x/clip", "lmsys/vicuna-7b-v1.5"], "datasets": ["x/y"]}
    for variant in (None, "released"):
        convert(folder, tmp_path / str(variant), projector_variant=variant)
    card = " ".join(build_card(tmp_path / "None", "x/llava", **names).content.split())
    for said in (
        "made for 144 visual tokens per image and uses 144 by default",
        "So at 144 visual tokens this is that LLaVA-1.5, and all other budgets are untrained",
        "67.2 on MMBench at 576 tokens, 61.7 at 144, 50.8 at 36 and 19.3 at 1 (Cai et al., 2024",
        "padded to squares in the mean colour",
        "The chat template is Vicuna's",
        "The projector's MLP is LLaVA-1.5's own.",
        "| Projector | `residual` variant, not the paper's",
    ):
        assert said in card
    (tmp_path / "None" / "chat_template.jinja").write_text("{{ messages }}")
    assert "Vicuna's" not in build_card(tmp_path / "None", "x/llava", **names).content
    card = build_card(tmp_path / "released", "x/llava", **names).content
    assert "started with random weights. Nothing has been trained since." in card and "MMBench" not in card


def test_a_converted_llava_can_be_published(llava_hf, tmp_path):
    _, folder = llava_hf()
    convert(folder, tmp_path / "out", dtype="bfloat16")
    names = {"base_model": ["x/clip", "lmsys/vicuna-7b-v1.5"], "datasets": ["LLaVA's own data"]}
    assert "model.safetensors" in prepare(tmp_path / "out", "org/llava-untrained", **names).files


def test_the_language_models_end_tokens_are_kept(llava_hf, tmp_path):
    llava, folder = llava_hf()
    llava.generation_config.update(eos_token_id=[2, 17], max_length=4096)
    llava.generation_config.save_pretrained(folder)
    convert(folder, tmp_path / "out")
    generation = load(tmp_path / "out").generation_config
    assert generation.eos_token_id == [2, 17] and generation.pad_token_id == 2


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """`hub_cache(name, folder)`: puts a folder where a repository of the Hub is cached, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def lay(name, folder, revision="main"):
        repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        commit = f"{len(name):040}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)

    return lay


def test_cached_repositories_are_converted_offline(whole, hub_cache, tmp_path, noise):
    settings = {"mm_vision_tower": "openai/clip-tiny", "_name_or_path": "./checkpoints/vicuna"}
    model, folder, _ = whole(tower_inside=False, num_shards=2, settings=settings)
    hub_cache("openai/clip-tiny", tmp_path / "tower")
    hub_cache("someone/llava-delta-7b", folder, revision="tokens-36")
    out = tmp_path / "out"
    convert("someone/llava-delta-7b", out, revision="tokens-36", max_shard_size=100_000)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    assert_same_logits(out, model, noise)
    sources = yaml.safe_load((out / "training/sources.yaml").read_text())
    names = {"vision_tower": "openai/clip-tiny", "language_model": "someone/llava-delta-7b"}
    assert sources == names | {"converted_from": "someone/llava-delta-7b"}
    assert_no_path(tmp_path, out)
    assert_no_path("checkpoints/vicuna", out)


def test_weights_are_fetched_in_one_format(whole, tmp_path, monkeypatch):
    _, folder, weights = whole()
    save_weights(weights, folder, suffix=".bin", num_shards=2)
    fetched = []

    def download(name, revision, allow_patterns):
        cache = tmp_path / "fetched"
        for file in filter_repo_objects([path.name for path in folder.iterdir()], allow_patterns=allow_patterns):
            cache.mkdir(exist_ok=True)
            shutil.copy(folder / file, cache)
            fetched.append((revision, file))
        return str(cache)

    monkeypatch.setattr(layouts, "snapshot_download", download)
    convert("someone/llava-delta-7b", tmp_path / "out", revision="v2")
    names = {file for _, file in fetched}
    assert "model.safetensors" in names and not any(name.endswith(".bin") for name in names)
    assert {revision for revision, _ in fetched} == {"v2"}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_all_weights_get_the_dtype_of_the_embeddings_or_the_one_asked_for(whole, tmp_path, dtype):
    _, folder, weights = whole()
    for name, weight in weights.items():
        if name == "lm_head.weight" or re.match(r"model\.(layers|embed_tokens)\.", name):
            weights[name] = weight.half()
    save_weights(weights, folder)
    convert(folder, tmp_path / "out", dtype=dtype)
    expected = torch.float16 if dtype == "auto" else torch.bfloat16
    saved = load_file(tmp_path / "out/model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {expected}
    old, new = weights["model.embed_tokens.weight"], saved["model.language_model.embed_tokens.weight"]
    assert torch.equal(new[:300], old.to(expected))
    torch.testing.assert_close(new[300], old.float().mean(0).to(expected))
    assert DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto").dtype == expected


def test_a_weight_that_the_dtype_cannot_hold_is_named(whole, tmp_path):
    _, folder, weights = whole()
    save_weights(weights | {"model.mm_projector.mlp.2.bias": torch.full((64,), 1e6)}, folder)
    with pytest.raises(ValueError, match=r"multi_modal_projector\.mlp\.2\.bias does not fit into torch\.float16"):
        convert(folder, tmp_path / "out", dtype="float16")
    with pytest.raises(ValueError, match="dtype=int8 must be 'auto' or one of"):
        convert(folder, tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.norm.weight": None, "model.mm_projector.mlp.2.bias": None},
            r"nothing was found for language_model\.model\.norm\.weight; nothing .* projector\.mlp\.2\.bias\.$",
        ),
        (
            {"model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": None},
            r"nothing was found for vision_tower\.pre_layrnorm\.bias\.$",
        ),
        (
            {"model.norm.weight": torch.ones(65)},
            r"model\.norm\.weight in model\.safetensors has shape \(65,\) instead of \(64,\)",
        ),
        (
            {"lm_head.weight": torch.ones(299, 64)},
            r"lm_head\.weight in model\.safetensors has shape \(299, 64\) instead of \(300, 64\)",
        ),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int64)}, r"has dtype torch\.int64 instead of one of"),
        ({"model.image_newline": torch.ones(64)}, r"has no place for model\.image_newline in model\.safetensors"),
        (
            {"model.vision_tower.vision_tower.vision_model.encoder.layers.6.mlp.fc1.bias": torch.ones(64)},
            r"has no place for model\.vision_tower\..*layers\.6\.mlp\.fc1\.bias",
        ),
        ({"model.mm_projector.mlp.4.bias": torch.ones(64)}, r"has no place for model\.mm_projector\.mlp\.4\.bias"),
        ({"model.mm_projector.readout.bias": torch.ones(64)}, r"'readout\.bias' is not a weight of the published"),
        (
            {"model.vision_tower.vision_tower.pre_layrnorm.bias": torch.ones(32)},
            r"pre_layrnorm\.bias in model\.safetensors and .* are the same weight",
        ),
        ({"model.norm.weight": torch.ones(64).to(torch.int8)}, r"model\.norm\.weight in .* torch\.int8 .*quantized"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_tensor_that_is_missing_misshapen_or_unknown_is_named(whole, tmp_path, change, message):
    _, folder, weights = whole()
    weights = {name: weight for name, weight in {**weights, **change}.items() if weight is not None}
    save_weights(weights, folder)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("linear", ["weight", "bias"]),
        ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
        ("mlp2x_res_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("tokenpacker", ["q_proj_1.weight", "ln_q_1.weight", "clip_attn.in_proj_weight", "mlp.0.weight"]),
    ],
)
def test_another_projector_is_named(whole, tmp_path, kind, names):
    _, folder, weights = whole(settings={"mm_projector_type": kind})
    other = {f"model.mm_projector.{name}": torch.ones(2) for name in names}
    save_weights({name: w for name, w in weights.items() if "mm_projector" not in name} | other, folder)
    message = rf"holds neither Delta-LLaVA's projector.* nor .*mm_projector_type is '{kind}'.*{names[0]}"
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"scale_factor": None}, {}, r"no scale_factor .*--num_visual_tokens"),
        ({"scale_factor": 5}, {}, "scale_factor=5 .* does not divide the vision tower's grid of 12x12"),
        ({}, {"num_visual_tokens": [9]}, r"num_visual_tokens=\[9\] contradicts scale_factor=2 .* makes 36 tokens"),
        ({"scale_factor": None}, {"num_visual_tokens": [25]}, r"num_visual_tokens=25 .*\[1, 4, 9, 16, 36, 144\]"),
        ({"image_aspect_ratio": "anyres"}, {}, "image_aspect_ratio='anyres' .* no counterpart here, only 'square' and"),
        ({"mm_vision_select_feature": "cls_patch"}, {}, "mm_vision_select_feature='cls_patch' .* only 'patch'"),
        ({"mm_use_im_start_end": True}, {}, r"mm_use_im_start_end .*--chat_template"),
        ({"model_type": "llava_mpt_9"}, {}, "model_type='llava_mpt_9' .* no language model that"),
        ({"mm_vision_tower": "/gone/clip"}, {}, "vision_tower=/gone/clip is not a folder here"),
    ],
)
def test_a_setting_that_cannot_be_kept_is_named(whole, tmp_path, settings, options, message):
    _, folder, _ = whole(settings=settings)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_what_is_no_checkpoint_or_not_whole_is_named(whole, tmp_path):
    _, folder, _ = whole(num_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json names model-00002-of-00003\.safetensors, but"):
        convert(folder, tmp_path / "out")
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors cannot be read"):
        convert(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"is of no known layout: .*model_type='clip'"):
        convert(tmp_path / "tower", tmp_path / "out")
    with pytest.raises(ValueError, match="checkpoint=/no/such/folder is not a folder here"):
        convert("/no/such/folder", tmp_path / "out")
    with pytest.raises(ValueError, match="holds files already"):
        convert(folder, folder)


def test_an_interrupted_conversion_leaves_no_checkpoint_and_can_be_repeated(whole, tmp_path, noise, monkeypatch):
    model, folder, _ = whole()
    out = tmp_path / "out"
    out.mkdir()

    def stop(*args, **names):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hub.parts, "write_sources", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, out, max_shard_size=100_000)
    assert not list(out.iterdir()) and not (tmp_path / "out.incomplete").exists()
    (tmp_path / "out.incomplete").mkdir()
    (tmp_path / "out.incomplete/model.safetensors").write_bytes(b"left by a process that was killed")
    convert(folder, out)
    assert not (tmp_path / "out.incomplete").exists() and len(list(out.glob("*.safetensors"))) == 1
    _, processor = assert_same_logits(out, model, noise)
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<image>") == processor.image_token_id


def test_command_line(whole, tmp_path, capsys):
    model, folder, _ = whole(settings={"_name_or_path": "/home/someone/vicuna"})
    main(["--checkpoint", str(folder), "--output_dir", str(tmp_path / "out"), "--language_model", "lmsys/vicuna-7b"])
    printed = capsys.readouterr().out
    assert "model.layers.0.self_attn.rotary_emb.inv_freq in model.safetensors" in printed
    assert re.search(r"left +16 tensors +0\.0 MB  layer after the tower's layer 5", printed)
    projector = model.model.multi_modal_projector.state_dict().values()
    megabytes = sum(4 * weight.numel() for weight in projector) / 1e6
    assert re.search(rf"projector +{len(projector)} tensors +{megabytes:.1f} MB  float32", printed)
    assert "whole checkpoint of the LLaVA code base" in printed and "[36] visual tokens per image" in printed
    sources = yaml.safe_load((tmp_path / "out/training/sources.yaml").read_text())
    assert sources["language_model"] == "lmsys/vicuna-7b"
