"""lmms-eval asks, our model answers, and the card shows the figure. `make test-lmms` has the environment for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest


pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: make test-lmms")

import evaluate
import torch
from clients import greedy_tokens
from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN

from delta_llava.demo import lmms_scenes, scenes
from delta_llava.evaluation import run as module
from delta_llava.evaluation.fastv import fastv
from delta_llava.evaluation.lmms import DeltaLlava, UntilStrings, cut, generation_options
from delta_llava.evaluation.suite import read_suite
from delta_llava.hub.card import build_card
from delta_llava.results import results_file


pytestmark = pytest.mark.lmms
SCENES = Path(lmms_scenes.__file__).parent / "lmms_eval"


@pytest.fixture
def model(checkpoint):
    """A model to whose answers every token of the prompt matters."""
    model = DeltaLlava(str(checkpoint), batch_size=3, device="cpu")
    with torch.no_grad():
        for weight in model.model.model.language_model.layers.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
    return model


@pytest.fixture
def docs(noise):
    """Questions of many lengths, about none, one or two pictures."""
    images = noise(9)
    questions = [
        "Which?",
        "What is this thing here?",
        "Why? " * 9,
        "Where is the cat?",
        "And then? " * 4,
        "A?",
        "B C?",
    ]
    return [
        {"question": question, "images": images[index : index + index % 3]} for index, question in enumerate(questions)
    ]


@pytest.fixture
def answers(docs):
    """`answers(model, **generation_kwargs)`: what the model answers to `docs`, of task "things"."""

    def ask(model, docs=docs, kwargs=None):
        def messages(doc):
            pictures = [{"type": "image", "url": image} for image in doc["images"]]
            return [{"role": "user", "content": [*pictures, {"type": "text", "text": doc["question"]}]}]

        kwargs = kwargs or [{"max_new_tokens": 8}] * len(docs)
        model.task_dict["things"] = {"test": docs}
        return model.generate_until(
            [
                Instance(
                    request_type="generate_until",
                    arguments=(doc["question"], messages, options, index, "things", "test"),
                    idx=0,
                    metadata={"task": "things", "doc_id": index, "repeats": 1},
                )
                for index, (doc, options) in enumerate(zip(docs, kwargs, strict=True))
            ]
        )

    return ask


@pytest.fixture
def batches(model, monkeypatch):
    """What `generate` was given, batch by batch."""
    given, generate = [], model.model.generate

    def spy(**inputs):
        given.append(inputs)
        return generate(**inputs)

    monkeypatch.setattr(model.model, "generate", spy)
    return given


def test_answers_are_those_of_each_question_alone_in_the_order_asked(model, docs, answers):
    alone = []
    for doc in docs:
        tokens = greedy_tokens(model.model, model.processor, doc["images"], doc["question"])
        alone.append(model.processor.decode(tokens, skip_special_tokens=True))
    assert len(set(alone)) >= 6  # else the order would not matter
    for batch_size in (1, 4, 7):
        model.batch_size = batch_size
        assert answers(model) == alone


def test_the_longest_are_answered_first_and_padded_on_the_left(model, docs, answers, batches):
    answers(model)
    masks = [batch["attention_mask"] for batch in batches]
    assert [len(mask) for mask in masks] == [3, 3, 1]
    assert all(mask[:, -1].all() for mask in masks) and not masks[0][:, 0].all()
    longest = model.processor.decode(batches[0]["input_ids"][0])
    assert docs[2]["question"].strip() in longest and "A?" in model.processor.decode(batches[2]["input_ids"][0])


def test_requests_of_other_generation_arguments_are_answered_apart(model, docs, answers, batches):
    kwargs = [{"max_new_tokens": 2 + index % 2, "temperature": 0, "top_p": 1.0} for index in range(len(docs))]
    answers(model, kwargs=kwargs)
    assert [(len(batch["input_ids"]), batch["max_new_tokens"]) for batch in batches] == [(3, 2), (1, 2), (3, 3)]
    assert all(batch["do_sample"] is False and "temperature" not in batch for batch in batches)


def test_answers_end_before_until_and_are_not_generated_further(model, docs, answers, monkeypatch):
    free = answers(model, docs=docs[3:4], kwargs=[{"max_new_tokens": 8}])[0]
    end = free[3:5]
    lengths, generate = [], model.model.generate

    def spy(**inputs):
        generated = generate(**inputs)
        lengths.append(generated.shape[1] - inputs["input_ids"].shape[1])
        return generated

    monkeypatch.setattr(model.model, "generate", spy)
    for until in (end, [end], ["never said", end]):
        kwargs = [{"max_new_tokens": 8, "until": until}]
        assert answers(model, docs=docs[3:4], kwargs=kwargs) == [free.partition(end)[0]]
    assert max(lengths) < 8


def test_until_looks_at_the_answer_and_not_at_the_prompt(model):
    ids = model.processor.tokenizer(["ASSISTANT:\n" + text for text in ("\na", "\n\n", "ab")])["input_ids"]
    prompt_length = len(model.processor.tokenizer("ASSISTANT:\n")["input_ids"])
    rows = torch.tensor([row[: prompt_length + 2] for row in ids])
    assert UntilStrings(model.processor, ["\n\n", "ASSISTANT:"], prompt_length)(rows, None).tolist() == [
        False,
        True,
        False,
    ]


def test_generation_arguments_are_the_tasks(model):
    assert generation_options({}) == ({"max_new_tokens": 1024, "do_sample": False}, [])
    greedy = {"until": "\n", "temperature": 0, "top_p": 1.0, "num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    assert generation_options(greedy) == ({"max_new_tokens": 3, "num_beams": 2, "do_sample": False}, ["\n"])
    sampled = {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 3}
    assert generation_options(sampled) == ({**sampled, "do_sample": True}, [])
    assert cut("a, b; c", [";", ","]) == "a" and cut("a", []) == "a"
    with pytest.raises(ValueError, match=r"until=\[''\] must be"):
        generation_options({"until": [""]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ["no such file.png"]}, "things test document 5, .*no such file.png"),
        ({"images": None}, "things test document 5, .*NoneType"),
    ],
)
def test_what_cannot_be_answered_is_an_error_and_no_empty_answer(model, docs, answers, change, message):
    docs[5] = {**docs[5], **change}
    with pytest.raises(RuntimeError, match=message):
        answers(model)


def test_what_generate_does_not_know_is_an_error(model, docs, answers):
    with pytest.raises(RuntimeError, match="image_aspect_ratio"):
        answers(model, docs=docs[:1], kwargs=[{"image_aspect_ratio": "original"}])


def test_the_budget_is_the_arguments_or_the_checkpoints(checkpoint, model, docs, answers, batches):
    assert model.num_visual_tokens == 36
    first = answers(model, docs=docs[1:2])
    model.num_visual_tokens = 4
    second = answers(model, docs=docs[1:2])
    assert first != second
    assert [batch["num_visual_tokens"].tolist() for batch in batches] == [[36], [4]]
    docs[1]["images"] = [image.resize((9, 5)) for image in docs[1]["images"]]
    model.num_visual_tokens = "auto"
    answers(model, docs=docs[1:2])
    assert batches[-1]["num_visual_tokens"].tolist() == [9]
    assert (
        get_model("delta_llava")
        .create_from_arg_string(f"pretrained={checkpoint},num_visual_tokens=auto", {"device": "cpu"})
        .num_visual_tokens
        == "auto"
    )
    for budget in (7, "Auto"):
        with pytest.raises(ValueError, match=rf"num_visual_tokens=\['?{budget}'?\] must be among"):
            DeltaLlava(str(checkpoint), num_visual_tokens=budget)
    with pytest.raises(ValueError, match="batch_size=auto must be"):
        DeltaLlava(str(checkpoint), batch_size="auto")


def test_a_cascade_answers_as_calibrated_and_counts_its_tokens(checkpoint, docs, answers):
    with pytest.raises(FileNotFoundError, match=r"has no cascade\.json"):
        DeltaLlava(str(checkpoint), device="cpu", cascade=True)
    plain = DeltaLlava(str(checkpoint), num_visual_tokens=36, batch_size=3, device="cpu")
    (checkpoint / "cascade.json").write_text(json.dumps({"num_visual_tokens": [4, 36], "threshold": 0.0}))
    model = DeltaLlava(str(checkpoint), batch_size=3, device="cpu", cascade=True)
    asked = [doc for doc in docs if doc["images"]]
    assert answers(model, docs=asked) == answers(plain, docs=asked)  # all of it asked again
    assert model.mean_visual_tokens() == 40 and model.mean_visual_tokens() == 0
    model.cascade, model.num_visual_tokens = False, 36
    assert answers(model) == answers(plain)


def test_lmms_eval_finds_the_model_and_its_arguments(checkpoint):
    arguments = f"pretrained={checkpoint},num_visual_tokens=4,batch_size=5,dtype=bfloat16,attn_implementation=eager"
    options = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    model = get_model("delta_llava").create_from_arg_string(arguments, options)
    assert isinstance(model, DeltaLlava) and not model.is_simple
    assert (model.num_visual_tokens, model.batch_size, model.model.dtype) == (4, 5, torch.bfloat16)
    assert model.config._attn_implementation == "eager" and model.device.type == "cpu"


@pytest.fixture
def caches(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")


@pytest.fixture
def held_out(tmp_path, monkeypatch):
    """The demo's held-out questions as a task, and the working directory from which it is found."""
    folder = tmp_path / "demo/out/scenes"
    scenes.write_scenes(folder, train_scenes=1, held_out_scenes=2)
    lmms_scenes.write_table(folder)
    monkeypatch.chdir(tmp_path)
    return json.loads((folder / "held_out.json").read_text())


def test_the_commands_figure_is_the_cards(checkpoint, held_out, answers, caches, tmp_path):
    # Three questions whose right answers the untrained model gives
    folder = tmp_path / "demo/out/scenes"
    docs = [{"question": row["question"], "images": [str(folder / "images" / row["image"])]} for row in held_out[:3]]
    said = answers(DeltaLlava(str(checkpoint), device="cpu"), docs=docs, kwargs=[{"max_new_tokens": 4}] * 3)
    for row, answer in zip(held_out, said, strict=False):
        row["answer"] = answer
    (folder / "held_out.json").write_text(json.dumps(held_out))
    lmms_scenes.write_table(folder)

    module.run(checkpoint, [36, 4], suite=SCENES / "suite.yaml", dtype="float32")
    content = json.loads(results_file(checkpoint, 36).read_text())
    (record,) = content["results"]
    assert (record["num_samples"], record["prompt_variant"]) == (len(held_out), "default")
    assert record["value"] == round(100 * 3 / len(held_out), 4)
    card = build_card(checkpoint, "org/name", base_model=["org/tower", "org/lm"], license="mit", datasets=["org/data"])
    assert "| held-out scenes |" in card.text and f" {record['value']} % |" in card.text

    command = [sys.executable, "-m", "lmms_eval", "--model", "delta_llava", "--tasks", "delta_llava_scenes"]
    command += ["--model_args", f"pretrained={checkpoint},num_visual_tokens=36,batch_size=4"]
    command += ["--include_path", str(SCENES / "tasks"), "--output_path", str(tmp_path / "out"), "--verbosity", "DEBUG"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(file.read_text())["results"]["delta_llava_scenes"]["exact_match,none"] == 3 / len(held_out)


def test_two_processes_divide_the_questions(checkpoint, held_out, tmp_path):
    """And the figure and its number of samples are of all."""
    module.run(checkpoint, [36], suite=SCENES / "suite.yaml", dtype="float32", output_dir=tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_endpoint", "127.0.0.1:0", "--rdzv_backend", "c10d", "-m", "delta_llava.evaluation.run"]
    command += ["--checkpoint", str(checkpoint), "--num_visual_tokens", "36", "--dtype", "float32"]
    command += ["--suite", str(SCENES / "suite.yaml"), "--output_dir", str(tmp_path / "two")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(results_file(tmp_path / name, 36).read_text())["results"] for name in ("one", "two"))
    assert one == two and done.stdout.count("| measured | 36 |") == 1


@pytest.fixture
def llava(tiny_config, tiny_processor, tmp_path):
    """A checkpoint of LLaVA as llava-hf has them, of 144 visual tokens: pictures are cropped, no system prompt."""
    config, processor = tiny_config(), tiny_processor()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_index=config.image_token_id,
            image_seq_length=144,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.dim() == 2 else 1)
    model.save_pretrained(tmp_path / "llava")
    processor.tokenizer.padding_side = "right"
    LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="USER: <image>\n{{ messages[0].content[1].text }} ASSISTANT:",
    ).save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def test_llava_is_asked_as_it_was_trained_and_answers_as_fastv_has_it(llava, docs, answers, tiny_processor, templates):
    model = LlavaForConditionalGeneration.from_pretrained(llava)
    image, question = docs[1]["images"][0], docs[1]["question"]
    # Padded to a square in the mean's colour, which is what CLIP's processor is given here
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in OPENAI_CLIP_MEAN))
    square.paste(image, tuple((side - length) // 2 for length in image.size))
    processor = tiny_processor()
    pixels = processor.image_processor(square, return_tensors="pt")["pixel_values"]
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    system += "detailed, and polite answers to the user's questions."
    text = f"<s>{system} USER: {'<image>' * 144}\n{question} ASSISTANT:"
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    said = set()
    for num_visual_tokens in (144, 9, 1):
        with fastv(model, num_visual_tokens, layer=1):
            generated = model.generate(**ids, pixel_values=pixels, max_new_tokens=8, do_sample=False)
        expected = processor.tokenizer.decode(generated[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        arguments = f"pretrained={llava},num_visual_tokens={num_visual_tokens},fastv_layer=1,batch_size=2"
        pruned = DeltaLlava.create_from_arg_string(arguments, {"device": "cpu"})
        longer = {"question": question + " And why?", "images": [image]}  # beside it the question is padded
        assert answers(pruned, docs=[{"question": question, "images": [image]}, longer])[0] == expected
        said.add(expected)
    assert len(said) == 3  # else the number would not matter


def test_llava_without_fastv_is_refused_and_keeps_all_tokens_by_default(llava):
    with pytest.raises(ValueError, match="model_type='llava'"):
        DeltaLlava(str(llava), device="cpu")
    assert DeltaLlava(str(llava), device="cpu", fastv_layer=1).num_visual_tokens == 144


def test_results_with_fastv_are_no_cards(llava, checkpoint, held_out, caches, monkeypatch):
    options = {"suite": SCENES / "suite.yaml", "dtype": "float32", "output_dir": checkpoint}
    text = module.run(llava, [144, 4], fastv_layer=1, **options)
    assert text.count(f"| {llava}, FastV after layer 1 | measured |") == 2
    content = json.loads(results_file(checkpoint, 4, fastv_layer=1).read_text())
    assert content["toolkit"].endswith("float32, FastV after layer 1") and len(content["results"]) == 1
    card = build_card(checkpoint, "org/name", base_model=["org/tower", "org/lm"], license="mit", datasets=["org/data"])
    assert "held-out scenes" not in card.text
    monkeypatch.setattr(module, "_load", None)  # what is measured is not measured again
    assert module.run(llava, [144, 4], fastv_layer=1, **options) == text


def test_right_answers_are_counted_by_the_packages_metric(held_out, caches):
    table = datasets.load_dataset("parquet", data_files="demo/out/scenes/held_out.parquet", split="train")
    assert table[0]["image"].size == (96, 96) and table["answer"][:] == [row["answer"] for row in held_out]
    pairs = [lmms_scenes.process_results(doc, [doc["answer"].upper() + "."])["exact_match"] for doc in table]
    assert lmms_scenes.exact_match(pairs) == 1.0
    pairs[0]["prediction"] = "none of them"
    assert lmms_scenes.exact_match(pairs) == pytest.approx(1 - 1 / len(pairs))


def test_an_error_of_the_model_ends_the_run_without_results(checkpoint, held_out, caches, monkeypatch):
    def broken(self, requests):
        raise ValueError("no memory")

    monkeypatch.setattr(DeltaLlava, "_inputs", broken)
    with pytest.raises(RuntimeError, match=r"delta_llava_scenes held_out document .*, at 36 visual tokens: no memory"):
        module.run(checkpoint, [36], suite=SCENES / "suite.yaml", dtype="float32")
    assert not (checkpoint / "results").exists()


def test_data_that_are_missing_are_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # lmms-eval's, between five attempts
    with pytest.raises(RuntimeError, match=r"delta_llava_scenes: the data cannot be loaded: .*held_out.parquet"):
        module.run(checkpoint, [36], suite=SCENES / "suite.yaml", dtype="float32")


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=read_suite(module.SUITE)["include_path"], model_name="delta_llava")


@pytest.mark.parametrize("entry", read_suite(module.SUITE)["tasks"], ids=lambda entry: entry["task"])
def test_lmms_eval_has_the_papers_tasks_as_the_suite_says(manager, entry):
    assert entry["task"] in manager.all_subtasks
    module.check_task(entry, load_yaml_config(manager.task_index[entry["task"]]["yaml_path"], mode="simple"))


def test_only_the_switch_is_another_with_ocr_tokens(manager):
    with_ocr, without = (
        load_yaml_config(manager.task_index[task]["yaml_path"], mode="full")
        for task in ("textvqa_val_ocr", "textvqa_val")
    )
    assert with_ocr.pop("lmms_eval_specific_kwargs")["default"] == {
        **without.pop("lmms_eval_specific_kwargs")["default"],
        "ocr": True,
    }
    assert with_ocr.pop("task") != without.pop("task")
    assert with_ocr.pop("metric_list")[0].items() <= without.pop("metric_list")[0].items()
    for config in (with_ocr, without):
        for name, value in config.items():
            config[name] = value.__name__ if callable(value) else value
    assert with_ocr == without


def test_the_ocr_tokens_stand_in_the_prompt(manager, model, noise, batches, tmp_path):
    doc = {"question": "what does it say?", "question_id": 1, "ocr_tokens": ["STOP", "HERE"], "answers": ["stop"] * 10}
    columns = {**doc, "answer": "stop", "image": noise(1)[0]}
    datasets.Dataset.from_dict({name: [value] for name, value in columns.items()}).to_parquet(tmp_path / "t.parquet")
    config = load_yaml_config(manager.task_index["textvqa_val_ocr"]["yaml_path"], mode="full")
    config |= {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "t.parquet")}}}
    config["generation_kwargs"] |= {"max_new_tokens": 2}
    task = ConfigurableMessagesTask(config=config, model_name="delta_llava")
    evaluator.simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=0)
    prompt = model.processor.decode(batches[0]["input_ids"][0], skip_special_tokens=True)
    assert "What does it say?\nReference OCR token: STOP, HERE\nAnswer the question using" in prompt


@pytest.fixture
def benchmarks(monkeypatch, noise):
    """Four documents of each of the paper's benchmarks, in the columns of its data set, where lmms-eval loads them."""
    said = {"question": "Is there a dog?", "question_id": "1", "answer": "Yes"}
    choices = {"A": "a dog", "B": "a cat", "C": "nan", "D": "nan", "E": "nan", "hint": "nan", "answer": "A"}
    ten = [{"answer": "yes", "answer_id": n, "answer_confidence": "yes"} for n in range(10)]
    # No word twice, so that CIDEr gives each the weight of a rare one
    captions = ["a dog runs on grass", "two cats sleep inside", "red boats leave port", "one man reads outdoors"]
    columns = {
        "GQA": {"question": "Is it red?", "answer": "yes", "imageId": "7"},
        "MMBench": {**choices, **{name: "x" for name in ("question", "category", "L2-category", "source", "split")}},
        "MME": {**said, "category": "existence"},
        "POPE": said,
        "ScienceQA": {"question": "Which?", "choices": ["a dog", "a cat"], "answer": 0, "hint": "Look."},
        "textvqa": {**said, "ocr_tokens": ["STOP", "HERE"], "answers": ["yes"] * 10},
        "VizWiz-VQA": {**said, "answers": ["yes"] * 10},
        "VQAv2": {**said, "answers": ten},
    }
    by_row = {
        "MMBench": {"index": [1, 2, 3, 4]},
        "MME": {"question_id": ["1", "1", "2", "2"]},
        "NoCaps": {"image_id": [1, 2, 3, 4], "annotations_captions": [[caption] for caption in captions]},
        "flickr30k": {"img_id": ["1", "2", "3", "4"], "caption": [[caption] for caption in captions]},
    }
    splits = {entry["dataset"]: entry["split"] for entry in read_suite(module.SUITE)["tasks"]}

    def load_dataset(path, name=None, split=None, **options):
        short = path.partition("/")[2]
        rows = {key: [value] * 4 for key, value in columns.get(short, {}).items()} | by_row.get(short, {})
        if name == "testdev_balanced_images":
            return datasets.Dataset.from_dict({"id": ["7"], "image": noise(1)})
        if short != "GQA":
            rows["image"] = noise(4)
        return datasets.DatasetDict({splits[path]: datasets.Dataset.from_dict(rows)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_the_whole_suite_runs(checkpoint, benchmarks, monkeypatch, capsys):
    """
    With a model that says "yes" to everything, which is right in all but the multiple choices and the captions; of
    those it has one in four right.
    """
    right_once = {"mmbench_en_dev_static": "A", "scienceqa_img": "A"}
    right_once |= dict.fromkeys(["nocaps_val", "flickr30k_test"], "a dog runs on grass")

    def answer(self, requests, arguments):
        asked = [(task, doc_id) for *_, doc_id, task, _ in (request.args for request in requests)]
        return [right_once.get(task, "Yes") if doc_id == 0 else "Yes" for task, doc_id in asked]

    monkeypatch.setattr(DeltaLlava, "_answer", answer)
    text = module.run(checkpoint, [4], dtype="float32")
    results = {record["name"]: record for record in json.loads(results_file(checkpoint, 4).read_text())["results"]}
    assert list(results) == [entry["name"] for entry in read_suite(module.SUITE)["tasks"]]
    assert {record["num_samples"] for record in results.values()} == {4}
    right = {"GQA", "POPE", "TextVQA", "TextVQA with OCR tokens", "VizWiz", "VQAv2"}
    assert {name for name, record in results.items() if record["value"] == 100} == right
    assert results["MME"]["value"] == 200
    assert {results[name]["value"] for name in ("MMBench", "ScienceQA-IMG")} == {25}
    # A caption that is the only reference has 10 times 100 points
    assert {results[name]["value"] for name in ("NoCaps", "Flickr30k")} == {1000 / 4}
    assert f"| {checkpoint} | measured | 4 | 100.00 | 25.00 | 200.00 | 100.00 |" in text
