"""What a run leaves in `training/` of its result, for the card that is published with it: recipe, log and curves."""

import importlib.metadata
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.utils import logging

from ..weights import check_place


logger = logging.get_logger(__name__)

FOLDER = "training"
MARK = "# Written by delta_llava.train"
# What a run writes into the folder, or copies into it from the model's
OURS = re.compile(r"sources\.yaml|(pretrain|finetune)(-\d+)?\.(yaml|json|png)")
# What a result is made of, a whole model or an adapter
RESULT = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
RESULT += (
    "tokenizer.json",
    "chat_template.jinja",
    *(f"{part}_config.json" for part in ("generation", "processor", "tokenizer")),
)
RESULT += ("config.json", "adapter_config.json", "trained_config.json")
PACKAGES = ("delta-llava", "torch", "transformers", "trl", "accelerate", "peft", "datasets")


def check_output_dir(output_dir: str | Path):
    """
    Refuse a folder that holds what a run would replace, unless a run has written it.

    Raises:
        `ValueError`: With the files that are in the way.
    """
    output_dir = Path(output_dir)
    folder = output_dir / FOLDER
    records = [path for path in folder.glob("*") if OURS.fullmatch(path.name)]
    recipes = (path for path in records if path.suffix == ".yaml" and path.is_file())
    if any(path.read_bytes().startswith(MARK.encode()) for path in recipes):
        return
    records += [path for pattern in RESULT for path in output_dir.glob(pattern)]
    if records:
        names = ", ".join(sorted({path.relative_to(output_dir).as_posix() for path in records}))
        raise ValueError(
            f"output_dir={output_dir} holds {names}, which no run has written and this one would replace: name another "
            "folder."
        )


class Record(TrainerCallback):
    """
    Writes `pretrain.yaml` (the recipe), `pretrain.png` (the curves, with every checkpoint) and, when the result is
    saved, `pretrain.json` (the log) into `training/` of the output folder, or the same of `finetune`.

    What the model's own folder holds from earlier stages is copied beside them. A stage that it has seen already gets a
    number: `finetune-2.yaml`. Other files there stay. A checkpoint holds all three, up to its step.

    Args:
        stage (`str`): `pretrain` or `finetune`.
        run (`dict[str, Any]`): What [`~delta_llava.train.runs.configured_run`] returns.
        num_rows (`int`, *optional*): Rows that are trained on; unknown for a stream.
        model_name_or_path (`str`), revision (`str`, *optional*): The model that the stage starts from.
    """

    def __init__(
        self,
        stage: str,
        run: dict[str, Any],
        num_rows: int | None,
        model_name_or_path: str,
        revision: str | None = None,
    ):
        self.stage, self.run, self.num_rows = stage, run, num_rows
        self.model_name_or_path, self.revision = model_name_or_path, revision
        self.versions = {package: importlib.metadata.version(package) for package in PACKAGES}

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
                if OURS.fullmatch(file.name):  # of an earlier run, whose weights will be replaced
                    file.unlink()
            if (earlier / "sources.yaml").is_file():
                _copy(model, folder)
            else:
                logger.warning(
                    f"{earlier} holds no record of what the model was made of: it will be missing in the card."
                )
        recipe = yaml.safe_dump(self.run["recipe"], sort_keys=False)
        self.file.with_suffix(".yaml").write_text(f"{MARK}.{self.stage}\n{recipe}", encoding="utf-8")

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._draw(state)

    def _draw(self, state: TrainerState):
        try:
            draw_curves(state.log_history, self.file.with_suffix(".png"))
        except OSError as error:
            logger.warning(f"{self.file}.png could not be written: {error}")  # no reason to end a run

    def write_checkpoint(self, trainer: Trainer, checkpoint: Path):
        """Write the record into a checkpoint as if the run had ended there: whoever publishes it needs all of it."""
        self._draw(trainer.state)
        folder = checkpoint / FOLDER
        folder.mkdir()
        _copy(checkpoint.parent, folder)
        end = {"train_runtime": round(time.time() - self.start, 4), "step": trainer.state.global_step}
        self._write_log(trainer, folder / f"{self.file.name}.json", end)

    def finish(self, trainer: Trainer):
        """Write the log, once the weights that it tells of are saved."""
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
            check_place(model, f"{FOLDER}/{file.name}", file)  # what is copied will be published
            shutil.copyfile(file, target / file.name)


def draw_curves(log_history: list[dict[str, float]], file: Path):
    """
    Draw losses and learning rate against steps.

    Args:
        log_history (`list[dict[str, float]]`): That of a `TrainerState`.
        file (`Path`): The picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, rates) = plt.subplots(
        2, 1, figsize=(9, 7), height_ratios=(3, 1), sharex=True, layout="constrained"
    )

    def plot(axis, key, **style):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), **style)

    plot(losses, "loss", color="grey", label="training")
    names = {key for entry in log_history for key in entry if key.startswith("eval_") and key.endswith("_loss")}
    for name in sorted(names, key=lambda name: int(name.split("_")[1])):
        plot(losses, name, marker="o", markersize=3, label=f"validation, {name.split('_')[1]} visual tokens")
    plot(rates, "learning_rate", color="grey")
    losses.set(ylabel="loss (nats per token)")
    if losses.lines:
        losses.legend()
    rates.set(xlabel="step", ylabel="learning rate")
    figure.savefig(file, dpi=100)
    plt.close(figure)
