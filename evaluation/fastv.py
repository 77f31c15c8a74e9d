"""
FastV drops visual tokens inside the language model by the attention that they receive ("An Image is Worth 1/2 Tokens
After Layer 2", Chen et al., 2024). It is the comparator of the paper's Table 6, and needs no training.

    with fastv(model, num_visual_tokens=36, layer=2):
        model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


NAME = "fastv"


@contextmanager
def fastv(model: PreTrainedModel, num_visual_tokens: int, layer: int = 2) -> Iterator[None]:
    """
    In this context, `model` drops visual tokens after layer `layer`: in the forward pass over a prompt, each row keeps
    the `num_visual_tokens` that received the most attention from the prompt's last token in that layer, averaged over
    its heads. The layers above neither compute nor cache the others. Positions do not change. The whole prompt must be
    passed at once, as `input_ids`, with an empty `DynamicCache` or without a cache.

    Args:
        model ([`DeltaLlavaForConditionalGeneration`] or `LlavaForConditionalGeneration`):
            Model with `attn_implementation="sdpa"`.
        num_visual_tokens (`int`): Visual tokens that a row keeps, of all its images together.
        layer (`int`, *optional*, defaults to 2): Number of the language model's layers that see all tokens.

    Raises:
        ValueError: If the model has no such layer or another kind of attention, or `num_visual_tokens` is negative; in
            a forward pass, if a row has fewer visual tokens, not all rows have the same number, or a prompt is padded
            on the right or passed in another way than above.
    """
    if num_visual_tokens < 0:
        raise ValueError(f"num_visual_tokens={num_visual_tokens} must be 0 or more.")
    language_model = model.model.language_model
    num_layers = len(language_model.layers)
    if not 0 < layer < num_layers:
        raise ValueError(
            f"layer={layer} must be at least 1, so that there is attention to measure, and below the language model's "
            f"{num_layers} layers, so that something is saved."
        )
    if language_model.config._attn_implementation != "sdpa":
        raise ValueError(f"FastV needs attn_implementation='sdpa', not {language_model.config._attn_implementation!r}.")
    pruning = _Pruning(model.config.image_token_id, num_visual_tokens, language_model.layers[layer - 1].self_attn)
    handles = []
    try:
        handles.append(model.register_forward_pre_hook(pruning.read_prompt, with_kwargs=True))
        for decoder in language_model.layers[layer:]:
            handles.append(decoder.register_forward_pre_hook(pruning.prune, with_kwargs=True))
        language_model.set_attn_implementation(NAME)
        yield
    finally:
        language_model.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()
        del pruning.attention.last_token_attention


class _Pruning:
    """The positions of the prompt that are kept, `(batch_size, length)`, and the hooks that drop the others."""

    def __init__(self, image_token_id: int, num_visual_tokens: int, attention: nn.Module):
        self.image_token_id = image_token_id
        self.num_visual_tokens = num_visual_tokens
        self.attention = attention
        attention.last_token_attention = None  # marks the layer that stores it
        self.is_visual = self.kept = None
        self.has_images = False  # `is_visual.any()`, without waiting for a GPU at each layer
        self.masks = None, None  # one of the model's, and its kept part

    def read_prompt(self, model: nn.Module, args: tuple, kwargs: dict):
        input_ids, attention_mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        cache = kwargs.get("past_key_values")
        if input_ids is None or not (cache is None or isinstance(cache, DynamicCache)):
            raise ValueError(
                "FastV needs a prompt as the keyword input_ids and a cache that grows (DynamicCache), but found "
                f"{sorted(kwargs)} and a {type(cache).__name__}."
            )
        if cache is not None and cache.get_seq_length() > 0:
            if self.is_visual is None or input_ids.shape[1] > 1:
                raise ValueError(
                    f"{input_ids.shape[1]} tokens follow {cache.get_seq_length()} cached ones, but FastV needs the "
                    "whole prompt at once, then one token at a time."
                )
            return
        self.is_visual, self.kept, self.masks = input_ids == self.image_token_id, None, (None, None)
        counts = self.is_visual.sum(1)
        self.has_images = bool(counts.any())
        if not self.has_images:
            return
        if (counts != counts[0]).any() or counts[0] < self.num_visual_tokens:
            raise ValueError(
                f"The rows have {counts.tolist()} visual tokens; to keep {self.num_visual_tokens}, all must have the "
                "same number, and no fewer: put others into separate batches."
            )
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("A prompt is padded on the right, but FastV measures the attention of its last token.")

    def prune(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.is_visual is None:
            raise ValueError("FastV prunes calls of the whole model, not of its parts.")
        if not self.has_images:
            return args, kwargs
        length = self.is_visual.shape[1]
        is_prompt = kwargs["position_embeddings"][0].shape[1] == length
        if self.kept is None:
            received = self.attention.last_token_attention.masked_fill(~self.is_visual, -1.0)
            chosen = received.topk(self.num_visual_tokens, dim=1).indices
            stays = (~self.is_visual).scatter(1, chosen, True)
            self.kept = stays.nonzero()[:, 1].view(len(stays), -1)
        hidden_states, mask = args[0], kwargs.get("attention_mask")
        if mask is not None:
            if mask is not self.masks[0]:  # all layers get the same
                generated = torch.arange(length, mask.shape[-1], device=mask.device).expand(len(self.kept), -1)
                columns = torch.cat([self.kept, generated], dim=1)
                left = mask.take_along_dim(columns[:, None, None], dim=3)
                left = left.take_along_dim(self.kept[:, None, :, None], dim=2) if is_prompt else left
                self.masks = mask, left
            kwargs["attention_mask"] = self.masks[1]
        if is_prompt:
            rows = self.kept[:, :, None]
            if hidden_states.shape[1] == length:
                hidden_states = hidden_states.take_along_dim(rows, dim=1)
            kwargs["position_embeddings"] = tuple(
                part.expand(len(rows), -1, -1).take_along_dim(rows, dim=1) for part in kwargs["position_embeddings"]
            )
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = kwargs["position_ids"].expand(len(rows), -1).take_along_dim(self.kept, dim=1)
        return (hidden_states, *args[1:]), kwargs


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """PyTorch's attention; the marked module also stores that of the last token, `(batch_size, length)`."""
    if query.shape[2] > 1 and hasattr(module, "last_token_attention"):
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = (query[:, :, -1:] @ keys.transpose(2, 3)).float() * scaling
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask[:, :, -1:], -torch.inf)
        module.last_token_attention = scores.softmax(-1).mean(1)[:, 0]
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
