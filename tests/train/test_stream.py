"""Records stream from WebDataset shards and Parquet files, in the same batches again when a run is resumed."""

import io
import json
import shutil
import tarfile

import pytest
from clients import encoded
from datasets import Dataset, Features, Image, List, Value
from datasets.distributed import split_dataset_by_node
from llava_records import turns
from PIL import Image as PilImage
from torch.utils.data import DataLoader

from delta_llava.train import finetune
from delta_llava.train.batches import Collator
from delta_llava.train.stream import StreamedBatches, stream_rows


def add(shard, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))


def png(colour):
    return encoded(PilImage.new("RGB", (20, 30), colour))


def conversation(text, placeholder="<image>\n"):
    return turns(f"{placeholder}Which colour?", text)


@pytest.fixture
def shards(tmp_path):
    """
    Tar files of six records, one for validation, as unlike each other as LLaVA's: ids that are numbers or texts,
    `image` a path, a list or absent, the second record of each file without an image, suffixes that differ.
    """

    def write(folder="shards", broken=(), names=("train-0", "train-1", "train-2", "train-3", "validation-0")):
        (tmp_path / folder).mkdir()
        for number, name in enumerate(names):
            with tarfile.open(tmp_path / folder / f"{name}.tar", "w") as shard:
                for index in range(6 * number, 6 * number + 6):
                    has_image = index % 6 != 1
                    text = conversation(f"Number {index}.", "<image>\n" if has_image else "")
                    record = {"id": index if index % 2 else f"r{index}", "conversations": text}
                    if has_image:
                        record["image"] = ["a.png"] if index % 3 else "a.png"
                        content = b"no image" if index in broken else png((index * 8, 0, 0))
                        add(shard, f"{index:04}.{'jpg' if index % 6 == 5 else 'png'}", content)
                    add(shard, f"{index:04}.json", json.dumps(record).encode())
                    if index % 6 == 4:
                        add(shard, f"{index:04}.txt", b"something else")
        return str(tmp_path / folder)

    return write


def answers(rows):
    return [row["messages"][-1]["content"][0]["text"] for row in rows]


def test_rows_come_from_tar_files_with_their_images(shards, tmp_path, tiny_processor):
    rows = list(stream_rows(shards(), "train", tiny_processor(), 4, None))
    assert answers(rows) == [f"Number {index}." for index in range(24)]
    assert [len(row["images"]) for row in rows] == [1, 0, 1, 1, 1, 1] * 4
    assert [row["id"] for row in rows[:3]] == ["r0", "1", "r2"]
    assert rows[0]["messages"][0]["content"][0] == {"type": "image", "text": None}

    (tmp_path / "several").mkdir()
    with tarfile.open(tmp_path / "several" / "train.tar", "w") as shard:
        for number in (2, 0, 1):
            add(shard, f"0.{number}.png", png((number, 0, 0)))
        record = {"id": 0, "conversations": conversation("None.", "<image>\n" * 3)}
        add(shard, "0.json", json.dumps(record).encode())
    batches = StreamedBatches(
        stream_rows(str(tmp_path / "several"), "train", tiny_processor(), 4, None),
        batch_size=1,
        num_visual_tokens=[4],
        seed=0,
        skip_bad_records=False,
        images_only=True,
    )
    (row,) = next(iter(batches))
    assert [image.getpixel((0, 0)) for image in row["images"]] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]


@pytest.mark.parametrize("content", [b"[1]", None])
def test_a_sample_that_is_no_record_is_named(tmp_path, tiny_processor, content):
    with tarfile.open(tmp_path / "train.tar", "w") as shard:
        add(shard, "0.png", png("red"))
        add(shard, "0.json", json.dumps({"id": 0, "conversations": conversation("Red.")}).encode())
        add(shard, "1.png", png("red"))
        if content:
            add(shard, "1.json", content)
    with pytest.raises(ValueError, match=r"Record '1' of .*: the record is a .*, not an object with id"):
        list(stream_rows(str(tmp_path), "train", tiny_processor(), 4, None))
    rows = stream_rows(str(tmp_path), "train", tiny_processor(), 4, None, skip_bad_records=True)
    assert answers(rows) == ["Red."]


def test_other_forms_stream_with_their_loss_and_what_is_ignored(tmp_path, tiny_processor):
    part = {"type": Value("string"), "text": Value("string"), "image": Image()}
    message = {"role": Value("string"), "content": List(part), "weight": Value("int64")}
    photo = {"bytes": png("red"), "path": None}

    def say(role, text, image=None, weight=None):
        images = [{"type": "image", "image": image}] if image else []
        return {"role": role, "content": [*images, {"type": "text", "text": text}], "weight": weight}

    messages = [
        say("user", "Which?", photo),
        say("assistant", "Red?", weight=0),
        say("user", "?"),
        say("assistant", "Red."),
    ]
    rows = Dataset.from_list(
        [{"messages": messages, "origin": "here"}],
        features=Features({"messages": List(message), "origin": Value("string")}),
    )
    (tmp_path / "one").mkdir()
    rows.to_parquet(tmp_path / "one" / "train.parquet")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: one\n  data_dir: one\n- config_name: two\n---\n")
    stream = stream_rows(str(tmp_path), "train", tiny_processor(), 4, None, dataset_config="one")
    (row,) = next(iter(StreamedBatches(stream, 1, [4], 0, skip_bad_records=False, images_only=True)))
    assert row["id"] is None
    assert row["loss"] == [True, False, True, True]
    assert row["notes"] == [{"kind": "ignored_key", "reason": "origin"}]
    assert row["images"][0].getpixel((0, 0)) == (255, 0, 0)
    labels = Collator(tiny_processor())([row])["labels"][0]
    assert tiny_processor().tokenizer.decode(labels[labels != -100]) == " Red.</s>"


def test_a_stream_has_to_carry_its_images(tmp_path, tiny_processor):
    record = {"image": "a.png", "conversations": conversation("Red.")}
    Dataset.from_list([record]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"Record None of .*: image a\.png is a file, but a stream has to carry"):
        list(stream_rows(str(tmp_path), "train", tiny_processor(), 4, None))


def test_rows_come_from_parquet_files_with_lists_of_images(tmp_path, tiny_processor):
    turn = {"from": Value("string"), "value": Value("string")}
    features = Features({"id": Value("int64"), "photos": List(Image()), "conversations": List(turn)})
    photo = {"bytes": png("red"), "path": None}
    records = [
        {"id": 1, "photos": [photo, photo], "conversations": conversation("Red.", "<image>\n<image>\n")},
        {"id": 2, "photos": [], "conversations": conversation("None.", "")},
    ]
    Dataset.from_list(records, features=features).to_parquet(tmp_path / "train.parquet")
    rows = list(stream_rows(str(tmp_path), "train", tiny_processor(), 4, None))
    assert [(row["id"], len(row["images"])) for row in rows] == [("1", 2), ("2", 0)]


def test_bad_streams_are_named(shards, tmp_path, tiny_processor, monkeypatch):
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"columns \['text'\].* a column of images are needed"):
        stream_rows(str(tmp_path), "train", tiny_processor(), 4, None)
    folder = shards(broken=[2])
    with pytest.raises(ValueError, match=r"Record '0001' of .*shards: the record has no image.*--skip_bad_records"):
        list(stream_rows(folder, "train", tiny_processor(), 4, None, require_images=True))
    with pytest.raises(ValueError, match=r"Record '0000' of .*its first answer ends after max_length=10"):
        list(stream_rows(folder, "train", tiny_processor(), 4, 10))
    rows = stream_rows(folder, "train", tiny_processor(), 4, None)
    with pytest.raises(
        ValueError, match=r"The row 'Which colour\? Number 2.* image 0002.png cannot be read: .*--skip_bad_records"
    ):
        next(iter(StreamedBatches(rows, 24, [4], 0, skip_bad_records=False, images_only=False)))
    with pytest.raises(ValueError, match=r"has no image\. FSDP and ZeRO-3 wait forever"):
        next(iter(StreamedBatches(rows, 24, [4], 0, skip_bad_records=True, images_only=True)))
    warnings = []
    monkeypatch.setattr("delta_llava.train.stream.logger.warning", warnings.append)
    skipping = stream_rows(folder, "train", tiny_processor(), 4, None, require_images=True, skip_bad_records=True)
    batch = next(iter(StreamedBatches(skipping, 19, [4], 0, skip_bad_records=True, images_only=True)))
    assert sorted(answers(batch)) == sorted(f"Number {index}." for index in range(24) if index % 6 != 1 and index != 2)
    assert sum("left out" in warning for warning in warnings) == 5
    nothing = stream_rows(folder, "train", tiny_processor(), 4, 10, skip_bad_records=True)
    with pytest.raises(ValueError, match="without one good row"):
        next(iter(StreamedBatches(nothing, 1, [4], 0, skip_bad_records=True, images_only=False)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_draws_and_order_are_the_same_again_and_budgets_in_all_processes(shards, tiny_processor, num_workers):
    folder = shards()

    def batches(process, processes=1, count=10):
        rows = split_dataset_by_node(stream_rows(folder, "train", tiny_processor(), 16, None), process, processes)
        stream = StreamedBatches(rows, 3, [1, 4, 16], 0, skip_bad_records=False, images_only=False)
        loader = iter(DataLoader(stream, batch_size=None, num_workers=num_workers, collate_fn=list))
        return [[(row["id"], row["num_visual_tokens"]) for row in next(loader)] for _ in range(count)]

    first = batches(0)
    assert batches(0) == first
    assert all(len({budget for _, budget in batch}) == 1 for batch in first)
    budgets = [batch[0][1] for batch in first]
    assert set(budgets) == {1, 4, 16}
    halves = [batches(process, 2, count=4) for process in range(2)]
    assert [batch[0][1] for batch in halves[0]] == [batch[0][1] for batch in halves[1]] == budgets[:4]
    seen = [{index for batch in half for index, _ in batch} for half in halves]
    assert not seen[0] & seen[1]
    everything = {str(index) if index % 2 else f"r{index}" for index in range(24)}
    assert seen[0] | seen[1] == everything
    epoch = [index for batch in first for index, _ in batch]
    assert set(epoch[:24]) == everything or num_workers
    assert epoch[:6] != epoch[24:]  # another order in the next epoch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_streamed_run_resumes_to_the_same_weights_and_validates(run, shards, tmp_path, num_workers):
    options = {
        "json_path": None,
        "image_folder": None,
        "stream": shards(),
        "num_visual_tokens": [1, 4],
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 2,
        "num_eval_rows": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "dataloader_num_workers": num_workers,
    }
    unbroken = run(finetune, "unbroken", **options)
    history = json.loads((unbroken / "checkpoint-5" / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_4_loss" in entry for entry in history) == sum("eval_1_loss" in entry for entry in history) == 3
    shutil.copytree(unbroken, tmp_path / "broken")
    with pytest.raises(ValueError, match=r"num_eval_rows=6, but the split validation of .* has 5 rows with images"):
        run(finetune, "few", **{**options, "num_eval_rows": 6})
    shutil.rmtree(tmp_path / "broken" / "checkpoint-5")
    (tmp_path / "broken" / "model.safetensors").unlink()
    resumed = run(finetune, "broken", ["--resume_from_checkpoint", "latest"], **options)
    assert (resumed / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


def test_a_dry_run_looks_at_the_first_rows(run, shards, tmp_path, capsys):
    options = {"json_path": None, "image_folder": None, "stream": shards(), "num_visual_tokens": [4], "max_steps": 7}
    run(finetune, "dry", ["--dry_run"], **options)
    output = capsys.readouterr().out
    assert "The first 24 rows of the stream represent all." in output
    assert "24 rows, 20 images, 4 rows without one" in output
    assert "7 steps of 4 rows" in output
    assert not (tmp_path / "dry").exists()
