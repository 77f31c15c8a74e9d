"""
Lets a CUDA build of torchvision be imported beside a CPU build of torch: where that fails, `make .venv-vllm/installed`
puts this file into the environment as its `sitecustomize.py`.

torchvision's operators live in a library that finds no CUDA, and its Python code then stumbles over two whose names it
takes for granted. Nothing here calls them.
"""

import torch


torchvision = torch.library.Library("torchvision", "DEF")
torchvision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torchvision.define(
    "qnms(Tensor dets, Tensor dets_scale, Tensor dets_zero_point, Tensor scores, float iou_threshold) -> Tensor"
)
