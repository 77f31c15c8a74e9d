"""What lets a run go on: its lock on the output folder, its checkpoints, and the settings they were trained with."""

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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi, snapshot_download
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging
from trl import ModelConfig, SFTConfig


logger = logging.get_logger(__name__)

RECORD = "run.json"  # in each checkpoint: the run that wrote it and, once all is written, what its files hold
LOCK = "run.lock"
# Options that change where, how fast and with how much memory a run computes, but not what it learns
_NOT_LEARNT = re.compile(
    "_?(log|eval_|per_device_eval|save_|hub_|push_to|report_to|run_name|project$|trackio|disable_tqdm|ddp_|fsdp|deepspeed|"
    "debug|skip_memory|local_rank|resume|dry_run|allow_changes|output_dir|json_path|image_folder|model_|use_cpu|do_|stream$|"
    "include_|torch_|gradient_checkpointing|activation_|auto_find|dataloader_(pin|persistent|prefetch)|use_cache|"
    "skip_bad_records|dtype|attn_)"
)
# What a checkpoint's weights and optimizer cannot take on
_FIXED = {"stage", "optim", "use_peft", "use_dora"} | {
    f"lora_{name}" for name in ("r", "target_modules", "target_parameters", "modules_to_save")
}
# DeepSpeed divides its states among the processes, and brings its own rates back
_FIXED_BY_DEEPSPEED = re.compile("num_processes|.*learning_rate|weight_decay|adam_.*")
_DIGESTS = {"data", "model", "rows", "chat_template_path"}
_NUM_SAMPLES = 1000  # rows whose texts and images are compared
_BYTES_READ_WHOLE = 2**31
_BLOCK = 2**16


def decided_by_main(training_args: SFTConfig, decide: Callable[[], Any]) -> Any:
    """Return in every process what the main one decides; a `ValueError` of its is raised in all."""
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
    Keep other runs out of the output folder for as long as this one is in it.

    The lock is the process's, so it ends with it, however it ends.

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
            # Not `flock`, and so not filelock: the loader's workers would inherit it, and outlive a killed run with it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            other = os.read(file, 1000).decode(errors="replace")
            os.close(file)
            raise ValueError(
                f"output_dir={folder} is in use by another run, {other or 'which has just begun'}: wait for its end, "
                "or name another folder."
            ) from error
        except OSError as error:
            logger.warning(f"{folder} cannot be locked ({error}): see to it that no other run writes there.")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                break
        os.close(file)  # the other run has ended just now, and taken this file away
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}".encode(), 0)
    return file


def why_incomplete(checkpoint: Path) -> str | None:
    """
    What keeps a run from going on from a checkpoint: a file is missing, is not as it was written, or was never written.

    Args:
        checkpoint (`Path`): Folder that [`~delta_llava.train.trainer.DeltaLlavaTrainer`] has written, maybe under FSDP
            or DeepSpeed.

    Returns:
        `str`: The reason; `None` if the checkpoint is complete.
    """
    record = _record(checkpoint)
    if record is None:
        return f"{RECORD} is missing or cannot be read"
    if "files" not in record:
        return "it was not written to its end"
    files = record["files"]
    if not any(Path(name).name.startswith("rng_state") for name in files):
        return "save_only_model has left optimizer, schedule and random state out"
    for name, (size, _) in files.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if (found := (checkpoint / name).stat().st_size) != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
    for name, content in zip(files, _contents(checkpoint, files), strict=True):
        if content != files[name]:
            return f"{name} does not hold what was written"
    return None


def latest_checkpoint(training_args: SFTConfig) -> str | None:
    """The complete checkpoint of the last step in the output folder; a warning names later ones that are incomplete."""
    for checkpoint in sorted(_checkpoints(training_args.output_dir), key=_step, reverse=True):
        reason = why_incomplete(checkpoint)
        if reason is None:
            return str(checkpoint)
        logger.warning(f"{checkpoint} is not complete: {reason}. The one before it is looked at.")
    return None


def begin_checkpoint(checkpoint: Path, run: dict[str, Any]):
    """Make an empty folder for a checkpoint, marked as this run's; what it has not written there is moved aside."""
    if checkpoint.exists():
        if _is_replaceable(checkpoint, run["id"]):
            _delete(checkpoint)
        else:
            names = (checkpoint.with_name(f"{checkpoint.name}.{number}") for number in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            checkpoint.rename(aside)
            logger.warning(f"{checkpoint} was there already, and this run had not written it: it is now {aside}.")
    checkpoint.mkdir(parents=True)
    _write_record(checkpoint, {"run": run})


def finish_checkpoint(checkpoint: Path, run: dict[str, Any], save_total_limit: int | None):
    """Note what a checkpoint's files hold, which makes it complete, and delete this run's oldest beyond a limit."""
    names = sorted(
        path.relative_to(checkpoint).as_posix()
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != RECORD
    )
    files = dict(zip(names, _contents(checkpoint, names), strict=True))
    _write_record(checkpoint, {"run": run, "step": _number(checkpoint), "files": files})
    if save_total_limit:
        ours = [path for path in _checkpoints(checkpoint.parent) if _is_of(_record(path), run["id"], path)]
        for path in sorted(ours, key=_number)[:-save_total_limit]:
            _delete(path)


def _checkpoints(output_dir: str | Path) -> list[Path]:
    return [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name[11:])


def _record(checkpoint: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
        return record if record.pop("sha256") == _digest_record(record) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _write_record(checkpoint: Path, record: dict[str, Any]):
    record = json.loads(json.dumps(record, default=str))
    unfinished = checkpoint / f"{RECORD}.tmp"
    unfinished.write_text(json.dumps({**record, "sha256": _digest_record(record)}, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(checkpoint / RECORD)


def _digest_record(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _step(checkpoint: Path) -> int:
    return (_record(checkpoint) or {}).get("step", _number(checkpoint))


def _contents(folder: Path, names: list[str]) -> list[list[int | str]]:
    def content(name: str) -> list[int | str]:
        with open(folder / name, "rb") as file:
            return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]

    with ThreadPoolExecutor() as threads:
        return list(threads.map(content, names))


def _is_of(record: dict[str, Any] | None, run_id: str, checkpoint: Path) -> bool:
    # A copy under another number is the user's
    return record is not None and record["run"]["id"] == run_id and record.get("step") == _number(checkpoint)


def _is_replaceable(checkpoint: Path, run_id: str) -> bool:
    """Whether a checkpoint is this run's, or one that a run has left unfinished."""
    record = _record(checkpoint)
    if record is None:
        return all(path.name == f"{RECORD}.tmp" for path in checkpoint.iterdir())
    return "files" not in record or _is_of(record, run_id, checkpoint)


def _is_finished(checkpoint: Path) -> bool:
    """Whether a run has written a checkpoint to its end, be it damaged now."""
    record = _record(checkpoint)
    return (checkpoint / TRAINER_STATE_NAME).exists() if record is None else "files" in record


def _delete(checkpoint: Path):
    # The record last: should this be interrupted, it says whose the rest is
    for path in checkpoint.iterdir():
        if path.name != RECORD:
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
                f"output_dir={folder} holds {_names(finished)} of an earlier run. Go on from it by "
                "--resume_from_checkpoint latest, or name another folder."
            )
        return None
    if asked.lower() in ("latest", "true"):
        if checkpoint := latest_checkpoint(training_args):
            return checkpoint
        way_on = "Name another folder" if finished else "Leave resume_from_checkpoint out"
        raise ValueError(
            f"resume_from_checkpoint={asked}, but output_dir={folder} holds no complete checkpoint. {way_on} to start "
            "from the beginning."
        )
    if reason := why_incomplete(Path(asked)):
        raise ValueError(
            f"resume_from_checkpoint={asked} is not a complete checkpoint: {reason}. Name another, or 'latest' for the "
            f"last complete one in {folder}."
        )
    record = _record(Path(asked))
    others = [path for path in finished if _step(path) > record["step"] or _id(path) != record["run"]["id"]]
    if others:
        raise ValueError(
            f"output_dir={folder} holds {_names(others)} of another run or of later steps than {asked}, for which this "
            "run's would be mistaken. Move it away, or name another folder."
        )
    return asked


def _names(checkpoints: list[Path]) -> str:
    return ", ".join(path.name for path in checkpoints)


def _id(checkpoint: Path) -> str | None:
    return (_record(checkpoint) or {"run": {"id": None}})["run"]["id"]


def configured_run(
    stage: str,
    recipe: dict[str, Any],
    script_args: Any,
    training_args: SFTConfig,
    model_args: ModelConfig,
    budgets: list[int],
    rows: Dataset | IterableDataset,
    checkpoint: str | None,
) -> dict[str, Any]:
    """
    What every checkpoint says of the run that writes it: a new run, or that of a checkpoint as it goes on.

    Settings are compared whole: options, processes, budgets, data and model. Data and model are compared by digests of
    what their files hold, wherever they lie: the sources whole, and texts and images of up to 1,000 rows.

    Args:
        stage (`str`): `pretrain` or `finetune`.
        recipe (`dict[str, Any]`): What [`~delta_llava.train.recipe.parse_recipe`] returns.
        script_args (`ScriptArguments`), training_args (`SFTConfig`), model_args (`ModelConfig`): The recipe.
        budgets (`list[int]`): That are trained.
        rows (`Dataset` or `IterableDataset`): What is trained on.
        checkpoint (`str`, *optional*): A complete one, to go on from.

    Returns:
        `dict[str, Any]`: `id`; `settings`; `recipe`, as published, which says what has changed at which step; and
        `budgets`, all that the run has trained. The same in all processes.

    Raises:
        `ValueError`: The checkpoint's settings are others, and `allow_changes` is off or does not help; the message
            lists them.
    """

    def configure():
        settings = _settings(script_args, training_args, model_args, rows)
        settings["stage"] = stage
        run = {"id": uuid.uuid4().hex, "recipe": recipe, "budgets": budgets, "settings": settings}
        return _go_on(run, checkpoint, script_args.allow_changes, training_args) if checkpoint else run

    return decided_by_main(training_args, configure)


def _settings(
    script_args: Any, training_args: SFTConfig, model_args: ModelConfig, rows: Dataset | IterableDataset
) -> dict[str, Any]:
    values = {**training_args.to_dict(), **asdict(model_args), **asdict(script_args)}
    values = {name: value for name, value in values.items() if not _NOT_LEARNT.match(name)}
    if not script_args.stream:
        del values["dataloader_num_workers"]  # only a stream is divided among them
    if training_args.max_steps > 0:
        del values["num_train_epochs"]
    if template := training_args.chat_template_path:
        values["chat_template_path"] = hashlib.sha256(Path(template).read_bytes()).hexdigest()
    values |= {
        "num_processes": training_args.world_size,
        "data": _digest_data(script_args.stream or script_args.json_path, rows),
        "model": _digest_model(model_args.model_name_or_path, model_args.model_revision),
    }
    if not isinstance(rows, IterableDataset):
        values |= {"num_rows": len(rows), "rows": _digest_rows(rows)}
    return json.loads(json.dumps(values, default=str))


def _go_on(run: dict[str, Any], checkpoint: str, allow_changes: bool, training_args: SFTConfig) -> dict[str, Any]:
    record = _record(Path(checkpoint))
    earlier, step = record["run"], record["step"]
    before, now = earlier["settings"], run["settings"]
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    if not changed:
        return earlier
    changes = "; ".join(
        f"{name} has changed" if name in _DIGESTS else f"{name} was {before[name]}, is {now[name]}" for name in changed
    )
    # A rate that begins or ceases to be set divides the optimizer's parameters otherwise
    impossible = [
        name
        for name in changed
        if name in _FIXED
        or (training_args.deepspeed_plugin and _FIXED_BY_DEEPSPEED.fullmatch(name))
        or (name.endswith("learning_rate") and None in (before[name], now[name]))
    ]
    if impossible:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {changes}. It cannot go on with another "
            f"{', '.join(impossible)}: give what it was trained with, or start a new run in another output_dir."
        )
    if not allow_changes:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {changes}. Give what it was trained with, or go on with "
            "the changes by --allow_changes."
        )
    logger.warning(f"From {checkpoint} on: {changes}.")
    recipe = dict(earlier["recipe"])
    for name in changed:
        was = recipe.get(name, before[name])
        recipe[name] = f"changed at step {step}" if name in _DIGESTS else f"{was}, from step {step} on {now[name]}"
    budgets = sorted({*earlier["budgets"], *run["budgets"]})
    if "num_visual_tokens" in changed:
        drawn = {*before["num_visual_tokens"], *now["num_visual_tokens"]}
        recipe["num_visual_tokens"] = [*budgets, *({"auto"} & drawn)]
    return {**run, "id": earlier["id"], "recipe": recipe, "budgets": budgets}


def _digest_data(source: str, rows: Dataset | IterableDataset) -> str:
    path = Path(source)
    if path.exists():
        return _digest_files([path] if path.is_file() else path.rglob("*"))
    # Rows that are all at hand are compared themselves
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
    """Of a file of more than 2 GiB a thousand blocks, spread over it, stand for all: what is new is new all over."""
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
