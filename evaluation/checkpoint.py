"""The checkpoint to evaluate: its files, its commit, and the budgets that it allows."""

from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig

from ..configuration_delta_llava import DeltaLlavaConfig
from ..weights import refuse_adapter


# All that loading needs if this package is installed
FILES = ["*.json", "*.jinja", "*.safetensors", "*.model"]


def locate(checkpoint: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """
    Finds a checkpoint's files, and downloads them from the Hub if they are there.

    Args:
        checkpoint (`str` or `Path`): Folder, or `ORG/NAME` of a Hub repository.
        revision (`str`, *optional*, defaults to `main`): Branch or commit of the repository.

    Returns:
        `tuple[Path, str or None]`: The folder, and the commit of what is on the Hub.

    Raises:
        ValueError: If a folder is given with a revision, or holds an adapter.
        OSError: If there is neither such a folder nor such a repository.
    """
    if Path(checkpoint).is_dir():
        if revision:
            raise ValueError(f"{checkpoint} is a folder, which has no revision {revision!r}.")
        folder, commit = Path(checkpoint), None
    else:
        try:
            folder = Path(snapshot_download(str(checkpoint), revision=revision, allow_patterns=FILES))
        except ValueError as error:  # not the name of a repository
            raise FileNotFoundError(f"{checkpoint} is neither a folder nor a repository of the Hub: {error}") from error
        commit = folder.name
    refuse_adapter(folder, checkpoint)
    return folder, commit


def check_visual_tokens(config: PreTrainedConfig, num_visual_tokens: list[int], fastv_layer: int | None = None):
    """
    Checks the budgets at which a checkpoint of Delta-LLaVA is to be measured; or, with `fastv_layer`, how many tokens
    FastV keeps after that layer of a LLaVA-1.5.

    Raises:
        ValueError: If the checkpoint does not allow one of these, has no such layer, or is of another kind.
    """
    if config.model_type != ("llava" if fastv_layer is not None else DeltaLlavaConfig.model_type):
        raise ValueError(
            f"The checkpoint has model_type={config.model_type!r}, but must have delta_llava without fastv_layer, or "
            "llava (LLaVA-1.5) with it."
        )
    if fastv_layer is None:
        valid = config.valid_visual_token_counts
        allowed = f"among {valid}"
    else:
        num_layers = config.text_config.num_hidden_layers
        if not 0 < fastv_layer < num_layers:
            raise ValueError(f"fastv_layer={fastv_layer} must be from 1 to {num_layers - 1}.")
        valid = range(1, config.image_seq_length + 1)
        allowed = f"from 1 to {config.image_seq_length}"
    if wrong := [budget for budget in num_visual_tokens if budget not in valid]:
        raise ValueError(f"num_visual_tokens={wrong} must be {allowed}.")
