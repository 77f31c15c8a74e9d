"""What the metrics ask of their inputs: text where text belongs, and labels that are labels."""

import datasets
import evaluate


class TextMetric(evaluate.Metric):
    """
    A metric whose columns hold strings or lists of strings, checked before they are stored.

    `evaluate` looks at the first entry of a column alone and turns whatever else it finds into a string: the answer 4
    into "4", and all of `[["red"], ["blue", 4]]` into strings of JSON with their quotes, which then match nothing.
    """

    def add_batch(self, *, predictions=None, references=None, **columns):
        """
        Adds examples to what `compute` scores.

        Args:
            predictions (`list[str]`): One answer or caption per example.
            references (`list[str]` or `list[list[str]]`): One entry per example, as the metric describes them.
            **columns (`list[str]`): The metric's further columns.

        Raises:
            ValueError: If a column is missing, empty or of another length than the first, or an entry is not of the
                type that the metric takes. Nothing of the batch is stored then.
        """
        columns = {"predictions": predictions, "references": references, **columns}
        for name, feature in self.features.items():
            check_column(name, columns.get(name), isinstance(feature, datasets.Value))
            if len(columns[name]) != len(columns["predictions"]):
                raise ValueError(
                    f"{name} has {len(columns[name])} entries and predictions has {len(columns['predictions'])}: "
                    "each needs one per example."
                )
        super().add_batch(**columns)

    def add(self, *, prediction=None, reference=None, **columns):
        """
        Adds one example to what `compute` scores.

        Args:
            prediction (`str`): The answer or caption.
            reference (`str` or `list[str]`): As the metric describes it.
            **columns (`str`): The example's entries of the metric's further columns.

        Raises:
            ValueError: As [`add_batch`].
        """
        columns = {name: [value] for name, value in columns.items()}
        self.add_batch(predictions=[prediction], references=[reference], **columns)


def check_column(name: str, column, holds_strings: bool):
    """
    Checks that a column holds what its metric takes.

    Args:
        name (`str`): Name of the column, for the error.
        column (`list`): The column.
        holds_strings (`bool`): Whether its entries are strings, or lists of them.

    Raises:
        ValueError: If the column is missing, empty or a string, or an entry is of the wrong type or an empty list.
    """
    if column is None or isinstance(column, str):
        raise ValueError(f"{name} is {column!r}: a list with one entry per example is needed.")
    if len(column) == 0:
        raise ValueError(f"{name} is empty: there is nothing to score.")
    for index, entry in enumerate(column):
        if holds_strings:
            if not isinstance(entry, str):
                raise ValueError(f"{name}[{index}] is {entry!r}, of type {type(entry).__name__}: a str is needed.")
            continue
        if not isinstance(entry, (list, tuple)) or len(entry) == 0:
            raise ValueError(f"{name}[{index}] is {entry!r}: a list of at least one str is needed.")
        for position, text in enumerate(entry):
            if not isinstance(text, str):
                raise ValueError(
                    f"{name}[{index}][{position}] is {text!r}, of type {type(text).__name__}: a str is needed."
                )


def check_labels(references: list[str]) -> list[str]:
    """
    Checks the labels of yes-no questions.

    Args:
        references (`list[str]`): "yes" or "no" in any case.

    Returns:
        `list[str]`: The labels in lower case.

    Raises:
        ValueError: If a label is neither.
    """
    labels = [label.lower() for label in references]
    for index, label in enumerate(labels):
        if label not in ("yes", "no"):
            raise ValueError(f"references[{index}] is {references[index]!r}: a label is 'yes' or 'no'.")
    return labels
