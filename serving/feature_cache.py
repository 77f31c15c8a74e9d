"""Visual tokens kept for the next question about an image, so that it skips vision tower and projector."""

import hashlib
import threading
import weakref
from collections import OrderedDict
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class FeatureCache:
    """
    Visual tokens by image and budget, on the model's device; the least recently used make way for new ones.

    Args:
        max_bytes (`int`, *optional*, defaults to 256 MiB): The most bytes to keep; 0 keeps nothing.

    Attributes:
        hits (`int`), misses (`int`): Images that were found, and that were not.
        num_bytes (`int`): Bytes that are kept now.
    """

    def __init__(self, max_bytes: int = 2**28):
        if max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes} must be 0 or more.")
        self.max_bytes = max_bytes
        self.hits = self.misses = self.num_bytes = 0
        self._features: OrderedDict[Any, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def clear(self):
        """Forget all images, but not the counts."""
        with self._lock:
            self._features.clear()
            self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key: Any) -> torch.Tensor | None:
        """The `(V, hidden_size)` visual tokens under a key, or `None`."""
        with self._lock:
            features = self._features.get(key)
            if features is None:
                self.misses += 1
            else:
                self.hits += 1
                self._features.move_to_end(key)
            return features

    def put(self, key: Any, features: torch.Tensor):
        """Keep `(V, hidden_size)` visual tokens, unless they alone exceed `max_bytes`."""
        with self._lock:
            if key in self._features or features.nbytes > self.max_bytes:
                return
            self._features[key] = features
            self.num_bytes += features.nbytes
            while self.num_bytes > self.max_bytes:
                _, oldest = self._features.popitem(last=False)
                self.num_bytes -= oldest.nbytes


def cache_image_features(model: PreTrainedModel, cache: FeatureCache):
    """
    Make a loaded model look for the visual tokens of an image in a cache before it encodes the image.

    Of a batch the model encodes the images that are missing, and no image twice. An image is identified by its pixels,
    so the same file under another name is found. The output of a cached `get_image_features` holds only
    `pooler_output`. With gradients, in training, while a graph is compiled, and if hidden states, attentions or a tuple
    are requested, the model works as without a cache. Its weights must not change meanwhile: a call in training mode
    clears the cache, other changes need `cache.clear()`.

    Args:
        model (`DeltaLlavaForConditionalGeneration` or `DeltaLlavaModel`): The model, which is changed in place.
        cache (`FeatureCache`): Several models and threads may share one.

    Example:

    ```python
    >>> cache_image_features(model, cache := FeatureCache(max_bytes=2**30))
    >>> for question in questions:  # about one image, which is encoded only for the first
    ...     model.generate(**processor(images=image, text=question, return_tensors="pt"))
    ```"""

    def get_image_features(self, pixel_values, num_visual_tokens=None, **kwargs):
        if self.training:
            cache.clear()
        wants_more = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
        wants_tuple = not kwargs.get("return_dict", self.config.return_dict)
        is_traced = torch.compiler.is_compiling()
        if self.training or torch.is_grad_enabled() or is_traced or wants_more or wants_tuple:
            return type(self).get_image_features(self, pixel_values, num_visual_tokens, **kwargs)
        budgets = self.image_budgets(len(pixel_values), num_visual_tokens)
        keys = [
            (weakref.ref(self), pixel_values.dtype, pixel_values.shape[1:], _digest(image), budget)
            for image, budget in zip(pixel_values.detach().cpu(), budgets, strict=True)
        ]
        features = {key: cache.get(key) for key in keys}
        missing = [key for key, found in features.items() if found is None]
        if missing:
            images = [keys.index(key) for key in missing]
            budgets = torch.tensor([budgets[image] for image in images])
            encoded = type(self).get_image_features(self, pixel_values[images], budgets, **kwargs)
            for key, projected in zip(missing, encoded.pooler_output, strict=True):
                features[key] = projected.clone()  # a view would keep its whole batch in memory
                cache.put(key, features[key])
        # Copies, so that a caller cannot change the cache
        return BaseModelOutputWithPooling(pooler_output=[features[key].clone() for key in keys])

    # Bound, so that a copy of the model encodes its images itself
    model.base_model.get_image_features = MethodType(get_image_features, model.base_model)


def _digest(image: torch.Tensor) -> bytes:
    # Cryptographic, so that nobody can make an image with another's digest
    return hashlib.blake2b(image.contiguous().view(torch.uint8).numpy(), digest_size=32).digest()
