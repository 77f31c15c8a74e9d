"""
Projectors that others published, and ablations of ours, with the call of ours, so that each can take its place:

    model.model.multi_modal_projector = TokenPackerProjector(model.config).apply(model._init_weights)

All are built from a `DeltaLlavaConfig` and read what the tower gives to ours: `query_features` are those of one layer,
which LLaVA-1.5 reads, `memory_features` those of several. The model's rule initializes all of them alike.
"""

from copy import copy

import torch
import torch.nn.functional as F
from torch import nn

from ..configuration_delta_llava import DeltaLlavaConfig, query_grid_size
from ..modeling_delta_llava import DeltaProjector, llava_mlp, position_table


class GatedProjector(DeltaProjector):
    """
    Ours as it was at first: the attention's output, times a learnt gate that starts at zero, is added to the pooled
    features before LLaVA-1.5's MLP.

    Args:
        config (`DeltaLlavaConfig`): As for [`DeltaProjector`]; its variant is not read.
    """

    def __init__(self, config: DeltaLlavaConfig):
        config = copy(config)
        config.projector_variant = "released"  # which has every part but the gate
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(config.vision_config.hidden_size))

    def forward(
        self, query_features: torch.Tensor, memory_features: torch.Tensor, num_visual_tokens: int
    ) -> torch.Tensor:
        """As [`DeltaProjector.forward`]."""
        side = self._side(query_features, num_visual_tokens)
        pooled = self._cells(query_features, side).mean(2)
        return self.mlp(pooled + self.gate * self._attend(query_features, memory_features, side))


class GateOneProjector(GatedProjector):
    """[`GatedProjector`] without its gate: the attention's output is added as it is."""

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        del self.gate
        self.gate = 1.0


class MlpProjector(nn.Module):
    """
    LLaVA-1.5's projector, an MLP on every patch ("Improved Baselines with Visual Instruction Tuning", Liu et al.,
    2023). There is no budget but all patches.

    Args:
        config (`DeltaLlavaConfig`): Gives the patch grid and the widths.
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        self.num_patches = config.patch_grid_size**2
        self.mlp = llava_mlp(config)

    def forward(
        self, query_features: torch.Tensor, memory_features: torch.Tensor, num_visual_tokens: int
    ) -> torch.Tensor:
        """
        Args:
            query_features (`torch.Tensor` of shape `(batch_size, G², vision_hidden_size)`): Patch features, row by row.
            memory_features (`torch.Tensor`): Not read.
            num_visual_tokens (`int`): G².

        Returns:
            `torch.Tensor` of shape `(batch_size, G², text_hidden_size)`.

        Raises:
            ValueError: If the budget is not the number of all patches.
        """
        if num_visual_tokens != self.num_patches:
            raise ValueError(
                f"num_visual_tokens={num_visual_tokens} is not possible with LLaVA-1.5's MLP: it makes one token of"
                f" each of the {self.num_patches} patches, so the budget must be {self.num_patches}."
            )
        return self.mlp(query_features)


class AveragePoolingProjector(nn.Module):
    """
    The mean of each cell's patches, then LLaVA-1.5's MLP: the nested visual tokens of M3 ("Matryoshka Multimodal
    Models", Cai et al., 2024), at every budget of the grid.

    Args:
        config (`DeltaLlavaConfig`): Gives the patch grid and the widths.
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        self.patch_grid_size = config.patch_grid_size
        self.mlp = llava_mlp(config)

    def forward(
        self, query_features: torch.Tensor, memory_features: torch.Tensor, num_visual_tokens: int
    ) -> torch.Tensor:
        """
        Args:
            query_features (`torch.Tensor` of shape `(batch_size, G², vision_hidden_size)`): Patch features, row by row.
            memory_features (`torch.Tensor`): Not read.
            num_visual_tokens (`int`): The budget V = g², g a divisor of G.

        Returns:
            `torch.Tensor` of shape `(batch_size, V, text_hidden_size)`.

        Raises:
            ValueError: If the grid does not allow the budget.
        """
        side = query_grid_size(num_visual_tokens, self.patch_grid_size)
        return self.mlp(_resize(query_features, self.patch_grid_size, side, "area"))


class TokenPackerProjector(nn.Module):
    """
    TokenPacker ("TokenPacker: Efficient Visual Projector for Multimodal LLM", Li et al., 2024): the image's features at
    g x g are queries, and each attends to the multi-level features of the patches of its own cell.

    It is what Delta-LLaVA's projector started from: an MLP in the place of each of the maps of keys and values, and
    neither positions nor refinement of the queries.

    Args:
        config (`DeltaLlavaConfig`): Gives the patch grid, the widths, the memory levels and the attention's heads.
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        self.patch_grid_size = config.patch_grid_size
        size = config.vision_config.hidden_size
        memory_size = len(config.memory_feature_layers) * size
        self.query_projection = nn.Linear(size, size, bias=False)
        self.key_projection = nn.Sequential(nn.Linear(memory_size, size), nn.GELU(), nn.Linear(size, size))
        self.value_projection = nn.Sequential(nn.Linear(memory_size, size), nn.GELU(), nn.Linear(size, size))
        self.query_norm = nn.LayerNorm(size, eps=1e-6)
        self.key_norm = nn.LayerNorm(size, eps=1e-6)
        self.value_norm = nn.LayerNorm(size, eps=1e-6)
        self.attention = nn.MultiheadAttention(size, config.projector_num_attention_heads, batch_first=True)
        self.mlp = llava_mlp(config)

    def forward(
        self, query_features: torch.Tensor, memory_features: torch.Tensor, num_visual_tokens: int
    ) -> torch.Tensor:
        """
        Args:
            query_features (`torch.Tensor` of shape `(batch_size, G², vision_hidden_size)`):
                Patch features, row by row, of the layer that queries are made from.
            memory_features (`torch.Tensor` of shape `(batch_size, G², num_levels * vision_hidden_size)`):
                Patch features of the layers that keys and values are made from, concatenated.
            num_visual_tokens (`int`): The budget V = g², g a divisor of G.

        Returns:
            `torch.Tensor` of shape `(batch_size, V, text_hidden_size)`.

        Raises:
            ValueError: If the grid does not allow the budget.
        """
        side = query_grid_size(num_visual_tokens, self.patch_grid_size)
        resized = _resize(query_features, self.patch_grid_size, side, "bilinear")
        queries = self.query_norm(self.query_projection(resized))
        keys = self.key_norm(self.key_projection(memory_features))
        values = self.value_norm(self.value_projection(memory_features))
        attended, _ = self.attention(
            queries.flatten(0, 1).unsqueeze(1), self._cells(keys, side), self._cells(values, side), need_weights=False
        )
        return self.mlp(attended.view_as(queries))

    def _cells(self, memory: torch.Tensor, side: int) -> torch.Tensor:
        """`(batch_size, G², C)` to `(batch_size * V, (G/g)², C)`."""
        scale = self.patch_grid_size // side
        cells = memory.unflatten(1, (side, scale, side, scale)).transpose(2, 3)
        return cells.flatten(3, 4).flatten(0, 2)


class ResamplerProjector(nn.Module):
    """
    Learnt queries that attend to all patches, of which a budget takes the first V ("Matryoshka Query Transformer for
    Large Vision-Language Models", Hu et al., 2024).

    Chosen here: one cross-attention layer, as published; up to 256 queries, as published, so that a larger budget is
    refused; keys are the normalized features with fixed positions on the grid, values the same features without. (The
    published code gives its keys the positions alone, by which no query could look for what an image shows.)

    Args:
        config (`DeltaLlavaConfig`): Gives the patch grid, the widths and the attention's heads.
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        self.patch_grid_size = config.patch_grid_size
        self.num_queries = min(256, self.patch_grid_size**2)
        size = config.vision_config.hidden_size
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(self.num_queries, size), std=0.02))
        self.query_norm = nn.LayerNorm(size, eps=1e-6)
        self.memory_norm = nn.LayerNorm(size, eps=1e-6)
        self.attention = nn.MultiheadAttention(size, config.projector_num_attention_heads, batch_first=True)
        self.text_projection = nn.Linear(size, config.text_config.hidden_size, bias=False)
        positions = position_table(size, self.patch_grid_size).flatten(2).transpose(1, 2)
        self.register_buffer("positions", positions, persistent=False)

    def forward(
        self, query_features: torch.Tensor, memory_features: torch.Tensor, num_visual_tokens: int
    ) -> torch.Tensor:
        """
        Args:
            query_features (`torch.Tensor` of shape `(batch_size, G², vision_hidden_size)`): Patch features, row by row.
            memory_features (`torch.Tensor`): Not read.
            num_visual_tokens (`int`): The budget V, at most `num_queries` and one that the grid allows.

        Returns:
            `torch.Tensor` of shape `(batch_size, V, text_hidden_size)`.

        Raises:
            ValueError: If the grid does not allow the budget, or there are fewer queries.
        """
        query_grid_size(num_visual_tokens, self.patch_grid_size)  # the same budgets as everyone's
        if num_visual_tokens > self.num_queries:
            raise ValueError(
                f"num_visual_tokens={num_visual_tokens} is more than the resampler's {self.num_queries} queries."
            )
        queries = self.query_norm(self.queries[:num_visual_tokens]).expand(len(query_features), -1, -1)
        values = self.memory_norm(query_features)
        keys = values + self.positions.to(values.dtype)
        attended, _ = self.attention(queries, keys, values, need_weights=False)
        return self.text_projection(attended)


def _resize(features: torch.Tensor, patch_grid_size: int, side: int, mode: str) -> torch.Tensor:
    """`(batch_size, G², C)` to `(batch_size, side², C)`, by `interpolate`'s mode."""
    grid = features.transpose(1, 2).unflatten(-1, (patch_grid_size, patch_grid_size))
    return F.interpolate(grid, size=(side, side), mode=mode).flatten(2).transpose(1, 2)
