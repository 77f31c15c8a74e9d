"""Delta-LLaVA: a LLaVA model whose projector turns an image into as few visual tokens as a call asks for."""

from .configuration_delta_llava import DeltaLlavaConfig  # first: it refuses older releases


# isort: split

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel, DeltaProjection, DeltaProjector
from .processing_delta_llava import DeltaLlavaProcessor


# Whoever has the package installed needs no `trust_remote_code` for its checkpoints.
AutoConfig.register("delta_llava", DeltaLlavaConfig, exist_ok=True)
AutoModel.register(DeltaLlavaConfig, DeltaLlavaModel, exist_ok=True)
AutoModelForImageTextToText.register(DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(DeltaLlavaConfig, DeltaLlavaProcessor, exist_ok=True)

__all__ = [
    "DeltaLlavaConfig",
    "DeltaLlavaForConditionalGeneration",
    "DeltaLlavaModel",
    "DeltaLlavaProcessor",
    "DeltaProjection",
    "DeltaProjector",
]
