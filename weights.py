"""The files of a checkpoint's weights: their names, their hashes, and a check that all values are finite."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_NAME


def weight_files(folder: str | Path, single: str = SAFE_WEIGHTS_NAME) -> list[str]:
    """
    Names of a checkpoint's files of weights, all of which exist in the folder itself.

    Args:
        folder (`str` or `Path`): Folder with one file of weights, or an index of several.
        single (`str`, *optional*, defaults to `model.safetensors`): Name of the one file; an index has the name with
            `.index.json` after it.

    Raises:
        ValueError: There is neither of the two, or both; the index cannot be read, or names a file that is missing or
            a link out of the folder. (Links of the Hub's cache lead to the blobs of their repository.)
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
    """Raises a `ValueError` that calls it `name` if the folder holds an adapter, which is not a checkpoint."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{name} holds an adapter: make a checkpoint of it with delta_llava.hub.merge_adapter.")


def weight_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256, in hexadecimal, of each of [`weight_files`] by its name. Raises a `ValueError` as they do."""
    digests = {}
    for name in tqdm(weight_files(folder), desc=f"hashing {folder}", unit=" files"):
        with open(Path(folder, name), "rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def read_weights(folder: str | Path, single: str = SAFE_WEIGHTS_NAME) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Yields the name and the tensor of each of a checkpoint's weights, from safetensors.

    Args:
        folder (`str` or `Path`), single (`str`): As for [`weight_files`].

    Raises:
        ValueError: A file cannot be read, does not hold the tensors that the index says, or holds one of another file;
            or a weight is not finite. Otherwise as for [`weight_files`].
    """
    folder = Path(folder)
    names = weight_files(folder, single)
    index = folder / f"{single}.index.json"
    weight_map = _weight_map(index) if index.exists() else None
    for name in tqdm(names, desc=f"reading {folder}", unit=" files"):
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
    """Raises a `ValueError` that names the weight if it has NaN or an infinite value."""
    if not weight.is_floating_point() or not weight.numel():
        return
    # Few operations are implemented for one byte; the extremes of other dtypes take no memory
    extremes = torch.stack(torch.aminmax(weight.float() if weight.itemsize == 1 else weight))
    if not extremes.isfinite().all():
        raise ValueError(f"{name} in {where} holds NaN or infinite values, with which no model can answer.")


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each weight, by an index."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} cannot be read as an index of weights: {type(error).__name__}: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: weight_map must hold the name of a file for every weight.")
    return weight_map


def check_place(folder: Path, name: str, named_by: Path):
    """Raises a `ValueError` if a file of a folder does not exist, or is a link out of the folder."""
    home, target = folder.resolve(), (folder / name).resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise ValueError(f"{folder / name} leads out of its folder, to {target}: replace it by the file itself.")
    if not target.is_file():
        raise ValueError(f"{named_by} names {name}, but {folder} does not hold that file.")
