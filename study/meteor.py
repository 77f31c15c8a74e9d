"""
A comparator after LLaVA-Meteor's abstract ("LLaVA-Meteor", arXiv 2505.11945): all patches are fused first, with each
other and with the instruction, then the most significant ones are kept.

Of that work we know the abstract alone, no equation and no number: this is our reading of it, not a reproduction, and
says nothing of how well the original does. What it has of the abstract: a trainable *Flash Global Fusion* of selective
state-space operators, which reads the patches by a *local-to-single scan*, and a *Visual-Native Selection*, for which
two experts judge every patch independently. One set of weights keeps any number of patches from 1 to all.

```
model = meteor_from(DeltaLlavaForConditionalGeneration.from_pretrained(checkpoint))  # with a new projector
processor = MeteorProcessor.from_pretrained(checkpoint)
model.generate(**processor(images=image, text=prompt, num_visual_tokens=29, return_tensors="pt"))
```

The processor hands the instruction to the model beside the image. It is the text before the first answer: in a chat of
several turns, the first question decides what is kept of all images, and no answer ever does. The classes of this file
load saved models: no code travels with them.

What an answer costs at each budget, beside Delta-LLaVA's:

    python -m delta_llava.study.meteor --recipe vicuna-7b --text_tokens 68 --new_tokens 30
"""

import argparse
import math
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BatchFeature, Mamba2Config
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ..configuration_delta_llava import DeltaLlavaConfig
from ..costs import FLOP_PARTS, LANGUAGE_MODELS, inference_costs, recipe_config
from ..modeling_delta_llava import (
    DeltaLlavaForConditionalGeneration,
    DeltaLlavaModel,
    DeltaLlavaPreTrainedModel,
    brief_list,
    llava_mlp,
)
from ..processing_delta_llava import DeltaLlavaImagesKwargs, DeltaLlavaProcessor, DeltaLlavaProcessorKwargs


NO_TOKEN = -100  # pads `instruction_ids`


def check_num_kept(num_visual_tokens: Any, num_patches: int | None = None):
    """Raises a `ValueError` for a budget that is no integer from 1 to `num_patches`."""
    is_integer = isinstance(num_visual_tokens, int) and not isinstance(num_visual_tokens, bool)
    if not is_integer or not 1 <= num_visual_tokens <= (num_patches or num_visual_tokens):
        raise ValueError(
            f"num_visual_tokens={num_visual_tokens} must be an integer from 1 to {num_patches or 'that of patches'}: so"
            " many patches are kept."
        )


@strict
class MeteorConfig(DeltaLlavaConfig):
    """
    Configuration of a [`MeteorForConditionalGeneration`]: a [`DeltaLlavaConfig`] whose budgets are any numbers from 1
    to that of all patches. Of the tower's layers `query_feature_layer` alone is read. What describes Delta-LLaVA's
    projector is not used.

    Args:
        scan (`str`, *optional*, defaults to `"local_to_single"`):
            Order in which patches are read: `"local_to_single"` has windows row by row, of each first its mean, a
            summary to which the pooled instruction is added, then its patches; `"window"` has the patches alone, and
            `"raster"` the patches row by row.
        scan_window (`int`, *optional*):
            Side of a window in patches, a divisor of the patch grid's. By default the largest one up to 4.
        experts (`str`, *optional*, defaults to `"both"`):
            Who judges: the `"visual"` expert, by the attention that the tower itself pays to a patch; the `"native"`
            one, by how near a projected patch is to a token of the instruction in the language model's embedding
            space; or `"both"`, whose ranks are averaged. Without an instruction the visual expert judges alone.
        use_instruction (`bool`, *optional*, defaults to `True`):
            Whether fusion and experts read the instruction.

    Raises:
        ValueError: For a budget below 1 or above the number of patches, a window that does not divide the grid, or a
            native expert without an instruction.
    """

    model_type = "llava_meteor_after_abstract"

    scan: Literal["local_to_single", "window", "raster"] = "local_to_single"
    scan_window: int | None = None
    experts: Literal["both", "visual", "native"] = "both"
    use_instruction: bool = True

    _auto_class = None  # no code travels with a comparator

    def __post_init__(self, **kwargs):
        default, budgets = self.num_visual_tokens, self.visual_token_budgets
        self.num_visual_tokens, self.visual_token_budgets = 1, [1]  # ours must be squares
        self.memory_feature_layers = [self.query_feature_layer]
        super().__post_init__(**kwargs)
        del self.auto_map
        num_patches, side = self.patch_grid_size**2, self.patch_grid_size
        self.num_visual_tokens = min(144, num_patches) if default is None else default
        self.visual_token_budgets = [self.num_visual_tokens] if budgets is None else budgets
        if len(set(self.visual_token_budgets)) != len(self.visual_token_budgets) or not self.visual_token_budgets:
            raise ValueError(f"visual_token_budgets={self.visual_token_budgets} must name budgets, each once.")
        for num_visual_tokens in (self.num_visual_tokens, *self.visual_token_budgets):
            check_num_kept(num_visual_tokens, num_patches)
        divisors = [divisor for divisor in range(1, side + 1) if side % divisor == 0]
        if self.scan_window is None:
            self.scan_window = max(divisor for divisor in divisors if divisor <= 4)
        if self.scan_window not in divisors:
            raise ValueError(
                f"scan_window={self.scan_window} must divide the grid of {side}x{side} patches: one of {divisors}."
            )
        if self.experts == "native" and not self.use_instruction:
            raise ValueError('experts="native" judges by the instruction, so use_instruction=False leaves it nothing.')

    @classmethod
    def from_delta_llava(cls, config: DeltaLlavaConfig, **fields) -> "MeteorConfig":
        """With the tower, the language model and the budgets of another configuration, and these fields."""
        own = ("model_type", "auto_map", "architectures")
        return cls(**{**{name: value for name, value in config.to_dict().items() if name not in own}, **fields})

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """[`~DeltaLlavaConfig.from_dict`], which checks fields that are named as arguments."""
        own = {name: kwargs.pop(name) for name in MeteorConfig.__annotations__.keys() & kwargs.keys()}
        return super().from_dict({**config_dict, **own}, **kwargs)

    @property
    def valid_visual_token_counts(self) -> list[int]:
        """All numbers of patches."""
        return list(range(1, self.patch_grid_size**2 + 1))


class MeteorImagesKwargs(DeltaLlavaImagesKwargs, total=False):
    """
    instruction (`str` or `list[str]`, *optional*):
        What is asked of all images, or of those of each text. By default it is taken from the text itself.
    """

    instruction: str | list[str] | None


class MeteorProcessorKwargs(DeltaLlavaProcessorKwargs, total=False):
    images_kwargs: MeteorImagesKwargs

    _defaults = {}  # older releases ask for it


class MeteorProcessor(DeltaLlavaProcessor):
    """
    A [`DeltaLlavaProcessor`] that takes any number of visual tokens up to that of the patches, and returns beside the
    images `instruction_ids` (int64, `(num_images, length)`): what each is asked, without special tokens, padded on the
    left by -100.

    The instruction of a chat is all text before its first answer; of a text, all that is not an answer by the chat
    template's own marks, or what the argument `instruction` says.

    Raises:
        ValueError: As [`DeltaLlavaProcessor`], and where there are not as many instructions as texts.
    """

    valid_processor_kwargs = MeteorProcessorKwargs
    _auto_class = None  # no code travels with a comparator

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, **kwargs: Unpack[MeteorProcessorKwargs]
    ) -> BatchFeature:
        images_kwargs = dict(kwargs.get("images_kwargs") or {})
        instruction = kwargs.pop("instruction", images_kwargs.pop("instruction", None))
        texts = [text] if isinstance(text, str) else text
        if images is not None and isinstance(texts, list) and all(isinstance(sample, str) for sample in texts):
            if instruction is None:
                instruction = [self._before_answer(sample) for sample in texts]
            elif isinstance(instruction, str):
                instruction = [instruction] * len(texts)
            if len(instruction) != len(texts):
                raise ValueError(f"instruction has {len(instruction)} texts, but there are {len(texts)} to go with.")
            images_kwargs["instruction"] = [
                asked
                for sample, asked in zip(texts, instruction, strict=True)
                for _ in range(sample.count(self.image_token))
            ]
        return super().__call__(images=images, text=text, **{**kwargs, "images_kwargs": images_kwargs})

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """[`~DeltaLlavaProcessor.apply_chat_template`], which hands the text before the first answer on."""
        options = kwargs.get("processor_kwargs") or {}
        if kwargs.get("tokenize") and "instruction" not in {**kwargs, **options}:
            is_list = isinstance(conversation, (list, tuple)) and len(conversation) > 0
            is_batch = is_list and not isinstance(conversation[0], dict)
            chats = conversation if is_batch else [conversation]
            instruction = [self._first_question(chat, chat_template, kwargs) for chat in chats]
            kwargs["processor_kwargs"] = {**options, "instruction": instruction}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def _first_question(self, chat: Any, chat_template: str | None, kwargs: dict[str, Any]) -> str:
        """What the template makes of the messages before the first answer."""
        messages = getattr(chat, "messages", chat)
        roles = [message.get("role") for message in messages]
        asked = messages[: roles.index("assistant")] if "assistant" in roles else messages
        if not asked:
            return ""
        asks = ("tokenize", "continue_final_message", "return_assistant_tokens_mask", "sanitize_control_tokens")
        kwargs = {name: value for name, value in kwargs.items() if name not in asks}
        return super().apply_chat_template(asked, chat_template, **{**kwargs, "add_generation_prompt": True})

    def _before_answer(self, text: str) -> str:
        """A text up to where the chat template would begin the first answer; all of it if it does so nowhere."""
        if self.chat_template is None:
            return text
        question = "\ufdd0"  # a character that Unicode keeps for a program's own use
        prompt = self._first_question([{"role": "user", "content": question}], None, {})
        end = prompt.partition(question)[2]
        return text[: text.find(end) + len(end)] if end in text else text

    def _process_images(self, images, instruction: list[str] | None = None, **kwargs):
        processed, replacements = super()._process_images(images, **kwargs)
        if instruction is not None:
            special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            rows = [
                [index for index in self.tokenizer.encode(asked, add_special_tokens=False) if index not in special]
                for asked in instruction
            ]
            length = max(1, *map(len, rows))
            processed["instruction_ids"] = [[NO_TOKEN] * (length - len(row)) + row for row in rows]
        return processed, replacements

    def _check_budget(self, num_visual_tokens: int):
        check_num_kept(num_visual_tokens, None if self.patch_grid_size is None else self.patch_grid_size**2)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "instruction_ids"]

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "auto_map"}


def scan(patches: torch.Tensor, window: int, summary: torch.Tensor | None = None) -> torch.Tensor:
    """
    Reads a grid window by window, row by row both within a window and of windows.

    Args:
        patches (`torch.Tensor` of shape `(batch_size, G², hidden_size)`): Row by row.
        window (`int`): Side k of a window, which divides G; with k = G that is the raster order.
        summary (`torch.Tensor` of shape `(batch_size, 1, hidden_size)`, *optional*):
            If given, each window begins with a summary: this and the mean of its patches.

    Returns:
        `torch.Tensor` of shape `(batch_size, G² [+ (G/k)²], hidden_size)`.
    """
    cells = math.isqrt(patches.shape[1]) // window
    windows = patches.unflatten(1, (cells, window, cells, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if summary is not None:
        windows = torch.cat([windows.mean(2, keepdim=True) + summary[:, None], windows], dim=2)
    return windows.flatten(1, 2)


def unscan(sequence: torch.Tensor, side: int, window: int, has_summaries: bool = False) -> torch.Tensor:
    """The patches of what [`scan`] returns for a grid of `side`² patches, row by row; summaries are dropped."""
    cells = side // window
    windows = sequence.unflatten(1, (cells**2, -1))[:, :, int(has_summaries) :]
    return windows.unflatten(1, (cells, cells)).unflatten(3, (window, window)).transpose(2, 3).flatten(1, 4)


class FlashGlobalFusion(nn.Module):
    """
    Lets every patch perceive the whole image and the instruction, at a cost linear in their number: a Mamba-2 mixer
    reads the instruction and then the patches in the order of the scan, reads the instruction and then the patches in
    the reverse order, and both outputs are added to the patches.

    The mixer's output projection starts at zero, and fusion as the identity. Half of its heads start with a memory of
    hundreds of patches; even so, little is left of an instruction after the first few, so its mean is also added to
    every window's summary.

    Args:
        config ([`MeteorConfig`]): Gives the patch grid, the widths and the scan. The fusion has the tower's width.
    """

    def __init__(self, config: MeteorConfig):
        super().__init__()
        size = config.vision_config.hidden_size
        self.side = config.patch_grid_size
        self.window = self.side if config.scan == "raster" else config.scan_window
        self.has_summaries = config.scan == "local_to_single"
        self.visual_norm = nn.LayerNorm(size)
        self.text_projection = None
        if config.use_instruction:
            self.text_projection = nn.Sequential(nn.Linear(config.text_config.hidden_size, size), nn.LayerNorm(size))
        inner_size = 2 * size
        head_dim = max(width for width in range(1, 65) if inner_size % width == 0 and inner_size // width >= 8)
        mixer_config = Mamba2Config(
            hidden_size=size,
            expand=2,
            num_heads=inner_size // head_dim,
            head_dim=head_dim,
            state_size=64,
            n_groups=1,
            chunk_size=64,
            use_conv_bias=False,  # so that zeros on the left leave no trace in the state
            num_hidden_layers=1,
        )
        self.mixer = Mamba2Mixer(mixer_config, layer_idx=0)

    def forward(
        self, features: torch.Tensor, instruction: torch.Tensor, instruction_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(batch_size, G², vision_hidden_size)`): Patch features, row by row.
            instruction (`torch.Tensor` of shape `(batch_size, length, text_hidden_size)`):
                Token embeddings; of length 0 without an instruction.
            instruction_mask (`torch.Tensor` of shape `(batch_size, length)`, bool):
                False at padding, which must come first: between text and patches it would wear the memory out.

        Returns:
            `torch.Tensor` of shape `(batch_size, G², vision_hidden_size)`.
        """
        text = features[:, :0]
        if self.text_projection is not None:
            text = self.text_projection(instruction) * instruction_mask[..., None]
        summary = None
        if self.has_summaries:
            summary = text.sum(1, keepdim=True) / instruction_mask.sum(1).clamp(min=1)[:, None, None]
        visual = scan(self.visual_norm(features), self.window, summary)
        rows = torch.cat([torch.cat([text, order], dim=1) for order in (visual, visual.flip(1))])
        forward, backward = self.mixer(rows)[:, text.shape[1] :].chunk(2)
        return features + unscan(forward + backward.flip(1), self.side, self.window, self.has_summaries)


@torch.no_grad()
def visual_native_selection(
    experts: str,
    tokens: torch.Tensor,
    attention: torch.Tensor,
    instruction: torch.Tensor,
    instruction_mask: torch.Tensor,
    num_visual_tokens: list[int],
) -> list[torch.Tensor]:
    """
    Which patches are kept of each image. An expert ranks them within the image, two experts' ranks are averaged, and
    equal ones are taken in the order of the grid.

    Args:
        experts (`str`): `"both"`, `"visual"` or `"native"`; an image without an instruction has the visual one's rank.
        tokens (`torch.Tensor` of shape `(batch_size, num_patches, text_hidden_size)`): Projected patches.
        attention (`torch.Tensor` of shape `(batch_size, num_patches)`): What the tower pays to each patch.
        instruction (`torch.Tensor` of shape `(batch_size, length, text_hidden_size)`), instruction_mask (`torch.Tensor`
            of shape `(batch_size, length)`, bool): Token embeddings, and False at padding.
        num_visual_tokens (`list[int]`): How many patches of each image are kept.

    Returns:
        `list[torch.Tensor]`: Of each image, `(num_visual_tokens[i],)` int64, ascending.
    """

    def ranks(scores: torch.Tensor) -> torch.Tensor:
        return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)

    rank = ranks(attention)
    if experts != "visual" and instruction.shape[1]:
        cosines = F.normalize(tokens.float(), dim=-1) @ F.normalize(instruction.float(), dim=-1).transpose(1, 2)
        native = ranks(cosines.masked_fill(~instruction_mask[:, None], -torch.inf).amax(2))
        judged = native if experts == "native" else rank + native  # a sum sorts as the mean does
        rank = torch.where(instruction_mask.any(1, keepdim=True), judged, rank)
    order = rank.argsort(dim=1, stable=True)
    return [row[:kept].sort().values for row, kept in zip(order, num_visual_tokens, strict=True)]


class MeteorProjector(nn.Module):
    """
    Fuses all patches, maps them by LLaVA-1.5's MLP, which is all it is before training, and keeps the most significant
    ones.

    Args:
        config ([`MeteorConfig`]): Gives the patch grid, the widths, the scan and the experts.
    """

    def __init__(self, config: MeteorConfig):
        super().__init__()
        self.num_patches = config.patch_grid_size**2
        self.experts = config.experts
        self.fusion = FlashGlobalFusion(config)
        self.mlp = llava_mlp(config)

    def forward(
        self,
        query_features: torch.Tensor,
        attention: torch.Tensor,
        instruction: torch.Tensor,
        instruction_mask: torch.Tensor,
        num_visual_tokens: list[int],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """
        Args:
            query_features (`torch.Tensor` of shape `(batch_size, G², vision_hidden_size)`): Patch features, row by row.
            attention (`torch.Tensor` of shape `(batch_size, G²)`): What the tower pays to each patch.
            instruction (`torch.Tensor` of shape `(batch_size, length, text_hidden_size)`), instruction_mask
                (`torch.Tensor` of shape `(batch_size, length)`, bool): Token embeddings, and False at padding, on the
                left.
            num_visual_tokens (`list[int]`): How many patches of each image are kept, 1 to G².

        Returns:
            `(tokens, patches)`: of each image `(num_visual_tokens[i], text_hidden_size)`, in the order of the grid, and
            `(num_visual_tokens[i],)` int64, the patches that they were.

        Raises:
            ValueError: If a budget is none of 1 to G², or there are not G² patches.
        """
        if query_features.shape[1] != self.num_patches:
            raise ValueError(
                f"Got {query_features.shape[1]} patches, but the projector expects {self.num_patches}. A tower with a"
                ' CLS token needs vision_feature_select_strategy="default", one without it "full".'
            )
        for kept in num_visual_tokens:
            check_num_kept(kept, self.num_patches)
        tokens = self.mlp(self.fusion(query_features, instruction, instruction_mask))
        patches = visual_native_selection(
            self.experts, tokens, attention, instruction, instruction_mask, num_visual_tokens
        )
        return [row[kept] for row, kept in zip(tokens, patches, strict=True)], patches


@dataclass
class MeteorImageFeatures(BaseModelOutputWithPooling):
    """
    Output of [`MeteorModel.get_image_features`]: that of the tower, and

    pooler_output (`list[torch.Tensor]` of shapes `(V_i, text_hidden_size)`): The visual tokens of each image.
    kept_patches (`list[torch.Tensor]` of shapes `(V_i,)`, int64): The patches that they were, row by row of the grid.
    """

    kept_patches: list[torch.Tensor] | None = None


class MeteorPreTrainedModel(DeltaLlavaPreTrainedModel):
    """What both models share: how the mixer starts."""

    config: MeteorConfig
    config_class = MeteorConfig
    _auto_class = None  # no code travels with a comparator
    _no_split_modules = ["MeteorProjector"]
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Mamba2Mixer):  # after its parts
            module.init_mamba2_weights()
            # As Mamba has them, 1, 2, 3, …, on one half of the heads; the other half forgets slowly
            rates = torch.arange(1.0, module.num_heads + 1)
            rates[module.num_heads // 2 :] = 1 / 64
            init.copy_(module.A_log, rates.log())
            for part in (module.in_proj, module.conv1d):
                init.kaiming_uniform_(part.weight, a=5**0.5)  # torch's own, as wide at any width
            init.zeros_(module.out_proj.weight)


class MeteorModel(MeteorPreTrainedModel, DeltaLlavaModel):
    """
    Vision tower, projector and language model, without an output head.

    Args:
        config ([`MeteorConfig`]): Sub-configs as [`DeltaLlavaConfig`] takes them. The tower's last layer, whose
            attention is read, attends by the plain implementation, which alone returns it.
    """

    def __init__(self, config: MeteorConfig):
        super().__init__(config)
        self.multi_modal_projector = MeteorProjector(config)
        layers = self._vision_tower_layers()
        for layer in layers:
            layer.register_forward_pre_hook(_without_output_attentions, with_kwargs=True)
        for module in layers[config.query_feature_layer - 1].modules():
            if hasattr(module, "config"):
                module.config = copy(module.config)
                module.config._attn_implementation = "eager"
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_visual_tokens: int | torch.Tensor | None = None,
        instruction_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MeteorImageFeatures:
        """
        Encodes images for an instruction: one pass of the tower and of the projector for all, whatever is kept of each.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`):
                Preprocessed images, in any floating dtype.
            num_visual_tokens (`int` or `torch.Tensor` of shape `(num_images,)`, int64, *optional*):
                How many patches of all images, or of each, are kept. Defaults to `config.num_visual_tokens`.
            instruction_ids (`torch.Tensor` of shape `(num_images, length)`, int64, *optional*):
                Token ids of what each image is asked, without the answer. Negative ids and placeholders are left out. A
                row without any means no instruction.

        Returns:
            [`MeteorImageFeatures`].

        Raises:
            ValueError: If a budget is none of 1 to the number of patches, or there are not as many budgets or
                instructions as images.
        """
        num_images = len(pixel_values)
        if num_visual_tokens is None:
            num_visual_tokens = self.config.num_visual_tokens
        budgets = torch.as_tensor(num_visual_tokens).flatten().tolist()
        if len(budgets) == 1:
            budgets = budgets * num_images
        if len(budgets) != num_images:
            raise ValueError(f"num_visual_tokens names {len(budgets)} budgets, but there are {num_images} images.")
        instruction, mask = self._embed_instruction(instruction_ids, pixel_values)

        outputs, query_features, _ = self._run_vision_tower(pixel_values, **{**kwargs, "output_attentions": True})
        attention = outputs.attentions[-1].mean(1)  # over heads; the last layer is the one that is read
        from_cls = self.config.vision_feature_select_strategy == "default"
        attention = (attention[:, 0] if from_cls else attention.mean(1))[:, -query_features.shape[1] :]
        tokens, patches = self.multi_modal_projector(
            query_features, attention.to(query_features.device), instruction, mask, budgets
        )
        return MeteorImageFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=tokens,
            hidden_states=outputs.get("hidden_states") if kwargs.get("output_hidden_states") else None,
            attentions=outputs.attentions if kwargs.get("output_attentions") else None,
            kept_patches=patches,
        )

    @torch.no_grad()
    def _embed_instruction(
        self, instruction_ids: torch.Tensor | None, pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `(num_images, length, hidden_size)` and their mask, with all padding on the left."""
        num_images = len(pixel_values)
        if instruction_ids is None or not self.config.use_instruction:
            instruction_ids = torch.empty((num_images, 0), dtype=torch.int64, device=pixel_values.device)
        if len(instruction_ids) != num_images:
            raise ValueError(f"instruction_ids has {len(instruction_ids)} rows, but there are {num_images} images.")
        is_text = (instruction_ids >= 0) & (instruction_ids != self.config.image_token_id)
        places = is_text.int().argsort(dim=1, stable=True)
        ids, mask = instruction_ids.gather(1, places), is_text.gather(1, places)
        return self.get_input_embeddings()(ids.clamp(min=0)), mask

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        *args,
        num_visual_tokens: int | torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        instruction_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """[`DeltaLlavaModel.forward`], and `instruction_ids` as [`get_image_features`] takes them."""
        if mm_encoder_outputs is None and pixel_values is not None:
            features = self.get_image_features(pixel_values, num_visual_tokens, instruction_ids, return_dict=True)
            pixel_values, mm_encoder_outputs = None, {"image": features}
        return super().forward(input_ids, pixel_values, *args, mm_encoder_outputs=mm_encoder_outputs, **kwargs)


def _without_output_attentions(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    # The tower has read it; the layers that return none would warn
    return args, {name: value for name, value in kwargs.items() if name != "output_attentions"}


class MeteorForConditionalGeneration(MeteorPreTrainedModel, DeltaLlavaForConditionalGeneration):
    """
    The comparator after LLaVA-Meteor's abstract, with its output head.

    Args:
        config ([`MeteorConfig`]): As [`MeteorModel`] takes it.
    """

    def __init__(self, config: MeteorConfig):
        super().__init__(config)
        self.model = MeteorModel(config)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_visual_tokens: int | torch.Tensor | None = None,
        instruction_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MeteorImageFeatures:
        """See [`MeteorModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, num_visual_tokens, instruction_ids, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        *args,
        pixel_values: torch.Tensor | None = None,
        num_visual_tokens: int | torch.Tensor | None = None,
        instruction_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ):
        """[`~GenerationMixin.generate`], and `instruction_ids` as [`MeteorModel.get_image_features`] takes them."""
        if pixel_values is not None:
            if mm_encoder_outputs is not None:
                raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
            features = self.get_image_features(pixel_values, num_visual_tokens, instruction_ids, return_dict=True)
            mm_encoder_outputs = {"image": features}
        return super().generate(*args, mm_encoder_outputs=mm_encoder_outputs, **kwargs)


def meteor_from(model: DeltaLlavaForConditionalGeneration, **fields) -> MeteorForConditionalGeneration:
    """
    A model with the tower and the language model of another, and a new projector.

    Args:
        model ([`DeltaLlavaForConditionalGeneration`]): It is left as it is.
        **fields: Of [`MeteorConfig`].
    """
    config = MeteorConfig.from_delta_llava(model.config, **fields)
    meteor = MeteorForConditionalGeneration(config).to(model.device, model.dtype)
    weights = {name: w for name, w in model.state_dict().items() if "multi_modal_projector" not in name}
    missing, _ = meteor.load_state_dict(weights, strict=False)  # of a tower, layers beyond the one that is read
    if others := [name for name in missing if "multi_modal_projector" not in name]:
        raise ValueError(f"The model lacks {brief_list(others)}.")
    meteor.generation_config = model.generation_config
    return meteor


def meteor_costs(
    config: MeteorConfig, num_visual_tokens: int, text_tokens: int, new_tokens: int, convention: str = "exact"
) -> dict[str, int]:
    """
    What it takes to answer one question about one image, as [`~delta_llava.costs.inference_costs`] has it. All text of
    the prompt is counted as the instruction, which the projector reads, too; its matrix products are counted by running
    it on torch's `meta` device, in the plain PyTorch of its mixer.

    Raises:
        ValueError: As [`~delta_llava.costs.inference_costs`], for any budget from 1 to the number of patches.
    """
    check_num_kept(num_visual_tokens, config.patch_grid_size**2)
    # To the language model, a visual token costs what one of the text does
    costs = inference_costs(config, 1, num_visual_tokens - 1 + text_tokens, new_tokens, convention)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = torch.empty(1, config.patch_grid_size**2, config.vision_config.hidden_size)
        instruction = torch.empty(1, text_tokens * config.use_instruction, config.text_config.hidden_size)
        mask = torch.empty(instruction.shape[:2], dtype=torch.bool)
        MeteorProjector(config)(features, features[..., 0], instruction, mask, [num_visual_tokens])
    return {**costs, "projector": counter.get_total_flops()}


def main(arguments: list[str] | None = None):
    """Print what an answer costs at each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=LANGUAGE_MODELS, default="vicuna-7b", help="CLIP-L/336 with this one")
    parser.add_argument("--text_tokens", type=int, default=68, help="of the prompt (default: 68)")
    parser.add_argument("--new_tokens", type=int, default=30, help="of the answer (default: 30)")
    options = parser.parse_args(arguments)
    delta = recipe_config(options.recipe)
    meteor = MeteorConfig.from_delta_llava(delta)
    lines = [
        "| visual tokens | projector, GFLOPs | answer, TFLOPs | Delta-LLaVA, residual: projector | answer |",
        "|---|---|---|---|---|",
    ]
    for budget in delta.valid_visual_token_counts:
        cells = [str(budget)]
        for count, config in ((meteor_costs, meteor), (inference_costs, delta)):
            try:
                costs = count(config, budget, options.text_tokens, options.new_tokens)
            except ValueError as error:
                parser.error(str(error))
            cells += [f"{costs['projector'] / 1e9:.1f}", f"{sum(costs[part] for part in FLOP_PARTS) / 1e12:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
