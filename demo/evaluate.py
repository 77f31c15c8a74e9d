"""Answers the demo's held-out questions from a saved checkpoint; `run.py` starts it in a process of its own.

    python -m delta_llava.demo.evaluate --checkpoint demo/out/checkpoint --scenes demo/out/scenes \
        --output demo/out/answers.json --num_visual_tokens 1 4 9 16 36 144
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .ask import answer, load, prepare


BATCH_SIZE = 100


def answer_rows(model, processor, rows, images, num_visual_tokens):
    """Answers, a list of strings, to the questions of `held_out.json` or `held_out_design.json`.

    Args:
        rows (`list[dict]`): the questions.
        images (`list`): the picture of each, in any form that [`answer`] takes.
        num_visual_tokens (`int` or `"auto"`, *optional*): the budget of each picture.
    """
    asked, answers = [row["question"] for row in rows], []
    for first in range(0, len(rows), BATCH_SIZE):
        part = slice(first, first + BATCH_SIZE)
        # Longer than any right answer.
        answers += answer(model, processor, images[part], asked[part], num_visual_tokens, max_new_tokens=4)
    return answers


@torch.inference_mode()
def count_flops(call):
    """FLOPs of what a function without arguments runs, as torch counts them: matrix products and convolutions.

    Attention runs as matrix products, because no fused kernel of a CPU is counted.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def main():
    """Write `{budget: {"held_out": [answers…], "held_out_design": [answers…], "flops": …}}`, in the files' order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--scenes", type=Path, required=True, help="folder that delta_llava.demo.scenes has written")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", required=True)
    options = parser.parse_args()

    model, processor = load(options.checkpoint)
    results = {}
    for budget in options.num_visual_tokens:
        results[budget] = {}
        for name in ("held_out", "held_out_design"):
            rows = json.loads((options.scenes / f"{name}.json").read_text(encoding="utf-8"))
            started = time.time()
            images = [options.scenes / "images" / row["image"] for row in rows]
            results[budget][name] = answer_rows(model, processor, rows, images, budget)
            print(f"{name}, {len(rows)} questions at {budget} visual tokens: {time.time() - started:.0f} s", flush=True)
        # Of tower, projector and prefill for one question.
        inputs = prepare(processor, images[:1], [rows[0]["question"]], budget)
        results[budget]["flops"] = count_flops(lambda inputs=inputs: model(**inputs, logits_to_keep=1))
    options.output.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
