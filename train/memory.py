"""
Prints the memory that each recipe needs on each GPU, as the README shows it:

```
python -m delta_llava.train.memory --budget_gib 80
```
"""

import argparse
from pathlib import Path

import yaml

from ..costs import TRAINABLE_PARTS, recipe_config, training_memory


RECIPES = Path(__file__).parent / "recipes"
STAGES = (
    "pretrain",
    "finetune",
    "finetune-lora",
    "finetune-qlora",
    "finetune-from-llava",
    "finetune-from-llava-lora",
)
MACHINES = {
    "1 GPU": (1, "ddp"),
    "8 GPUs, DDP": (8, "ddp"),
    "8 GPUs, ZeRO-2": (8, "zero2"),
    "8 GPUs, FSDP2": (8, "fsdp2"),
    "16 GPUs, FSDP2": (16, "fsdp2"),
}


def recipe_files(folder: Path = RECIPES) -> list[Path]:
    """
    The recipes `NAME/STAGE.yaml` of a folder, by name and in the order of `STAGES`.

    Raises:
        ValueError: A recipe is none of the stages; the message lists them.
    """
    files = sorted(folder.glob("*/*.yaml"))
    for file in files:
        if file.stem not in STAGES:
            raise ValueError(f"{file} is none of the stages {list(STAGES)}.")
    return sorted(files, key=lambda file: (file.parent.name, STAGES.index(file.stem)))


def recipe_memory(file: Path) -> dict[str, int]:
    """
    Bytes on each GPU with full rows: `max_length` tokens each, with one image and a loss on all the text.

    Args:
        file (`Path`): A recipe; its folder's name says which language model, and of CLIP-L/336 the tower.

    Returns:
        `dict[str, int]`: The sum that [`~delta_llava.costs.training_memory`] gives, for each of `MACHINES`.

    Raises:
        ValueError: The recipe lacks a value, or its language model is unknown.
    """
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
    trains_all = file.stem != "pretrain" and not uses_lora
    num_visual_tokens = max(budgets)
    return {
        machine: training_memory(
            config,
            num_visual_tokens,
            num_images=num_rows,
            num_rows=num_rows,
            sequence_length=recipe["max_length"],
            num_labels=num_rows * (recipe["max_length"] - num_visual_tokens),
            trained_parts=TRAINABLE_PARTS if trains_all else ("multi_modal_projector",),
            num_gpus=num_gpus,
            sharding=sharding,
            gradient_checkpointing=recipe.get("gradient_checkpointing", True),  # as TRL does
            lora_rank=recipe["lora_r"] if uses_lora else None,
            load_in_4bit=recipe.get("load_in_4bit", False),
        )["total"]
        for machine, (num_gpus, sharding) in MACHINES.items()
    }


def table(files: list[Path], budget_gib: float) -> str:
    """
    The memory of recipes in Markdown.

    Args:
        files (`list[Path]`): The recipes.
        budget_gib (`float`): GiB that a GPU has; what needs more is marked.
    """
    lines = [
        f"GiB on each GPU; ✗: more than {budget_gib:g}. Computed for the worst case, in which every row of a "
        "micro-batch has `max_length` tokens; the CUDA context, fragmentation and NCCL come on top.",
        "",
        f"| recipe | rows x tokens | {' | '.join(MACHINES)} |",
        f"|---|---|{'---|' * len(MACHINES)}",
    ]
    for file in files:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        sizes = [num_bytes / 2**30 for num_bytes in recipe_memory(file).values()]
        columns = [f"{gib:.1f} ✗" if gib > budget_gib else f"{gib:.1f}" for gib in sizes]
        rows = f"{recipe['per_device_train_batch_size']} x {recipe['max_length']}"
        lines.append(f"| {file.parent.name}/{file.stem} | {rows} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None):
    """Print the table of all recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget_gib", type=float, default=80, help="GiB that a GPU has (default: 80)")
    options = parser.parse_args(arguments)
    print(table(recipe_files(), options.budget_gib))


if __name__ == "__main__":
    main()
