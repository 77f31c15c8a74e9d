"""
Delta-LLaVA in vLLM: its transformers backend, and a cache that keeps an image apart at each of its budgets.

vLLM finds this by the entry point `vllm.general_plugins` of an installed delta-llava; `README.md` has the command.
"""

from dataclasses import replace

from torch import nn
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.model_executor.models.transformers.utils import replace_linear_class
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems

from ..processing_delta_llava import DeltaLlavaProcessor


class _Processor(DeltaLlavaProcessor):
    def _check_budgets_for_server(self, kwargs):
        """Accepts lists: the classes below cache each image with its own budget."""


class _ProcessingInfo(MultiModalProcessingInfo):
    def get_hf_processor(self, **kwargs) -> DeltaLlavaProcessor:
        """The package's own, whatever `--trust-remote-code` says. No argument of a request changes how it loads."""
        processor = self.ctx.get_hf_processor(_Processor)
        processor.patch_grid_size = self.get_hf_config().patch_grid_size  # a processor may be saved without it
        return processor

    def get_max_image_tokens(self) -> int:
        """The largest budget that fits into a prompt: any request may ask for it."""
        budgets = self.get_hf_config().valid_visual_token_counts
        return max(budget for budget in budgets if budget < self.ctx.model_config.max_model_len)


class _MultiModalProcessor(MultiModalProcessor):
    """Passes `num_visual_tokens` on as one budget for each image, and hashes each image with its own."""

    def get_dummy_inputs(self, *args, **kwargs):
        largest = {"num_visual_tokens": self.info.get_max_image_tokens()}
        return replace(super().get_dummy_inputs(*args, **kwargs), hf_processor_mm_kwargs=largest)

    def apply(self, inputs, timing_ctx):
        budgets = self._check(inputs)
        try:
            return super().apply(replace(inputs, hf_processor_mm_kwargs={"num_visual_tokens": budgets}), timing_ctx)
        except ValueError as error:  # its cause is our processor's message about an image, which vLLM's omits
            raise VLLMValidationError(str(error.__cause__ or error)) from error

    def _check(self, inputs) -> list[int]:
        """The budget of each image, or an error for the client: an error of the model would end the engine."""
        named = {name: value for name, value in inputs.hf_processor_mm_kwargs.items() if value is not None}
        if unknown := named.keys() - {"num_visual_tokens"}:
            raise VLLMValidationError(
                f"A request can set num_visual_tokens, not {', '.join(sorted(unknown))}.",
                parameter="mm_processor_kwargs",
            )
        images = inputs.mm_data_items.get_items("image", ImageProcessorItems)
        # A client may name a cached image by its id and send no pixels
        sizes = [(1, 1) if image is None else images.get_image_size(index) for index, image in enumerate(images)]
        named = self.info.ctx.get_merged_mm_kwargs(named)
        budgets = named.get("num_visual_tokens")
        if "auto" in (budgets if isinstance(budgets, list) else [budgets]) and any(image is None for image in images):
            raise VLLMValidationError(
                "num_visual_tokens='auto' needs the size of an image: send the image itself, not only its uuid.",
                parameter="mm_processor_kwargs",
            )
        try:
            return self.info.get_hf_processor()._get_num_multimodal_tokens(sizes, **named).num_image_tokens
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="mm_processor_kwargs") from error

    def _get_mm_hashes(self, inputs):
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs={}))
        budgets = inputs.hf_processor_mm_kwargs["num_visual_tokens"]
        return {"image": [f"{image}-{budget}" for image, budget in zip(hashes["image"], budgets, strict=True)]}

    def _get_cache_missing_processor_kwargs(self, inputs, mm_is_cached):
        budgets = zip(inputs.hf_processor_mm_kwargs["num_visual_tokens"], mm_is_cached["image"], strict=True)
        return {"num_visual_tokens": [budget for budget, is_cached in budgets if not is_cached]}


@MULTIMODAL_REGISTRY.register_processor(
    _MultiModalProcessor, info=_ProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class DeltaLlavaForConditionalGeneration(TransformersMultiModalForCausalLM):
    """vLLM's transformers backend, in which `--quantization` leaves the vision tower and the projector alone."""

    def recursive_replace(self):
        if self.quant_config is not None:
            for name in ("vision_tower", "multi_modal_projector"):
                for module in list(self.model.get_submodule(name).modules()):
                    for child_name, child in module.named_children():
                        if isinstance(child, nn.Linear):  # becomes vLLM's own, which super() leaves as it is
                            setattr(module, child_name, replace_linear_class(child))
        super().recursive_replace()
