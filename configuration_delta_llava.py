"""
Configuration of Delta-LLaVA: which tower layers are read, and into how many visual tokens by which projector.

How a budget is decided. The budget of an image is the number of its visual tokens, `num_visual_tokens`. A call's
argument wins over the processor's default, which wins over the configuration's; both defaults are the same number in a
checkpoint. It is one budget for all images of the call or a list of one for each, in the order of their placeholders:

- an integer g², where g divides the tower's patch grid ([`query_grid_size`]). One that is not in
  `visual_token_budgets`, those that the checkpoint was trained for, works and warns once.
- `"auto"`, to the processor and to servers: by the size of the image ([`auto_visual_tokens`]).

`total_visual_tokens` in its place is shared by all images of a text ([`share_visual_tokens`]).
"""

import transformers


# Before the other imports, and imported first by the two other files: older releases lack names imported below.
if (RELEASE := tuple(map(int, transformers.__version__.split(".")[:2]))) < (5, 19):
    raise ImportError(
        f"Delta-LLaVA needs transformers>=5.19,<6, but {transformers.__version__} is installed: run `pip install"
        ' "transformers>=5.19,<6"`.'
    )

from copy import deepcopy
from itertools import pairwise
from math import isqrt
from typing import TYPE_CHECKING, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging


if TYPE_CHECKING:
    # Whoever loads or saves one of the three files follows these lines: a Hub repository always holds all three.
    from .modeling_delta_llava import DeltaLlavaForConditionalGeneration  # noqa: F401
    from .processing_delta_llava import DeltaLlavaProcessor  # noqa: F401

if RELEASE >= (6, 0):
    logging.get_logger(__name__).warning(
        f"Delta-LLaVA is made for transformers>=5.19,<6 and untested with {transformers.__version__}."
    )

AUTO_MAP = {
    "AutoConfig": "configuration_delta_llava.DeltaLlavaConfig",
    "AutoModel": "modeling_delta_llava.DeltaLlavaModel",
    "AutoModelForImageTextToText": "modeling_delta_llava.DeltaLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_delta_llava.DeltaLlavaForConditionalGeneration",
    "AutoProcessor": "processing_delta_llava.DeltaLlavaProcessor",
}


def valid_visual_token_counts(patch_grid_size: int) -> list[int]:
    """The budgets that a grid of `patch_grid_size`² patches allows: g² for every g that divides it, ascending."""
    return [side**2 for side in range(1, patch_grid_size + 1) if patch_grid_size % side == 0]


def default_visual_tokens(budgets: list[int]) -> int:
    """The budget of `budgets` that is the default: the largest up to 144, or the smallest where all are larger."""
    return max((budget for budget in budgets if budget <= 144), default=min(budgets))


def query_grid_size(num_visual_tokens: int, patch_grid_size: int) -> int:
    """
    Side g of the query grid of a budget.

    Args:
        num_visual_tokens (`int`): Budget V = g² of one image.
        patch_grid_size (`int`): Side G of the vision tower's patch grid.

    Returns:
        `int`: g, a divisor of G.

    Raises:
        ValueError: If V is not the square of a divisor of G; the message lists the budgets that are.
    """
    valid = valid_visual_token_counts(patch_grid_size)
    if isinstance(num_visual_tokens, bool) or num_visual_tokens not in valid:
        raise ValueError(
            f"num_visual_tokens={num_visual_tokens} does not fit a grid of {patch_grid_size}x{patch_grid_size} patches:"
            f" it must be one of {valid}."
        )
    return isqrt(num_visual_tokens)


def budget_of_each_image(num_visual_tokens: int | str | list[int | str], num_images: int) -> list[int | str]:
    """The budgets of a call's images, from one for all or a list of one for each, whose length is checked."""
    budgets = num_visual_tokens if isinstance(num_visual_tokens, list) else [num_visual_tokens] * num_images
    if len(budgets) != num_images:
        raise ValueError(f"num_visual_tokens names {len(budgets)} budgets, but there are {num_images} images.")
    return budgets


def auto_visual_tokens(longer_side: int, patch_size: int, budgets: list[int], default: int) -> int:
    """
    The budget that `num_visual_tokens="auto"` gives an image: no more tokens than it has patches of its own.

    An image enlarged to the tower's size shows no more than before. At its own size, `n = ceil(longer_side /
    patch_size)` patches of the tower span it, so its budget is the smallest g² with g >= n. If there is none up to the
    default, its budget is the default.

    Args:
        longer_side (`int`): The larger of the image's width and height as it was opened, in pixels.
        patch_size (`int`): Side of one of the tower's patches, in pixels.
        budgets (`list[int]`): What the checkpoint was trained for.
        default (`int`): The largest budget that an image may get.

    Returns:
        `int`: One of `budgets`, or the default.
    """
    needed = -(-longer_side // patch_size)
    return min((budget for budget in budgets if needed**2 <= budget <= default), default=default)


def share_visual_tokens(total: int, num_images: int, budgets: list[int]) -> list[int]:
    """
    The budgets that `total_visual_tokens` gives the images of one row: as even as the trained ones allow.

    All images start with the smallest budget and go up together, budget by budget. Where the rest does not cover the
    next budget for all of them, the first images get it.

    Args:
        total (`int`): Visual tokens of all images together.
        num_images (`int`): How many there are, in the order of their placeholders.
        budgets (`list[int]`): What the checkpoint was trained for.

    Returns:
        `list[int]`: A budget for each image, whose sum is at most `total`; `[144, 144, 36]` for three images and 400 of
        `[36, 144]`.

    Raises:
        ValueError: If the smallest budget for each is more than `total`.
    """
    budgets = sorted(set(budgets))
    left = total - num_images * budgets[0]
    if num_images and left < 0:
        raise ValueError(
            f"total_visual_tokens={total} is too few for {num_images} images: {budgets[0]}, the smallest budget, for"
            f" each makes {num_images * budgets[0]}."
        )
    shares = [budgets[0]] * num_images
    for budget, larger in pairwise(budgets):
        num_raised = min(shares.count(budget), left // (larger - budget))
        shares[:num_raised] = [larger] * num_raised
        left -= num_raised * (larger - budget)
    return shares


@strict
class DeltaLlavaConfig(PreTrainedConfig):
    r"""
    Configuration of a [`DeltaLlavaForConditionalGeneration`].

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to CLIP-ViT-L/14 at 336 pixels):
            The vision tower. Layers after the deepest one that is read are cut off here.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `LlamaConfig()`):
            The causal language model.
        image_token_id (`int`, *optional*, defaults to 32000):
            Id of the image token, which `input_ids` hold once for every visual token. LLaVA's name for it,
            `image_token_index`, works too.
        num_visual_tokens (`int`, *optional*):
            Default budget of an image: by default 144, or the largest valid one below it.
        visual_token_budgets (`list[int]`, *optional*, defaults to `[num_visual_tokens]`):
            Budgets that the checkpoint was trained for.
        query_feature_layer (`int`, *optional*, defaults to -2):
            Tower layer that queries are made from, as an index into `hidden_states` (0 is the embedding, so that 1 to n
            are the outputs of the n layers). Negative indices are resolved here and stored positive.
        memory_feature_layers (`list[int]`, *optional*):
            Tower layers that keys and values are made from, indexed alike. By default n/2, 2n/3, n-2 and n-1 (rounded,
            without repeats) for a tower of n layers: `[12, 16, 22, 23]` for CLIP-L.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `"default"` drops the tokens that the tower puts before its patches (CLS, registers): all but the last G².
            `"full"` is for towers without any (SigLIP).
        image_size (`int`, *optional*, defaults to that of `vision_config`):
            Side of the images in pixels. A side that differs from the tower's needs a tower that interpolates its
            position embeddings itself (DINOv2) or has none (DINOv3).
        projector_variant (`str`, *optional*, defaults to `"released"`):
            `"released"` is the projector of the published code, `"paper"` that of the paper's equations 3 to 11, and
            `"residual"` ours, not the paper's: LLaVA-1.5's MLP maps the pooled query features to tokens, and
            what the released one attends to is added to these by a linear map that starts at zero.
        projector_rank (`int`, *optional*, defaults to 16):
            Rank r of every low-rank update (equation 4).
        projector_num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of the attention between a query and its cell (equation 9).
        projector_intermediate_size (`int`, *optional*, defaults to 4096):
            Width h of the feed-forward refinement (equation 11); only the `"paper"` variant has one.
        query_pooling (`str`, *optional*, defaults to `"bilinear"`):
            How query features shrink to the query grid: `"bilinear"` as released, or `"area"`, where every patch counts
            even if cells are large.
        use_delta_projection, use_self_attention, use_refinement_block (`bool`, *optional*, defaults to `True`):
            The ablation's switches (table 3: No DeltaProj, No EMHSA, No TB).
        refinement_mlp_ratio (`int`, *optional*, defaults to 2):
            Width of the refinement block's MLP in multiples of the vision width.
        attention_drop_path, convolution_drop_path, mlp_drop_path (`float`, *optional*, defaults to 0.075, 0.025, 0.1):
            Probability, in training, that a sample skips that residual branch of the refinement block.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal that the projector's linear layers start from.
        tie_word_embeddings (`bool`, *optional*, defaults to that of `text_config`):
            Whether the output head is the language model's token embedding.

    Raises:
        ValueError: For a budget that the grid does not allow, a layer that the tower does not have, a grid that is not
            square, or a vision width that is not a multiple of 8; the message names the value and those allowed. Fields
            that `from_pretrained` overrides are checked too, and all again when the configuration is saved.

    Example:

    ```python
    >>> from delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration

    >>> config = DeltaLlavaConfig(num_visual_tokens=36)  # CLIP-L/336 and a 7B Llama
    >>> config.valid_visual_token_counts
    [1, 4, 9, 16, 36, 64, 144, 576]
    ```"""

    model_type = "delta_llava"
    attribute_map = {"image_token_index": "image_token_id"}
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    num_visual_tokens: int | None = None
    visual_token_budgets: list[int] | None = None
    query_feature_layer: int = -2
    memory_feature_layers: list[int] | None = None
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    image_size: int | None = None
    projector_variant: Literal["released", "paper", "residual"] = "released"
    projector_rank: int = 16
    projector_num_attention_heads: int = 8
    projector_intermediate_size: int = 4096
    query_pooling: Literal["bilinear", "area"] = "bilinear"
    use_delta_projection: bool = True
    use_self_attention: bool = True
    use_refinement_block: bool = True
    refinement_mlp_ratio: int = 2
    attention_drop_path: float = 0.075
    convolution_drop_path: float = 0.025
    mlp_drop_path: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """[`~PreTrainedConfig.get_config_dict`], but without `config.json` an error, not the default 7B model."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds no config.json. If it holds an adapter, merge it into a"
                " checkpoint by delta_llava.hub.merge_adapter of the package delta-llava."
            )
        return config_dict, kwargs

    def __post_init__(self, **kwargs):
        self.vision_config = _sub_config(
            self.vision_config,
            "clip_vision_model",
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        )
        self.text_config = _sub_config(self.text_config, "llama")
        # The head is ours, so the flag must be here too.
        self.tie_word_embeddings = bool(
            self.tie_word_embeddings or getattr(self.text_config, "tie_word_embeddings", False)
        )
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

        needed = "image_size", "patch_size", "hidden_size", "num_hidden_layers"
        if missing := [name for name in needed if getattr(self.vision_config, name, None) is None]:
            raise ValueError(
                f"Vision towers of type {self.vision_config.model_type!r} have no {' and no '.join(missing)}: a tower"
                " must make one token of each patch, in all of its layers."
            )
        if self.image_size is None:
            self.image_size, width = _as_pair(self.vision_config.image_size)
            if width != self.image_size:
                raise ValueError(
                    "The vision tower's patch grid must be square, but its image_size="
                    f"{self.vision_config.image_size} is not."
                )
        if self.vision_config.hidden_size % 8:
            raise ValueError(
                f"The vision tower's hidden_size={self.vision_config.hidden_size} must be a multiple of 8."
            )
        if (
            self.projector_num_attention_heads < 1
            or self.vision_config.hidden_size % self.projector_num_attention_heads
        ):
            raise ValueError(
                f"projector_num_attention_heads={self.projector_num_attention_heads} must divide the vision tower's"
                f" hidden_size={self.vision_config.hidden_size}."
            )
        if self.projector_rank < 1:
            raise ValueError(
                f"projector_rank={self.projector_rank} must be 1 or more; use_delta_projection=False leaves the"
                " low-rank update out."
            )
        self._resolve_layers()
        if self.num_visual_tokens is None:
            self.num_visual_tokens = default_visual_tokens(self.valid_visual_token_counts)
        if self.visual_token_budgets is None:
            self.visual_token_budgets = [self.num_visual_tokens]
        if len(set(self.visual_token_budgets)) != len(self.visual_token_budgets) or not self.visual_token_budgets:
            raise ValueError(f"visual_token_budgets={self.visual_token_budgets} must name budgets, each once.")
        for num_visual_tokens in (self.num_visual_tokens, *self.visual_token_budgets):
            query_grid_size(num_visual_tokens, self.patch_grid_size)

    def _resolve_layers(self):
        num_layers = self.vision_config.num_hidden_layers

        def resolve(name: str, layer: int) -> int:
            resolved = layer + num_layers + 1 if layer < 0 else layer
            if not 1 <= resolved <= num_layers:
                raise ValueError(
                    f"{name} names layer {layer}, but the vision tower has {num_layers} layers: it must be in"
                    f" 1..{num_layers} or -{num_layers}..-1."
                )
            return resolved

        if self.memory_feature_layers == []:
            raise ValueError("memory_feature_layers=[] must name a layer.")
        if self.memory_feature_layers is None:
            fractions = (num_layers / 2, 2 * num_layers / 3, num_layers - 2, num_layers - 1)
            self.memory_feature_layers = sorted({max(round(layer), 1) for layer in fractions})
        self.query_feature_layer = resolve("query_feature_layer", self.query_feature_layer)
        self.memory_feature_layers = [resolve("memory_feature_layers", layer) for layer in self.memory_feature_layers]
        deepest = max(self.query_feature_layer, *self.memory_feature_layers)
        self.vision_config.num_hidden_layers = deepest
        if hasattr(self.vision_config, "stage_names"):  # a backbone, such as DINOv2, has a name for each layer
            self.vision_config.stage_names = self.vision_config.stage_names[: deepest + 1]
            self.vision_config.out_features = self.vision_config.stage_names[-1:]

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """[`~PreTrainedConfig.from_dict`], except that fields given as arguments are checked like all others."""
        names = DeltaLlavaConfig.__annotations__.keys() - cls.sub_configs.keys() & kwargs.keys()
        return super().from_dict({**config_dict, **{name: kwargs.pop(name) for name in names}}, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """[`~PreTrainedConfig.save_pretrained`]; a configuration that would not load again is a `ValueError`."""
        self.from_dict(self.to_dict())
        super().save_pretrained(save_directory, **kwargs)

    @property
    def patch_grid_size(self) -> int:
        """Side G of the vision tower's patch grid, in patches."""
        patch_height, patch_width = _as_pair(self.vision_config.patch_size)
        if self.image_size // patch_height != self.image_size // patch_width:
            raise ValueError(
                f"The vision tower's patch grid must be square, but image_size={self.image_size} and"
                f" patch_size={self.vision_config.patch_size} do not make one."
            )
        return self.image_size // patch_height

    @property
    def valid_visual_token_counts(self) -> list[int]:
        """The budgets that the patch grid allows, ascending: `[1, 4, 9, 16, 36, 64, 144, 576]` for 24x24 patches."""
        return valid_visual_token_counts(self.patch_grid_size)


def _sub_config(config: dict | PreTrainedConfig | None, model_type: str, **defaults) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return deepcopy(config)  # ours is trimmed, the caller's is not
    if config is None:
        return CONFIG_MAPPING[model_type](**defaults)
    return CONFIG_MAPPING[config.get("model_type", model_type)](**config)


def _as_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


DeltaLlavaConfig.register_for_auto_class()

__all__ = [
    "AUTO_MAP",
    "RELEASE",
    "DeltaLlavaConfig",
    "auto_visual_tokens",
    "budget_of_each_image",
    "default_visual_tokens",
    "query_grid_size",
    "share_visual_tokens",
    "valid_visual_token_counts",
]
