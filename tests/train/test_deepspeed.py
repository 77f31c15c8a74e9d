"""Under DeepSpeed two processes train what one does. Run where `pip install deepspeed` was done."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from delta_llava import DeltaLlavaForConditionalGeneration
from delta_llava.train import finetune


pytest.importorskip("deepspeed")

TRAIN = """
import json, sys
from accelerate.state import AcceleratorState
from delta_llava.train import finetune

finetune.main(sys.argv[2:])
state = AcceleratorState()
facts = [state.distributed_type.value, state.num_processes, state.deepspeed_plugin.zero_stage]
if state.is_main_process:
    open(sys.argv[1], "w").write(json.dumps(facts))
"""


@pytest.fixture
def launch(tmp_path):
    """Runs stage 2 by `accelerate launch` with one of our files, but in two processes, in float32 and on the CPU."""

    def launch(file, *arguments):
        config = yaml.safe_load(file.read_text()) | {"num_processes": 2, "mixed_precision": "no"}
        (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / "script.py").write_text(TRAIN)
        command = ["-m", "accelerate.commands.launch", "--config_file", tmp_path / "accelerate.yaml"]
        command += ["--main_process_port", "0", tmp_path / "script.py", tmp_path / "facts.json", *arguments]
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            env={**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads((tmp_path / "facts.json").read_text())

    return launch


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_train_and_save_what_one_does(run, launch, still_checkpoint, tmp_path, stage):
    options = {
        "model_name_or_path": str(still_checkpoint),
        "num_visual_tokens": [4, 144],  # all patches too, where no query matters and ZeRO waits for its gradient
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "projector_learning_rate": 1e-2,
        "branch_learning_rate": 2e-2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    one = run(finetune, "one", **options, per_device_train_batch_size=4)
    # accelerate takes the processes for one unless the backend is named, and its own `use_cpu` turns DeepSpeed off
    recipe = run.recipe("two", **options, per_device_train_batch_size=2, ddp_backend="gloo")
    file = Path(finetune.__file__).parent / "accelerate" / f"zero{stage}.yaml"
    assert launch(file, *recipe) == ["DEEPSPEED", 2, stage]

    def history(folder, key):
        entries = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        return [entry[key] for entry in entries if key in entry]

    two = tmp_path / "two"
    for key in ("loss", "grad_norm"):
        assert len(history(two, key)) == 4
        assert history(two, key) == pytest.approx(history(one, key), rel=1e-4)
    # Equal weights after three learning rates: the projector and its branch have kept their own
    expected, saved = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert saved.keys() == expected.keys()
    for name, weight in expected.items():
        assert saved[name].dtype == weight.dtype
        assert saved[name].sub(weight).abs().max() < 1e-4, name
    _, loading = DeltaLlavaForConditionalGeneration.from_pretrained(two, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
