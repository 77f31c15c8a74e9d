"""Each comparator is what was published, and takes our projector's place in the model and in the training scripts."""

import json

import pytest
import torch
import yaml
from parity import assert_parity, drawn
from safetensors.torch import load_file

from delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from delta_llava.study.projectors import (
    AveragePoolingProjector,
    GatedProjector,
    GateOneProjector,
    MlpProjector,
    ResamplerProjector,
    TokenPackerProjector,
)
from delta_llava.train import pretrain, stage


ELASTIC = (AveragePoolingProjector, TokenPackerProjector, ResamplerProjector)
every_projector = pytest.mark.parametrize("kind", [MlpProjector, *ELASTIC])
# Ours, and the names of the published TokenPacker
PUBLISHED_NAMES = {
    "query_projection": "q_proj_1",
    "key_projection": "k_proj_1",
    "value_projection": "v_proj_1",
    "query_norm": "ln_q_1",
    "key_norm": "ln_k_1",
    "value_norm": "ln_v_1",
    "attention": "clip_attn",
    "mlp": "mlp",
}


@pytest.fixture(scope="module")
def published():
    projector = TokenPackerProjector(DeltaLlavaConfig()).eval()
    weights = {}
    for name, weight in projector.state_dict().items():
        part, _, rest = name.partition(".")
        weights[name] = drawn(f"{PUBLISHED_NAMES[part]}.{rest}", tuple(weight.shape))
    projector.load_state_dict(weights)
    return projector


@torch.inference_mode()
@pytest.mark.parametrize("num_visual_tokens", [1, 4, 16, 36, 64, 144, 576])
def test_parity_with_the_published_tokenpacker(published, fixtures, num_visual_tokens):
    assert_parity(published, num_visual_tokens, fixtures / "released_tokenpacker_projector.safetensors")


@pytest.fixture
def features(tiny_config):
    """Of two images, with a gradient as none of training's: it shows what is read."""
    config = tiny_config()
    size = config.vision_config.hidden_size
    torch.manual_seed(0)
    return [torch.randn(2, 144, size * levels, requires_grad=True) for levels in (1, len(config.memory_feature_layers))]


@pytest.mark.parametrize("kind", ELASTIC)
def test_one_projector_serves_every_budget_of_the_grid(tiny_config, features, kind):
    config = tiny_config()
    projector = kind(config)
    for num_visual_tokens in config.valid_visual_token_counts:
        tokens = projector(*features, num_visual_tokens)
        assert tokens.shape == (2, num_visual_tokens, config.text_config.hidden_size)
    with pytest.raises(ValueError, match=r"num_visual_tokens=25 .* one of \[1, 4, 9, 16, 36, 144\]"):
        projector(*features, 25)


def test_the_mlp_has_no_budget_but_all_patches(tiny_config, features):
    projector = MlpProjector(tiny_config())
    torch.testing.assert_close(projector(*features, 144), projector.mlp(features[0]))
    with pytest.raises(ValueError, match=r"num_visual_tokens=36 .* the budget must be 144"):
        projector(*features, 36)


def test_pooling_gives_the_mean_of_each_cell(tiny_config, features):
    projector = AveragePoolingProjector(tiny_config())
    # 12 x 12 patches into 4 x 4 cells of 3 x 3
    cells = features[0].view(2, 4, 3, 4, 3, -1).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(projector(*features, 16), projector.mlp(cells))


def test_tokenpacker_reads_a_cell_for_each_token(tiny_config, features):
    tokens = TokenPackerProjector(tiny_config())(*features, 16)
    tokens[:, 6].sum().backward()  # row 1, column 2 of 4 x 4 cells of 3 x 3 patches
    read = features[1].grad.abs().sum((0, 2)).view(12, 12) > 0
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[3:6, 6:9] = True
    assert torch.equal(read, expected)


def test_fewer_tokens_of_the_resampler_are_the_first_of_more(tiny_config, features):
    projector = ResamplerProjector(tiny_config())
    torch.testing.assert_close(projector(*features, 4), projector(*features, 36)[:, :4])


def test_the_resampler_looks_at_places_too(tiny_config, features):
    """Else an image and the same patches in another order would be the same to it."""
    projector = ResamplerProjector(tiny_config())
    with torch.no_grad():
        projector.query_norm.weight.mul_(10)  # so that it looks at all, before any training
        shuffled = projector(features[0].flip(1), features[1], 4)
        assert (shuffled - projector(*features, 4)).abs().max() > 1e-4


def test_the_resampler_refuses_more_than_its_256_queries():
    with torch.device("meta"):
        projector = ResamplerProjector(DeltaLlavaConfig())
    assert projector.queries.shape == (256, 1024)
    with pytest.raises(ValueError, match="num_visual_tokens=576 is more than the resampler's 256 queries"):
        projector(torch.zeros(1), torch.zeros(1), 576)


@pytest.mark.parametrize("num_visual_tokens", [4, 144])
def test_a_gate_of_zero_is_pooling_and_of_one_adds_the_attention(tiny_config, features, num_visual_tokens):
    model = DeltaLlavaForConditionalGeneration(tiny_config())
    gated = placed(model, GatedProjector).eval().model.multi_modal_projector
    pooling, fixed = AveragePoolingProjector(model.config), GateOneProjector(model.config).eval()
    pooling.mlp = gated.mlp
    torch.testing.assert_close(gated(*features, num_visual_tokens), pooling(*features, num_visual_tokens))
    gated.gate.data.fill_(1)
    fixed.load_state_dict({name: weight for name, weight in gated.state_dict().items() if name != "gate"})
    ones = gated(*features, num_visual_tokens)
    assert (ones - pooling(*features, num_visual_tokens)).abs().max() > 1e-4
    torch.testing.assert_close(fixed(*features, num_visual_tokens), ones)


def placed(model, kind):
    """The model with the projector in the place of ours, initialized as ours."""
    torch.manual_seed(0)
    projector = kind(model.config).apply(model._init_weights)
    model.model.multi_modal_projector = projector.to(model.dtype)
    return model


@every_projector
def test_it_starts_from_the_models_initialization(tiny_config, kind):
    projector = placed(DeltaLlavaForConditionalGeneration(tiny_config()), kind).model.multi_modal_projector
    for module in projector.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias is None or not module.bias.any()


@every_projector
def test_gradients_reach_every_weight(tiny_model, kind):
    model = placed(tiny_model(), kind)
    prompt = torch.tensor([[1, *[model.config.image_token_id] * 144, 5, 6, 7]])
    model(prompt, pixel_values=torch.randn(1, 3, 48, 48), num_visual_tokens=144, labels=prompt).loss.backward()
    for name, weight in model.model.multi_modal_projector.named_parameters():
        # With one patch in a cell there is nothing to choose, so at all patches TokenPacker's queries learn nothing
        if not (kind is TokenPackerProjector and name.startswith(("query", "key"))):
            assert weight.grad.abs().max() > 0, name


def test_gradients_reach_tokenpackers_queries_where_there_is_a_choice(tiny_config, features):
    projector = TokenPackerProjector(tiny_config())
    projector(*features, 16).square().sum().backward()
    for name, weight in projector.named_parameters():
        assert weight.grad.abs().max() > 0, name


@every_projector
def test_a_model_with_it_answers_from_what_it_sees(tiny_model, kind):
    model = placed(tiny_model(), kind)
    with torch.no_grad():
        for weight in model.model.multi_modal_projector.parameters():
            weight.mul_(20)
    budget = 144 if kind is MlpProjector else 9
    prompt = torch.tensor([[1, *[model.config.image_token_id] * budget, 5, 6]]).expand(2, -1)
    pixel_values = torch.randn(2, 3, 48, 48)
    answer = model.generate(
        prompt,
        pixel_values=pixel_values,
        num_visual_tokens=budget,
        max_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert answer.sequences.shape[1] == prompt.shape[1] + 3
    assert (answer.logits[0][0] - answer.logits[0][1]).abs().max() > 1e-3  # of two images


@every_projector
def test_a_fresh_one_takes_over_the_saved_weights(tiny_config, features, tmp_path, kind):
    projector, fresh = kind(tiny_config()), kind(tiny_config())
    torch.save(projector.state_dict(), tmp_path / "projector.pt")
    fresh.load_state_dict(torch.load(tmp_path / "projector.pt", weights_only=True))
    torch.testing.assert_close(fresh(*features, 144), projector(*features, 144))


@every_projector
def test_stage_1_trains_it(tiny_config, tiny_processor, noise, tmp_path, monkeypatch, kind):
    budget = 144 if kind is MlpProjector else 16
    processor = tiny_processor()
    processor.save_pretrained(tmp_path / "checkpoint")
    config = tiny_config(visual_token_budgets=[budget], image_token_id=processor.image_token_id)
    DeltaLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "checkpoint")
    records = []
    for index, image in enumerate(noise(4)):
        image.save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Noise {index}."}]
        records.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    recipe = {
        "model_name_or_path": str(tmp_path / "checkpoint"),
        "json_path": str(tmp_path / "data.json"),
        "image_folder": str(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "num_visual_tokens": [budget],
        "bf16": False,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "max_steps": 2,
        "save_strategy": "no",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    models, load_model = [], stage.load_model

    def load_with_comparator(*arguments):
        models.append(placed(load_model(*arguments), kind))
        return models[0]

    monkeypatch.setattr(stage, "load_model", load_with_comparator)
    pretrain.main(["--config", str(tmp_path / "recipe.yaml")])
    projector = models[0].model.multi_modal_projector
    saved = load_file(tmp_path / "out" / "model.safetensors")
    initial = placed(DeltaLlavaForConditionalGeneration(config), kind).model.multi_modal_projector.state_dict()
    for name, weight in projector.state_dict().items():
        torch.testing.assert_close(saved[f"model.multi_modal_projector.{name}"], weight)
        assert not torch.equal(weight, initial[name]), name
