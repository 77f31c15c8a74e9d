"""What is evaluated: where a checkpoint's files lie, of which commit, what its weights are, and with which budgets."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_delta_llava import DeltaLlavaConfig


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


def visual_token_counts(config: PreTrainedConfig, fastv_layer: int | None = None) -> Sequence[int]:
    """
    Numbers of visual tokens per image at which a checkpoint can be measured.

    Args:
        config (`PreTrainedConfig`): Of Delta-LLaVA; with FastV, of transformers' LLaVA, too.
        fastv_layer (`int`, *optional*): Layer behind which FastV drops visual tokens.

    Returns:
        `Sequence[int]`: Delta-LLaVA's budgets; with FastV, from one to as many as an image has before it.

    Raises:
        ValueError: If the checkpoint is of another kind.
    """
    if config.model_type == DeltaLlavaConfig.model_type:
        budgets = config.valid_visual_token_counts
        return budgets if fastv_layer is None else range(1, config.num_visual_tokens + 1)
    if config.model_type == "llava" and fastv_layer is not None:
        return range(1, config.image_seq_length + 1)
    raise ValueError(
        f"The checkpoint has model_type={config.model_type!r}, but must be of delta_llava, or of llava with FastV "
        "(fastv_layer)."
    )


def weight_digests(folder: Path) -> dict[str, str]:
    """
    Tells weights from others, by the files that `hub.card` hashes: neither imports the other.

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
