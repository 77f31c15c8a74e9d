"""A tiny checkpoint and tiny data in LLaVA's format, made in place."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
import yaml
from llava_records import record, turns
from PIL import Image
from safetensors.torch import load_file

from delta_llava import DeltaLlavaForConditionalGeneration


@pytest.fixture(scope="session")
def save_checkpoint(tmp_path_factory, tiny_config, tiny_processor):
    def save(branch_std=0.0, **overrides):
        folder = tmp_path_factory.mktemp("checkpoint")
        tiny_processor().save_pretrained(folder)
        torch.manual_seed(0)
        config = tiny_config(projector_variant="residual", visual_token_budgets=[36], **overrides)
        model = DeltaLlavaForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.multi_modal_projector.text_projection.weight, std=branch_std)
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def checkpoint(save_checkpoint):
    """An untrained Delta-LLaVA as `hub.assemble` leaves it."""
    return save_checkpoint()


@pytest.fixture(scope="session")
def still_checkpoint(save_checkpoint):
    """
    One without drop path, which trains alike in any number of processes. Its branch has begun to learn: from zero,
    Adam's first steps are of one size for all gradients, rounding included.
    """
    return save_checkpoint(0.1, attention_drop_path=0.0, convolution_drop_path=0.0, mlp_drop_path=0.0)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """
    Twelve coloured rectangles, each asked about once: the JSON file and the image folder.

    Beside it, `mixed.json` asks half of them twice, and has eight more records without an image.
    """
    folder = tmp_path_factory.mktemp("data")
    draw, records = random.Random(0), []
    for index in range(12):
        colour = draw.choice(["red", "green", "blue"])
        Image.new("RGB", (draw.randint(20, 60), draw.randint(20, 60)), colour).save(folder / f"{index}.png")
        question = "<image>\nWhich colour?" if index % 3 else "Which colour?\n<image>"
        records.append(record(question, f"It is {colour}.", id=f"scene-{index}", image=f"{index}.png"))
    (folder / "data.json").write_text(json.dumps(records))
    for scene in records[1::2]:
        scene["conversations"] += turns("Sure?", "Yes.")
    for index in range(1, 9):
        records.append(record("Count! " * index, f"{index} times.", id=f"text-{index}", image=None))
    (folder / "mixed.json").write_text(json.dumps(records))
    return folder / "data.json", folder


@pytest.fixture
def run(checkpoint, data, tmp_path):
    """Runs a stage on the tiny data with a recipe that is written to a file, and returns the output folder."""

    def run(stage, output_dir="out", arguments=(), **changes):
        stage.main([*recipe(output_dir, **changes), *arguments])
        return tmp_path / output_dir

    def recipe(output_dir, **changes):
        values = {
            "model_name_or_path": str(checkpoint),
            "json_path": str(data[0]),
            "image_folder": str(data[1]),
            "output_dir": str(tmp_path / output_dir),
            "bf16": False,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "max_steps": 2,
            "save_strategy": "no",
            "logging_steps": 1,
            **changes,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        return ["--config", str(tmp_path / "recipe.yaml")]

    run.recipe = recipe
    return run


@pytest.fixture
def launch(tmp_path):
    """`launch(command, script, *arguments)`: runs a script by a launcher; returns what it writes to its file."""

    def launch(command, script, *arguments, **environment):
        (tmp_path / "script.py").write_text(script)
        (tmp_path / "facts.json").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, *map(str, [*command, tmp_path / "script.py", tmp_path / "facts.json", *arguments])],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads((tmp_path / "facts.json").read_text())

    return launch


@pytest.fixture
def doubled(run, still_checkpoint, tmp_path):
    """`doubled(stage, **options)`: trains in one process, to "one"; returns the recipe of two, to "two"."""

    def doubled(stage, in_two=(), **options):
        options = {
            "model_name_or_path": str(still_checkpoint),
            "num_visual_tokens": [4, 144],  # all patches too: no query matters, and DDP and ZeRO wait for its gradient
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "projector_learning_rate": 1e-2,
            "branch_learning_rate": 2e-2,
            "adam_epsilon": 1e-6,  # more than rounding, which is all the gradient of a bias of the keys
            "save_strategy": "steps",
            **options,
        }
        run(stage, "one", **options, per_device_train_batch_size=4)
        return run.recipe("two", **{**options, **dict(in_two)}, per_device_train_batch_size=2)

    def history(name, key, step):
        state = tmp_path / name / f"checkpoint-{step}" / "trainer_state.json"
        return [entry[key] for entry in json.loads(state.read_text())["log_history"] if key in entry]

    def assert_alike(step, numbers):
        """Equal losses; and equal weights, which three learning rates have led to."""
        for key, number in numbers.items():
            assert history("two", key, step) == pytest.approx(history("one", key, step), rel=1e-4)
            assert len(history("two", key, step)) == number
        one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name, weight in one.items():
            assert two[name].dtype == weight.dtype
            assert two[name].sub(weight).abs().max() < 1e-4, name
        return two

    doubled.assert_alike = assert_alike
    return doubled
