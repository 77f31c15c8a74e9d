"""However a run ends early, the last good checkpoint is there, the error says so, and the way on repeats the run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from delta_llava.train import finetune, trainer
from delta_llava.train.trainer import latest_checkpoint


ELASTIC = {
    "num_visual_tokens": [1, 4, 16],
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 9,
    "dataloader_num_workers": 1,
}

# Step 6 is the end of the second epoch of six batches, each step takes two
KILLED_BETWEEN_CHECKPOINTS = """
import os, signal, sys
from delta_llava.train import finetune, trainer
def training_step(self, *args, original=trainer.SFTTrainer.training_step, **kwargs):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
trainer.DeltaLlavaTrainer.training_step = training_step
finetune.main(sys.argv[1:])
"""
KILLED_IN_A_CHECKPOINT = """
import os, signal, sys
from delta_llava.train import finetune, trainer
def save_rng_state(self, output_dir, original=trainer.SFTTrainer._save_rng_state):
    if self.state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, output_dir)
trainer.DeltaLlavaTrainer._save_rng_state = save_rng_state
finetune.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return tmp_path_factory.mktemp("unbroken")


@pytest.fixture
def unbroken_weights(run, unbroken):
    """The result of a run that nothing has ended early, which is made once."""
    if not any(unbroken.iterdir()):
        shutil.copytree(run(finetune, "unbroken", **ELASTIC), unbroken, dirs_exist_ok=True)
    return (unbroken / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("killed_run", "left", "complete"),
    [(KILLED_BETWEEN_CHECKPOINTS, [2, 4], 4), (KILLED_IN_A_CHECKPOINT, [2, 4, 6, 8], 6)],
    ids=["killed between checkpoints", "killed in a checkpoint"],
)
def test_a_killed_run_resumes_to_the_weights_of_an_unbroken_one(
    run, unbroken_weights, tmp_path, killed_run, left, complete
):
    arguments = [sys.executable, "-c", killed_run, *run.recipe("killed", **ELASTIC)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in left
    ]

    resumed = run(finetune, "killed", ["--resume_from_checkpoint", "latest"], **ELASTIC)
    logged = json.loads((resumed / "checkpoint-9" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logged if "loss" in entry] == list(range(1, 10))
    assert not (resumed / "bad_records.jsonl").exists()
    for step in range(complete + 2, 9, 2):
        assert (resumed / f"checkpoint-{step}" / "trainer_state.json").exists()
    assert (resumed / "model.safetensors").read_bytes() == unbroken_weights


def start(
    run, output_dir, script="from delta_llava.train import finetune; import sys; finetune.main(sys.argv[1:])", **changes
):
    """A run in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *run.recipe(output_dir, **{**ELASTIC, **changes})],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise TimeoutError(path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(run, data, tmp_path):
    """Twenty moments between the first step and the last, drawn anew each time; about ten minutes on two cores."""
    options = {
        "json_path": str(data[1] / "mixed.json"),
        "train_sampling_strategy": "group_by_length",
        "max_steps": 40,
        "save_steps": 1,  # so that many a moment lies within the writing of a checkpoint
        "save_total_limit": 2,
    }
    begun = time.monotonic()
    unbroken = start(run, "unbroken", **options)
    wait_for(tmp_path / "unbroken" / "checkpoint-1")
    first_checkpoint = time.monotonic() - begun
    assert unbroken.wait() == 0
    duration = time.monotonic() - begun
    expected = (tmp_path / "unbroken" / "model.safetensors").read_bytes()
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    incomplete = 0  # the newest checkpoint, at that moment
    for trial in range(20):
        killed = start(run, "killed", **options)
        time.sleep(moments.uniform(first_checkpoint, duration - 1))
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        checkpoints = sorted((tmp_path / "killed").glob("checkpoint-*"))
        incomplete += any(not (checkpoint / "trainer_state.json").exists() for checkpoint in checkpoints)
        complete = any((checkpoint / "trainer_state.json").exists() for checkpoint in checkpoints)
        resumed = start(run, "killed", **options, **({"resume_from_checkpoint": "latest"} if complete else {}))
        assert resumed.wait() == 0, (seed, trial, resumed.stderr.read())
        assert (tmp_path / "killed" / "model.safetensors").read_bytes() == expected, (seed, trial)
        shutil.rmtree(tmp_path / "killed")
    print(f"seed {seed}: 20 runs, {incomplete} of them killed while they wrote a checkpoint")


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_checkpoint_that_lacks_a_part_is_not_resumed_from(run, tmp_path, file):
    """As a run leaves one that is killed while it deletes its oldest checkpoint, or while it writes its newest."""
    folder = run(finetune, "run", **ELASTIC)
    args = SimpleNamespace(output_dir=folder, world_size=1)
    assert latest_checkpoint(args) == str(folder / "checkpoint-9")
    # deleting from a folder makes it the newest
    (folder / "checkpoint-2" / "config.json").unlink()
    assert latest_checkpoint(args) == str(folder / "checkpoint-9")
    part = folder / "checkpoint-9" / file
    if file == "rng_state.pth":
        part.write_bytes(part.read_bytes()[:-50])
    else:
        part.unlink()
    assert latest_checkpoint(args) == str(folder / "checkpoint-8")
    assert latest_checkpoint(SimpleNamespace(output_dir=folder, world_size=2)) is None


def test_sigterm_ends_a_run_behind_a_checkpoint(run, unbroken_weights, tmp_path):
    stopped = start(run, "stopped", SLOW_STEPS)
    wait_for(tmp_path / "stopped" / "checkpoint-2" / "trainer_state.json")
    os.killpg(stopped.pid, signal.SIGTERM)  # to the loader's worker too, as a shell does
    _, errors = stopped.communicate()
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "SIGTERM has ended training at step" in errors
    assert not (tmp_path / "stopped" / "model.safetensors").exists()  # no result that looks like that of a whole run
    latest = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "stopped").glob("checkpoint-*"))
    assert f"training at step {latest} of 9" in errors
    assert f"checkpoint-{latest}: --resume_from_checkpoint latest" in errors
    resumed = run(finetune, "stopped", ["--resume_from_checkpoint", "latest"], **ELASTIC)
    assert (resumed / "model.safetensors").read_bytes() == unbroken_weights


SLOW_STEPS = """
import sys, time
from delta_llava.train import finetune, trainer
def training_step(self, *args, original=trainer.SFTTrainer.training_step, **kwargs):
    time.sleep(0.3)
    return original(self, *args, **kwargs)
trainer.SFTTrainer.training_step = training_step
finetune.main(sys.argv[1:])
"""

# A limit to the size of files stands for the full disk: what lies on one cannot be longer either
FULL_DISK = """
import resource, signal, sys
from delta_llava.train import finetune, trainer
def save_optimizer_and_scheduler(self, output_dir, original=trainer.SFTTrainer._save_optimizer_and_scheduler):
    if self.state.global_step == 4:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    original(self, output_dir)
trainer.SFTTrainer._save_optimizer_and_scheduler = save_optimizer_and_scheduler
finetune.main(sys.argv[1:])
"""


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(run, unbroken_weights, tmp_path):
    _, errors = (failed := start(run, "full", FULL_DISK)).communicate()
    assert failed.returncode == 1
    message = errors[errors.index("OSError: The checkpoint of step 4") :]
    assert "could not be written" in message
    assert "GiB are free" in message
    assert f"The last complete checkpoint is {tmp_path / 'full' / 'checkpoint-2'}" in message
    resumed = run(finetune, "full", ["--resume_from_checkpoint", "latest"], **ELASTIC)
    assert (resumed / "model.safetensors").read_bytes() == unbroken_weights


FULL_AT_THE_END = """
import resource, signal, sys
from delta_llava.train import finetune, trainer
def save_result(self, *args, original=trainer.DeltaLlavaTrainer._save_result):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    original(self, *args)
trainer.DeltaLlavaTrainer._save_result = save_result
finetune.main(sys.argv[1:])
"""


def test_a_disk_that_is_full_at_the_end_is_named(run, tmp_path):
    _, errors = (failed := start(run, "full", FULL_AT_THE_END, save_strategy="no", max_steps=1)).communicate()
    assert failed.returncode == 1
    assert f"OSError: The result could not be written to {tmp_path / 'full'}, where " in errors


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_learnt_from(run, tmp_path, monkeypatch):
    def compute_loss(self, *args, original=trainer.SFTTrainer.compute_loss, **kwargs):
        return original(self, *args, **kwargs) * (float("nan") if self.state.global_step == 5 else 1)

    monkeypatch.setattr(trainer.SFTTrainer, "compute_loss", compute_loss)
    with pytest.raises(FloatingPointError, match=r"loss of step 6 is nan.* last complete checkpoint is .*checkpoint-4"):
        run(finetune, "nan", **ELASTIC)
    assert not (tmp_path / "nan" / "checkpoint-6").exists()


def test_weights_that_are_no_numbers_are_not_saved(run, tmp_path, monkeypatch):
    def clip(self, model, original=trainer.SFTTrainer._clip_grad_norm):
        norm = original(self, model)
        if self.state.global_step == 3:
            next(weight for weight in model.parameters() if weight.grad is not None).grad.fill_(float("inf"))
        return norm

    monkeypatch.setattr(trainer.SFTTrainer, "_clip_grad_norm", clip)
    with pytest.raises(FloatingPointError, match=r"At step 4, trained weights are not finite .*checkpoint-2: --resume"):
        run(finetune, "inf", **ELASTIC)
    assert not (tmp_path / "inf" / "checkpoint-4").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_vanished_image_is_named(run, data, tmp_path, monkeypatch, num_workers):
    folder = tmp_path / "images"
    shutil.copytree(data[1], folder)

    def train(self, *args, original=trainer.SFTTrainer.train, **kwargs):
        (folder / "7.png").unlink()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.SFTTrainer, "train", train)
    with pytest.raises(ValueError, match=r"The row 'Which colour.*: image .*7\.png cannot be read: "):
        run(finetune, **{**ELASTIC, "dataloader_num_workers": num_workers}, image_folder=str(folder))
