"""What a run leaves in `training/` of its result, for the card that is published with it: recipe, log and curves."""

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from transformers import Trainer, TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)

FOLDER = "training"
PACKAGES = ("delta-llava", "torch", "transformers", "trl", "accelerate", "peft", "datasets")


class Record(TrainerCallback):
    """
    Writes `pretrain.yaml` (the recipe), `pretrain.png` (the curves, with every checkpoint) and, when the result is
    saved, `pretrain.json` (the log) into `training/` of the output folder, or the same of `finetune`.

    What the model's own folder holds from earlier stages is copied beside them. A stage that it has seen already gets a
    number: `finetune-2.yaml`. A resumed run keeps the recipe that it began with.

    Args:
        stage (`str`): `pretrain` or `finetune`.
        recipe (`dict[str, Any]`): What [`~delta_llava.train.recipe.parse_recipe`] returns.
        num_rows (`int`, *optional*): Rows that are trained on; unknown for a stream.
        model_name_or_path (`str`), revision (`str`, *optional*): The model that the stage starts from.
    """

    def __init__(
        self,
        stage: str,
        recipe: dict[str, Any],
        num_rows: int | None,
        model_name_or_path: str,
        revision: str | None = None,
    ):
        self.stage, self.recipe, self.num_rows = stage, recipe, num_rows
        self.model_name_or_path, self.revision = model_name_or_path, revision
        self.versions = {package: importlib.metadata.version(package) for package in PACKAGES}

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        model = Path(self.model_name_or_path)
        if not model.is_dir():
            model = Path(snapshot_download(str(model), revision=self.revision, allow_patterns=f"{FOLDER}/*"))
        earlier, folder = model / FOLDER, Path(args.output_dir, FOLDER)
        times = sum(file.stem.split("-")[0] == self.stage for file in earlier.glob("*.yaml"))
        self.file = folder / (f"{self.stage}-{times + 1}" if times else self.stage)
        if state.global_step > 0 and self.file.with_suffix(".yaml").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, whose weights will be replaced
        if (earlier / "sources.yaml").is_file():
            shutil.copytree(earlier, folder)
        else:
            logger.warning(f"{earlier} holds no record of what the model was made of: it will be missing in the card.")
            folder.mkdir(parents=True)
        self.file.with_suffix(".yaml").write_text(yaml.safe_dump(self.recipe, sort_keys=False), encoding="utf-8")

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            try:
                draw_curves(state.log_history, self.file.with_suffix(".png"))
            except OSError as error:
                logger.warning(f"{self.file}.png could not be written: {error}")  # no reason to end a run

    on_train_end = on_save

    def finish(self, trainer: Trainer):
        """Write the log, once the weights that it tells of are saved."""
        args, state = trainer.args, trainer.state
        if not state.is_world_process_zero or not state.log_history:  # none if nothing was left to train
            return
        log = {
            "num_rows": self.num_rows,
            "num_processes": args.world_size,
            "batch_size": state.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "versions": self.versions,
            "log_history": state.log_history,
        }
        self.file.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


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
    losses.legend()
    rates.set(xlabel="step", ylabel="learning rate")
    figure.savefig(file, dpi=100)
    plt.close(figure)
