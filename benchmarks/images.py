"""How many images per second one core prepares for stage 2, beside LLaVA's own way of preparing them in the same run.

    python -m delta_llava.benchmarks.images --images 32

Images are decoded and preprocessed one by one on one thread, as by a worker of the data loader. Ours is what
`train/finetune.py` sets up, by each of transformers' backends that is installed. The aim is 1.5 times LLaVA's images/s
by torchvision's, at no more than one grey level of difference.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import PIL.Image
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import BaseImageProcessor, CLIPImageProcessorPil, LlavaImageProcessor, LlavaImageProcessorPil
from transformers.utils import is_torchvision_available

from ..llava import pad_to_square
from ..train.batches import BudgetedRows
from ..train.data import FEATURES
from .harness import markdown_table
from .photographs import write_photographs


SIZE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
ROUNDS = 5


def expand2square(image: PIL.Image.Image, colour: tuple[int, int, int]) -> PIL.Image.Image:
    """LLaVA's padding: the image in the middle of a square of its longer side."""
    side = max(image.size)
    square = PIL.Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def make_paths(files: list[str]) -> dict[str, Callable[[int], torch.Tensor]]:
    """The ways from the index of a file to its pixel values, float32 `(3, 336, 336)`, by name, LLaVA's first."""
    clip_processor = CLIPImageProcessorPil(**SIZE)
    mean_colour = tuple(int(mean * 255) for mean in clip_processor.image_mean)
    # Rows as `fit_rows` leaves them, each an image and nothing said about it
    rows = {"images": [[file] for file in files], "messages": [[] for _ in files]}
    dataset = Dataset.from_dict(rows, features=FEATURES)
    dataset = dataset.add_column("num_messages", [0] * len(files)).add_column("num_images", [1] * len(files))
    budgeted_rows = BudgetedRows(dataset)

    def llava(index: int) -> torch.Tensor:
        image = expand2square(PIL.Image.open(files[index]).convert("RGB"), mean_colour)
        return clip_processor(image, return_tensors="pt")["pixel_values"][0]

    def ours(processor: BaseImageProcessor) -> Callable[[int], torch.Tensor]:
        return lambda index: processor(budgeted_rows[index, 144]["images"], return_tensors="pt")["pixel_values"][0]

    settings = pad_to_square(clip_processor).to_dict()
    paths = {"LLaVA's": llava, "ours, PIL": ours(LlavaImageProcessorPil.from_dict(settings))}
    if is_torchvision_available():
        paths["ours, torchvision"] = ours(LlavaImageProcessor.from_dict(settings))
    return paths


def grey_levels_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of two images' pixel values `(3, height, width)`, de-normalized to 0..255."""
    std = torch.tensor(CLIPImageProcessorPil.image_std)[:, None, None]
    return float(((one - other).abs() * std * 255).max())


def measure(files: list[str]) -> list[dict]:
    """
    Times every path, all of them in each round, and compares what they make.

    Returns for each its name, `path`; `grey_levels`, its largest difference from LLaVA's; and `seconds` for all the
    files, one for each round.
    """
    paths = make_paths(files)
    rows = []
    for name, prepare in paths.items():
        reference = paths["LLaVA's"]
        apart = max(grey_levels_apart(prepare(index), reference(index)) for index in range(len(files)))
        rows.append({"path": name, "grey_levels": apart, "seconds": []})
    for _ in tqdm(range(ROUNDS), unit="round"):
        for row in rows:
            prepare = paths[row["path"]]
            started = time.perf_counter()
            for index in range(len(files)):
                prepare(index)
            row["seconds"].append(time.perf_counter() - started)
    return rows


def table(rows: list[dict], num_images: int) -> str:
    """The measurement in Markdown."""
    baseline = median(rows[0]["seconds"])
    caption = (
        f"{num_images} JPEGs of 640x480 and 480x640 to 336x336, one at a time on one thread; medians of {ROUNDS} "
        "interleaved rounds. The ratio is to LLaVA's images/s."
    )
    lines = []
    for row in rows:
        seconds = median(row["seconds"])
        speed, ratio = num_images / seconds, baseline / seconds
        lines.append((row["path"], f"{speed:.1f}", f"{ratio:.2f}", f"{row['grey_levels']:.3f}"))
    columns = ["path", "images/s", "ratio", "largest difference in grey levels"]
    return f"{caption}\n\n{markdown_table(columns, lines)}"


def main(arguments: list[str] | None = None):
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="how many images (default: 32)")
    options = parser.parse_args(arguments)
    if options.images < 1:
        parser.error(f"--images {options.images}: at least 1 is needed.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(write_photographs(Path(folder), options.images))
    print(table(rows, options.images))


if __name__ == "__main__":
    main()
