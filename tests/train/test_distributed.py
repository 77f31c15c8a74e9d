"""Two processes (gloo, on the CPU) train what one does, and torch's `fully_shard` shards what we train."""

import shutil

import pytest

from delta_llava.train import finetune, pretrain


TRAIN = """
import json, sys
from accelerate import PartialState
from delta_llava.train import finetune, pretrain, trainer

def on_step_end(self, args, state, control, optimizer=None, original=trainer.SaveOnSigterm.on_step_end, **kwargs):
    for group in optimizer.param_groups:
        peak, size = str(group["initial_lr"]), sum(weight.numel() for weight in group["params"])
        sizes[state.global_step][peak] = sizes[state.global_step].get(peak, 0) + size
    original(self, args, state, control, **kwargs)
sizes = {step: {} for step in range(1, 7)}
trainer.SaveOnSigterm.on_step_end = on_step_end

{"finetune": finetune, "pretrain": pretrain}[sys.argv[2]].main(sys.argv[3:])
state = PartialState()
facts = {"num_processes": state.num_processes, "distributed_type": state.distributed_type.value, "sizes": sizes}
if state.is_main_process:
    open(sys.argv[1], "w").write(json.dumps(facts))
state.destroy_process_group()  # otherwise gloo's threads may abort a process that ends
"""


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize("stage", [pretrain, finetune])
def test_two_processes_train_what_one_does_with_the_doubled_batch(doubled, launch, data, tmp_path, stage):
    recipe = doubled(
        stage,
        json_path=str(data[1] / "mixed.json") if stage is finetune else str(data[0]),
        train_sampling_strategy="group_by_length",
        max_steps=6,
        save_steps=6,
        num_eval_rows=3,
        eval_strategy="steps",
        eval_steps=3,
        per_device_eval_batch_size=1,
    )
    facts = launch(TORCHRUN, TRAIN, stage.__name__.rpartition(".")[2], *recipe, ACCELERATE_USE_CPU="true")
    assert (facts["num_processes"], facts["distributed_type"]) == (2, "MULTI_CPU")
    assert len(list((tmp_path / "two" / "checkpoint-6").glob("rng_state*.pth"))) == 2
    weights = doubled.assert_alike(6, {"loss": 6, "grad_norm": 6, "eval_4_loss": 2, "eval_144_loss": 2})

    # With accelerate too, the projector and its branch have their own rates, and every trained weight has one
    sizes = {"0.01": 0, "0.02": 0, "0.001": 0}
    for name, weight in weights.items():
        if "multi_modal_projector" in name:
            sizes["0.01" if "multi_modal_projector.mlp." in name else "0.02"] += weight.numel()
        elif "vision_tower" not in name and stage is finetune:
            sizes["0.001"] += weight.numel()
    expected = {rate: size for rate, size in sizes.items() if size}
    assert facts["sizes"] == {str(step): expected for step in range(1, 7)}


REFUSED = """
import json, os, sys
from accelerate import PartialState
from delta_llava.train import finetune

try:
    finetune.main(sys.argv[2:])
except ValueError as error:  # in both processes, or this would not end
    if os.environ["RANK"] == "1":
        open(sys.argv[1], "w").write(json.dumps(str(error)))
PartialState().destroy_process_group()
"""


def test_another_number_of_processes_is_noticed_and_may_go_on(run, launch, still_checkpoint, tmp_path):
    options = {"model_name_or_path": str(still_checkpoint), "save_strategy": "steps", "save_steps": 2}
    folder = run(finetune, "run", **options, max_steps=4)
    resume = [*run.recipe("run", **options, max_steps=4), "--resume_from_checkpoint", "latest"]
    error = launch(TORCHRUN, REFUSED, *resume, ACCELERATE_USE_CPU="true")
    assert "num_processes was 1, is 2. Restore what it was trained with" in error
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    shutil.rmtree(folder / "checkpoint-4")
    facts = launch(TORCHRUN, TRAIN, "finetune", *resume, "--allow_changes", ACCELERATE_USE_CPU="true")
    assert facts["num_processes"] == 2
    assert len(list((folder / "checkpoint-4").glob("rng_state*.pth"))) == 2


SHARD = """
import json, sys
from functools import partial
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from types import SimpleNamespace
from delta_llava import DeltaLlavaForConditionalGeneration
from delta_llava.train.trainer import DeltaLlavaTrainer

def load():
    torch.manual_seed(0)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(sys.argv[2]).train()
    model.model.vision_tower.requires_grad_(False)
    return model

def batch(seed, num_images=2):
    torch.manual_seed(seed)
    ids = torch.randint(5, 200, (2, 12))
    ids[:, 1:5] = model.config.image_token_id
    inputs = {"input_ids": ids, "labels": ids, "num_visual_tokens": torch.tensor([4, 4])}
    return {**inputs, "pixel_values": torch.randn(2, 3, 48, 48)}

def optimizer(model):
    # the trainer's own grouping, without the rest of a trainer
    trainer = object.__new__(DeltaLlavaTrainer)
    trainer.model, trainer.optimizer, trainer.optimizer_cls_and_kwargs = model, None, (torch.optim.AdamW, {"lr": 1e-3})
    trainer.projector_learning_rate, trainer.branch_learning_rate = 1e-2, 2e-2
    trainer.args = SimpleNamespace(weight_decay=0.0)
    return trainer.create_optimizer()

model = load()
torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
rank = mesh.get_local_rank()

# Alone: both halves of every batch
steps = optimizer(model)
losses = []
for step in range(3):
    for seed in (2 * step, 2 * step + 1):
        loss = model(**batch(seed)).loss
        (loss / 2).backward()
        losses.append([loss.item()])
    steps.step(); steps.zero_grad()
alone = {name: weight.detach().clone() for name, weight in model.state_dict().items()}

# Divided, as accelerate divides it: each layer by itself, all else in one group
model = load()
policy = MixedPrecisionPolicy()
if sys.argv[4] == "bfloat16":  # frozen weights in bfloat16, trained ones in float32 and cast for computing
    model.model.vision_tower.bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for module in (*model.model.vision_tower.modules(), *model.model.language_model.modules()):
    if type(module).__name__ in model._no_split_modules:
        fully_shard(module, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)
steps = optimizer(model)
for step in range(3):
    loss = model(**batch(2 * step + rank)).loss
    losses[2 * step + rank].append(loss.item())
    loss.backward()
    steps.step(); steps.zero_grad()

sizes = {str(group["lr"]): 0 for group in steps.param_groups}
for group in steps.param_groups:
    assert all(isinstance(weight, DTensor) for weight in group["params"])
    sizes[str(group["lr"])] += sum(weight.to_local().numel() for weight in group["params"])
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    model.save_pretrained(sys.argv[3], state_dict=full)
    loaded = DeltaLlavaForConditionalGeneration.from_pretrained(sys.argv[3]).state_dict()
    facts = {
        "shards": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "difference": max((loaded[name] - weight).abs().max().item() for name, weight in alone.items()),
        "change": max((load().state_dict()[name] - weight).abs().max().item() for name, weight in alone.items()),
        "losses": losses[::2],
        "sizes": sizes,
        "total": sum(weight.numel() for name, weight in full.items() if "vision_tower" not in name),
    }
    open(sys.argv[1], "w").write(json.dumps(facts))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-3)])
def test_fully_sharded_modules_train_save_and_load(launch, still_checkpoint, tmp_path, dtype, tolerance):
    facts = launch(TORCHRUN, SHARD, still_checkpoint, tmp_path / "sharded", dtype)
    assert facts["shards"] == 5 + 2 + 1  # the tower's layers, the language model's, and all else
    for alone, sharded in facts["losses"]:
        assert sharded == pytest.approx(alone, rel=tolerance)
    assert facts["change"] > 0.025
    if dtype == "float32":
        assert facts["difference"] < tolerance
    # either process holds its part of all groups
    assert set(facts["sizes"]) == {"0.001", "0.01", "0.02"}
    assert facts["total"] / 2 <= sum(facts["sizes"].values()) < 0.51 * facts["total"]
