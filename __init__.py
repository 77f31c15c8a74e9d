"""Delta-LLaVA: a LLaVA model whose projector turns an image into as few visual tokens as a call asks for."""

from .configuration_delta_llava import DeltaLlavaConfig
from .modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel, DeltaProjection, DeltaProjector
from .processing_delta_llava import DeltaLlavaProcessor


__all__ = [
    "DeltaLlavaConfig",
    "DeltaLlavaForConditionalGeneration",
    "DeltaLlavaModel",
    "DeltaLlavaProcessor",
    "DeltaProjection",
    "DeltaProjector",
]
