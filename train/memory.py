"""
Estimates the memory that each recipe needs on each GPU, and prints it as the README shows it:

```
python -m delta_llava.train.memory --budget_gib 80
```
"""

import argparse
from pathlib import Path

import yaml

from ..costs import TRAINABLE_PARTS, recipe_config, training_memory


RECIPES = Path(__file__).parent / "recipes"
MACHINES = {
    "1 GPU": (1, "ddp"),
    "8 GPUs, DDP": (8, "ddp"),
    "8 GPUs, ZeRO-2": (8, "zero2"),
    "8 GPUs, FSDP2": (8, "fsdp2"),
    "16 GPUs, FSDP2": (16, "fsdp2"),
}


def recipe_memory(file: Path) -> dict[str, int]:
    """
    Bytes on each GPU with full rows, `max_length` tokens each, with one image and a loss on all text: the sum that
    [`~delta_llava.costs.training_memory`] gives for each of `MACHINES`.

    The recipe's folder names the language model; the tower is CLIP-L/336.

    Raises:
        ValueError: The recipe's name has no stage, it lacks a value, or its language model is unknown.
    """
    stage = file.stem.partition("-")[0]
    if stage not in ("pretrain", "finetune"):
        raise ValueError(f"{file}: a recipe's name must start with its stage, pretrain or finetune.")
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    uses_lora = recipe.get("use_peft", False)
    needed = {"num_visual_tokens", "per_device_train_batch_size", "max_length"} | ({"lora_r"} if uses_lora else set())
    if missing := needed - set(recipe):
        raise ValueError(f"{file} lacks {sorted(missing)}, without which its memory cannot be computed.")
    budgets, num_rows = recipe["num_visual_tokens"], recipe["per_device_train_batch_size"]
    budgets = [budget for budget in (budgets if isinstance(budgets, list) else [budgets]) if budget != "auto"]
    if not budgets:
        raise ValueError(f"{file} names no number in num_visual_tokens, without which its memory cannot be computed.")
    config = recipe_config(file.parent.name)
    trains_all = stage == "finetune" and not uses_lora
    return {
        machine: training_memory(
            config,
            max(budgets),
            num_images=num_rows,
            num_rows=num_rows,
            sequence_length=recipe["max_length"],
            num_labels=num_rows * (recipe["max_length"] - max(budgets)),
            trained_parts=TRAINABLE_PARTS if trains_all else ("multi_modal_projector",),
            num_gpus=num_gpus,
            sharding=sharding,
            gradient_checkpointing=recipe.get("gradient_checkpointing", True),  # TRL's default
            lora_rank=recipe["lora_r"] if uses_lora else None,
            load_in_4bit=recipe.get("load_in_4bit", False),
        )["total"]
        for machine, (num_gpus, sharding) in MACHINES.items()
    }


def main(arguments: list[str] | None = None):
    """Print the table of all recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget_gib", type=float, default=80, help="GiB of one GPU (default: 80)")
    options = parser.parse_args(arguments)
    print(
        f"Estimated GiB on each GPU; ✗: more than {options.budget_gib:g}. The worst case, in which every row of a "
        "micro-batch has `max_length` tokens; the CUDA context, fragmentation and NCCL come on top.\n"
    )
    print(f"| recipe | rows x tokens | {' | '.join(MACHINES)} |")
    print(f"|---|---|{'---|' * len(MACHINES)}")
    by_stage = {file: (file.parent.name, file.stem != "pretrain", file.stem) for file in RECIPES.glob("*/*.yaml")}
    for file in sorted(by_stage, key=by_stage.get):
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        sizes = [num_bytes / 2**30 for num_bytes in recipe_memory(file).values()]
        columns = [f"{gib:.1f}{' ✗' * (gib > options.budget_gib)}" for gib in sizes]
        rows = f"{recipe['per_device_train_batch_size']} x {recipe['max_length']}"
        print(f"| {file.parent.name}/{file.stem} | {rows} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
