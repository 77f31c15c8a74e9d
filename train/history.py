"""The history that a run writes into `training/` of its result, for the card: recipe, log and curves."""

import importlib.metadata
import json
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from matplotlib.figure import Figure
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.utils import logging

from ..weights import check_place


logger = logging.get_logger(__name__)

FOLDER = "training"
MARK = "# Written by delta_llava.train"
# Files that a run writes into the folder, or copies there from the model's
OURS = re.compile(r"sources\.yaml|(pretrain|finetune)(-\d+)?\.(yaml|json|png)")
# The files of a result, a whole model or an adapter
RESULT = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    *("tokenizer.json", "chat_template.jinja", "config.json"),
    *(f"{part}_config.json" for part in ("adapter", "generation", "processor", "tokenizer", "trained")),
)
PACKAGES = ("delta-llava", "torch", "transformers", "trl", "accelerate", "peft", "datasets")


def check_output_dir(output_dir: str | Path):
    """
    Refuse a folder with files that a run would replace, unless a run has written them.

    Raises:
        `ValueError`: The message names the files.
    """
    output_dir = Path(output_dir)
    folder = output_dir / FOLDER
    found = [path for path in folder.glob("*") if OURS.fullmatch(path.name)]
    recipes = (path for path in found if path.suffix == ".yaml" and path.is_file())
    if any(path.read_bytes().startswith(MARK.encode()) for path in recipes):
        return
    found += [path for pattern in RESULT for path in output_dir.glob(pattern)]
    if found:
        names = ", ".join(sorted({path.relative_to(output_dir).as_posix() for path in found}))
        raise ValueError(
            f"output_dir={output_dir} holds {names}, which no run has written and this one would replace: name another "
            "folder."
        )


@dataclass(eq=False)
class History(TrainerCallback):
    """
    Writes `pretrain.yaml` (the recipe), `pretrain.png` (the curves, updated with every checkpoint) and, once the result
    is saved, `pretrain.json` (the log) into `training/` of the output folder; likewise for `finetune`.

    The history of earlier stages is copied from the model's folder. A repeated stage gets a number: `finetune-2.yaml`.
    Other files there stay. A checkpoint holds all three files, up to its step.

    Args:
        stage (`str`): `pretrain` or `finetune`.
        run (`dict[str, Any]`): What [`~delta_llava.train.runs.configured_run`] returns.
        num_rows (`int`, *optional*): Rows that are trained on; unknown for a stream.
        model_name_or_path (`str`), revision (`str`, *optional*): The model that the stage starts from.
    """

    stage: str
    run: dict[str, Any]
    num_rows: int | None
    model_name_or_path: str
    revision: str | None = None
    versions: dict[str, str] = field(  # those that train, not those that are installed when the log is written
        init=False, default_factory=lambda: {package: importlib.metadata.version(package) for package in PACKAGES}
    )

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.time()
        if not state.is_world_process_zero:
            return
        model = Path(self.model_name_or_path)
        if not model.is_dir():
            model = Path(snapshot_download(str(model), revision=self.revision, allow_patterns=f"{FOLDER}/*"))
        earlier, folder = model / FOLDER, Path(args.output_dir, FOLDER)
        recipes = (file.stem for file in earlier.glob("*.yaml") if OURS.fullmatch(file.name))
        times = sum(recipe.split("-")[0] == self.stage for recipe in recipes)
        self.file = folder / (f"{self.stage}-{times + 1}" if times else self.stage)
        folder.mkdir(parents=True, exist_ok=True)
        if state.global_step == 0 or not self.file.with_suffix(".yaml").exists():
            for file in folder.iterdir():
                if OURS.fullmatch(file.name):  # of an earlier run, whose weights this one replaces
                    file.unlink()
            if (earlier / "sources.yaml").is_file():
                _copy(model, folder)
            else:
                logger.warning(f"{earlier} does not say what the model was made from: the card will lack it.")
        recipe = yaml.safe_dump(self.run["recipe"], sort_keys=False)
        self.file.with_suffix(".yaml").write_text(f"{MARK}.{self.stage}\n{recipe}", encoding="utf-8")

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._draw(state)

    def _draw(self, state: TrainerState):
        """Plot losses and learning rate against steps."""
        figure = Figure(figsize=(9, 7), layout="constrained")
        losses, rates = figure.subplots(2, height_ratios=(3, 1), sharex=True)

        def plot(axis, key, **style):
            points = [(entry["step"], entry[key]) for entry in state.log_history if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), **style)

        plot(losses, "loss", color="grey", label="training")
        keys = {key for entry in state.log_history for key in entry}
        for budget in sorted(int(key.split("_")[1]) for key in keys if re.fullmatch(r"eval_\d+_loss", key)):
            label = f"validation, {budget} visual tokens"
            plot(losses, f"eval_{budget}_loss", marker="o", markersize=3, label=label)
        plot(rates, "learning_rate", color="grey")
        losses.set(ylabel="loss (nats per token)")
        if losses.lines:
            losses.legend()
        rates.set(xlabel="step", ylabel="learning rate")
        try:
            figure.savefig(self.file.with_suffix(".png"), dpi=100)
        except OSError as error:
            logger.warning(f"{self.file}.png could not be written: {error}")  # no reason to end a run

    def write_checkpoint(self, trainer: Trainer, checkpoint: Path):
        """Write the history into a checkpoint as if the run had ended there, so that it can be published."""
        self._draw(trainer.state)
        folder = checkpoint / FOLDER
        folder.mkdir()
        _copy(checkpoint.parent, folder)
        end = {"train_runtime": round(time.time() - self.start, 4), "step": trainer.state.global_step}
        self._write_log(trainer, folder / f"{self.file.name}.json", end)

    def finish(self, trainer: Trainer):
        """Write the log, once the weights that it describes are saved."""
        if trainer.state.is_world_process_zero:
            self._write_log(trainer, self.file.with_suffix(".json"))

    def _write_log(self, trainer: Trainer, file: Path, *more: dict[str, float]):
        args, state = trainer.args, trainer.state
        log = {
            "num_rows": self.num_rows,
            "num_processes": args.world_size,
            "batch_size": state.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "versions": self.versions,
            "log_history": [*state.log_history, *more],
        }
        file.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def _copy(model: Path, target: Path):
    for file in (model / FOLDER).iterdir():
        if OURS.fullmatch(file.name):
            check_place(model, f"{FOLDER}/{file.name}", file)  # what is copied may be published
            shutil.copyfile(file, target / file.name)
