"""Asks the demo's held-out questions about smaller pictures, at the default budget and at the one for their size.

    python -m delta_llava.demo.sizes --checkpoint demo/out/checkpoint --scenes demo/out/scenes

Each picture is reduced to every one of `--sizes` and enlarged again by the processor, as any small picture is. Prints
the visual tokens of an image and the accuracy, by default and with `num_visual_tokens="auto"`.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from . import scenes
from .ask import CHECKPOINT, load
from .evaluate import answer_rows
from .run import score


def ask(model, processor, questions, images, budget):
    """Ask all questions, about as many images.

    Returns:
        The mean tokens of an image and the accuracy.
    """
    sizes = [(image.height, image.width) for image in images]
    tokens = processor._get_num_multimodal_tokens(image_sizes=sizes, num_visual_tokens=budget).num_image_tokens
    answers = answer_rows(model, processor, questions, images, budget)
    return sum(tokens) / len(tokens), score(questions, answers)["accuracy"]


def main(arguments=None):
    """Print a table in Markdown, one line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="(default: the one that the demo leaves)")
    parser.add_argument("--scenes", default=CHECKPOINT.parent / "scenes", help="(default: the demo's)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 72, 48, 40, 32, 24, 16, 8], help="sides in pixels")
    options = parser.parse_args(arguments)
    questions = json.loads((Path(options.scenes) / "held_out.json").read_text(encoding="utf-8"))
    model, processor = load(options.checkpoint)
    print(f"{len(questions)} questions about pictures of {scenes.IMAGE_SIZE} pixels, reduced\n")
    print("| pixels | tokens, default | tokens, auto | accuracy, default | accuracy, auto | difference |")
    print("|---|---|---|---|---|---|")
    for size in options.sizes:
        opened = (Image.open(Path(options.scenes) / "images" / row["image"]) for row in questions)
        images = [image.resize((size, size), Image.Resampling.LANCZOS) for image in opened]
        (tokens, default), (fewer, auto) = (ask(model, processor, questions, images, b) for b in (None, "auto"))
        difference = f"{100 * (auto - default):+.1f}"
        print(f"| {size} | {tokens:.0f} | {fewer:.0f} | {default:.1%} | {auto:.1%} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
