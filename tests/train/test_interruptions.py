"""However a run ends early, the last good checkpoint remains, the error names it, and a resumed run repeats it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from delta_llava import DeltaLlavaProcessor
from delta_llava.train import finetune, trainer
from delta_llava.train.runs import finish_checkpoint, latest_checkpoint, why_incomplete


ELASTIC = {
    "num_visual_tokens": [1, 4, 16],
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 9,
    "dataloader_num_workers": 1,
}

SCRIPT = """
import os, resource, signal, sys, time
from delta_llava.train import finetune, trainer
{}
finetune.main(sys.argv[1:])
"""
# Step 6 is the end of the second epoch of six batches, each step takes two
KILLED_BETWEEN_CHECKPOINTS = """
def training_step(self, *args, original=trainer.SFTTrainer.training_step, **kwargs):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
trainer.DeltaLlavaTrainer.training_step = training_step
"""
KILLED_IN_A_CHECKPOINT = """
def save_rng_state(self, output_dir, original=trainer.SFTTrainer._save_rng_state):
    if self.state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, output_dir)
trainer.DeltaLlavaTrainer._save_rng_state = save_rng_state
"""
SLOW_STEPS = """
def training_step(self, *args, original=trainer.SFTTrainer.training_step, **kwargs):
    time.sleep(0.3)
    return original(self, *args, **kwargs)
trainer.SFTTrainer.training_step = training_step
"""
# A limit to the size of files stands in for a full disk
FULL_DISK = """
def save_optimizer_and_scheduler(self, output_dir, original=trainer.SFTTrainer._save_optimizer_and_scheduler):
    if self.state.global_step == 4:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    original(self, output_dir)
trainer.SFTTrainer._save_optimizer_and_scheduler = save_optimizer_and_scheduler
"""
FULL_AT_THE_END = """
def save_result(self, *args, original=trainer.DeltaLlavaTrainer._save_result):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    original(self, *args)
trainer.DeltaLlavaTrainer._save_result = save_result
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return tmp_path_factory.mktemp("unbroken")


@pytest.fixture
def checkpoints(run, unbroken, tmp_path):
    """A copy of a folder with checkpoints 2, 4, 6, 8 and 9 and the result of an uninterrupted run, made once."""
    if not any(unbroken.iterdir()):
        shutil.copytree(run(finetune, "unbroken", **ELASTIC), unbroken, dirs_exist_ok=True)
    return shutil.copytree(unbroken, tmp_path / "run")


@pytest.fixture
def unbroken_weights(checkpoints):
    return (checkpoints / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("killed_run", "left", "complete"),
    [(KILLED_BETWEEN_CHECKPOINTS, [2, 4], 4), (KILLED_IN_A_CHECKPOINT, [2, 4, 6, 8], 6)],
    ids=["killed between checkpoints", "killed in a checkpoint"],
)
def test_a_killed_run_resumes_to_the_weights_of_an_unbroken_one(
    run, unbroken_weights, tmp_path, killed_run, left, complete
):
    killed = start(run, "killed", killed_run)
    _, errors = killed.communicate()
    assert killed.returncode == -9, errors
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


def start(run, output_dir, patch="", **changes):
    """A run in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(patch), *run.recipe(output_dir, **{**ELASTIC, **changes})],
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
        incomplete += any(map(why_incomplete, (tmp_path / "killed").glob("checkpoint-*")))
        complete = latest_checkpoint(tmp_path / "killed")
        resumed = start(run, "killed", **options, **({"resume_from_checkpoint": "latest"} if complete else {}))
        assert resumed.wait() == 0, (seed, trial, resumed.stderr.read())
        assert (tmp_path / "killed" / "model.safetensors").read_bytes() == expected, (seed, trial)
        shutil.rmtree(tmp_path / "killed")
    print(f"seed {seed}: 20 runs, {incomplete} of them killed while they wrote a checkpoint")


def damaged(content, kind):
    return {
        "cut": content[: len(content) // 2],
        "emptied": b"",
        "zeroed": bytes(len(content)),
        # as a file system leaves a file whose last blocks it had not written
        "zeroed at its end": content[: len(content) * 3 // 4] + bytes(len(content) - len(content) * 3 // 4),
        "changed in one bit": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    }[kind]


def test_a_checkpoint_is_complete_if_every_file_holds_what_was_written(checkpoints):
    last = checkpoints / "checkpoint-9"
    files = [path for path in last.rglob("*") if path.is_file()]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json", "run.json"} < {
        path.name for path in files
    }
    assert latest_checkpoint(checkpoints) == str(last)
    for file in files:
        content = file.read_bytes()
        for kind in ("cut", "emptied", "zeroed", "zeroed at its end", "changed in one bit"):
            file.write_bytes(damaged(content, kind))
            assert latest_checkpoint(checkpoints) == str(checkpoints / "checkpoint-8"), (file, kind)
        file.unlink()
        assert latest_checkpoint(checkpoints) == str(checkpoints / "checkpoint-8"), file
        file.write_bytes(content)
    assert latest_checkpoint(checkpoints) == str(last)


def test_the_last_step_is_taken_whatever_the_files_times(checkpoints):
    for time_, step in enumerate((9, 2, 8, 4, 6)):
        for path in (checkpoints / f"checkpoint-{step}").rglob("*"):
            os.utime(path, (time_, time_))
    assert latest_checkpoint(checkpoints) == str(checkpoints / "checkpoint-9")
    # By what it holds: a copy under another number is of the same step
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-40")
    assert latest_checkpoint(checkpoints) == str(checkpoints / "checkpoint-9")


def test_damaged_checkpoints_are_named_and_an_older_one_is_taken(run, checkpoints, unbroken_weights, caplog):
    optimizer = checkpoints / "checkpoint-9/optimizer.pt"
    optimizer.write_bytes(bytes(optimizer.stat().st_size))
    scheduler = checkpoints / "checkpoint-8/scheduler.pt"
    scheduler.write_bytes(scheduler.read_bytes()[:-30])
    (checkpoints / "checkpoint-6/model.safetensors").unlink()
    explicit = ["--resume_from_checkpoint", str(checkpoints / "checkpoint-8")]
    with pytest.raises(
        ValueError, match=r"checkpoint-8 is not a complete checkpoint: scheduler\.pt has .* bytes instead"
    ):
        run(finetune, "run", explicit, **ELASTIC)
    caplog.clear()
    resumed = run(finetune, "run", ["--resume_from_checkpoint", "latest"], **ELASTIC)
    assert "checkpoint-9 is not complete: optimizer.pt does not hold what was written" in caplog.text
    assert "checkpoint-8 is not complete: scheduler.pt has " in caplog.text
    assert "checkpoint-6 is not complete: model.safetensors is missing" in caplog.text
    assert (resumed / "model.safetensors").read_bytes() == unbroken_weights
    assert latest_checkpoint(resumed) == str(resumed / "checkpoint-9")


def test_a_checkpoint_of_the_model_alone_is_not_resumed_with_a_new_optimizer(run):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "save_only_model": True}
    folder = run(finetune, **options)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        run(finetune, resume_from_checkpoint="latest", **{**options, "max_steps": 2})
    with pytest.raises(ValueError, match="save_only_model has left out optimizer"):
        run(finetune, resume_from_checkpoint=str(folder / "checkpoint-1"), **{**options, "max_steps": 2})


def test_a_run_goes_on_in_another_folder(run, checkpoints, unbroken_weights):
    moved = run(finetune, "moved", ["--resume_from_checkpoint", str(checkpoints / "checkpoint-8")], **ELASTIC)
    assert (moved / "model.safetensors").read_bytes() == unbroken_weights
    assert {path.name for path in moved.glob("checkpoint-*")} == {"checkpoint-9"}
    expected, record = ((folder / "training/finetune.yaml").read_text() for folder in (checkpoints, moved))
    assert record == expected


def test_without_a_complete_checkpoint_nothing_is_deleted(run, checkpoints):
    for checkpoint in checkpoints.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"holds no complete checkpoint\. Name another folder"):
        run(finetune, "run", ["--resume_from_checkpoint", "latest"], **ELASTIC)
    with pytest.raises(ValueError, match=r"checkpoint-2, checkpoint-4, .* of an earlier run"):
        run(finetune, "run", **ELASTIC)
    assert len(list(checkpoints.glob("checkpoint-*/model.safetensors"))) == 5


def test_a_run_deletes_its_own_checkpoints_alone(run, checkpoints):
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-best")
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-2-kept")
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-3")
    (checkpoints / "checkpoint-1").mkdir()
    (checkpoints / "checkpoint-1/notes.txt").write_text("mine")
    shutil.rmtree(checkpoints / "checkpoint-9")
    options = {**ELASTIC, "save_total_limit": 1}
    run(finetune, "run", ["--resume_from_checkpoint", "latest"], **options)
    left = {path.name for path in checkpoints.glob("checkpoint-*")}
    assert left == {f"checkpoint-{name}" for name in ("1", "2-kept", "3", "9", "best")}
    with pytest.raises(ValueError, match=r"holds checkpoint-9 of another run or of later steps than .*checkpoint-3"):
        run(finetune, "run", ["--resume_from_checkpoint", str(checkpoints / "checkpoint-3")], **options)
    # What is in the way moves aside: something foreign, and what has lost the record of whose it is
    (checkpoints / "checkpoint-1").rename(checkpoints / "checkpoint-4")
    (checkpoints / "checkpoint-9/run.json").unlink()
    run(finetune, "run", ["--resume_from_checkpoint", "latest"], **options)
    assert (checkpoints / "checkpoint-4.1/notes.txt").read_text() == "mine"
    assert (checkpoints / "checkpoint-9.1/model.safetensors").exists()
    assert latest_checkpoint(checkpoints) == str(checkpoints / "checkpoint-9")


def test_a_forged_pickle_is_refused_without_torchs_advice(run, checkpoints, capfd):
    class Forged:
        def __reduce__(self):
            return os.mkdir, (str(checkpoints / "executed"),)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        file = checkpoints / "checkpoint-8" / name
        content, record = file.read_bytes(), (file.parent / "run.json").read_bytes()
        torch.save(Forged(), file)
        finish_checkpoint(file.parent, json.loads(record)["run"], None)
        shutil.rmtree(checkpoints / "checkpoint-9", ignore_errors=True)
        with pytest.raises(ValueError, match="checkpoint-8 holds pickled objects that no run writes") as raised:
            run(finetune, "run", ["--resume_from_checkpoint", "latest"], **ELASTIC)
        assert raised.value.__cause__ is None and raised.value.__suppress_context__
        assert "weights_only" not in capfd.readouterr().err
        assert not (checkpoints / "executed").exists()
        file.write_bytes(content)
        (file.parent / "run.json").write_bytes(record)


CHANGES = {
    "budgets": ({"num_visual_tokens": [1, 4]}, r"num_visual_tokens was \[1, 4, 16\], is \[1, 4\]"),
    "auto": ({"num_visual_tokens": ["auto", 1, 4, 16]}, r"num_visual_tokens was \[1, 4, 16\], is \[1, 4, 16, 'auto'\]"),
    "rate": ({"learning_rate": 0.02}, "learning_rate was 0.01, is 0.02"),
    "projector's rate": ({"projector_learning_rate": 0.02}, "projector_learning_rate was None, is 0.02"),
    "schedule": ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type was linear, is cosine"),
    "batch": ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 2, is 4"),
    "accumulation": ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps was 2, is 1"),
    "steps": ({"max_steps": 12}, "max_steps was 9, is 12"),
    "seed": ({"seed": 1}, "seed was 42, is 1"),
    "order": ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy was random, is group_by_length"),
    "dtype": ({"bf16": True, "use_cpu": True}, "bf16 was False, is True"),
    "adapters": ({"use_peft": True}, "use_peft was False, is True"),
    "length": ({"max_length": 400}, "max_length was 1024, is 400"),
    "held out": (
        {"num_eval_rows": 2, "eval_strategy": "epoch"},
        "num_eval_rows was 0, is 2; num_rows was 12, is 10; rows has changed",
    ),
}


@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES)
def test_a_resumed_run_says_what_has_changed(run, checkpoints, monkeypatch, changes, message):
    monkeypatch.setattr("delta_llava.train.stage.load_model", None)  # before a weight is loaded
    with pytest.raises(ValueError, match=f"checkpoint-9 was trained .*settings: {message}.*[Rr]estore what it was"):
        run(finetune, "run", ["--resume_from_checkpoint", "latest"], **{**ELASTIC, **changes})


def test_a_resumed_run_notices_other_data_and_another_model(run, data, checkpoint, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("delta_llava.train.stage.load_model", None)
    images = shutil.copytree(data[1], tmp_path / "images")
    model = shutil.copytree(checkpoint, tmp_path / "model")
    options = {
        **ELASTIC,
        "json_path": str(images / "data.json"),
        "image_folder": str(images),
        "model_name_or_path": str(model),
    }

    def resume(**changes):
        run(finetune, "run", ["--resume_from_checkpoint", "latest"], **{**options, **changes})

    with pytest.raises(TypeError, match="NoneType"):  # all copies are as good, and what does not matter may change
        resume(logging_steps=5, save_steps=1, dataloader_pin_memory=False, num_visual_tokens=[16, 1, 4, 4])
    records = json.loads((images / "data.json").read_text())
    (images / "data.json").write_text(json.dumps(records).replace("Which colour?", "What colour?"))
    with pytest.raises(ValueError, match=r"other settings: data has changed; rows has changed\. Restore"):
        resume()
    (images / "data.json").write_text(json.dumps(records))
    Image.new("RGB", Image.open(images / "7.png").size, "yellow").save(images / "7.png")
    with pytest.raises(ValueError, match=r"other settings: rows has changed\. Restore"):
        resume()
    shutil.copyfile(data[1] / "7.png", images / "7.png")
    weights = load_file(model / "model.safetensors")
    next(iter(weights.values())).add_(1)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other settings: model has changed\. Restore"):
        resume()


def test_changes_that_are_allowed_take_effect_and_are_recorded(run, checkpoints, caplog):
    for step in (8, 9):
        shutil.rmtree(checkpoints / f"checkpoint-{step}")
    options = {**ELASTIC, "num_visual_tokens": [4, "auto", 36], "learning_rate": 0.001}
    options["per_device_train_batch_size"] = 3
    resume = ["--resume_from_checkpoint", "latest", "--allow_changes"]
    folder = run(finetune, "run", resume, **options)
    changes = "learning_rate was 0.01, is 0.001; num_visual_tokens was [1, 4, 16], is [4, 36, 'auto']"
    assert f"checkpoint-6 on: {changes}; per_device_train_batch_size was 2, is 3" in caplog.text
    history = json.loads((folder / "checkpoint-9/trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    # a linear schedule down to zero, at a tenth from step 6 on; what is logged is the rate of the step
    assert rates == pytest.approx([0.01 * (9 - step) / 9 * (0.1 if step >= 6 else 1) for step in range(9)])
    for config in (folder / "config.json", folder / "checkpoint-9/config.json"):
        config = json.loads(config.read_text())
        assert (config["visual_token_budgets"], config["num_visual_tokens"]) == ([1, 4, 16, 36], 36)
    for saved in (folder, folder / "checkpoint-9"):
        assert DeltaLlavaProcessor.from_pretrained(saved).visual_token_budgets == [1, 4, 16, 36]
    recipe = yaml.safe_load((folder / "training/finetune.yaml").read_text())
    assert recipe["num_visual_tokens"] == [1, 4, 16, 36, "auto"]
    assert recipe["learning_rate"] == "0.01, from step 6 on 0.001"
    assert recipe["per_device_train_batch_size"] == "2, from step 6 on 3"
    # What it was changed to is what it goes on with
    (folder / "checkpoint-9/optimizer.pt").unlink()
    run(finetune, "run", ["--resume_from_checkpoint", "latest"], **options)
    assert yaml.safe_load((folder / "training/finetune.yaml").read_text()) == recipe
    assert json.loads((folder / "config.json").read_text())["visual_token_budgets"] == [1, 4, 16, 36]
    for impossible in ({"use_peft": True}, {"projector_learning_rate": 0.001}):
        with pytest.raises(ValueError, match=f"It cannot resume with another {next(iter(impossible))}"):
            run(finetune, "run", resume, **options, **impossible)


def test_two_runs_do_not_share_a_folder(run, tmp_path):
    first = start(run, "shared", SLOW_STEPS)
    wait_for(tmp_path / "shared/checkpoint-4")
    for arguments in ([], ["--resume_from_checkpoint", "latest"]):
        with pytest.raises(ValueError, match=rf"shared is in use by another run, process {first.pid} on .* since 20"):
            run(finetune, "shared", arguments, **ELASTIC)
    run(finetune, "shared", ["--dry_run"], **{**ELASTIC, "resume_from_checkpoint": "latest"})  # which only looks
    os.kill(first.pid, signal.SIGKILL)  # its loader's worker lives on for a while
    first.wait()
    resumed = run(finetune, "shared", ["--resume_from_checkpoint", "latest"], **ELASTIC)
    assert not (resumed / "run.lock").exists()


def test_sigterm_ends_a_run_after_a_checkpoint(run, unbroken_weights, tmp_path):
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


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(run, unbroken_weights, tmp_path):
    _, errors = (failed := start(run, "full", FULL_DISK)).communicate()
    assert failed.returncode == 1
    message = errors[errors.index("OSError: The checkpoint of step 4") :]
    assert "could not be written" in message
    assert "GiB are free" in message
    assert f"The last complete checkpoint is {tmp_path / 'full' / 'checkpoint-2'}" in message
    resumed = run(finetune, "full", ["--resume_from_checkpoint", "latest"], **ELASTIC)
    assert (resumed / "model.safetensors").read_bytes() == unbroken_weights


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
    with pytest.raises(
        FloatingPointError, match=r"At step 4, trained weights are no longer finite.*checkpoint-2: --res"
    ):
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
