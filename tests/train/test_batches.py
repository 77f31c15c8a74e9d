"""Batches hold what shall be learnt, at the budget drawn, in an order that a resumed run repeats."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from PIL import Image
from torch.utils.data import BatchSampler

from delta_llava.train.batches import BudgetedRows, BudgetSampler, Collator
from delta_llava.train.data import load_llava_json


def record(**changes):
    """A good record, with what a test wants different."""
    good = {
        "id": "0",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}],
    }
    return {**good, **changes}


def turns(*values, speakers=("human", "gpt")):
    return [{"from": speakers[index % 2], "value": value} for index, value in enumerate(values)]


@pytest.fixture
def load(tmp_path):
    """Writes records beside two images, one of them cut short, and loads them."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    Image.effect_noise((64, 64), 50).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-500])
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")

    def load(records, **kwargs):
        (tmp_path / "data.json").write_text(records if isinstance(records, str) else json.dumps(records))
        return load_llava_json(tmp_path / "data.json", folder, tmp_path / "out" / "bad_records.jsonl", **kwargs)

    return load


@pytest.fixture
def collate(load, tiny_processor, templates):
    def collate(records, num_visual_tokens=4, template="vicuna-v1", **kwargs):
        rows = BudgetedRows(load(records))
        collator = Collator(tiny_processor(), chat_template=(templates / f"{template}.jinja").read_text(), **kwargs)
        return collator([rows[index, num_visual_tokens] for index in range(len(rows))])

    return collate


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        ("vicuna-v1", [" A square.</s> It is red.</s>", " Hi.</s>"]),
        ("chatml", ["A square.<|im_end|>It is red.<|im_end|>", "Hi.<|im_end|>"]),
        ("plain", ["A square.\nIt is red.\n", "Hi.\n"]),
    ],
)
def test_labels_are_the_answers_with_their_end_and_nothing_else(collate, tiny_processor, template, learnt):
    conversation = turns("<image>\nWhat?", "A square.", "Which colour?", "It is red.")
    greeting = record(image=None, conversations=turns("Hello.", "Hi."))
    batch = collate([record(conversations=conversation), greeting], template=template)
    tokenizer = tiny_processor().tokenizer
    answers = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert answers == learnt
    is_label = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_label], batch["input_ids"][is_label])
    assert not (is_label & (batch["attention_mask"] == 0)).any()


def test_a_batch_has_the_budget_of_its_rows(collate, tiny_processor):
    greeting = record(image=None, conversations=turns("Hello.", "Hi."))
    two_images = record(image=["a.png", "a.png"], conversations=turns("<image>\n<image>\nSame?", "Yes."))
    batch = collate([record(), greeting, two_images], num_visual_tokens=9)
    assert batch["num_visual_tokens"].tolist() == [9, 9, 9]
    assert batch["pixel_values"].shape == (3, 3, 48, 48)
    assert (batch["input_ids"] == tiny_processor().image_token_id).sum(dim=1).tolist() == [9, 0, 18]
    assert set(collate([greeting])) == {"input_ids", "attention_mask", "labels"}


def test_a_row_without_labels_is_an_error_that_names_it(collate, load, tiny_processor):
    length = collate([record()])["input_ids"].shape[1]
    long = record(conversations=turns("<image>\n" + "What? " * 20, "This."))
    assert collate([record(), record()], max_length=length)["labels"].shape == (2, length)
    with pytest.raises(ValueError, match=rf"Row 1 .*What\? What\?.*nothing to learn.*max_length={length}"):
        collate([record(), long], max_length=length)
    without_generation = Collator(tiny_processor(), chat_template="{{ messages[1]['content'][0]['text'] }}")
    rows = BudgetedRows(load([record(image=None, conversations=turns("Hello.", "Hi."))]))
    with pytest.raises(ValueError, match=r"Row 0 .*Hello\. Hi\..*nothing to learn"):
        without_generation([rows[0, 4]])


def test_image_tokens_are_never_cut(collate):
    length = collate([record()])["input_ids"].shape[1]
    late = record(conversations=turns("What? " * 20, "This.", "<image>\nAnd that?", "That."))
    with pytest.raises(ValueError, match=rf"Row 1 .*image tokens beyond max_length={length}: at 4 visual tokens"):
        collate([record(), late], max_length=length)


def sampler(seed=0, epoch=0, num_rows=50, batch_size=4, budgets=(1, 4, 16)):
    trainer = SimpleNamespace(state=SimpleNamespace(epoch=epoch))
    return BudgetSampler(num_rows, batch_size, list(budgets), seed, trainer)


def test_order_and_budgets_follow_from_seed_epoch_and_position_alone():
    torch.manual_seed(1)
    first = list(sampler())
    torch.manual_seed(2)
    assert list(sampler()) == first
    assert list(sampler(epoch=0.0)) == first
    assert list(sampler(epoch=1.0)) != first
    assert list(sampler(seed=1)) != first
    assert sorted(index for index, _ in first) == list(range(50))
    budgets = [{budget for _, budget in first[start : start + 4]} for start in range(0, 50, 4)]
    assert all(len(budget) == 1 for budget in budgets)
    assert set.union(*budgets) == {1, 4, 16}
    # not from the data: another number of rows leaves the draws as they are
    assert [budget for _, budget in sampler(num_rows=48)] == [budget for _, budget in first[:48]]


def test_each_budget_is_drawn_equally_often():
    drawn = [budget for _, budget in sampler(num_rows=3000, batch_size=1)]
    assert all(900 < drawn.count(budget) < 1100 for budget in (1, 4, 16))


def test_processes_draw_the_same_budget_at_the_same_step_also_when_resumed():
    def batches(process):
        shard = BatchSamplerShard(BatchSampler(sampler(batch_size=2 * 3), 3, drop_last=False), 2, process)
        return list(shard), list(SkipBatchSampler(shard, 5))

    (first, first_resumed), (second, second_resumed) = batches(0), batches(1)
    assert [batch[0][1] for batch in first[:8]] == [batch[0][1] for batch in second[:8]]
    assert {index for batch in first + second for index, _ in batch} == set(range(50))
    assert (first_resumed, second_resumed) == (first[5:], second[5:])
