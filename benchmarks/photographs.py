"""Pictures for the benchmarks, made in place, as heavy as those that users have."""

from pathlib import Path

import numpy as np
import PIL.Image


def write_photographs(folder: Path, count: int) -> list[str]:
    """
    Write JPEGs like photographs of COCO's usual sizes: smooth gradients with a sensor's noise, at quality 90.

    Landscape and portrait alternate. Returns the paths.
    """
    draw = np.random.default_rng(0)
    files = [str(folder / f"{index}.jpg") for index in range(count)]
    for index, file in enumerate(files):
        height, width = (640, 480) if index % 2 else (480, 640)
        rows = np.sin(np.arange(height)[:, None, None] / draw.uniform(40, 200, 3) + draw.uniform(0, 6, 3))
        columns = np.sin(np.arange(width)[None, :, None] / draw.uniform(40, 200, 3) + draw.uniform(0, 6, 3))
        pixels = 127 + 100 * rows * columns + draw.normal(0, 8, (height, width, 3))
        PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return files
