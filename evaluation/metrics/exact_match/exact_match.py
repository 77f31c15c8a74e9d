"""Exact match of normalized answers: GQA, ScienceQA, and any question with one right answer."""

from operator import eq
from statistics import fmean

from delta_llava.evaluation.metrics import checks
from delta_llava.evaluation.metrics.normalization import comparable


class ExactMatch(checks.TextMetric):
    """
    Share of the predictions that equal their reference after the normalization of the VQA evaluation. If that leaves
    nothing, articles stay: "a." and "(A)" match the option "A" of a multiple choice, an empty prediction does not.

    Args:
        predictions (`list[str]`): One answer per question.
        references (`list[str]`): The right answer to each question.

    Returns:
        `dict`: `exact_match` (`float`), from 0 to 1.

    Raises:
        ValueError: If an entry is not a string, or a reference is blank.
    """

    def _compute(self, predictions, references):
        for index, reference in enumerate(references):
            if not reference.strip():
                raise ValueError(f"references[{index}] is {reference!r}: a right answer is needed.")
        return {"exact_match": fmean(map(eq, map(comparable, predictions), map(comparable, references)))}
