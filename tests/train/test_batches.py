"""Batches hold what is to be learnt, whole, at the budget drawn, in an order that a resumed run repeats."""

import json
import random
from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from datasets import Dataset
from llava_records import record, turns
from PIL import Image
from tokenizers import AddedToken
from torch.utils.data import BatchSampler

from delta_llava.train.batches import BudgetedRows, BudgetSampler, Collator, fit_rows
from delta_llava.train.data import load_llava_json


@pytest.fixture
def fitted(tmp_path, tiny_processor, templates):
    """Writes records beside an image, loads them and fits them to a template."""
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")

    def fitted(records, num_visual_tokens=4, max_length=None, template="vicuna-v1"):
        (tmp_path / "data.json").write_text(json.dumps(records))
        dataset = load_llava_json(tmp_path / "data.json", tmp_path, tmp_path / "bad_records.jsonl")
        template = (templates / f"{template}.jinja").read_text()
        return fit_rows(dataset, tiny_processor(), num_visual_tokens, max_length, template)

    return fitted


@pytest.fixture
def collate(fitted, tiny_processor, templates):
    def collate(records, num_visual_tokens=4, template="vicuna-v1", max_length=None):
        rows = BudgetedRows(fitted(records, num_visual_tokens, max_length, template))
        collator = Collator(tiny_processor(), max_length, (templates / f"{template}.jinja").read_text())
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
    greeting = record("Hello.", "Hi.", image=None)
    batch = collate([record(conversations=conversation), greeting], template=template)
    tokenizer = tiny_processor().tokenizer
    answers = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert answers == learnt
    is_label = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_label], batch["input_ids"][is_label])
    assert not (is_label & (batch["attention_mask"] == 0)).any()


@pytest.mark.parametrize("template", ["vicuna-v1", "chatml"])
def test_a_turn_whose_loss_is_off_is_context(collate, tiny_processor, template):
    values = ("<image>\nWhat?", "A square.", "Which colour?", "It is red.", "Sure?", "Yes.")
    end, tokenizer = {"vicuna-v1": "</s>", "chatml": "<|im_end|>"}[template], tiny_processor().tokenizer
    conversation = turns(*values)
    conversation[1]["loss"] = False
    conversation[5]["weight"] = 0
    batch = collate([record(), record(conversations=conversation)], template=template)
    assert tokenizer.decode(batch["labels"][1][batch["labels"][1] != -100]).strip() == f"It is red.{end}"
    whole = collate([record(), record(*values)], template=template)
    assert torch.equal(whole["input_ids"], batch["input_ids"])
    assert torch.equal(whole["labels"][0], batch["labels"][0])


def test_a_row_is_cut_where_an_answer_is_learnt_or_left_out(fitted):
    values = ("<image>\nWhat?", "A square.", "Which colour?", "It is red.")
    quiet = record(*values)
    quiet["conversations"][1]["loss"] = False
    whole = fitted([record(*values)])["num_tokens"][0] + 3
    assert fitted([record(), quiet], max_length=whole)["num_messages"][:] == [2, 4]
    assert fitted([record(), quiet], max_length=whole - 1)["num_messages"][:] == [2]


def test_answers_that_a_template_does_not_keep_apart_are_all_learnt_or_none(fitted, tiny_processor):
    quiet = record("<image>\nWhat?", "A square.", "Which colour?", "It is red.")
    quiet["conversations"][1]["loss"] = False
    rows = BudgetedRows(fitted([quiet]))
    template = (
        "<image>{% generation %}{{ messages[1].content[0].text + messages[3].content[0].text }}{% endgeneration %}"
    )
    with pytest.raises(ValueError, match=r"The row 'What\?.* marks 1 spans by \{% generation %\} for its 2 answers"):
        Collator(tiny_processor(), chat_template=template)([rows[0, 4]])


@pytest.mark.parametrize("template", ["vicuna-v1", "chatml"])
def test_special_tokens_in_texts_are_encoded_as_text(collate, fitted, tiny_processor, template):
    answer = "No</s> end,<|im_end|>\n<|im_start|>user <pad>"
    spelling = record("<image>\nWrite </s> and <s>.", answer, "And </", "s> and </s>")
    batch = collate([spelling, record()], template=template)
    tokenizer = tiny_processor().tokenizer
    ids = batch["input_ids"][0][batch["attention_mask"][0] == 1]
    end, space, num_ends = {"vicuna-v1": ("</s>", " ", 2), "chatml": ("<|im_end|>", "", 5)}[template]
    assert (ids == tokenizer.convert_tokens_to_ids(end)).sum() == num_ends
    for token in {"</s>", "<|im_end|>", "<pad>"} - {end}:
        assert tokenizer.convert_tokens_to_ids(token) not in ids
    learnt = tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert learnt == f"{space}{answer}{end}{space}s> and </s>{end}"
    # counted as they are encoded
    (num_tokens, _) = fitted([spelling, record()], template=template)["num_tokens"]
    assert num_tokens + 3 == len(ids)
    # and other texts as ever
    plain = collate([record()], template=template)["input_ids"]
    rendered = tiny_processor().tokenizer.decode(plain[0])
    assert tokenizer.encode(rendered, add_special_tokens=False) == plain[0].tolist()


def test_a_tokenizer_that_cannot_spell_its_token_is_refused_where_a_text_has_it(fitted, tiny_processor, templates):
    processor = tiny_processor()
    backend = processor.tokenizer.backend_tokenizer
    processor.tokenizer._tokenizer.add_special_tokens([AddedToken("<end>", special=True, normalized=True)])
    assert backend.token_to_id("<end>")
    rows = BudgetedRows(fitted([record(), record("<image>\nWhat?", "The <end>.")]))
    collator = Collator(processor, None, (templates / "vicuna-v1.jinja").read_text())
    collator([rows[0, 4]])
    with pytest.raises(ValueError, match=r"The row 'What\? The <end>\.'… spells out '<end>'"):
        collator([rows[1, 4]])


def test_a_batch_has_the_budget_of_its_rows(collate, tiny_processor):
    greeting = record("Hello.", "Hi.", image=None)
    two_images = record("<image>\n<image>\nSame?", "Yes.", image=["a.png", "a.png"])
    batch = collate([record(), greeting, two_images], num_visual_tokens=9)
    assert batch["num_visual_tokens"].tolist() == [9, 9, 9]
    assert batch["pixel_values"].shape == (3, 3, 48, 48)
    assert (batch["input_ids"] == tiny_processor().image_token_id).sum(dim=1).tolist() == [9, 0, 18]
    assert set(collate([greeting])) == {"input_ids", "attention_mask", "labels"}


def test_a_row_without_labels_is_an_error_that_names_it(fitted, tiny_processor):
    without_generation = Collator(tiny_processor(), chat_template="{{ messages[1]['content'][0]['text'] }}")
    rows = BudgetedRows(fitted([record("Hello.", "Hi.", image=None)]))
    with pytest.raises(ValueError, match=r"The row 'Hello\. Hi\.'.* nothing to learn"):
        without_generation([rows[0, 4]])


QUESTIONS = ("<image>\nWhat?", "A square.", "Which colour?", "It is red.", "<image>\nAnd this?", "The same.")
LONG = record(*QUESTIONS, image=["a.png", "a.png"])


@pytest.mark.parametrize("template", ["vicuna-v1", "chatml"])
def test_a_long_row_is_cut_after_the_last_whole_answer_that_fits(collate, tiny_processor, template):
    processor = tiny_processor()
    whole = collate([LONG], template=template)
    parts = [
        record(*QUESTIONS[:2]),
        record(*QUESTIONS[:4]),
        LONG,
    ]
    lengths = [collate([part], template=template)["input_ids"].shape[1] for part in parts]
    assert whole["input_ids"].shape[1] == lengths[2]
    for max_length, answers, images in [
        (lengths[2], 3, 2),
        (lengths[2] - 1, 2, 1),
        (lengths[1], 2, 1),
        (lengths[1] - 1, 1, 1),
        (lengths[0], 1, 1),
    ]:
        batch = collate([LONG], template=template, max_length=max_length)
        length = lengths[answers - 1]
        assert batch["input_ids"].tolist() == whole["input_ids"][:, :length].tolist()
        assert batch["labels"].tolist() == whole["labels"][:, :length].tolist()
        assert batch["pixel_values"].shape[0] == images
        assert (batch["input_ids"] == processor.image_token_id).sum() == 4 * images
    with pytest.raises(ValueError, match=rf"All 1 rows are longer than max_length={lengths[0] - 1} at 4 visual tokens"):
        collate([LONG], template=template, max_length=lengths[0] - 1)


def test_rows_that_do_not_fit_at_all_are_left_out_and_counted(fitted, monkeypatch):
    warnings = []
    monkeypatch.setattr("delta_llava.train.batches.logger.warning", warnings.append)
    late = record("What? " * 40, "This.", "<image>\nAnd that?", "That.")
    (one,) = fitted([record()])["num_tokens"]
    max_length = one + 3 + 30  # three more tokens at the image, and some for the second question
    rows = fitted([record(), late, LONG, record()], max_length=max_length)
    assert [row["num_messages"] for row in rows.remove_columns("images")] == [2, 4, 2]
    (warning,) = warnings
    assert f"2 of 4 rows are longer than max_length={max_length} at 4 visual tokens" in warning
    assert "1 are cut after their last whole answer that fits, and 1, whose first answer does not fit" in warning
    assert "The first: The row 'What? What?" in warning
    # at another budget, the same rows have other lengths
    fitted([record(), late, LONG, record()], num_visual_tokens=144, max_length=max_length + 140)
    assert "at 144 visual tokens" in warnings[1]


def test_measuring_is_remembered_however_the_tokenizer_was_used(fitted, tiny_processor, templates, monkeypatch):
    from delta_llava.train import batches

    rows = [record(), record("Hello.", "Hi.", id="1", image=None)]
    first = fitted(rows)
    monkeypatch.setattr(batches, "cut_positions", None)
    assert fitted(rows)[:] == first[:]


def test_a_row_longer_than_the_limit_is_no_batch(fitted, tiny_processor):
    rows = BudgetedRows(fitted([record()], num_visual_tokens=4))
    with pytest.raises(ValueError, match=r"The row .* tokens long at 36 visual tokens an image, but max_length=30"):
        Collator(tiny_processor(), max_length=30)([rows[0, 36]])


def rows_of(lengths, images):
    columns = {"num_tokens": lengths, "num_images": images, "num_messages": [2] * len(lengths)}
    return Dataset.from_dict({"images": [[]] * len(lengths), "messages": [[]] * len(lengths), **columns})


def sampler(seed=0, epoch=0, num_rows=50, batch_size=4, budgets=(1, 4, 16), rows=None, group=False):
    rows = rows or rows_of([10] * num_rows, [1] * num_rows)
    return BudgetSampler(rows, batch_size, list(budgets), seed, group=group, epoch=lambda: int(epoch))


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
    drawn = Counter(budget for _, budget in sampler(num_rows=3000, batch_size=1))
    assert all(900 < count < 1100 for count in drawn.values())
    # not from the data: another number of rows leaves the draws as they are
    assert [budget for _, budget in sampler(num_rows=48)] == [budget for _, budget in first[:48]]


@pytest.mark.parametrize("group", [False, True])
def test_processes_draw_the_same_budget_at_the_same_step_also_when_resumed(group):
    def batches(process):
        order = sampler(batch_size=2 * 3, group=group)
        shard = BatchSamplerShard(BatchSampler(order, 3, drop_last=False), 2, process)
        return list(shard), list(SkipBatchSampler(shard, 5))

    (first, first_resumed), (second, second_resumed) = batches(0), batches(1)
    assert [batch[0][1] for batch in first[:8]] == [batch[0][1] for batch in second[:8]]
    assert {index for batch in first + second for index, _ in batch} == set(range(50))
    assert (first_resumed, second_resumed) == (first[5:], second[5:])


def test_groups_are_of_one_kind_and_of_about_one_length():
    draw = random.Random(0)
    lengths = [draw.randint(10, 1000) for _ in range(1003)]
    images = [int(draw.random() < 0.6) for _ in range(1003)]
    order = sampler(rows=rows_of(lengths, images), group=True, batch_size=8)
    indices = [index for index, _ in order]
    assert len(indices) == len(order)
    batches = [indices[start : start + 8] for start in range(0, len(indices), 8)]
    assert all(len({images[index] for index in batch}) == 1 for batch in batches)
    # every row occurs, and only what fills up the last batch of a kind occurs twice
    assert set(indices) == set(range(1003))
    assert len(indices) < 1003 + 2 * 8

    def spread(batches):
        return sum(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches) / len(batches)

    assert spread(batches) < 0.2 * spread([batch for batch in sampler_batches(1003, 8)])
    at_most = [lengths[index] + images[index] * 15 for index in indices]
    assert max(at_most[:8]) == max(at_most)
    assert [index for index, _ in sampler(rows=rows_of(lengths, images), group=True, batch_size=8)] == indices
    later = [index for index, _ in sampler(rows=rows_of(lengths, images), group=True, batch_size=8, epoch=1)]
    assert later != indices and set(later) == set(indices)
    # neither long before short nor one kind before the other
    means = [sum(lengths[i] for i in batch) / 8 for batch in batches]
    assert abs(sum(means[:60]) - sum(means[-60:])) / 60 < 150
    assert 20 < sum(images[batch[0]] for batch in batches[:60]) < 55


def sampler_batches(num_rows, batch_size):
    indices = [index for index, _ in sampler(num_rows=num_rows)]
    return [indices[start : start + batch_size] for start in range(0, num_rows, batch_size)]


@pytest.mark.parametrize(
    ("num_images", "num_texts", "batch_size", "num_repeated", "num_mixed"),
    [
        (60, 3, 128, 0, 3),  # no batch is full: it stays partial
        (9, 2, 8, 5, 2),
        (1000, 3, 128, 21, 3),
        (100, 70, 128, 86, 0),  # 28 and 58
        (64, 63, 128, 1, 63),
        (70, 0, 128, 58, 0),
        (128, 256, 128, 0, 0),
    ],
)
def test_no_row_occurs_more_than_twice_in_an_epoch(num_images, num_texts, batch_size, num_repeated, num_mixed):
    images = [1] * num_images + [0] * num_texts
    order = sampler(rows=rows_of([*range(5, 5 + len(images))], images), group=True, batch_size=batch_size)
    indices = [index for index, _ in order]
    assert len(indices) == len(order) == len(images) + num_repeated
    assert (order.num_repeated, order.num_mixed) == (num_repeated, num_mixed)
    counts = Counter(indices)
    assert set(counts) == set(range(len(images)))
    assert max(counts.values()) <= 2
    kinds = [{images[index] for index in indices[at : at + batch_size]} for at in range(0, len(indices), batch_size)]
    assert num_mixed or all(len(kind) == 1 for kind in kinds)
