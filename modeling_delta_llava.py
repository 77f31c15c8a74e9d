"""Delta-LLaVA from pixels to logits: vision tower, the projector that forms few visual tokens, language model."""

from .configuration_delta_llava import (  # first: it refuses older releases
    RELEASE,
    DeltaLlavaConfig,
    budget_of_each_image,
    query_grid_size,
)


# isort: split

import threading
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from copy import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import TransformersKwargs, can_return_tuple, logging, torch_compilable_check


logger = logging.get_logger(__name__)

# The fields of quantization configurations that list modules to skip: bitsandbytes'; that of torchao, AWQ and most
# others; HQQ's; AQLM's. (GPTQ quantizes one list of blocks, and finds the language model's by its name.)
_QUANTIZATION_SKIP_LISTS = {
    "llm_int8_skip_modules",
    "modules_to_not_convert",
    "skip_modules",
    "linear_weights_not_to_quantize",
}
# Names in a model with an output head, and in one without
_NOT_QUANTIZED = (
    "lm_head",
    "vision_tower",
    "model.vision_tower",
    "multi_modal_projector",
    "model.multi_modal_projector",
)
# Since 5.23 a tower keeps only the layers that are asked for, also in a compiled graph
_TOWER_SELECTS_LAYERS = RELEASE >= (5, 23)


class DeltaProjection(nn.Module):
    """
    A linear map with a low-rank update, then GELU and LayerNorm: `LN(GELU(x·(W + (U·V)ᵀ)ᵀ))` (equation 4).

    Args:
        in_features (`int`), out_features (`int`): Sizes of the last dimension.
        rank (`int`): Rank r of the update; 0 leaves it out (the ablation "No DeltaProj").
        num_levels (`int`, *optional*): Number of feature levels, which share W and LN and have an update each
            (equation 8). The input is then `(..., num_levels, num_tokens, in_features)`.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, num_levels: int | None = None):
        super().__init__()
        levels = () if num_levels is None else (num_levels,)
        self.rank = rank
        self.shared_weight = nn.Linear(in_features, out_features, bias=False)
        if rank:
            self.U = nn.Parameter(torch.empty(*levels, in_features, rank))
            self.V = nn.Parameter(torch.empty(*levels, rank, out_features))
            self.reset_parameters()
        self.norm = nn.LayerNorm(out_features, eps=1e-6)

    def reset_parameters(self):
        for factor in (self.U, self.V):
            bound = (6.0 / sum(factor.shape[-2:])) ** 0.5  # Xavier-uniform, each level by itself
            nn.init.uniform_(factor, -bound, bound)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., num_tokens, in_features)` to `(..., num_tokens, out_features)`."""
        projected = self.shared_weight(features)
        if self.rank:
            # Not folded into W: in bfloat16 a small update would be rounded away there.
            projected = projected + features @ self.U @ self.V
        return self.norm(F.gelu(projected))


class DropPath(nn.Module):
    """Drops a residual branch for a random part of the samples, in training only (stochastic depth)."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.probability == 0.0:
            return branch
        keep = 1.0 - self.probability
        mask = branch.new_empty(branch.shape[0], *[1] * (branch.ndim - 1)).bernoulli_(keep)
        return branch * mask / keep


class EMHSA(nn.Module):
    """Efficient multi-head self-attention: pre-normalized, over all tokens of the query grid (equation 2)."""

    def __init__(self, hidden_size: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.input_norm = nn.LayerNorm(hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_visual_tokens, hidden_size)` to the same."""
        tokens = self.norm(self.input_norm(tokens))
        query, key, value = (
            projection(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class MHCA(nn.Module):
    """Multi-head convolutional attention: a grouped 3x3 convolution, each group a head with its own neighbourhood."""

    def __init__(self, hidden_size: int, head_dim: int):
        super().__init__()
        self.grouped = nn.Conv2d(hidden_size, hidden_size, 3, padding=1, groups=hidden_size // head_dim, bias=False)
        self.norm = nn.LayerNorm(hidden_size)
        self.pointwise = nn.Conv2d(hidden_size, hidden_size, 1, bias=False)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """`(batch_size, hidden_size, g, g)` to the same."""
        grid = self.norm(self.grouped(grid).movedim(1, -1)).movedim(-1, 1)
        return self.pointwise(F.relu(grid))


class RefinementBlock(nn.Module):
    """
    Specializes the queries on their grid: self-attention on ¾ of the channels, convolution on ¼, then an MLP on both
    (EMHSA, MHCA and MLP of equation 6; together the ablation's "TB").
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        hidden_size = config.vision_config.hidden_size
        convolution_size = hidden_size // 4
        attention_size = hidden_size - convolution_size
        head_dim = max(size for size in range(1, 33) if convolution_size % size == 0)
        self.attention_input = nn.Conv2d(hidden_size, attention_size, 1, bias=False)
        self.attention = EMHSA(attention_size, head_dim) if config.use_self_attention else None
        self.attention_drop_path = DropPath(config.attention_drop_path)
        self.convolution_input = nn.Conv2d(attention_size, convolution_size, 1, bias=False)
        self.convolution = MHCA(convolution_size, head_dim)
        self.convolution_drop_path = DropPath(config.convolution_drop_path)
        self.mlp = nn.Sequential(
            nn.Conv2d(hidden_size, config.refinement_mlp_ratio * hidden_size, 1),
            nn.ReLU(),
            nn.Conv2d(config.refinement_mlp_ratio * hidden_size, hidden_size, 1),
        )
        self.mlp_drop_path = DropPath(config.mlp_drop_path)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """`(batch_size, vision_hidden_size, g, g)` to the same."""
        attended = self.attention_input(grid)
        if self.attention is not None:
            branch = self.attention(attended.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(attended)
            attended = attended + self.attention_drop_path(branch)
        convolved = self.convolution_input(attended)
        convolved = convolved + self.convolution_drop_path(self.convolution(convolved))
        refined = torch.cat([attended, convolved], dim=1)
        return refined + self.mlp_drop_path(self.mlp(refined))


class CellAttention(nn.MultiheadAttention):
    """
    Multi-head attention in which every query has a memory of its own (equation 9).

    Where a memory has several tokens, no map is applied to them. Each head maps the query into the space of the keys,
    `(W_q·q)ᵀ(W_k·k) = (W_kᵀ·W_q·q)ᵀk`, and applies the value map after the weighted sum, `Σ aᵢ·W_v·vᵢ = W_v·Σ aᵢ·vᵢ`.
    The keys' bias adds the same to all scores of a query, which softmax ignores.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__(hidden_size, num_heads, batch_first=True)

    def forward(self, queries: torch.Tensor | None, keys: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            queries (`torch.Tensor` of shape `(batch_size, num_queries, hidden_size)`): One of each cell.
            keys, values (`torch.Tensor` of shape `(batch_size, num_queries, memory_size, hidden_size)`):
                What the query of a cell sees. If `memory_size` is 1, the softmax over the one score is 1: `queries` and
                `keys` change nothing, and may be `None` or those of one cell.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_queries, hidden_size)`.
        """
        query_weight, key_weight, value_weight = self.in_proj_weight.chunk(3)
        query_bias, _, value_bias = self.in_proj_bias.chunk(3)
        heads = (self.num_heads, self.head_dim)
        if queries is not None:
            queries = (F.linear(queries, query_weight, query_bias) * self.head_dim**-0.5).unflatten(-1, heads)
        if values.shape[2] == 1:
            attended = F.linear(values[:, :, 0], value_weight, value_bias)
            if queries is not None:
                keys = F.linear(keys[:, :, 0], key_weight).unflatten(-1, heads)
                weights = (queries * keys).sum(-1, keepdim=True).softmax(-1)
                attended = (attended.unflatten(-1, heads) * weights).flatten(2)
            return self.out_proj(attended)
        queries = torch.einsum("bqhd,hdc->bqhc", queries, key_weight.unflatten(0, heads))
        # Not fused: kernels are made for heads of up to 256 channels, and these scores are few
        weights = (queries @ keys.transpose(-1, -2)).softmax(-1, dtype=torch.float32).type_as(values)
        attended = torch.einsum("bqhc,hdc->bqhd", weights @ values, value_weight.unflatten(0, heads))
        return self.out_proj(attended.flatten(2) + value_bias)


def llava_mlp(config: DeltaLlavaConfig) -> nn.Sequential:
    """The map from vision to text width that LLaVA-1.5 introduced."""
    vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
    return nn.Sequential(nn.Linear(vision_size, text_size), nn.GELU(), nn.Linear(text_size, text_size))


class DeltaProjector(nn.Module):
    """
    Forms g² visual tokens from a grid of G² patches: queries are the image's features at g x g, refined among
    themselves; each attends to the multi-level features of the (G/g)² patches of its own cell (section 4).

    The budget is an argument of the call, and no weight depends on it.

    Args:
        config (`DeltaLlavaConfig`): `projector_variant` chooses how the attention's output becomes visual tokens: by an
            MLP to the language model's width (`"released"`, the published code), by a linear map and a refinement
            (`"paper"`, equations 3 to 11), or by a linear map that starts at zero, added to what LLaVA-1.5's MLP makes
            of the mean of each cell's query features (`"residual"`, which is ours and not the paper's).
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        self.variant = config.projector_variant
        self.query_pooling = config.query_pooling
        self.patch_grid_size = config.patch_grid_size
        vision_size = config.vision_config.hidden_size
        text_size = config.text_config.hidden_size
        rank = config.projector_rank if config.use_delta_projection else 0
        self.num_levels = len(config.memory_feature_layers)

        match self.variant:
            case "released" | "residual":
                memory_projection = (self.num_levels * vision_size, vision_size, rank)
                self.mlp = llava_mlp(config)
                if self.variant == "residual":
                    self.text_projection = nn.Linear(vision_size, text_size, bias=False)
            case "paper":
                memory_projection = (vision_size, vision_size, rank, self.num_levels)
                self.text_projection = nn.Linear(vision_size, text_size)
                self.mlp = nn.Sequential(
                    nn.LayerNorm(text_size, eps=1e-6),
                    nn.Linear(text_size, config.projector_intermediate_size),
                    nn.GELU(),
                    nn.Linear(config.projector_intermediate_size, text_size),
                )
        self.query_projection = DeltaProjection(vision_size, vision_size, rank)
        self.key_projection = DeltaProjection(*memory_projection)
        self.value_projection = DeltaProjection(*memory_projection)
        self.refinement_block = RefinementBlock(config) if config.use_refinement_block else None
        self.attention = CellAttention(vision_size, config.projector_num_attention_heads)
        # A function of the shape, so no checkpoint holds it; `_init_weights` fills it again after `from_pretrained`
        positions = position_table(vision_size, self.patch_grid_size)
        self.register_buffer("positions", positions, persistent=False)

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
            `torch.Tensor` of shape `(batch_size, V, text_hidden_size)`, row by row of the query grid.

        Raises:
            ValueError: If the grid does not allow the budget, or there are not G² patches.
        """
        side = self._side(query_features, num_visual_tokens)
        attended = self._attend(query_features, memory_features, side)
        match self.variant:
            case "released":
                return self.mlp(attended)
            case "residual":
                return self.mlp(self._cells(query_features, side).mean(2)) + self.text_projection(attended)
            case "paper":
                tokens = self.text_projection(attended)
                return tokens + self.mlp(tokens)  # equation 11

    def _side(self, query_features: torch.Tensor, num_visual_tokens: int) -> int:
        """Of the query grid, after a check of budget and patches."""
        if query_features.shape[1] != self.patch_grid_size**2:
            raise ValueError(
                f"Got {query_features.shape[1]} patches, but the projector expects {self.patch_grid_size}x"
                f"{self.patch_grid_size}={self.patch_grid_size**2}. A tower with a CLS token needs"
                ' vision_feature_select_strategy="default", a tower without it "full".'
            )
        return query_grid_size(num_visual_tokens, self.patch_grid_size)

    def _attend(self, query_features: torch.Tensor, memory_features: torch.Tensor, side: int) -> torch.Tensor:
        """What each query gathers from its cell (equation 9): `(batch_size, V, C)`."""
        grid = query_features.transpose(1, 2).unflatten(-1, (self.patch_grid_size, self.patch_grid_size))
        if self.variant == "paper":
            memory_features = memory_features.unflatten(-1, (self.num_levels, -1)).transpose(1, 2)
        values = self._cells(self.value_projection(memory_features), side)
        queries = keys = None
        if values.shape[2] > 1:
            queries = self._queries(grid, side)
            keys = self._cells(self.key_projection(memory_features), side)
        elif self.training:
            # A single memory token gets all attention, whatever the query. The query and key of one cell still run, so
            # that every parameter gets a gradient, of 0: DDP and ZeRO wait for it.
            queries = self._queries(grid, 1)
            keys = self.key_projection(memory_features[..., :1, :]).view_as(values[:, :1])
        return self.attention(queries, keys, values)

    def _queries(self, grid: torch.Tensor, side: int) -> torch.Tensor:
        """Refined and projected queries (equations 3 to 6): `(batch_size, C, G, G)` to `(batch_size, V, C)`."""
        # Contiguous, because the linear layers that vLLM puts in place of torch's on a CPU take nothing else
        grid = F.interpolate(grid, size=(side, side), mode=self.query_pooling)
        positions = F.interpolate(self.positions.float(), size=(side, side), mode="bicubic").to(grid.dtype)
        if self.variant == "paper":
            queries = self.query_projection((grid + positions).flatten(2).transpose(1, 2).contiguous())
            return self._refine(queries.transpose(1, 2).unflatten(-1, (side, side))).flatten(2).transpose(1, 2)
        grid = self._refine(grid) + positions
        return self.query_projection(grid.flatten(2).transpose(1, 2).contiguous())

    def _refine(self, grid: torch.Tensor) -> torch.Tensor:
        return grid if self.refinement_block is None else self.refinement_block(grid)

    def _cells(self, memory: torch.Tensor, side: int) -> torch.Tensor:
        """
        Cuts the patch grid into the cells of the query grid: `(batch_size, [num_levels,] G², C)` to
        `(batch_size, V, [num_levels *] (G/g)², C)`.
        """
        scale = self.patch_grid_size // side
        cells = memory.reshape(memory.shape[0], -1, side, scale, side, scale, memory.shape[-1])
        return cells.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 5).flatten(1, 2)


def position_table(hidden_size: int, grid_size: int) -> torch.Tensor:
    """
    Fixed 2-D sine-cosine positions, float32 `(1, hidden_size, grid_size, grid_size)`: the first half of the channels
    encodes the column, the second the row, each as sines then cosines of falling frequency.
    """
    frequencies = 10000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1).T.float()
    columns = line[:, None, :].expand(-1, grid_size, -1)
    rows = line[:, :, None].expand(-1, -1, grid_size)
    return torch.cat([columns, rows])[None]


class DeltaLlavaPreTrainedModel(PreTrainedModel):
    """What both Delta-LLaVA models share: capabilities, initialization, loading, and what quantization skips."""

    config: DeltaLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeltaProjector"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = _TOWER_SELECTS_LAYERS

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, DeltaProjector):
            hidden_size, grid_size = module.positions.shape[1:3]
            init.copy_(module.positions, position_table(hidden_size, grid_size))
            if module.variant == "residual" and isinstance(module.text_projection, nn.Linear):  # not a quantized one
                init.zeros_(module.text_projection.weight)
        elif isinstance(module, nn.Conv2d) or (isinstance(module, DeltaProjection) and module.rank):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args, quantization_config=None, **kwargs):
        """
        [`~PreTrainedModel.from_pretrained`], except that a `quantization_config` never reaches the vision tower, the
        projector or the output head (their names are added to the modules that the backend skips), and that no weight
        of a folder or repository may be missing.

        Raises:
            ValueError: If the files lack a weight of the model; not with `output_loading_info=True`, which returns the
                missing names, nor with `state_dict=...`.
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = _quantize_language_model_only(quantization_config)
        if kwargs.get("output_loading_info") or kwargs.get("state_dict") is not None:
            return super().from_pretrained(*args, **kwargs)
        model, info = super().from_pretrained(*args, **{**kwargs, "output_loading_info": True})
        check_all_loaded(info, args[0] if args else kwargs["pretrained_model_name_or_path"])
        return model


def check_all_loaded(info: dict, name: str):
    """Raises a `ValueError` if `from_pretrained`'s loading info says that `name` lacks weights of the model."""
    # With `ignore_mismatched_sizes`, a weight of another shape is not loaded either
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if missing:
        unknown = sorted(info["unexpected_keys"])
        raise ValueError(
            f"{name} lacks {len(missing)} of the model's weights, which would be random: {brief_list(missing)}. "
            + (f"It has others, which this version does not know: {brief_list(unknown)}. " if unknown else "")
            + "Get the whole checkpoint, or train it again with this version."
        )


def brief_list(names: Iterable[str], separator: str = ", ") -> str:
    """The first four names and the number of the others, for an error."""
    names = list(names)
    more = f"{separator}and {len(names) - 4} more" if len(names) > 4 else ""
    return separator.join(names[:4]) + more or "none"


def _quantize_language_model_only(quantization_config):
    """A copy of the configuration (an object or a dict) that skips everything but the language model's layers."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    quantization_config = copy(quantization_config)
    for name in vars(quantization_config).keys() & _QUANTIZATION_SKIP_LISTS:
        setattr(quantization_config, name, [*(getattr(quantization_config, name) or []), *_NOT_QUANTIZED])
    return quantization_config


class DeltaLlavaModel(DeltaLlavaPreTrainedModel):
    """
    Vision tower, projector and language model, without an output head.

    Args:
        config (`DeltaLlavaConfig`): Sub-configs name any tower with a square patch grid and any causal language model
            that `AutoModel` knows.
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = DeltaProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_visual_tokens: int | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Encodes images: one pass of the vision tower for all, one pass of the projector for each distinct budget.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`):
                Preprocessed images, in any floating dtype.
            num_visual_tokens (`int` or `torch.Tensor` of shape `(num_images,)`, int64, *optional*):
                The budget of all images, or of each. Defaults to `config.num_visual_tokens`. See "How a budget is
                decided" in `configuration_delta_llava.py`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: the tower's output, in which `pooler_output`
            is a list of one `(V_i, text_hidden_size)` tensor per image.

        Raises:
            ValueError: If the grid does not allow a budget, there are not as many budgets as images, or the images are
                not of size `config.image_size`.
        """
        num_images, _, height, width = pixel_values.shape
        if (height, width) != (self.config.image_size, self.config.image_size):
            raise ValueError(
                f"pixel_values are images of {height}x{width} pixels, but must be of {self.config.image_size}x"
                f"{self.config.image_size}."
            )
        budgets = self.image_budgets(num_images, num_visual_tokens)
        for budget in sorted(set(budgets) - set(self.config.visual_token_budgets)):
            query_grid_size(budget, self.config.patch_grid_size)
            if not torch.compiler.is_compiling():
                logger.warning_once(
                    f"This checkpoint was trained for {self.config.visual_token_budgets} visual tokens and is now used"
                    f" with {budget}: it works, but its answers may be worse."
                )

        vision_outputs, query_features, memory_features = self._run_vision_tower(pixel_values, **kwargs)
        image_features = [None] * num_images
        for budget in sorted(set(budgets)):
            images = [index for index, other in enumerate(budgets) if other == budget]
            part = slice(None) if len(images) == num_images else images  # a slice copies nothing
            projected = self.multi_modal_projector(query_features[part], memory_features[part], budget)
            for index, features in zip(images, projected, strict=True):
                image_features[index] = features
        return BaseModelOutputWithPooling(
            last_hidden_state=vision_outputs.last_hidden_state,
            pooler_output=image_features,
            hidden_states=vision_outputs.get("hidden_states") if kwargs.get("output_hidden_states") else None,
            attentions=vision_outputs.get("attentions"),
        )

    def image_budgets(self, num_images: int, num_visual_tokens: int | torch.Tensor | None = None) -> list[int]:
        """The budget of each image, from any form that [`~DeltaLlavaModel.get_image_features`] takes."""
        if num_visual_tokens is None:
            num_visual_tokens = self.config.num_visual_tokens
        if not isinstance(num_visual_tokens, int):  # the values of a tensor are unknown while a graph is compiled
            budgets = torch.as_tensor(num_visual_tokens).flatten().tolist()
            num_visual_tokens = budgets[0] if len(budgets) == 1 else budgets
        return budget_of_each_image(num_visual_tokens, num_images)

    def _run_vision_tower(self, pixel_values: torch.Tensor, **kwargs):
        """
        Runs the tower once and keeps only the layers that are read.

        Returns the tower's output, the query features `(num_images, G², C)` and the memory features
        `(num_images, G², num_levels * C)`.
        """
        # A frozen tower needs no autograd graph, whatever hooks gradient checkpointing has put on its embeddings
        needs_grad = pixel_values.requires_grad or any(
            weight.requires_grad for weight in self.vision_tower.parameters()
        )
        layers = {self.config.query_feature_layer, *self.config.memory_feature_layers}
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_grad):
            if _TOWER_SELECTS_LAYERS:
                kwargs["output_hidden_states"] = kwargs.get("output_hidden_states") or sorted(layers)
                vision_outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
                captured = vision_outputs.hidden_states
            else:
                with self._capture_layers(layers) as captured:
                    vision_outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)

        def patches(layer: int) -> torch.Tensor:
            tokens = captured[layer]
            if self.config.vision_feature_select_strategy == "full":
                return tokens
            return tokens[:, max(tokens.shape[1] - self.config.patch_grid_size**2, 0) :]

        query_features = patches(self.config.query_feature_layer)
        memory_features = torch.cat(
            [patches(layer).to(query_features.device) for layer in self.config.memory_feature_layers], dim=-1
        )
        return vision_outputs, query_features, memory_features

    @contextmanager
    def _capture_layers(self, layers: set[int]):
        """Yields a dict that the tower's next pass fills with the outputs of `layers`, counted from 1."""
        # For releases before 5.23, where `output_hidden_states=True` keeps every layer's output until the end
        captured, thread = {}, threading.get_ident()

        def keep(index: int):
            def hook(module, args, output):
                if threading.get_ident() == thread:  # not another thread's pass through the same tower
                    captured[index] = output[0] if isinstance(output, tuple) else output

            return hook

        tower_layers = self._vision_tower_layers()
        with ExitStack() as hooks:
            for index in layers:
                hooks.enter_context(tower_layers[index - 1].register_forward_hook(keep(index)))
            yield captured

    def _vision_tower_layers(self) -> nn.ModuleList:
        num_layers = self.config.vision_config.num_hidden_layers
        for module in self.vision_tower.modules():
            if isinstance(module, nn.ModuleList) and len(module) == num_layers:
                return module
        raise ValueError(f"{type(self.vision_tower).__name__} has no list of its {num_layers} layers to read from.")

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: list[torch.Tensor]
    ) -> torch.Tensor:
        """
        Where the image tokens are, `(batch_size, sequence_length, 1)`, bool.

        They are found by id, or without `input_ids` by their embedding. `image_features` are the visual tokens of each
        image, `(V_i, hidden_size)`.

        Raises:
            ValueError: If there are not as many image tokens as visual tokens, or images of different budgets do not
                end where their image tokens do.
        """
        if input_ids is None:
            placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        budgets = [len(features) for features in image_features]
        num_tokens = mask.sum()
        torch_compilable_check(num_tokens == sum(budgets), lambda: self._mismatch(int(num_tokens), budgets))
        if len(set(budgets)) > 1:
            # With mixed budgets the totals may agree while images are in the wrong order
            ends = mask & ~F.pad(mask, (0, 1))[:, 1:]
            token_ends = mask.flatten().cumsum(0)[ends.flatten()].tolist()
            feature_ends = torch.tensor(budgets).cumsum(0).tolist()
            if not set(token_ends) <= set(feature_ends):
                raise ValueError(
                    f"Image features and image tokens do not match: runs of image tokens end after {token_ends} tokens,"
                    f" but the images' features, {budgets} tokens each, end after {feature_ends}."
                )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    @staticmethod
    def _mismatch(num_tokens: int, budgets: list[int]) -> str:
        """Why there may be `num_tokens` image tokens for images of these `budgets`."""
        found = f"Image features and image tokens do not match, tokens: {num_tokens}, features: {sum(budgets)}"
        if not budgets:
            return f'{found}. Pass pixel_values, or mm_encoder_outputs={{"image": output of get_image_features}}.'
        return (
            f"{found}, of {len(budgets)} images with num_visual_tokens={budgets}. Pass the same num_visual_tokens to"
            " processor and model, and do not truncate image tokens."
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_visual_tokens: int | torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaModelOutputWithPast:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, int64, *optional*):
                Token ids, with `config.image_token_id` once for every visual token.
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`, *optional*):
                The images of all rows, in the order of their image tokens.
            attention_mask, position_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, int64, *optional*):
                As the language model takes them.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Instead of `input_ids`; image tokens are embedded like any token.
            num_visual_tokens (`int` or `torch.Tensor` of shape `(num_images,)`, int64, *optional*):
                As for [`~DeltaLlavaModel.get_image_features`].
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": output of get_image_features}`, instead of `pixel_values`: images encoded once serve many
                questions.

        Returns:
            `LlavaModelOutputWithPast`: that of the language model, and `image_hidden_states` of shape
            `(total_visual_tokens, hidden_size)`: the visual tokens of all images, in order, as they entered it.

        Raises:
            ValueError: If both or neither of `input_ids` and `inputs_embeds` are given, both of `pixel_values` and
                `mm_encoder_outputs`, or image tokens and visual tokens do not match. `input_ids` may have image tokens
                without any images, but not in training, in `generate`, or if `mm_encoder_outputs` lacks `"image"`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if image_outputs is not None:
                raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
            image_outputs = self.get_image_features(pixel_values, num_visual_tokens, return_dict=True)

        image_features = None
        if image_outputs is not None:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_outputs.pooler_output)
            image_features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        elif input_ids is not None and (self.training or mm_encoder_outputs is not None):
            # An answer or a training step, since `generate` always passes `mm_encoder_outputs`. A plain forward pass
            # may see image tokens without images, as in transformers' common tests
            if past_key_values is None or not past_key_values.is_initialized:  # later ones are the answer's own tokens
                self.get_placeholder_mask(input_ids, inputs_embeds, [])

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


class DeltaLlavaForConditionalGeneration(DeltaLlavaPreTrainedModel, GenerationMixin):
    """
    Delta-LLaVA with its output head: answers questions about images, with as many visual tokens for each as the call
    asks for.

    Example:

    ```python
    >>> from transformers import AutoModelForImageTextToText, AutoProcessor

    >>> model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    >>> inputs = processor(images=image, text=prompt, num_visual_tokens=36, return_tensors="pt")
    >>> model.generate(**inputs, max_new_tokens=30)
    ```"""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        self.model = DeltaLlavaModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=_head_has_bias(text_config))
        self.logit_scale = _logit_scale(text_config)
        self.logit_softcapping = getattr(text_config, "final_logit_softcapping", None)
        # `embed_tokens` in most language models, but not in all
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_visual_tokens: int | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`DeltaLlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, num_visual_tokens, **kwargs)

    def generate(self, *args, mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None, **kwargs):
        """
        [`~GenerationMixin.generate`], except that `mm_encoder_outputs` can be used again afterwards.

        Raises:
            ValueError: For `prefill_chunk_size` with images before transformers 5.23, whose chunks lose them.
        """
        config = kwargs.get("generation_config") or self.generation_config
        chunk_size = kwargs.get("prefill_chunk_size", config.prefill_chunk_size)
        has_images = mm_encoder_outputs is not None or kwargs.get("pixel_values") is not None
        if chunk_size is not None and has_images and RELEASE < (5, 23):
            raise ValueError(
                f"prefill_chunk_size={chunk_size} loses the images before transformers 5.23: leave it out."
            )
        if mm_encoder_outputs is not None:
            # Beam search repeats the features in place, once for each beam
            mm_encoder_outputs = {modality: copy(outputs) for modality, outputs in mm_encoder_outputs.items()}
            kwargs["mm_encoder_outputs"] = mm_encoder_outputs
        return super().generate(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_visual_tokens: int | torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaCausalLMOutputWithPast:
        """
        [`DeltaLlavaModel.forward`], and

        Args:
            labels (`torch.Tensor` of shape `(batch_size, sequence_length)`, int64, *optional*):
                Token ids to predict, -100 where there is no loss.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits of that many last positions only (0: of all), or of those that a tensor selects: int64
                indices `(num_positions,)` for all rows or `(batch_size, num_positions)` for each, or a bool mask
                `(batch_size, sequence_length)`, whose logits are `(num_true, vocab_size)`.

        Returns:
            `LlavaCausalLMOutputWithPast`: as [`DeltaLlavaModel.forward`], with `logits` of shape `(batch_size,
            num_positions, vocab_size)` and, with `labels`, `loss`: the cross-entropy of the next token.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            num_visual_tokens=num_visual_tokens,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(_keep_positions(outputs[0], logits_to_keep))
        # As the language model's own class, and TRL's fused loss, which reads the same fields
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcapping is not None:
            logits = torch.tanh(logits / self.logit_softcapping) * self.logit_softcapping
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


def _head_has_bias(text_config: PreTrainedConfig) -> bool:
    if text_config.model_type == "ernie4_5_moe":
        return text_config.use_bias
    return text_config.model_type in ("codegen", "gptj", "phi") or getattr(text_config, "lm_head_bias", False)


def _logit_scale(text_config: PreTrainedConfig) -> float:
    """What the language model multiplies its logits by."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text_config, name, None) is not None:
            return getattr(text_config, name)
    scaling = getattr(text_config, "logits_scaling", None) or 1.0
    return scaling if text_config.model_type == "hyperclovax" else 1.0 / scaling


def _keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """`slice_logits_to_keep` of transformers 5.23, for all releases."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)


__all__ = [
    "DeltaLlavaForConditionalGeneration",
    "DeltaLlavaModel",
    "DeltaLlavaPreTrainedModel",
    "DeltaProjection",
    "DeltaProjector",
]
