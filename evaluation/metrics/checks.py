"""What the metrics share: the form of `evaluate` modules, and checks that text is text and labels are labels."""

from inspect import cleandoc

import datasets
import evaluate


class TextMetric(evaluate.Metric):
    """
    A metric whose columns hold strings or lists of strings, checked before they are stored. Its documentation is that
    of the class.

    `evaluate` looks only at the first entry of a column and turns whatever else it finds into a string: the answer 4
    into "4", and all of `[["red"], ["blue", 4]]` into strings of JSON with their quotes, which then match nothing.
    """

    COLUMNS = {"predictions": str, "references": str}  # or list, for lists of strings
    SOURCE = ""  # address of the metric's definition
    CITATION = ""

    def _info(self):
        description, _, inputs = cleandoc(self.__doc__).partition("\nArgs:")
        types = {str: datasets.Value("string"), list: datasets.List(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=description,
            inputs_description=f"Args:{inputs}",
            citation=self.CITATION,
            features=datasets.Features({name: types[kind] for name, kind in self.COLUMNS.items()}),
            reference_urls=[self.SOURCE] if self.SOURCE else [],
        )

    def add_batch(self, *, predictions=None, references=None, **columns):
        """
        Adds examples for `compute` to score.

        Args:
            predictions (`list[str]`): One answer or caption per example.
            references (`list[str]` or `list[list[str]]`): One entry per example, as the metric describes them.
            **columns (`list[str]`): The metric's further columns.

        Raises:
            ValueError: If a column is missing, empty or of another length than the first, or an entry is not of the
                type that the metric takes. Nothing of the batch is stored then.
        """
        columns = {"predictions": predictions, "references": references, **columns}
        for name, kind in self.COLUMNS.items():
            check_column(name, columns.get(name), kind)
            if len(columns[name]) != len(predictions):
                raise ValueError(
                    f"{name} has {len(columns[name])} entries and predictions has {len(predictions)}: each needs one "
                    "per example."
                )
        super().add_batch(**columns)

    def add(self, *, prediction=None, reference=None, **columns):
        """[`add_batch`] of one example: its prediction, its reference and its entries of further columns."""
        columns = {name: [value] for name, value in columns.items()}
        self.add_batch(predictions=[prediction], references=[reference], **columns)


def check_column(name: str, column, kind: type):
    """
    Checks that a column holds strings, or non-empty lists of them where `kind` is `list`.

    Raises:
        ValueError: If the column is missing, empty or a string, or an entry is of another type; the message names the
            column and the entry.
    """
    if column is None or isinstance(column, str):
        raise ValueError(f"{name} is {column!r}: a list with one entry per example is needed.")
    if len(column) == 0:
        raise ValueError(f"{name} is empty: there is nothing to score.")
    for index, entry in enumerate(column):
        texts = {f"{name}[{index}]": entry}
        if kind is list:
            if not isinstance(entry, (list, tuple)) or len(entry) == 0:
                raise ValueError(f"{name}[{index}] is {entry!r}: a list of at least one str is needed.")
            texts = {f"{name}[{index}][{position}]": text for position, text in enumerate(entry)}
        for where, text in texts.items():
            if not isinstance(text, str):
                raise ValueError(f"{where} is {text!r}, of type {type(text).__name__}: a str is needed.")


def check_labels(references: list[str]) -> list[str]:
    """The labels of yes-no questions in lower case; raises a `ValueError` if one is neither "yes" nor "no"."""
    labels = [label.lower() for label in references]
    for index, label in enumerate(labels):
        if label not in ("yes", "no"):
            raise ValueError(f"references[{index}] is {references[index]!r}: a label is 'yes' or 'no'.")
    return labels
