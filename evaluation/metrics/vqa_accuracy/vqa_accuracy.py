"""VQA accuracy over ten answers: VQAv2, TextVQA, VizWiz."""

from statistics import fmean

from delta_llava.evaluation.metrics import checks
from delta_llava.evaluation.metrics.normalization import normalize_answer


class VqaAccuracy(checks.TextMetric):
    """
    Accuracy of open-ended answers against those of ten people. Each of the ten is left out once, the answer scores
    min(matches among the other nine / 3, 1), and the ten scores are averaged: 0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, 4 or
    more matches. Predictions and references are always normalized, as the official evaluation describes it. Its scripts
    leave the references, and in some versions the prediction too, as they are if all ten people wrote the same.

    Args:
        predictions (`list[str]`): One answer per question.
        references (`list[list[str]]`): Exactly ten answers per question; with fewer, full marks would be out of reach.

    Returns:
        `dict`: `vqa_accuracy` (`float`), the mean over the questions, from 0 to 1.

    Raises:
        ValueError: If an entry has the wrong type, or a question does not have ten answers.
    """

    COLUMNS = {"predictions": str, "references": list}
    SOURCE = "https://visualqa.org/evaluation.html"
    CITATION = """
@inproceedings{antol2015vqa,
  title={{VQA}: Visual Question Answering},
  author={Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and
          Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={ICCV},
  year={2015}
}
"""

    def _compute(self, predictions, references):
        for index, answers in enumerate(references):
            if len(answers) != 10:
                raise ValueError(
                    f"references[{index}] has {len(answers)} answers: VQA accuracy is defined for 10. "
                    "Questions with one answer are for exact_match."
                )
        return {"vqa_accuracy": fmean(map(question_accuracy, predictions, references))}


def question_accuracy(prediction: str, answers: list[str]) -> float:
    """The accuracy of one answer against those of ten people, from 0 to 1."""
    prediction = normalize_answer(prediction)
    agrees = [normalize_answer(answer) == prediction for answer in answers]
    return sum(min((sum(agrees) - left_out) / 3, 1) for left_out in agrees) / len(answers)
