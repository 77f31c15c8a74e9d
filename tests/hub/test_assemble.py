"""Assembling: small parts saved and joined for real, the backbones we name at full size on the meta device."""

import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    LlamaForCausalLM,
    MambaConfig,
    MiniMaxConfig,
    OPTConfig,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionModel,
)

from delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from delta_llava.hub.assemble import assemble, main
from delta_llava.hub.parts import build_config, join


@pytest.fixture
def parts(tmp_path, tiny_config, tiny_tokenizer, tiny_processor):
    """Saves a CLIP model (both halves, as its repository has) and a Llama without pad token or `<image>`."""

    def save(tie=False, text_config=None, siglip=False):
        torch.manual_seed(0)
        config = tiny_config(siglip=siglip)
        vision_config = type(config.vision_config)(
            **config.vision_config.to_diff_dict()
            | {"num_hidden_layers": 6}
            | ({"vision_use_head": True} if siglip else {})
        )
        if siglip:
            SiglipVisionModel(vision_config).save_pretrained(tmp_path / "tower")
            image_processor = SiglipImageProcessor(size={"height": 48, "width": 48})
        else:
            text_half = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            clip = CLIPConfig(vision_config=vision_config.to_dict(), text_config=text_half, projection_dim=8)
            CLIPModel(clip).save_pretrained(tmp_path / "tower")
            image_processor = tiny_processor().image_processor
        image_processor.save_pretrained(tmp_path / "tower")
        text_config = text_config or config.text_config
        text_config.tie_word_embeddings = tie
        text_config.vocab_size = 300
        language = AutoModelForCausalLM.from_config(text_config)
        language.save_pretrained(tmp_path / "language")
        tokenizer = tiny_tokenizer(image_token=None, pad_token=None)
        tokenizer.save_pretrained(tmp_path / "language")
        return str(tmp_path / "tower"), str(tmp_path / "language"), tmp_path / "out"

    return save


def loaded(folder):
    """Model and processor, as anyone loads them."""
    return tuple(
        auto.from_pretrained(folder, trust_remote_code=True) for auto in (AutoModelForImageTextToText, AutoProcessor)
    )


@pytest.mark.parametrize("tie", [False, True])
def test_assembled_weights_are_those_of_the_parts(parts, tie):
    tower, language, out = parts(tie)
    assemble(tower, language, out, num_visual_tokens=[144, 4, 36], projector_variant="paper")
    model, processor = loaded(out)
    assert model.config.num_visual_tokens == 144 and model.config.visual_token_budgets == [4, 36, 144]
    assert (processor.num_visual_tokens, processor.patch_grid_size) == (144, 12)
    assert processor.visual_token_budgets == [4, 36, 144]
    assert model.config.projector_variant == "paper"
    assert model.config.vision_config.num_hidden_layers == 5  # the sixth is read by nothing
    published = CLIPModel.from_pretrained(tower).vision_model.state_dict()
    for name, weight in model.model.vision_tower.state_dict().items():
        assert torch.equal(weight, published[name]), name
    published = LlamaForCausalLM.from_pretrained(language).state_dict()
    ours = model.model.language_model.state_dict()
    assert {f"model.{name}" for name in ours} | {"lm_head.weight"} == published.keys()
    for name, weight in ours.items():
        rows = 300 if name == "embed_tokens.weight" else None
        assert torch.equal(weight[:rows], published[f"model.{name}"]), name
    assert torch.equal(model.lm_head.weight[:300], published["lm_head.weight"])
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tie
    # Names that may be published: of folders the last one, here and nowhere else
    assert tower not in (out / "config.json").read_text() and language not in (out / "config.json").read_text()
    sources = yaml.safe_load((out / "training/sources.yaml").read_text())
    assert sources == {"vision_tower": "tower", "language_model": "language"}


def test_tokens_and_template_of_a_llama(parts):
    tower, language, out = parts()
    assemble(tower, language, out)
    model, processor = loaded(out)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert processor.tokenizer.pad_token_id == model.generation_config.pad_token_id is not None
    assert processor.tokenizer.padding_side == "left"
    assert len(processor.tokenizer) <= model.get_input_embeddings().num_embeddings == 320
    assert model.config.text_config.vocab_size == model.lm_head.out_features == 320
    assert processor.num_visual_tokens == model.config.num_visual_tokens == 144
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text.startswith("<s>A chat between") and text.endswith("USER: <image>\nWhat is it? ASSISTANT:")


def test_qwen_gets_chatml_and_stops_at_its_end_of_turn(parts, tiny_config):
    llama = tiny_config().text_config
    qwen = Qwen2Config(
        **{name: getattr(llama, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    )
    qwen.num_attention_heads = qwen.num_key_value_heads = 2
    qwen.eos_token_id, qwen.bos_token_id = 2, None
    tower, language, out = parts(text_config=qwen)
    assemble(tower, language, out)
    model, processor = loaded(out)
    chat = [{"role": "user", "content": "Who?"}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True).endswith(
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id


def test_siglip_keeps_all_patches_and_loses_its_head(parts, noise):
    tower, language, out = parts(siglip=True)
    assemble(tower, language, out, num_visual_tokens=[36])
    model, processor = loaded(out)
    assert model.config.vision_feature_select_strategy == "full"
    assert not any("head" in name for name, _ in model.model.vision_tower.named_parameters())
    logits = model(**processor(images=noise(1), text="<image>", return_tensors="pt")).logits
    assert logits.shape[1] == 36


@pytest.fixture
def join_tower(parts, tiny_processor):
    """Assembles a tower, saved by a function, with a Llama; returns the model as anyone loads it."""

    def make(vision_config, **options):
        torch.manual_seed(0)
        tower, language, out = parts()
        shutil.rmtree(tower)
        shutil.rmtree(out, ignore_errors=True)
        AutoModel.from_config(vision_config).save_pretrained(tower)
        tiny_processor().image_processor.save_pretrained(tower)
        assemble(tower, language, out, **options)
        return AutoModel.from_pretrained(tower).eval(), *loaded(out)

    return make


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 4,
}


@pytest.mark.parametrize(
    ("model_type", "prefix_tokens"),
    [("dinov2", 1), ("dinov2_with_registers", 5), ("dinov3_vit", 1), ("deit", 2), ("ijepa", 0), ("beit", 1)],
)
def test_any_tokens_before_the_patches_are_dropped(join_tower, model_type, prefix_tokens):
    tower, model, _ = join_tower(CONFIG_MAPPING[model_type](**TOWER))
    assert model.config.vision_feature_select_strategy == ("default" if prefix_tokens else "full")
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    query, memory = model.model._run_vision_tower(pixels)[1:]
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
    assert states[1].shape[1] == 144 + prefix_tokens
    torch.testing.assert_close(query, states[5][:, prefix_tokens:])
    expected = torch.cat([states[layer][:, prefix_tokens:] for layer in model.config.memory_feature_layers], dim=-1)
    torch.testing.assert_close(memory, expected)


def test_a_tower_takes_images_of_another_size_than_its_own_by_an_option(join_tower, noise):
    dinov2 = Dinov2Config(**TOWER | {"image_size": 64})
    with pytest.raises(ValueError, match=r"makes images of 48x48 pixels, but .* 64x64. .* --image_size"):
        join_tower(dinov2)
    tower, model, processor = join_tower(dinov2, image_size=48)
    assert (model.config.image_size, model.config.patch_grid_size) == (48, 12)
    inputs = processor(images=noise(1), text="<image>", num_visual_tokens=36, return_tensors="pt")
    with torch.no_grad():
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.model._run_vision_tower(inputs["pixel_values"])[1], states[5][:, 1:])
    assert model(**inputs).image_hidden_states.shape == (36, 64)
    _, model, processor = join_tower(dinov2, image_size=64)
    assert processor(images=noise(1), text="<image>", return_tensors="pt")["pixel_values"].shape[-2:] == (64, 64)
    with pytest.raises(ValueError, match=r"type 'clip_vision_model' cannot be used at 64x64 pixels: .*64\*64"):
        join_tower(CLIPVisionConfig(**TOWER), image_size=64)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("vit_mae", r"tokens of shape \(3, 37, 32\)"),  # it drops patches by chance
        ("yolos", "its last 144 tokens are not its patches"),  # they are its detections
        ("pixtral", r"tokens of shape \(1, 432, 32\)"),  # it packs images into one row
        ("sam_vision_model", r"tokens of shape \(3, 12, 12, 32\)"),
        ("siglip2_vision_model", "spatial_shapes"),
        ("vivit", "not enough values"),
    ],
)
def test_a_tower_that_cannot_be_run_is_refused_by_name(parts, join_tower, model_type, reason):
    size = {"image_size": [48, 48]} if model_type == "yolos" else {}
    with pytest.raises(ValueError, match=f"type '{model_type}' cannot be used at 48x48 pixels: .*{reason}"):
        join_tower(CONFIG_MAPPING[model_type](**TOWER | size))


def test_a_tower_with_missing_weights_is_refused(parts):
    tower, language, out = parts(siglip=True)
    weights = load_file(f"{tower}/model.safetensors")
    missing = next(name for name in weights if name.endswith("layers.0.mlp.fc1.weight"))
    del weights[missing]
    save_file(weights, f"{tower}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"tower lacks 1 of the model's weights, .*layers.0.mlp.fc1.weight"):
        assemble(tower, language, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text_config", "reason"),
    [
        (BertConfig(is_decoder=True, num_attention_heads=4), "its output head has"),
        (BartConfig(), "its base is BartDecoderWrapper"),
        (OPTConfig(word_embed_proj_dim=32, ffn_dim=96, num_attention_heads=4), "its output head has"),
        (MambaConfig(), "past_key_values"),
        (
            MiniMaxConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2),
            "cache of its own",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_language_model_of_another_make_is_refused_by_name(parts, templates, text_config, reason):
    for name, value in {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "d_model": 64}.items():
        if hasattr(text_config, name):
            setattr(text_config, name, value)
    tower, language, out = parts(text_config=text_config)
    with pytest.raises(ValueError, match=f"type '{text_config.model_type}' cannot be joined: .*{reason}"):
        assemble(tower, language, out, chat_template=templates / "vicuna-v1.jinja")
    assert sorted(path.name for path in out.parent.iterdir()) == ["language", "tower"]


def test_logits_that_are_not_the_language_model_s_leave_no_folder(parts, monkeypatch):
    tower, language, out = parts()
    save = DeltaLlavaForConditionalGeneration.save_pretrained

    def save_another(model, folder, **options):
        with torch.no_grad():
            model.lm_head.weight[7] += 0.1
        save(model, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(DeltaLlavaForConditionalGeneration, "save_pretrained", save_another)
        with pytest.raises(ValueError, match=r"type 'llama' cannot be joined: .* logits on a text are .* away"):
            assemble(tower, language, out)
    assert not out.exists() and not out.with_name("out.incomplete").exists()
    # What a killed process has left is no obstacle
    out.with_name("out.incomplete").mkdir()
    out.mkdir()
    for dtype in ("bfloat16", "float16"):
        assert assemble(tower, language, out, dtype=dtype).dtype == getattr(torch, dtype)
        assert [path.name for path in out.parent.glob("out*")] == ["out"]
        shutil.rmtree(out)


def test_memory_holds_one_language_model(parts, monkeypatch):
    tower, language, out = parts()
    load, alive = AutoModelForCausalLM.from_pretrained, []

    def watch(*args, **kwargs):
        model, info = load(*args, **kwargs)
        alive.extend(weakref.ref(weight) for weight in model.parameters())
        return model, info

    load_joined = DeltaLlavaForConditionalGeneration.from_pretrained

    def check(*args, **kwargs):
        assert alive and not any(weight() is not None for weight in alive)
        return load_joined(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watch)
    monkeypatch.setattr(DeltaLlavaForConditionalGeneration, "from_pretrained", check)
    assemble(tower, language, out)


def test_the_language_model_s_own_end_tokens_stay_beside_the_template_s(parts, tiny_config, tmp_path, noise):
    gemma = GemmaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, head_dim=32)
    gemma.num_key_value_heads = 1
    tower, language, out = parts(text_config=gemma)
    own = {"bos_token_id": 1, "eos_token_id": [2, 6], "temperature": 0.9, "top_p": 0.6, "_from_model_config": True}
    (Path(language) / "generation_config.json").write_text(json.dumps(own))
    template = tmp_path / "mine.jinja"
    body = "{% for message in messages %}{% generation %}{{ message.content }}END{% endgeneration %}{% endfor %}"
    for end, expected in {"<|im_end|>\n": [2, 4, 6], "</s>": [2, 6], "": [2, 6]}.items():
        template.write_text(body.replace("END", end))
        assemble(tower, language, out, chat_template=template)
        generation_config = GenerationConfig.from_pretrained(out)
        assert generation_config.eos_token_id == expected
        assert generation_config.bos_token_id == 1 and generation_config.pad_token_id == 291
        shutil.rmtree(out)
    # Without a file the configuration says the end tokens; sampling that is asked for stays
    (Path(language) / "generation_config.json").write_text(json.dumps({**own, "do_sample": True, "top_k": 5}))
    assemble(tower, language, out, chat_template=template)
    generation_config = GenerationConfig.from_pretrained(out)
    assert (generation_config.do_sample, generation_config.temperature, generation_config.top_k) == (True, 0.9, 5)
    template.write_text("{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match="The chat template cannot be rendered: no"):
        assemble(tower, language, tmp_path / "out2", chat_template=template)


def test_prompt_lookup_says_what_greedy_search_does(parts, noise):
    tower, language, out = parts()
    model = assemble(tower, language, out)
    processor = DeltaLlavaProcessor.from_pretrained(out)
    # The prompt's "USER: <image>" has what an answer may begin with, and images after it
    prompt = "USER: <image>\nWhat is it? ASSISTANT: It is USER:"
    inputs = processor(images=noise(1), text=prompt, num_visual_tokens=9, return_tensors="pt")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=5), expected)
    assert model.config.image_token_id not in expected[0, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        (None, True),
        ("{{ 'USER: ' + messages[0].content + ' ASSISTANT:' }}", True),
        ("{{ '<|im_start|>user\n' + messages[0].content + '<|im_end|>' }}", False),
        ("{{ '<|user|>\n' + messages[0].content + eos_token }}", False),
    ],
)
def test_a_llama_with_a_template_of_its_own_gets_no_other(parts, templates, own, kept):
    tower, language, out = parts()
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.chat_template = own
    tokenizer.save_pretrained(language)
    if not kept:
        with pytest.raises(ValueError, match=r"has a chat template of its own, .* with --chat_template"):
            assemble(tower, language, out)
        assert not out.exists()
    assemble(tower, language, out, chat_template=None if kept else templates / "vicuna-v1.jinja")
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    assert processor.chat_template == (templates / "vicuna-v1.jinja").read_text()


def test_joining_copies_no_weight_of_the_language_model(parts):
    tower, language, _ = parts()
    language_model = AutoModelForCausalLM.from_pretrained(language)
    pointers = {name: weight.data_ptr() for name, weight in language_model.model.layers.named_parameters()}
    config = build_config(
        AutoConfig.from_pretrained(tower).vision_config, language_model.config, fake_tokenizer(302, image_token_id=300)
    )
    model = join(config, AutoModel.from_pretrained(tower, config=config.vision_config), language_model)
    layers = dict(model.model.language_model.layers.named_parameters())
    assert {name: weight.data_ptr() for name, weight in layers.items()} == pointers


def fake_tokenizer(size, image_token_id):
    """What `build_config` asks a tokenizer: its size, the placeholder's id, the padding token."""

    class Tokenizer(SimpleNamespace):
        __len__ = lambda self: size  # noqa: E731

    return Tokenizer(convert_tokens_to_ids=lambda token: image_token_id, pad_token_id=0)


CLIP_LAYER = 12_596_224  # 4 (C² + C) + 8 C² + 5 C + 4 C at C = 1024
SIGLIP_LAYER = 15_239_504  # the same at C = 1152 and an MLP of 4304
SIGLIP_HEAD = 15_238_352  # attention, LayerNorm and MLP of that size, and a probe
FULL_SIZE = {
    # Published parameter counts of the towers (CLIP-L cut by one layer; SigLIP by one layer and its pooling head) and
    # of the language models, the latter with the rows that <image> and the padding to 64 add (2 x 64 x H for Vicuna).
    ("clip-vit-large-patch14-336", "vicuna-7b-v1.5"): (303_507_456 - CLIP_LAYER, 6_738_415_616 + 2 * 64 * 4096),
    ("clip-vit-large-patch14-336", "vicuna-13b-v1.5"): (303_507_456 - CLIP_LAYER, 13_015_864_320 + 2 * 64 * 5120),
    ("clip-vit-large-patch14-336", "qwen2.5-7b-instruct"): (303_507_456 - CLIP_LAYER, 7_615_616_512),
    ("clip-vit-large-patch14", "vicuna-7b-v1.5"): (303_179_776 - CLIP_LAYER, 6_738_415_616 + 2 * 64 * 4096),
    ("siglip-so400m-patch14-384", "vicuna-7b-v1.5"): (
        428_225_600 - SIGLIP_HEAD - SIGLIP_LAYER,
        6_738_415_616 + 2 * 64 * 4096,
    ),
}


@pytest.mark.parametrize(("tower", "language"), FULL_SIZE)
def test_full_size_on_meta(tower, language, backbones):
    vision_config = AutoConfig.from_pretrained(backbones / tower)
    text_config = AutoConfig.from_pretrained(backbones / language)
    tokens = 151_666 if "qwen" in language else 32_001
    config = build_config(vision_config, text_config, fake_tokenizer(tokens, image_token_id=tokens - 1))
    with torch.device("meta"):
        parts = AutoModel.from_config(config.vision_config), AutoModelForCausalLM.from_config(text_config)
        reference = DeltaLlavaForConditionalGeneration(config)
    model = join(config, *parts)

    assert {name: weight.shape for name, weight in model.state_dict().items()} == {
        name: weight.shape for name, weight in reference.state_dict().items()
    }

    def size(part):
        return sum(weight.numel() for weight in part.parameters())

    tower_size, language_size = FULL_SIZE[tower, language]
    assert size(model.model.vision_tower) == tower_size
    assert size(model.model.language_model) + size(model.lm_head) == language_size


def test_bad_input_is_refused_before_a_weight_is_loaded(parts, monkeypatch, tiny_config):
    tower, language, out = parts()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # loading would fail
    with pytest.raises(ValueError, match=r"num_visual_tokens=25 .*\[1, 4, 9, 16, 36, 144\]"):
        assemble(tower, language, out, num_visual_tokens=[36, 25])
    CLIPImageProcessor(crop_size={"height": 64, "width": 64}).save_pretrained(tower)
    with pytest.raises(ValueError, match="images of 64x64 pixels, but the vision tower takes 48x48"):
        assemble(tower, language, out)
    GPT2Config().save_pretrained(language)
    with pytest.raises(ValueError, match=r"type 'gpt2', only for \['llama', 'qwen2', 'qwen3'\]: name a Jinja file"):
        assemble(tower, language, out)
    out.mkdir()
    (out / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds files already"):
        assemble(tower, language, out)


def test_command_line(parts, tmp_path, capsys):
    tower, language, out = parts()
    template = tmp_path / "mine.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    overrides = '{"query_pooling": "area"}'
    command = f"--vision_tower {tower} --language_model {language} --output_dir {out} --num_visual_tokens 9 36"
    main([*command.split(), "--chat_template", str(template), "--config_overrides", overrides])
    assert "for [9, 36] visual tokens per image" in capsys.readouterr().out
    model = DeltaLlavaForConditionalGeneration.from_pretrained(out)
    assert (model.config.num_visual_tokens, model.config.query_pooling) == (36, "area")
    assert AutoProcessor.from_pretrained(out, trust_remote_code=True).chat_template == template.read_text()
