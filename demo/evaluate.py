"""Answers the demo's held-out questions from a saved checkpoint; `run.py` starts it as a process of its own.

    python -m delta_llava.demo.evaluate --checkpoint demo/out/checkpoint --scenes demo/out/scenes \
        --output demo/out/answers.json --num_visual_tokens 1 4 9 16 36 144
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from .ask import answer, load, prepare


BATCH_SIZE = 100


@torch.inference_mode()
def count_flops(model, processor, image, question, num_visual_tokens):
    """FLOPs of tower, projector and prefill for one question, as torch counts them in the forward that runs."""
    inputs = prepare(processor, [image], [question], num_visual_tokens)
    with FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    return counter.get_total_flops()


def main():
    """Write `{budget: {"answers": […], "flops": …}}`, the answers in the order of `held_out.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--scenes", required=True, help="folder that delta_llava.demo.scenes has written")
    parser.add_argument("--output", required=True)
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", required=True)
    options = parser.parse_args()

    rows = json.loads((Path(options.scenes) / "held_out.json").read_text(encoding="utf-8"))
    images = [Path(options.scenes) / "images" / row["image"] for row in rows]
    questions = [row["question"] for row in rows]
    model, processor = load(options.checkpoint)
    results = {}
    for budget in options.num_visual_tokens:
        started, answers = time.time(), []
        for first in range(0, len(rows), BATCH_SIZE):
            part = slice(first, first + BATCH_SIZE)
            # No right answer is longer than four tokens.
            answers += answer(model, processor, images[part], questions[part], budget, max_new_tokens=6)
        flops = count_flops(model, processor, images[0], questions[0], budget)
        results[budget] = {"answers": answers, "flops": flops}
        print(f"{len(rows)} questions at {budget} visual tokens: {time.time() - started:.0f} s", flush=True)
    Path(options.output).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
