"""This package's entry point for vLLM. The classes are in a module of their own, imported when vLLM needs them."""


def register():
    """Registers our configuration, model and processor in each of vLLM's processes."""
    from vllm import ModelRegistry

    import delta_llava  # noqa: F401  registers the configuration with transformers

    ModelRegistry.register_model(
        "DeltaLlavaForConditionalGeneration", "delta_llava.serving.vllm:DeltaLlavaForConditionalGeneration"
    )
