"""What clients of a server send, what transformers itself answers, and a server to ask."""

import base64
import io
import socket
import subprocess
import time
from contextlib import contextmanager

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import Image


def encoded(image, format="PNG", **options):
    """The bytes of an image's file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photograph(size=(160, 200)):
    """Smooth colours with some noise, as photographs have them."""
    draw = np.random.default_rng(0)
    rows, columns = (np.sin(np.linspace(0, 6, length))[:, None] for length in size)
    pixels = 127 + 90 * (rows * columns.T)[..., None] * [1, 0.8, -0.6] + draw.normal(0, 5, (*size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def data_url(image, format="PNG"):
    """An image as a request carries it."""
    return f"data:image/{format.lower()};base64,{base64.b64encode(encoded(image, format)).decode()}"


@torch.inference_mode()
def greedy_tokens(model, processor, images, question, budgets=None, max_new_tokens=8):
    """Token ids of the answer that transformers gives, at these budgets or the checkpoint's default."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": budgets} if images else {},
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(command, cwd, log, **environment):
    """Runs a server's command on a free port of loopback; yields its process, with its `url`, once it answers."""
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=cwd,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    process.url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 400
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            try:
                httpx.get(f"{process.url}/v1/models", trust_env=False).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield process
        assert process.poll() is None, log.read_text()[-6000:]
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
