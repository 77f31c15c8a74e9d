"""Asks the demo's checkpoint, or another, about any image file.

python -m delta_llava.demo.ask demo/out/scenes/images/held_out-00000.png "What is at b2?"
python -m delta_llava.demo.ask picture.png "How many animals are there?" --num_visual_tokens 16 4
python -m delta_llava.demo.ask icon.png "How many animals are there?" --num_visual_tokens auto
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


CHECKPOINT = Path(__file__).parent / "out" / "checkpoint"


def load(checkpoint):
    """Load a checkpoint as any user would, with the code in its folder.

    Args:
        checkpoint (`str` or `Path`): folder in Hub layout.

    Returns:
        The model, in eval mode, and its processor.

    Raises:
        FileNotFoundError: if the folder has no checkpoint.
    """
    if not (Path(checkpoint) / "config.json").is_file():
        raise FileNotFoundError(
            f"{checkpoint} has no checkpoint: run `make demo` (or python -m delta_llava.demo.run) first."
        )
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)


def prepare(processor, images, questions, num_visual_tokens=None):
    """Chat inputs for one question about each image, padded on the left.

    Args:
        images (`list`): paths, or anything else that the processor accepts as an image.
        questions (`list[str]`): one for each image.
        num_visual_tokens (`int` or `"auto"`, *optional*): the budget of each image; by default the checkpoint's own.
    """
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, questions, strict=True)
    ]
    named = {} if num_visual_tokens is None else {"num_visual_tokens": num_visual_tokens}
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, **named},
    )  # fmt: skip


@torch.inference_mode()
def answer(model, processor, images, questions, num_visual_tokens=None, max_new_tokens=40):
    """Answers, a list of strings, to one question about each image; arguments as for [`prepare`]."""
    inputs = prepare(processor, images, questions, num_visual_tokens)
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def budget(text):
    """A budget from the command line: a number, or `auto`."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")
    return text if text == "auto" else int(text)


def main(arguments=None):
    """Command line: prints the answer, or one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="any image file")
    parser.add_argument("question")
    budgets = "one or more, or auto (default: the checkpoint's own)"
    parser.add_argument("--num_visual_tokens", type=budget, nargs="+", default=[None], help=budgets)
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="(default: the one that the demo leaves)")
    options = parser.parse_args(arguments)
    try:
        model, processor = load(options.checkpoint)
        for number in options.num_visual_tokens:
            (given,) = answer(model, processor, [options.image], [options.question], number)
            print(given if len(options.num_visual_tokens) == 1 else f"{number}: {given}")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
