"""Metrics load by path without a network and give the numbers that were published with them."""

import random
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
from pycocoevalcap.cider.cider import Cider as CiderScorer

from delta_llava.evaluation import metrics
from delta_llava.evaluation.metrics.normalization import normalize_answer


METRICS = Path(metrics.__file__).parent


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    cache = tmp_path_factory.mktemp("evaluate")
    return lambda name: evaluate.load(str(METRICS / name), cache_dir=str(cache))


def test_loads_offline_by_path_in_a_fresh_process(tmp_path):
    script = f"""
import evaluate

for name in ("vqa_accuracy", "exact_match", "pope", "mme", "cider"):
    print(evaluate.load({str(METRICS)!r} + f"/{{name}}").name)
metric = evaluate.load({str(METRICS / "vqa_accuracy")!r})
print(metric.compute(predictions=["Two dogs."], references=[["2 dogs"] * 10]))
"""
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=offline, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *names, score = result.stdout.splitlines()
    assert names == ["vqa_accuracy", "exact_match", "pope", "mme", "cider"]
    assert score == "{'vqa_accuracy': 1.0}"


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        # The examples of visualqa.org/evaluation.html.
        ("dont", "don't"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        # Those of the tests of MMF's answer processor (tests/datasets/test_processors.py) that hold for both.
        ("two", "2"),
        ("a building", "building"),
        ("snow, mountain", "snow mountain"),
        ("isnt", "isn't"),
        # What the official script does beyond its description.
        ("Nike-shoes", "nike shoes"),
        ("left -side", "left side"),
        ("1,000 red/blue", "1000 redblue"),
        ("3.5 miles.", "3.5 miles"),
        ("None", "0"),
        ("shouldnt've", "shouldn't've"),
        ("yall'd've", "y'all'd've"),
        ("twas", "'twas"),
        ("Im", "im"),
        ("its", "its"),
        ("somebody'd", "somebodyd"),
        ("\tThe  Ten\ndogs ", "10 dogs"),
        ("?", ""),
    ],
)
def test_answers_are_normalised_as_officially(answer, normalized):
    assert normalize_answer(answer) == normalized


@pytest.mark.parametrize("matches", range(11))
def test_vqa_accuracy_of_few_matches(load, matches):
    # The published steps: 0.3 for one match among ten, 0.6, 0.9, and 1 from four on.
    accuracy = [0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1][matches]
    references = [["red"] * matches + [f"other {index}" for index in range(10 - matches)]]
    assert load("vqa_accuracy").compute(predictions=["Red."], references=references) == {
        "vqa_accuracy": pytest.approx(accuracy)
    }


def test_vqa_accuracy_is_the_mean_of_the_questions(load):
    predictions = ["red", "blue", "2", "a dog"]
    references = [["red"] * 2 + ["blue"] * 8, ["blue"] * 10, ["two"] * 3 + ["one"] * 7, ["cat"] * 10]
    accuracy = load("vqa_accuracy").compute(predictions=predictions, references=references)
    assert accuracy == {"vqa_accuracy": pytest.approx((0.6 + 1 + 0.9 + 0) / 4)}


@pytest.mark.parametrize("count", [1, 9, 11])
def test_vqa_accuracy_needs_ten_answers(load, count):
    with pytest.raises(ValueError, match=rf"references\[1\] has {count} answers: VQA accuracy is defined for 10"):
        load("vqa_accuracy").compute(predictions=["a", "b"], references=[["a"] * 10, ["b"] * count])


def test_exact_match_is_of_normalised_answers(load):
    predictions = ["Yes.", "two", "the left side", "dog", ""]
    references = ["yes", "2", "left side", "cat", "no"]
    assert load("exact_match").compute(predictions=predictions, references=references) == {"exact_match": 0.6}


@pytest.mark.parametrize(("prediction", "score"), [("A", 1), ("a.", 1), ("(A)", 1), ("B", 0), ("", 0), ("the", 0)])
def test_option_a_is_more_than_an_article(load, prediction, score):
    assert load("exact_match").compute(predictions=[prediction], references=["A"]) == {"exact_match": score}


@pytest.mark.parametrize(
    ("true_yes", "false_yes", "published"),
    [
        # Rows of table 3 (MSCOCO) of the POPE paper, whose counts follow from its 1500 questions of each label: LLaVA
        # and MiniGPT-4 on random objects, LLaVA on popular and InstructBLIP on adversarial ones.
        (1497, 1364, (54.43, 52.32, 99.80, 68.65, 95.37)),
        (1240, 405, (77.83, 75.38, 82.67, 78.86, 54.83)),
        (1497, 1424, (52.43, 51.25, 99.80, 67.72, 97.37)),
        (1400, 669, (74.37, 67.67, 93.33, 78.45, 68.97)),
    ],
)
def test_pope_gives_the_papers_rows(load, true_yes, false_yes, published):
    predictions = ["Yes"] * true_yes + ["No"] * (1500 - true_yes) + ["Yes"] * false_yes + ["No"] * (1500 - false_yes)
    result = load("pope").compute(predictions=predictions, references=["yes"] * 1500 + ["no"] * 1500)
    assert list(result) == ["accuracy", "precision", "recall", "f1", "yes_ratio"]
    assert tuple(100 * value for value in result.values()) == pytest.approx(published, abs=0.005001)


@pytest.mark.parametrize(
    ("answer", "yes_ratio"),
    [
        ("No", 0),
        ("no, there is none", 0),
        ("There is not.", 0),
        ("Yes, there is", 1),
        ("Yes. There is no doubt", 1),  # the first sentence alone counts
        ("Nothing", 1),  # whole words only
        ("NO", 1),  # the script knows three spellings
        ("", 1),
    ],
)
def test_pope_reads_free_answers_as_its_script_does(load, answer, yes_ratio):
    assert load("pope").compute(predictions=[answer], references=["Yes"])["yes_ratio"] == yes_ratio


def test_pope_without_a_yes_is_zero_and_no_error(load):
    result = load("pope").compute(predictions=["no", "no"], references=["no", "yes"])
    assert result == {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}


# Images of each of MME's subtasks, and the output of its official script for InternVL-Chat-V1.5, which that model's
# documentation prints.
PUBLISHED_MME = {
    "existence": (30, 190.0),
    "count": (30, 175.0),
    "position": (30, 171.66666666666669),
    "color": (30, 178.33333333333331),
    "posters": (147, 173.8095238095238),
    "celebrity": (170, 142.05882352941177),
    "scene": (200, 156.5),
    "landmark": (200, 179.5),
    "artwork": (200, 144.0),
    "OCR": (20, 147.5),
    "commonsense_reasoning": (70, 133.57142857142858),
    "numerical_calculation": (20, 117.5),
    "text_translation": (20, 185.0),
    "code_reasoning": (20, 97.5),
}


def test_mme_gives_published_scores(load):
    rows = []
    for subtask, (num_images, score) in PUBLISHED_MME.items():
        # An image adds 200 / n where both answers are right and 50 / n where one is: the fewest ones that fit.
        both, one = divmod(round(score * num_images / 50), 4)
        for image in range(num_images):
            right = (image < both + one, image < both)
            rows += [(subtask, f"{image}.png", "Yes", "Yes, it is" if right[0] else "No")]
            rows += [(subtask, f"{image}.png", "No", "no" if right[1] else "I cannot tell")]
    random.Random(0).shuffle(rows)
    subtasks, image_ids, references, predictions = map(list, zip(*rows, strict=True))
    metric = load("mme")
    half = len(rows) // 2
    for part in (slice(None, half), slice(half, None)):
        metric.add_batch(
            predictions=predictions[part],
            references=references[part],
            subtasks=subtasks[part],
            image_ids=image_ids[part],
        )
    result = metric.compute()
    scores = {subtask: values["score"] for subtask, values in result["subtasks"].items()}
    assert scores == pytest.approx({subtask: score for subtask, (_, score) in PUBLISHED_MME.items()})
    assert result["perception"] == pytest.approx(1658.3683473389356)
    assert result["cognition"] == pytest.approx(533.5714285714286)


def test_mme_by_hand(load):
    # Two images, three of four answers right, both of one image: 75 % and 50 %.
    result = load("mme").compute(
        predictions=[" Yes.", "Not at all", "It is so: yes", "no"],
        references=["Yes", "No", "Yes", "No"],
        subtasks=["OCR"] * 4,
        image_ids=["a", "a", "b", "b"],
    )
    assert result == {
        "perception": 125.0,
        "cognition": 0,
        "subtasks": {"OCR": {"accuracy": 75.0, "accuracy_plus": 50.0, "score": 125.0}},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subtasks": ["existence", "ocr"]}, r"subtasks\[1\] is 'ocr': MME has existence, .*OCR"),
        ({"image_ids": ["a", "b"]}, r"Image 'a' of subtask 'OCR' has 1 questions: MME asks 2"),
        ({"references": ["Yes", "true"]}, r"references\[1\] is 'true': a label is 'yes' or 'no'"),
        ({"image_ids": None}, r"image_ids is None"),
        ({"image_ids": [7, 7]}, r"image_ids\[0\] is 7, of type int: a str is needed"),
    ],
)
def test_mme_refuses_what_it_cannot_score(load, changes, message):
    columns = {"predictions": ["yes"] * 2, "references": ["yes"] * 2, "subtasks": ["OCR"] * 2, "image_ids": ["a"] * 2}
    with pytest.raises(ValueError, match=message):
        load("mme").compute(**columns | changes)


@pytest.mark.parametrize(
    ("name", "predictions", "references", "message"),
    [
        ("pope", ["yes", None], ["yes", "no"], r"predictions\[1\] is None, of type NoneType: a str is needed"),
        ("pope", ["yes", "no"], ["yes"], r"references has 1 entries and predictions has 2"),
        ("pope", ["yes"], None, r"references is None: a list"),
        ("pope", "yes", ["yes"] * 3, r"predictions is 'yes': a list"),
        ("pope", [], [], r"predictions is empty"),
        ("exact_match", ["red", "red"], ["red", " "], r"references\[1\] is ' ': a right answer is needed"),
        ("vqa_accuracy", ["a", "b"], [["a"] * 10, []], r"references\[1\] is \[\]: a list of at least one str"),
        ("vqa_accuracy", ["a", "b"], [["a"] * 10, "b" * 10], r"references\[1\] is 'bbbbbbbbbb': a list"),
        ("vqa_accuracy", ["a"], [["a"] * 9 + [4]], r"references\[0\]\[9\] is 4, of type int: a str is needed"),
        ("cider", ["a", "b"], [["a"], []], r"references\[1\] is \[\]"),
        ("cider", ["a"], [["a"]], r"needs at least 2, and found 1"),
    ],
)
def test_bad_input_names_index_and_column(load, name, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        load(name).compute(predictions=predictions, references=references)


CAPTIONS = ["A man's hat (red) is on the bench.", "Two dogs,\rrunning on a beach", "", "Une tasse de café: vide!"]
HUMAN_CAPTIONS = [
    ["A red hat is lying on a bench.", 'The hat of a man -- "red"...'],
    ["Two dogs run on a beach;\u2028both wet", "Dogs running on the beach"],
    ["A street at night."],
    ["Une tasse de café", "An empty cup."],
]
# The same as the Penn Treebank tokenizer has it: clitics apart, lower case, no punctuation. Brackets stay.
TOKENS = ["a man 's hat -lrb- red -rrb- is on the bench", "two dogs running on a beach", "", "une tasse de café vide"]
HUMAN_TOKENS = [
    ["a red hat is lying on a bench", "the hat of a man red"],
    ["two dogs run on a beach both wet", "dogs running on the beach"],
    ["a street at night"],
    ["une tasse de café", "an empty cup"],
]


def test_cider_is_pycocoevalcaps(load):
    expected, _ = CiderScorer().compute_score(
        dict(enumerate(HUMAN_TOKENS)), {index: [tokens] for index, tokens in enumerate(TOKENS)}
    )
    result = load("cider").compute(predictions=CAPTIONS, references=HUMAN_CAPTIONS)
    assert result == {"cider": pytest.approx(expected, rel=1e-12)}


def test_cider_needs_no_java_of_the_machine(load, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    captions = ["a red hat on a bench", "two dogs run on a beach"]
    # The bounds that are known of CIDEr-D: 10 for the references themselves, 0 without a word in common.
    assert load("cider").compute(predictions=captions, references=[[caption] for caption in captions]) == {
        "cider": pytest.approx(10)
    }
    assert load("cider").compute(predictions=captions, references=[["street"], ["café"]]) == {"cider": 0}
