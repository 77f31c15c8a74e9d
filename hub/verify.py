r"""
Loads a published commit as a stranger would, and compares it with the folder that it was pushed from.

```
python -m delta_llava.hub.verify --checkpoint checkpoints/delta-llava-7b-144 --repo_id ORG/delta-llava-7b-144 \
    --revision COMMIT
```

The commit is downloaded into an empty cache, and a hash of each tensor is compared with the local one's. Then a new
process, without the package `delta_llava`, a network or the login, has both models answer a question about one picture.
`TMPDIR` says where the download goes.
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
from huggingface_hub import snapshot_download

from ..weights import read_weights
from .client import explain_hub_errors


STRANGER = Path(__file__).with_name("stranger.py")
# All that loading reads, without what others have put beside it, such as weights in another format
LOADED = ("*.json", "*.jinja", "*.py", "*.txt", "*.model", "model.safetensors", "model-*-of-*.safetensors")


def verify(
    checkpoint: str | Path,
    repo_id: str,
    revision: str,
    num_visual_tokens: int | None = None,
    home: str | Path | None = None,
):
    """
    Verifies a commit, and prints that it did.

    Args:
        checkpoint (`str` or `Path`): The folder that was pushed.
        repo_id (`str`), revision (`str`): Repository and commit.
        num_visual_tokens (`int`, *optional*, defaults to the folder's): Default budget to expect.
        home (`str` or `Path`, *optional*, defaults to a new folder that is deleted afterwards):
            For `HF_HOME`: empty, or as another branch's verification has left it.

    Raises:
        RuntimeError: It does not load, or differs; the message says how.
        OSError: The Hub refuses, cannot be reached or stops answering.
        ValueError: A weight is not finite, or the weights of either cannot be read.
    """
    if home is None:
        with tempfile.TemporaryDirectory() as home:
            return verify(checkpoint, repo_id, revision, num_visual_tokens, home)
    what = f"{repo_id} at {revision}"
    print(f"verifying {what} with an empty cache", flush=True)
    with explain_hub_errors(repo_id):
        folder = snapshot_download(repo_id, revision=revision, cache_dir=Path(home, "hub"), allow_patterns=LOADED)
    published, local = _tensor_hashes(folder), _tensor_hashes(checkpoint)
    if differing := sorted(name for name in published.keys() | local.keys() if published.get(name) != local.get(name)):
        raise RuntimeError(f"{what}: {len(differing)} of {len(local)} tensors differ: {', '.join(differing[:10])}")

    # Published code is run, which needs neither the Hub nor the login
    login = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
    environment = {
        name: value for name, value in os.environ.items() if not name.endswith("_CACHE") and name not in login
    }
    environment |= {"HF_HOME": str(Path(home).resolve()), "HF_HUB_OFFLINE": "1"}
    asked = [
        {"model_name": repo_id, "revision": revision},
        {"model_name": str(Path(checkpoint).resolve()), "num_visual_tokens": num_visual_tokens},
    ]
    command = [sys.executable, "-P", str(STRANGER), json.dumps(asked)]
    completed = subprocess.run(command, env=environment, cwd=home, stdout=subprocess.PIPE, text=True, check=False)
    if completed.returncode:
        raise RuntimeError(
            f"{what} could not be verified: the process ended with {completed.returncode}, and the messages above say "
            "why. What was published stays there."
        )
    published_answer, local_answer = json.loads(completed.stdout.splitlines()[-1])
    if published_answer != local_answer:
        raise RuntimeError(f"{what} answers {published_answer}, the model in {checkpoint} {local_answer}.")
    print(
        f"Verified {what}: {len(local)} tensors equal the local ones, and both models give the same answer, with "
        f"{published_answer['num_visual_tokens']} visual tokens by default.",
        flush=True,
    )


def _tensor_hashes(folder: str | Path) -> dict[str, str]:
    hashes = {}
    for name, tensor in read_weights(folder):
        shape = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        hashes[name] = hashlib.sha256(shape + content.tobytes()).hexdigest()
    return hashes


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder that was pushed")
    parser.add_argument("--repo_id", required=True, help="ORG/NAME")
    parser.add_argument("--revision", required=True, help="commit")
    parser.add_argument("--num_visual_tokens", type=int, help="default budget of the commit (default: the folder's)")
    try:
        verify(**vars(parser.parse_args(arguments)))
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
