"""The projector: parity with the published code, the paper's variant, the ablation switches, the shapes in between."""

import math

import pytest
import torch
from parity import assert_parity, drawn, published_weights

from delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaProjection, DeltaProjector
from delta_llava.hub.convert import projector_from_released


# Where ours could hold the same numbers in another shape
CONVOLUTIONS = {
    "patch_embed.conv": (768, 1024, 1, 1),
    "projection.conv": (256, 768, 1, 1),
    "mhca.group_conv3x3": (256, 32, 3, 3),
    "mhca.projection": (256, 256, 1, 1),
    "mlp.conv1": (2048, 1024, 1, 1),
    "mlp.conv2": (1024, 2048, 1, 1),
}


@pytest.fixture(scope="module")
def published():
    """With weights drawn by the published names: under others they would not give the figures."""
    projector = DeltaProjector(DeltaLlavaConfig()).eval()
    shapes = {name: tuple(weight.shape) for name, weight in published_weights(projector).items()}
    convolutions = {f"combined_block.ntb.{name}.weight": shape for name, shape in CONVOLUTIONS.items()}
    assert {name: shape for name, shape in shapes.items() if len(shape) == 4} == convolutions
    weights = {name: drawn(name, shape) for name, shape in shapes.items()}
    projector.load_state_dict(projector_from_released(weights), strict=True)
    return projector


@torch.inference_mode()
@pytest.mark.parametrize("num_visual_tokens", [1, 4, 16, 36, 64, 144, 576])
def test_parity_with_the_published_projector(published, fixtures, num_visual_tokens):
    assert_parity(published, num_visual_tokens, fixtures / "released_delta_projector.safetensors")


@pytest.mark.parametrize(
    ("variant", "parameters"), [("released", 42_503_680), ("paper", 53_100_032), ("residual", 46_697_984)]
)
def test_parameter_count_at_clip_l_and_7b(variant, parameters):
    with torch.device("meta"):
        projector = DeltaProjector(DeltaLlavaConfig(projector_variant=variant))
    assert sum(weight.numel() for weight in projector.parameters()) == parameters


def random_projector(config):
    projector = DeltaProjector(config)
    for weight in projector.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    width = config.vision_config.hidden_size
    return projector, (torch.randn(2, 144, width), torch.randn(2, 144, width * len(config.memory_feature_layers)))


def naive_paper_projector(projector, config, query_features, memory_features, side):
    """Equations 3 to 11 one cell, one head and one level at a time, from the same weights."""
    grid, width = config.patch_grid_size, config.vision_config.hidden_size
    heads = config.projector_num_attention_heads
    scale = grid // side

    def delta(module, features, level=None):
        u, v = (module.U, module.V) if level is None else (module.U[level], module.V[level])
        weight = module.shared_weight.weight + (u @ v).T
        return module.norm(torch.nn.functional.gelu(features @ weight.T))

    resized = torch.nn.functional.interpolate(
        query_features.view(1, grid, grid, width).permute(0, 3, 1, 2), size=(side, side), mode="bilinear"
    )
    positions = torch.nn.functional.interpolate(projector.positions, size=(side, side), mode="bicubic")
    queries = delta(projector.query_projection, (resized + positions)[0].permute(1, 2, 0).reshape(-1, width))
    queries = projector.refinement_block(queries.T.reshape(1, width, side, side))[0].permute(1, 2, 0).reshape(-1, width)
    levels = memory_features.view(grid * grid, -1, width).unbind(1)
    weights, biases = projector.attention.in_proj_weight.chunk(3), projector.attention.in_proj_bias.chunk(3)
    rows = []
    for cell in range(side * side):
        top, left = (cell // side) * scale, (cell % side) * scale
        patches = [y * grid + x for y in range(top, top + scale) for x in range(left, left + scale)]
        keys = torch.cat([delta(projector.key_projection, z[patches], level) for level, z in enumerate(levels)])
        values = torch.cat([delta(projector.value_projection, z[patches], level) for level, z in enumerate(levels)])
        query = queries[cell] @ weights[0].T + biases[0]
        key, value = keys @ weights[1].T + biases[1], values @ weights[2].T + biases[2]
        outputs = []
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            scores = key[:, part] @ query[part] / math.sqrt(width // heads)
            outputs.append(scores.softmax(0) @ value[:, part])
        rows.append(projector.attention.out_proj(torch.cat(outputs)))
    tokens = projector.text_projection(torch.stack(rows))
    return tokens + projector.mlp(tokens)


@torch.no_grad()
@pytest.mark.parametrize("num_visual_tokens", [1, 9, 36])
def test_the_paper_variant_is_its_equations(tiny_config, num_visual_tokens):
    config = tiny_config(projector_variant="paper", projector_num_attention_heads=4)
    projector, features = random_projector(config)
    first = [part[:1] for part in features]
    expected = naive_paper_projector(projector.eval(), config, *first, side=math.isqrt(num_visual_tokens))
    torch.testing.assert_close(projector(*features, num_visual_tokens)[0], expected)


@pytest.mark.parametrize("variant", ["released", "paper", "residual"])
@pytest.mark.parametrize(
    ("switch", "missing"),
    [
        ("use_delta_projection", ("U", "V")),
        ("use_self_attention", ("refinement_block.attention.",)),
        ("use_refinement_block", ("refinement_block.",)),
    ],
)
def test_a_switch_removes_its_part_and_nothing_else(tiny_config, variant, switch, missing):
    full = DeltaProjector(tiny_config(projector_variant=variant)).state_dict()
    config = tiny_config(projector_variant=variant, **{switch: False})
    ablated, features = random_projector(config)
    removed = full.keys() - ablated.state_dict().keys()
    assert removed and ablated.state_dict().keys() <= full.keys()
    assert all(name.startswith(missing) or name.endswith(missing) for name in removed)
    assert ablated(*features, 9).shape == (2, 9, config.text_config.hidden_size)


def test_area_pooling_lets_every_patch_count(tiny_config):
    width = tiny_config().vision_config.hidden_size
    # One patch in a corner, far from the centre of the single cell that bilinear resizing reads.
    features = torch.zeros(1, width, 12, 12)
    features[0, :, 0, 0] = 1.0
    for pooling, counts in (("bilinear", False), ("area", True)):
        projector = DeltaProjector(tiny_config(query_pooling=pooling, use_refinement_block=False)).eval()
        with torch.no_grad():
            moved = projector._queries(features, 1) - projector._queries(torch.zeros_like(features), 1)
        assert bool(moved.abs().max() > 1e-6) is counts


def test_drop_path_acts_in_training_only(tiny_config):
    config = tiny_config(attention_drop_path=0.5, convolution_drop_path=0.5, mlp_drop_path=0.5)
    projector, features = random_projector(config)
    torch.manual_seed(0)
    first, second = projector.train()(*features, 36), projector(*features, 36)
    assert not torch.equal(first, second)
    assert torch.equal(projector.eval()(*features, 36), projector(*features, 36))


@torch.no_grad()
@pytest.mark.parametrize("num_visual_tokens", [1, 9, 36, 144])
def test_residual_adds_what_released_attends_to_onto_the_mlp_of_pooled_features(tiny_config, num_visual_tokens):
    projector, features = random_projector(tiny_config(projector_variant="residual"))
    projector.eval()
    released = DeltaProjector(tiny_config()).eval()
    shared = {key: weight for key, weight in projector.state_dict().items() if not key.startswith("text_projection.")}
    released.load_state_dict(shared)
    released.mlp = projector.text_projection
    side = math.isqrt(num_visual_tokens)
    cells = features[0].view(2, side, 12 // side, side, 12 // side, -1)
    expected = projector.mlp(cells.mean((2, 4)).flatten(1, 2)) + released(*features, num_visual_tokens)
    torch.testing.assert_close(projector(*features, num_visual_tokens), expected)


def test_the_branch_starts_at_zero_and_learns(tiny_config):
    model = DeltaLlavaForConditionalGeneration(tiny_config(projector_variant="residual"))
    projector = model.model.multi_modal_projector
    last = projector.text_projection
    assert not last.weight.any()
    _, features = random_projector(model.config)
    projector.train()(*features, 9).square().sum().backward()
    assert last.weight.grad.abs().min() > 0


class Opaque(torch.nn.Module):
    """A module that can be called and whose weight cannot be read, as vLLM, LoRA and quantization replace modules."""

    def __init__(self, module):
        super().__init__()
        self.hidden = [module]

    def forward(self, *args):
        return self.hidden[0](*args)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("num_visual_tokens", [1, 9, 144])
@pytest.mark.parametrize("variant", ["released", "paper", "residual"])
def test_every_submodule_is_called_and_its_weight_never_read(tiny_config, variant, num_visual_tokens, mode):
    projector, features = random_projector(tiny_config(projector_variant=variant, drops=False))
    projector.train(mode == "training")
    expected = projector(*features, num_visual_tokens)
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm)
    names = [name for name, module in projector.named_modules() if isinstance(module, kinds)]
    assert len(names) > 15
    for name in names:
        parent, _, child = name.rpartition(".")
        parent = projector.get_submodule(parent)
        module = getattr(parent, child)
        parent._modules[child] = Opaque(module)
        assert torch.equal(projector(*features, num_visual_tokens), expected), name
        parent._modules[child] = module


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("switch", [{}, {"use_refinement_block": False}, {"use_self_attention": False}])
@pytest.mark.parametrize("variant", ["released", "paper", "residual"])
def test_linear_layers_get_contiguous_features(tiny_model, variant, switch, siglip):
    """vLLM's own, on a CPU, end the engine otherwise."""
    model, strides = tiny_model(siglip=siglip, projector_variant=variant, **switch), []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, args: strides.append(args[0].stride(-1)))
    for budget in model.config.valid_visual_token_counts:
        model.get_image_features(torch.randn(1, 3, 48, 48), budget)
        model.get_image_features(torch.randn(2, 3, 48, 48), torch.tensor([budget, 36]))
    assert set(strides) == {1}


@pytest.mark.parametrize("variant", ["released", "residual"])
def test_a_single_patch_cell_leaves_out_what_cannot_matter_but_no_gradient(tiny_config, variant):
    projector, features = random_projector(tiny_config(projector_variant=variant, drops=False))
    trained = projector.train()(*features, 144)
    trained.sum().backward()
    assert [name for name, weight in projector.named_parameters() if weight.grad is None] == []  # DDP waits for each
    assert projector.query_projection.U.grad.abs().max() == 0
    projector.query_projection = projector.key_projection = projector.refinement_block = None
    torch.testing.assert_close(projector.eval()(*features, 144), trained)


def test_low_rank_update_is_part_of_the_map():
    projection = DeltaProjection(8, 4, rank=2)
    for weight in projection.parameters():
        torch.nn.init.normal_(weight)
    features = torch.randn(3, 8)
    folded = projection.shared_weight.weight + (projection.U @ projection.V).T
    expected = projection.norm(torch.nn.functional.gelu(features @ folded.T))
    torch.testing.assert_close(projection(features), expected)


def test_bad_budget_and_bad_grid_are_refused(tiny_config):
    projector, (query, memory) = random_projector(tiny_config())
    with pytest.raises(ValueError, match=r"num_visual_tokens=25 .* one of \[1, 4, 9, 16, 36, 144\]"):
        projector(query, memory, 25)
    with pytest.raises(ValueError, match="Got 143 patches, but the projector expects 12x12=144"):
        projector(query[:, 1:], memory, 36)
