"""The dry run: parameters, data, steps, FLOPs and memory of a run, and a sample with its labels."""

import math
import os
from collections import Counter
from itertools import groupby, islice

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig

from ..costs import TRAINABLE_PARTS, training_flops, training_memory
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from ..records import name_keys
from .batches import BudgetedRows, BudgetSampler, Collator, fit_rows
from .recipe import Recipe


PARTS = ("vision_tower", *TRAINABLE_PARTS)
NUM_SAMPLES = 64


def report(
    recipe: Recipe,
    model: DeltaLlavaForConditionalGeneration,
    rows: Dataset | IterableDataset,
    collator: Collator,
    adapters: LoraConfig | None = None,
):
    """
    Print what a run of this recipe would do and cost, with as many processes as have been launched.

    The `model` is on `meta`, with `requires_grad` set as for training, and without the `adapters`, which are added
    here. The first rows of a stream represent all.

    Raises:
        `ValueError`: Among the sampled rows, one has no labels or is too long.
    """
    training_args, config = recipe.training, model.config
    if training_args.process_index != 0:
        return
    if adapters is not None:
        model = get_peft_model(model, adapters)
    trained = _print_parameters(model)

    if isinstance(rows, IterableDataset):
        rows = rows.remove_columns("id")
        sample = Dataset.from_list(list(islice(rows, NUM_SAMPLES)), features=rows.features)
        rows = fit_rows(sample, collator.processor, max(config.visual_token_budgets), None, collator.chat_template)
        print(f"\nThe first {len(rows)} rows of the stream represent all.")
    sizes = rows.select_columns(["num_tokens", "num_images"]).with_format("numpy")[:]
    num_images = sizes["num_images"]
    text_tokens = sizes["num_tokens"] - num_images
    print(
        f"\n{len(rows):,} rows, {num_images.sum():,} images, {(num_images == 0).sum():,} rows without one;"
        f" {text_tokens.mean():.0f} tokens of text a row, {text_tokens.max():,} at most."
    )
    _print_ignored_keys(rows)
    label_share = _label_share(rows, collator, max(config.visual_token_budgets))

    rows_per_gpu, world_size = training_args.per_device_train_batch_size, training_args.world_size
    accumulated = training_args.gradient_accumulation_steps
    rows_per_step = rows_per_gpu * world_size * accumulated
    sampler = BudgetSampler(
        rows,
        rows_per_gpu * world_size,
        config.visual_token_budgets,
        training_args.seed if training_args.data_seed is None else training_args.data_seed,
        group=training_args.train_sampling_strategy == "group_by_length",
    )
    num_steps = training_args.max_steps
    if num_steps <= 0:
        # accelerate fills the last batch of all processes, or drops it
        rounded = math.floor if training_args.dataloader_drop_last else math.ceil
        num_batches = rounded(len(sampler) / (rows_per_gpu * world_size))
        num_steps = math.ceil(training_args.num_train_epochs * max(math.ceil(num_batches / accumulated), 1))
    print(
        f"{num_steps:,} steps of {rows_per_step} rows: {rows_per_gpu} on each of {world_size} processes, {accumulated}"
        " accumulated."
    )
    if sampler.num_repeated:
        print(f"In an epoch, {sampler.num_repeated:,} rows occur twice to fill the last batch of a group.")
    if sampler.num_mixed:
        print(
            f"Rows with and without images share batches: the {sampler.num_mixed:,} rows of one kind would not fill "
            f"half of a batch of {rows_per_gpu * world_size}."
        )

    sharding = _sharding(training_args)
    whole = [part for part in TRAINABLE_PARTS if part in trained and not (adapters and part == "language_model")]
    cost = {
        "trained_parts": whole,
        "gradient_checkpointing": training_args.gradient_checkpointing,
        "lora_rank": adapters.r if adapters else None,
    }
    print(f"\n| visual tokens | tokens a step | padding | TFLOPs a step | GiB a GPU, at most ({sharding}) |")
    print("|---|---|---|---|---|")
    order = np.array([index for index, _ in sampler])
    rows_per_gpu = min(rows_per_gpu, len(order))
    order = order[: len(order) // rows_per_gpu * rows_per_gpu]
    for budget in config.visual_token_budgets:
        lengths = (text_tokens + num_images * budget)[order]
        batches = lengths.reshape(-1, rows_per_gpu)
        padded, longest = batches.max(axis=1).mean(), int(batches.max())
        flops = training_flops(
            config,
            budget,
            num_images=num_images.mean() * rows_per_gpu,
            num_rows=rows_per_gpu,
            sequence_length=padded,
            num_labels=text_tokens.mean() * rows_per_gpu * label_share,
            **cost,
        )
        memory = training_memory(
            config,
            budget,
            num_images=int(num_images.max()) * rows_per_gpu,
            num_rows=rows_per_gpu,
            sequence_length=longest,
            num_labels=math.ceil(text_tokens.max() * rows_per_gpu * label_share),
            num_gpus=world_size,
            sharding=sharding,
            load_in_4bit=recipe.model.load_in_4bit,
            **cost,
        )
        print(
            f"| {budget} | {lengths.mean() * rows_per_step:,.0f} | {1 - lengths.mean() / padded:.0%} |"
            f" {sum(flops.values()) * world_size * accumulated / 1e12:,.4g} | {memory['total'] / 2**30:,.3g} |"
        )
    print("The memory is an estimate for the longest batch; context, fragmentation and NCCL come on top.")
    if recipe.model.load_in_8bit:
        print("It counts 16 bits per weight: load_in_8bit takes less.")
    _print_sample(rows, collator, max(config.visual_token_budgets))
    print("\nDry run: nothing was trained or saved.")


def _print_parameters(model) -> set[str]:
    total, trained = Counter(), Counter()
    for name, weight in model.named_parameters():
        if "original_module" in name:  # peft's copy of the projector from before training
            continue
        part = next(part for part in PARTS if part in name)
        total[part] += weight.numel()
        trained[part] += weight.numel() * weight.requires_grad
    print("\n| part | parameters | trained |")
    print("|---|---|---|")
    for part in PARTS:
        print(f"| {part} | {total[part]:,} | {trained[part]:,} |")
    print(f"| all | {total.total():,} | {trained.total():,} |")
    return {part for part in PARTS if trained[part]}


def _print_ignored_keys(rows: Dataset):
    notes = pc.list_flatten(rows.select_columns("notes").with_format("arrow")[:]["notes"])
    ignored = pc.struct_field(notes, "reason").filter(pc.equal(pc.struct_field(notes, "kind"), "ignored_key"))
    counts = Counter({line["values"]: line["counts"] for line in pc.value_counts(ignored).to_pylist()})
    if counts:
        print(f"Keys that nothing here reads, and how many records have them: {name_keys(counts)}.")


def _sharding(training_args: SFTConfig) -> str:
    if training_args.deepspeed_plugin is not None:
        return f"zero{training_args.deepspeed_plugin.zero_stage}"
    return "fsdp2" if training_args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true" else "ddp"


def _label_share(rows: Dataset, collator: Collator, budget: int) -> float:
    """The share of the text that is learnt, from a batch of rows spread over the data, which checks them too."""
    indices = np.linspace(0, len(rows) - 1, min(len(rows), NUM_SAMPLES)).astype(int)
    batch = collator([BudgetedRows(rows)[int(index), budget] for index in indices])
    num_labels = int((batch["labels"] != -100).sum())
    print(f"{len(indices)} of them make a valid batch, with {num_labels / len(indices):.0f} labels a row.")
    is_text = (batch["attention_mask"] == 1) & (batch["input_ids"] != collator.processor.image_token_id)
    return num_labels / int(is_text.sum())


def _print_sample(rows: Dataset, collator: Collator, budget: int):
    batch = collator([BudgetedRows(rows)[0, budget]])
    image_token_id, tokenizer = collator.processor.image_token_id, collator.processor.tokenizer
    print(f"\nThe first row at {budget} visual tokens an image, as the model sees it, and which parts are learnt:")
    tokens = zip(batch["input_ids"][0].tolist(), (batch["labels"][0] != -100).tolist(), strict=True)
    for (is_image, is_learnt), span in groupby(tokens, key=lambda token: (token[0] == image_token_id, token[1])):
        ids = [token for token, _ in span]
        text = f"<image> x {len(ids)}" if is_image else repr(tokenizer.decode(ids))
        print(f"  {'learnt ' if is_learnt else 'context'} {text}")
