"""The published projectors' figures: weights and inputs drawn from their names, so that none need to be stored."""

import zlib

import numpy as np
import torch
from safetensors.torch import load_file

from delta_llava.hub import layouts


def drawn(name, shape):
    """A weight by its published name, or `input.query_features` or `input.memory_features`."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    if name.startswith("input."):
        return values
    is_norm = "norm" in name or name.startswith("ln_")
    return 1 + 0.1 * values if is_norm and name.endswith("weight") else 0.05 * values


def published_weights(projector):
    """The projector's weights under the names that the published code gives them."""
    beginnings = {
        ours.replace(r"\1", letter): theirs.replace("([qkv])", letter).replace("\\", "")
        for theirs, ours in layouts._RENAMED.items()
        for letter in "qkv"
    }
    weights = {}
    for name, weight in projector.state_dict().items():
        ours = next(beginning for beginning in beginnings if name.startswith(beginning))
        weights[beginnings[ours] + name.removeprefix(ours)] = weight
    return weights


def assert_parity(projector, num_visual_tokens, file):
    """Compares tokens, and the norm of them all, with the figures in a file."""
    figures = load_file(file)
    query_features = drawn("input.query_features", (1, 576, 1024))
    memory_features = drawn("input.memory_features", (1, 576, 4096))
    tokens = projector(query_features, memory_features, num_visual_tokens)
    assert tokens.shape == (1, num_visual_tokens, 4096)
    assert relative_error(tokens[0][:, ::64], figures[f"visual_tokens_{num_visual_tokens}"]) <= 1e-5
    assert relative_error(torch.linalg.vector_norm(tokens), figures[f"norm_{num_visual_tokens}"]) <= 1e-5


def relative_error(ours, theirs):
    return (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()
