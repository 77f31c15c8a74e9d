"""What is evaluated: where a checkpoint's files lie, which commit they are of, and what its weights are."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


# All that loading needs where this package is installed.
FILES = ["*.json", "*.jinja", "*.safetensors", "*.model"]


def locate(checkpoint: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """
    Finds a checkpoint's files, and downloads them where they are on the Hub.

    Args:
        checkpoint (`str` or `Path`): Folder, or `ORG/NAME` of a Hub repository.
        revision (`str`, *optional*, defaults to `main`): Branch or commit of the repository.

    Returns:
        `tuple[Path, str or None]`: The folder, and the commit of what is on the Hub.

    Raises:
        ValueError: If a revision of a folder is asked for.
        OSError: If there is neither such a folder nor such a repository.
    """
    if Path(checkpoint).is_dir():
        if revision:
            raise ValueError(f"{checkpoint} is a folder, which has no revision {revision!r}.")
        return Path(checkpoint), None
    try:
        folder = Path(snapshot_download(str(checkpoint), revision=revision, allow_patterns=FILES))
    except ValueError as error:  # what cannot name a repository
        raise FileNotFoundError(f"{checkpoint} is neither a folder nor a repository of the Hub: {error}") from error
    return folder, folder.name


def weight_digests(folder: Path) -> dict[str, str]:
    """
    Tells weights from others.

    Args:
        folder (`Path`): With `model.safetensors`, or with an index of several files.

    Returns:
        `dict[str, str]`: SHA-256, in hexadecimal, by the file's name.

    Raises:
        ValueError: There is none of these, or both.
    """
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.exists() == single.exists():
        found = "both" if single.exists() else "neither"
        raise ValueError(f"{folder} must hold {single.name} or {index.name}, and holds {found}.")
    names = [single.name]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    digests = {}
    for name in names:
        with open(folder / name, "rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
