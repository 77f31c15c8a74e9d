"""What a run needs to be resumed: its lock on the output folder, its checkpoints, and their settings."""

import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi, snapshot_download
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging
from trl import SFTConfig

from .recipe import Recipe


logger = logging.get_logger(__name__)

MANIFEST = "run.json"  # in each checkpoint: the run that wrote it and, once complete, the digests of its files
LOCK = "run.lock"
# Options that change where, how fast and with how much memory a run computes, but not what it learns
_WITHOUT_INFLUENCE = re.compile(
    "_?(log|eval_|per_device_eval|save_|hub_|push_to|report_to|run_name|project$|trackio|disable_tqdm|ddp_|fsdp|deepspeed|"
    "debug|skip_memory|local_rank|resume|dry_run|allow_changes|output_dir|json_path|image_folder|model_|use_cpu|do_|stream$|"
    "include_|torch_|gradient_checkpointing|activation_|auto_find|dataloader_(pin|persistent|prefetch)|use_cache|"
    "skip_bad_records|dtype|attn_)"
)
# Settings that a checkpoint's weights and optimizer do not allow to change
_FIXED = {"stage", "optim", "use_peft", "use_dora"} | {
    f"lora_{name}" for name in ("r", "target_modules", "target_parameters", "modules_to_save")
}
# DeepSpeed divides its states among the processes, and restores its own rates
_FIXED_BY_DEEPSPEED = re.compile("num_processes|.*learning_rate|weight_decay|adam_.*")
_DIGESTS = {"data", "model", "rows", "chat_template_path"}
_NUM_SAMPLES = 1000  # rows whose texts and images are compared
_BYTES_READ_WHOLE = 2**31
_BLOCK = 2**16


def decided_by_main(training_args: SFTConfig, decide: Callable[[], Any]) -> Any:
    """Return in every process what the main one decides, or raise its `ValueError` in all of them."""
    outcome = [None, None]
    if training_args.process_index == 0:
        try:
            outcome[0] = decide()
        except ValueError as error:
            outcome[1] = str(error)
    if training_args.world_size > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


@contextmanager
def sole_run(training_args: SFTConfig) -> Iterator[None]:
    """
    Keep other runs out of the output folder while this one uses it.

    The lock belongs to the process and ends with it, however it ends.

    Raises:
        `ValueError`: Another run is in the folder; the message names it.
    """
    lock = decided_by_main(training_args, lambda: _lock(Path(training_args.output_dir)))
    try:
        yield
    finally:
        if training_args.process_index == 0:
            Path(training_args.output_dir, LOCK).unlink(missing_ok=True)
            os.close(lock)


def _lock(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Not `flock`, and so not filelock: the loader's workers would inherit it and keep it after a killed run
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            other = os.read(file, 1000).decode(errors="replace")
            os.close(file)
            raise ValueError(
                f"output_dir={folder} is in use by another run, {other or 'which has just begun'}: wait until it ends, "
                "or name another folder."
            ) from error
        except OSError as error:
            logger.warning(f"{folder} cannot be locked ({error}): make sure that no other run writes there.")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                break
        os.close(file)  # the other run has just ended and removed this file
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}".encode(), 0)
    return file


def why_incomplete(checkpoint: Path) -> str | None:
    """
    Why a run cannot resume from a checkpoint of [`~delta_llava.train.trainer.DeltaLlavaTrainer`], possibly under FSDP
    or DeepSpeed: a file is missing, has changed, or was never written. `None` if it is complete.
    """
    manifest = _manifest(checkpoint)
    if manifest is None:
        return f"{MANIFEST} is missing or cannot be read"
    if "files" not in manifest:
        return "it was not written completely"
    files = manifest["files"]
    if not any(Path(name).name.startswith("rng_state") for name in files):
        return "save_only_model has left out optimizer, schedule and random state"
    for name, (size, _) in files.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if (found := (checkpoint / name).stat().st_size) != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
    for name, content in zip(files, _contents(checkpoint, files), strict=True):
        if content != files[name]:
            return f"{name} does not hold what was written"
    return None


def latest_checkpoint(output_dir: str | Path) -> str | None:
    """The last complete checkpoint in an output folder; a warning names later ones that are incomplete."""
    for checkpoint in sorted(_checkpoints(output_dir), key=_step, reverse=True):
        reason = why_incomplete(checkpoint)
        if reason is None:
            return str(checkpoint)
        logger.warning(f"{checkpoint} is not complete: {reason}. Trying the one before it.")
    return None


def begin_checkpoint(checkpoint: Path, run: dict[str, Any]):
    """Make an empty folder for a checkpoint, marked as this run's, and move aside anything that it has not written."""
    if checkpoint.exists():
        if _is_replaceable(checkpoint, run["id"]):
            _delete(checkpoint)
        else:
            names = (checkpoint.with_name(f"{checkpoint.name}.{number}") for number in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            checkpoint.rename(aside)
            logger.warning(f"{checkpoint} already existed and was not written by this run: it is now {aside}.")
    checkpoint.mkdir(parents=True)
    _write_manifest(checkpoint, {"run": run})


def finish_checkpoint(checkpoint: Path, run: dict[str, Any], save_total_limit: int | None):
    """Write the digests of a checkpoint's files, which completes it, and delete this run's oldest beyond a limit."""
    names = sorted(
        path.relative_to(checkpoint).as_posix()
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != MANIFEST
    )
    files = dict(zip(names, _contents(checkpoint, names), strict=True))
    _write_manifest(checkpoint, {"run": run, "step": _number(checkpoint), "files": files})
    if save_total_limit:
        ours = [path for path in _checkpoints(checkpoint.parent) if _is_of(_manifest(path), run["id"], path)]
        for path in sorted(ours, key=_number)[:-save_total_limit]:
            _delete(path)


def _checkpoints(output_dir: str | Path) -> list[Path]:
    return [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name[11:])


def _manifest(checkpoint: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest.pop("sha256") == _digest_manifest(manifest) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _write_manifest(checkpoint: Path, manifest: dict[str, Any]):
    manifest = json.loads(json.dumps(manifest, default=str))
    manifest["sha256"] = _digest_manifest(manifest)
    unfinished = checkpoint / f"{MANIFEST}.tmp"
    unfinished.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(checkpoint / MANIFEST)


def _digest_manifest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _step(checkpoint: Path) -> int:
    return (_manifest(checkpoint) or {}).get("step", _number(checkpoint))


def _contents(folder: Path, names: list[str]) -> list[list[int | str]]:
    def content(name: str) -> list[int | str]:
        with open(folder / name, "rb") as file:
            return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]

    with ThreadPoolExecutor() as threads:
        return list(threads.map(content, names))


def _is_of(manifest: dict[str, Any] | None, run_id: str, checkpoint: Path) -> bool:
    # A copy under another number belongs to the user
    return manifest is not None and manifest["run"]["id"] == run_id and manifest.get("step") == _number(checkpoint)


def _is_replaceable(checkpoint: Path, run_id: str) -> bool:
    """Whether a checkpoint belongs to this run, or was left unfinished by any run."""
    manifest = _manifest(checkpoint)
    if manifest is None:
        return all(path.name == f"{MANIFEST}.tmp" for path in checkpoint.iterdir())
    return "files" not in manifest or _is_of(manifest, run_id, checkpoint)


def _is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was written completely, even if it is damaged now."""
    manifest = _manifest(checkpoint)
    return (checkpoint / TRAINER_STATE_NAME).exists() if manifest is None else "files" in manifest


def _delete(checkpoint: Path):
    # The manifest last: after an interruption, it says whose the rest is
    for path in checkpoint.iterdir():
        if path.name != MANIFEST:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(checkpoint)


def checkpoint_to_resume(training_args: SFTConfig) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` asks for, the same in all processes.

    Raises:
        `ValueError`: It is not complete, or the output folder holds checkpoints of another run.
    """
    return decided_by_main(training_args, lambda: _checkpoint_to_resume(training_args))


def _checkpoint_to_resume(training_args: SFTConfig) -> str | None:
    asked, folder = str(training_args.resume_from_checkpoint), Path(training_args.output_dir)
    finished = [path for path in sorted(_checkpoints(folder), key=_step) if _is_finished(path)]
    if asked.lower() in ("none", "false"):
        if finished:
            raise ValueError(
                f"output_dir={folder} holds {_names(finished)} of an earlier run. Resume it by "
                "--resume_from_checkpoint latest, or name another folder."
            )
        return None
    if asked.lower() in ("latest", "true"):
        if checkpoint := latest_checkpoint(folder):
            return checkpoint
        remedy = "Name another folder" if finished else "Leave resume_from_checkpoint out"
        raise ValueError(
            f"resume_from_checkpoint={asked}, but output_dir={folder} holds no complete checkpoint. {remedy} to start "
            "from the beginning."
        )
    if reason := why_incomplete(Path(asked)):
        raise ValueError(
            f"resume_from_checkpoint={asked} is not a complete checkpoint: {reason}. Name another, or 'latest' for the "
            f"last complete one in {folder}."
        )
    manifest = _manifest(Path(asked))
    others = [path for path in finished if _step(path) > manifest["step"] or _id(path) != manifest["run"]["id"]]
    if others:
        raise ValueError(
            f"output_dir={folder} holds {_names(others)} of another run or of later steps than {asked}, which would be "
            "confused with this run's. Move it away, or name another folder."
        )
    return asked


def _names(checkpoints: list[Path]) -> str:
    return ", ".join(path.name for path in checkpoints)


def _id(checkpoint: Path) -> str | None:
    return (_manifest(checkpoint) or {"run": {"id": None}})["run"]["id"]


def configured_run(
    stage: str, recipe: Recipe, budgets: list[int], rows: Dataset | IterableDataset, checkpoint: str | None
) -> dict[str, Any]:
    """
    How every checkpoint describes the run that writes it: a new run, or the run that a complete `checkpoint` continues.

    All settings are compared: options, processes, budgets, data and model. Data and model are compared by digests of
    their files' contents, wherever they lie: the sources whole, and texts and images of up to 1,000 rows.

    Returns:
        `dict[str, Any]`: `id`; `settings`; `recipe`, as published, which says what has changed at which step; and
        `budgets`, all that the run has trained. The same in all processes.

    Raises:
        `ValueError`: The checkpoint's settings differ, and `allow_changes` is off or does not help; the message lists
            them.
    """

    def configure():
        settings = _settings(recipe, rows) | {"stage": stage}
        run = {"id": uuid.uuid4().hex, "recipe": recipe.named, "budgets": budgets, "settings": settings}
        return _resumed(run, checkpoint, recipe) if checkpoint else run

    return decided_by_main(recipe.training, configure)


def _settings(recipe: Recipe, rows: Dataset | IterableDataset) -> dict[str, Any]:
    values = {name: value for name, value in recipe.values().items() if not _WITHOUT_INFLUENCE.match(name)}
    if not recipe.script.stream:
        del values["dataloader_num_workers"]  # only streams are divided among them
    if recipe.training.max_steps > 0:
        del values["num_train_epochs"]
    if template := recipe.training.chat_template_path:
        values["chat_template_path"] = hashlib.sha256(Path(template).read_bytes()).hexdigest()
    values |= {
        "num_processes": recipe.training.world_size,
        "data": _digest_data(recipe.script.stream or recipe.script.json_path, rows),
        "model": _digest_model(recipe.model.model_name_or_path, recipe.model.model_revision),
    }
    if not isinstance(rows, IterableDataset):
        values |= {"num_rows": len(rows), "rows": _digest_rows(rows)}
    return json.loads(json.dumps(values, default=str))


def _resumed(run: dict[str, Any], checkpoint: str, recipe: Recipe) -> dict[str, Any]:
    manifest = _manifest(Path(checkpoint))
    earlier, step = manifest["run"], manifest["step"]
    before, now = earlier["settings"], run["settings"]
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    if not changed:
        return earlier
    changes = "; ".join(
        f"{name} has changed" if name in _DIGESTS else f"{name} was {before[name]}, is {now[name]}" for name in changed
    )
    # Setting a rate, or no longer setting it, changes the optimizer's parameter groups
    impossible = [
        name
        for name in changed
        if name in _FIXED
        or (recipe.training.deepspeed_plugin and _FIXED_BY_DEEPSPEED.fullmatch(name))
        or (name.endswith("learning_rate") and None in (before[name], now[name]))
    ]
    if impossible:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {changes}. It cannot resume with another "
            f"{', '.join(impossible)}: restore what it was trained with, or start a new run in another output_dir."
        )
    if not recipe.script.allow_changes:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {changes}. Restore what it was trained with, or resume "
            "with the changes by --allow_changes."
        )
    logger.warning(f"From {checkpoint} on: {changes}.")
    published = dict(earlier["recipe"])
    for name in changed:
        was = published.get(name, before[name])
        published[name] = f"changed at step {step}" if name in _DIGESTS else f"{was}, from step {step} on {now[name]}"
    budgets = sorted({*earlier["budgets"], *run["budgets"]})
    if "num_visual_tokens" in changed:
        drawn = {*before["num_visual_tokens"], *now["num_visual_tokens"]}
        published["num_visual_tokens"] = [*budgets, *({"auto"} & drawn)]
    return {**run, "id": earlier["id"], "recipe": published, "budgets": budgets}


def _digest_data(source: str, rows: Dataset | IterableDataset) -> str:
    path = Path(source)
    if path.exists():
        return _digest_files([path] if path.is_file() else path.rglob("*"))
    # Rows that are not streamed are compared themselves
    return HfApi().dataset_info(source).sha if isinstance(rows, IterableDataset) else source


def _digest_model(name: str, revision: str) -> str:
    folder = Path(name)
    if not folder.is_dir():
        return Path(snapshot_download(name, revision=revision, allow_patterns="config.json")).name  # the commit
    return _digest_files([path for kind in ("safetensors", "json", "jinja") for path in folder.glob(f"*.{kind}")])


def _digest_files(paths: Iterable[Path]) -> str:
    files = sorted(path for path in paths if path.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() if len(files) > 1 else b"")
        digest.update(_digest_file(file))
    return digest.hexdigest()


def _digest_file(path: Path) -> bytes:
    """The digest of a file; above 2 GiB, of a thousand blocks spread over it, as new versions differ everywhere."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _BYTES_READ_WHOLE:
            return hashlib.file_digest(file, "sha256").digest()
        digest = hashlib.sha256(str(size).encode())
        for position in np.linspace(0, size - _BLOCK, 1000).astype(int):
            file.seek(position)
            digest.update(file.read(_BLOCK))
        return digest.digest()


def _digest_rows(rows: Dataset) -> str:
    digest = hashlib.sha256()
    positions = np.linspace(0, len(rows) - 1, min(len(rows), _NUM_SAMPLES)).astype(int)
    for row in rows.with_format("arrow")[positions].to_pylist():
        digest.update(json.dumps(row["messages"]).encode())
        for image in row["images"]:
            digest.update(image["bytes"] or _digest_file(Path(image["path"])))
    return digest.hexdigest()
