"""The files of a checkpoint's weights: which they are, their hashes, and whether all of their values are finite."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_NAME


def weight_files(folder: str | Path, single: str = SAFE_WEIGHTS_NAME) -> list[str]:
    """
    Names of the files that a checkpoint's weights lie in, which are all there and all in the folder itself.

    Args:
        folder (`str` or `Path`): With one file of weights, or with an index of several.
        single (`str`, *optional*, defaults to `model.safetensors`): Name of the one file; that of an index has
            `.index.json` after it.

    Raises:
        ValueError: There is none of these, or both; the index cannot be read, or names a file that is not in the
            folder, or that a link leads out of it. (Those of the Hub's cache lead to the blobs of their repository.)
    """
    folder = Path(folder)
    file, index = folder / single, folder / f"{single}.index.json"
    if index.exists() == file.exists():
        found = "both" if file.exists() else "neither"
        raise ValueError(f"{folder} must hold {file.name} or {index.name}, and holds {found}.")
    names = [file.name]
    if index.exists():
        check_place(folder, index.name, index)
        names = sorted(set(_weight_map(index).values()))
    for name in names:
        if "\\" in name or Path(name).name != name or Path(name).suffix != file.suffix:
            raise ValueError(f"{index} places weights in {name!r}, but must name {file.suffix} files beside it.")
        check_place(folder, name, index if index.exists() else file)
    return names


def refuse_adapter(folder: Path, name: str | Path):
    """Raises a `ValueError` if the folder of what the user calls `name` holds an adapter, which is no checkpoint."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{name} holds an adapter: make a checkpoint of it by delta_llava.hub.merge_adapter.")


def weight_digests(folder: str | Path) -> dict[str, str]:
    """
    Tells weights from others.

    Args:
        folder (`str` or `Path`), Raises: As for [`weight_files`].

    Returns:
        `dict[str, str]`: SHA-256, in hexadecimal, by the file's name.
    """
    digests = {}
    for name in weight_files(folder):
        with open(Path(folder, name), "rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def read_weights(folder: str | Path, single: str = SAFE_WEIGHTS_NAME) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Reads a checkpoint's weights from safetensors, one after the other, and refuses those that no model can use.

    Args:
        folder (`str` or `Path`), single (`str`): As for [`weight_files`].

    Yields:
        `tuple[str, torch.Tensor]`: Name and weight.

    Raises:
        ValueError: A file cannot be read, or holds other tensors than the index says, or one that another file holds
            too; or a weight is not finite. Else as for [`weight_files`].
    """
    folder = Path(folder)
    names = weight_files(folder, single)
    index = folder / f"{single}.index.json"
    weight_map = _weight_map(index) if index.exists() else None
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                held = set(file.keys())
                placed = held if weight_map is None else {weight for weight in weight_map if weight_map[weight] == name}
                if unlike := sorted(held ^ placed):
                    raise ValueError(
                        f"{index} places {len(placed)} tensors in {name}, which holds {len(held)}: see "
                        f"{', '.join(unlike[:4])}."
                    )
                for weight in sorted(held):
                    tensor = file.get_tensor(weight)
                    check_finite(weight, tensor, folder / name)
                    yield weight, tensor
        except SafetensorError as error:
            raise ValueError(f"{folder / name} cannot be read: {error}.") from error


def check_finite(name: str, weight: torch.Tensor, where: str | Path):
    """Raises a `ValueError` that names a weight in which NaN or an infinite value is."""
    if not weight.is_floating_point() or not weight.numel():
        return
    # Of one byte alone few operations are implemented; the extremes of others take no memory
    extremes = torch.stack(torch.aminmax(weight.float() if weight.itemsize == 1 else weight))
    if not extremes.isfinite().all():
        raise ValueError(f"{name} in {where} holds NaN or infinite values, with which no model can answer.")


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each weight, as an index has it."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} cannot be read as an index of weights: {type(error).__name__}: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: weight_map must hold the name of a file for every weight.")
    return weight_map


def check_place(folder: Path, name: str, named_by: Path):
    """Raises a `ValueError` if a file that is to be read is not there, or a link leads out of the folder to it."""
    home, target = folder.resolve(), (folder / name).resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise ValueError(f"{folder / name} leads out of its folder, to {target}: put the file itself there.")
    if not target.is_file():
        raise ValueError(f"{named_by} names {name}, but {folder} does not hold that file.")
