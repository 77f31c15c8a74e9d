"""POPE: whether a model sees objects that are not there."""

from delta_llava.evaluation.metrics import checks


class Pope(checks.TextMetric):
    """
    Accuracy, precision, recall and F1 of yes-no answers, where "yes" is the positive class, and the share of "yes"
    among the answers. An answer is a "no" by the rule of the official script: the text before the first full stop,
    without commas and split at spaces, has the word "No", "no" or "not". All others are a "yes", even an empty one.

    Args:
        predictions (`list[str]`): One answer per question, in free words.
        references (`list[str]`): The labels, "yes" or "no" in any case.

    Returns:
        `dict`: `accuracy`, `precision`, `recall`, `f1` and `yes_ratio` (`float`), from 0 to 1. A ratio of nothing, such
        as the precision of a model that never says yes, is 0.

    Raises:
        ValueError: If an entry is not a string, or a label is neither "yes" nor "no".
    """

    SOURCE = "https://github.com/AoiDragon/POPE"
    CITATION = """
@inproceedings{li2023pope,
  title={Evaluating Object Hallucination in Large Vision-Language Models},
  author={Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
  booktitle={EMNLP},
  year={2023}
}
"""

    def _compute(self, predictions, references):
        says_yes = [not says_no(prediction) for prediction in predictions]
        is_yes = [label == "yes" for label in checks.check_labels(references)]
        hits = sum(said and true for said, true in zip(says_yes, is_yes, strict=True))
        precision = ratio(hits, sum(says_yes))
        recall = ratio(hits, sum(is_yes))
        return {
            "accuracy": ratio(sum(said == true for said, true in zip(says_yes, is_yes, strict=True)), len(is_yes)),
            "precision": precision,
            "recall": recall,
            "f1": ratio(2 * precision * recall, precision + recall),
            "yes_ratio": ratio(sum(says_yes), len(says_yes)),
        }


def says_no(answer: str) -> bool:
    """Whether POPE's script reads a free answer as a no; otherwise it is a yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.isdisjoint(words)


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
