"""Under DeepSpeed, two processes train what one does. Run where `pip install deepspeed` was done."""

from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_train_and_save_what_one_does(doubled, launch, tmp_path, stage):
    # accelerate takes the processes for one unless the backend is named, and its own `use_cpu` turns DeepSpeed off
    recipe = doubled(finetune, in_two={"ddp_backend": "gloo"}, max_steps=4, save_steps=4)
    file = Path(finetune.__file__).parent / "accelerate" / f"zero{stage}.yaml"
    config = yaml.safe_load(file.read_text()) | {"num_processes": 2, "mixed_precision": "no"}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    command = ["-m", "accelerate.commands.launch", "--config_file", tmp_path / "accelerate.yaml"]
    on_cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    facts = launch([*command, "--main_process_port", "0"], TRAIN, *recipe, **on_cpu)
    assert facts == ["DEEPSPEED", 2, stage]
    doubled.assert_alike(4, {"loss": 4, "grad_norm": 4})
    _, loading = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
