"""Prints the name of every linear layer that vLLM makes of a checkpoint, and how it is quantized: CHECKPOINT METHOD."""

import sys

from vllm import LLM
from vllm.model_executor.layers.linear import LinearBase


def methods(model):
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LinearBase)]
    return {name: type(layer.quant_method).__name__ for name, layer in layers}


if __name__ == "__main__":
    from quantized import methods  # by a name that vLLM's processes can import

    checkpoint, quantization = sys.argv[1:]
    for name, method in LLM(checkpoint, quantization=quantization, enforce_eager=True).apply_model(methods)[0].items():
        print("layer", name, method)
