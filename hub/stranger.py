"""
Has a published commit answer about one picture, as a stranger would: run by `verify`, not imported by it.

It does not import `delta_llava`, even if that is installed, and loads the code beside the weights.
"""

import json
import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def answer(model_name: str, revision: str | None = None, num_visual_tokens: int | None = None) -> dict:
    """Tokens of a greedy answer about a drawn picture, at the default budget unless one is given."""
    options = {"revision": revision, "trust_remote_code": True}
    model, info = AutoModelForImageTextToText.from_pretrained(
        model_name, **options, dtype="auto", device_map="auto", output_loading_info=True
    )
    if any(info.values()):
        raise SystemExit(f"{model_name} does not load as it is: {info}")
    processor = AutoProcessor.from_pretrained(model_name, **options)
    image = Image.linear_gradient("L").convert("RGB")
    question = [{"type": "image", "image": image}, {"type": "text", "text": "What is in this picture?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={} if num_visual_tokens is None else {"num_visual_tokens": num_visual_tokens},
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return {"num_visual_tokens": int(inputs["num_visual_tokens"][0]), "token_ids": output[0].tolist()}


if __name__ == "__main__":
    sys.modules["delta_llava"] = None  # what is loaded must come from the repository
    print(json.dumps([answer(**arguments) for arguments in json.loads(sys.argv[1])]))
