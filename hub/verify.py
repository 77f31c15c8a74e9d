r"""
Loads a published commit as a stranger would, and compares it with the folder that it was pushed from.

```
python -m delta_llava.hub.verify --checkpoint checkpoints/delta-llava-7b-144 --repo_id ORG/delta-llava-7b-144 \
    --revision COMMIT
```

A new process with an empty cache, and without the package `delta_llava`, downloads the commit, compares a hash of each
tensor with the local file's, and lets both models answer about one picture. `TMPDIR` says where there is room for the
download.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def verify(
    checkpoint: str | Path,
    repo_id: str,
    revision: str,
    num_visual_tokens: int | None = None,
    home: str | Path | None = None,
):
    """
    Verify a commit in a process of its own, and say so.

    Args:
        checkpoint (`str` or `Path`): The folder that was pushed.
        repo_id (`str`), revision (`str`): Repository and commit.
        num_visual_tokens (`int`, *optional*, defaults to the folder's): Default budget that the commit shall have.
        home (`str` or `Path`, *optional*, defaults to a new folder that is deleted afterwards):
            For `HF_HOME`: empty, or as the verification of another branch of the repository has left it.

    Raises:
        RuntimeError: It does not load, or differs; the message says in what.
    """
    if home is None:
        with tempfile.TemporaryDirectory() as home:
            return verify(checkpoint, repo_id, revision, num_visual_tokens, home)
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE")}
    # The login's file lies in the home that is left; huggingface_hub alone reads it
    token_path = Path(constants.HF_TOKEN_PATH).resolve()
    environment |= {"HF_HOME": str(home), "HF_TOKEN_PATH": str(token_path)}
    command = [sys.executable, "-P", __file__, "--in_this_process", "--checkpoint", str(Path(checkpoint).resolve())]
    command += ["--repo_id", repo_id, "--revision", revision]
    command += ["--num_visual_tokens", str(num_visual_tokens)] if num_visual_tokens else []
    print(f"verifying {repo_id} at {revision} in a new process with a cache of its own", flush=True)
    completed = subprocess.run(command, env=environment, cwd=home, stdout=subprocess.PIPE, text=True, check=False)
    if completed.returncode:
        raise RuntimeError(
            f"{repo_id} at {revision} could not be verified: the process ended with {completed.returncode}, and the "
            "messages above say why."
        )
    print(completed.stdout, end="", flush=True)


def weight_files(folder: Path) -> list[str]:
    """
    Names of the safetensors files that a checkpoint's weights lie in.

    Args:
        folder (`Path`): With `model.safetensors`, or with an index of several.

    Raises:
        ValueError: There is none of these, or both.
    """
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.exists() == single.exists():
        found = "both" if single.exists() else "neither"
        raise ValueError(f"{folder} must hold {single.name} or {index.name}, and holds {found}.")
    if single.exists():
        return [single.name]
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def compare(checkpoint: str, repo_id: str, revision: str, num_visual_tokens: int | None) -> str:
    """Compare tensors and answers of a commit and a folder; return what was found alike, raise `SystemExit` if not."""
    patterns = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-*-of-*.safetensors"]
    folder = snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
    published, local = _tensor_hashes(Path(folder)), _tensor_hashes(Path(checkpoint))
    differing = sorted(name for name in published.keys() | local.keys() if published.get(name) != local.get(name))
    if differing:
        raise SystemExit(f"{len(differing)} of {len(local)} tensors differ: {', '.join(differing[:10])}")
    published_answer, local_answer = _answer(repo_id, revision, None), _answer(checkpoint, None, num_visual_tokens)
    if published_answer != local_answer:
        raise SystemExit(f"The published model answers {published_answer}, the local one {local_answer}.")
    return (
        f"Verified {repo_id} at {revision}: {len(local)} tensors are those of the local files, and both models give "
        f"the same answer, by default with {published_answer['num_visual_tokens']} visual tokens."
    )


def _tensor_hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for file in weight_files(folder):
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                shape = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
                content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
                hashes[name] = hashlib.sha256(shape + content.tobytes()).hexdigest()
    return hashes


def _answer(model_name: str, revision: str | None, num_visual_tokens: int | None) -> dict:
    """Tokens of a greedy answer about a drawn picture, at the default budget if none is named."""
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


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder that was pushed")
    parser.add_argument("--repo_id", required=True, help="ORG/NAME")
    parser.add_argument("--revision", required=True, help="commit")
    parser.add_argument("--num_visual_tokens", type=int, help="default budget of the commit (default: the folder's)")
    parser.add_argument("--in_this_process", action="store_true", help=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    if options.pop("in_this_process"):
        sys.modules["delta_llava"] = None  # installed or not: what is loaded must come from the repository
        print(compare(**options))
    else:
        verify(**options)


if __name__ == "__main__":
    main()
