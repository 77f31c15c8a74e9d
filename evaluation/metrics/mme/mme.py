"""MME: perception and cognition scores over pairs of yes-no questions."""

from collections import defaultdict

from delta_llava.evaluation.metrics import checks


PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


class Mme(checks.TextMetric):
    """
    MME asks two yes-no questions about each image. The score of a subtask is the percentage of questions answered right
    plus the percentage of images with both answered right, so at most 200. Perception is the sum over its ten subtasks
    (2000), cognition that over its four (800). An answer is read as the official script reads it: "yes" if the first
    four letters of the stripped, lower-cased text hold "yes", else "no" if they hold "no", else a wrong answer.

    Args:
        predictions (`list[str]`): One answer per question.
        references (`list[str]`): The labels, "yes" or "no" in any case.
        subtasks (`list[str]`): The subtask of each question, by its official name.
        image_ids (`list[str]`): The image of each question; the two questions of an image need not be neighbours.

    Returns:
        `dict`: `perception` and `cognition` (`float`), each the sum over those of its subtasks that were given, 0 if
        there are none, and `subtasks` (`dict`), which holds for each of these `accuracy` and `accuracy_plus` in percent
        and their sum `score`.

    Raises:
        ValueError: If an entry is not a string, a label is neither "yes" nor "no", a subtask is unknown, or an image
            does not have two questions in a subtask.
    """

    COLUMNS = dict.fromkeys(("predictions", "references", "subtasks", "image_ids"), str)
    SOURCE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
    CITATION = """
@article{fu2023mme,
  title={{MME}: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models},
  author={Fu, Chaoyou and Chen, Peixian and Shen, Yunhang and Qin, Yulei and Zhang, Mengdan and Lin, Xu and others},
  journal={arXiv:2306.13394},
  year={2023}
}
"""

    def _compute(self, predictions, references, subtasks, image_ids):
        labels = checks.check_labels(references)
        images = defaultdict(lambda: defaultdict(list))
        for index, subtask in enumerate(subtasks):
            if subtask not in PERCEPTION + COGNITION:
                allowed = ", ".join(PERCEPTION + COGNITION)
                raise ValueError(f"subtasks[{index}] is {subtask!r}: MME has {allowed}.")
            right = read_answer(predictions[index]) == labels[index]
            images[subtask][image_ids[index]].append(right)
        scores = {name: subtask_score(name, images[name]) for name in PERCEPTION + COGNITION if name in images}
        return {
            "perception": sum(scores[name]["score"] for name in PERCEPTION if name in scores),
            "cognition": sum(scores[name]["score"] for name in COGNITION if name in scores),
            "subtasks": scores,
        }


def subtask_score(subtask: str, images: dict[str, list[bool]]) -> dict[str, float]:
    """The scores of a subtask, from which questions about each image were answered right."""
    for image_id, right in images.items():
        if len(right) != 2:
            raise ValueError(f"Image {image_id!r} of subtask {subtask!r} has {len(right)} questions: MME asks 2.")
    accuracy = 100 * sum(map(sum, images.values())) / (2 * len(images))
    accuracy_plus = 100 * sum(map(all, images.values())) / len(images)
    return {"accuracy": accuracy, "accuracy_plus": accuracy_plus, "score": accuracy + accuracy_plus}


def read_answer(answer: str) -> str | None:
    """A free answer as MME's script reads it: "yes", "no", or neither."""
    start = answer.strip().lower()[:4]
    return next((label for label in ("yes", "no") if label in start), None)
