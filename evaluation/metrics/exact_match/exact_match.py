"""Exact match of normalised answers: GQA, ScienceQA, and any question with one right answer."""

from operator import eq
from statistics import fmean

import datasets
import evaluate

from delta_llava.evaluation.metrics import checks
from delta_llava.evaluation.metrics.normalization import comparable


DESCRIPTION = """
Share of the predictions that equal their reference after the normalisation of the VQA evaluation. Where that leaves
nothing, articles stay: the option "A" of a multiple choice is matched by "a." and "(A)", not by an empty prediction.
"""
INPUTS = """
Args:
    predictions (`list[str]`): One answer per question.
    references (`list[str]`): The right answer of each question.

Returns:
    `dict`: `exact_match` (`float`), from 0 to 1.

Raises:
    ValueError: If an entry is not a string, or a reference is blank.
"""


class ExactMatch(checks.TextMetric):
    """Exact match (see `DESCRIPTION`)."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            inputs_description=INPUTS,
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        for index, reference in enumerate(references):
            if not reference.strip():
                raise ValueError(f"references[{index}] is {reference!r}: a right answer is needed.")
        return {"exact_match": fmean(map(eq, map(comparable, predictions), map(comparable, references)))}
