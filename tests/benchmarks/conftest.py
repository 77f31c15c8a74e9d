"""What the benchmarks' tests share."""

from itertools import pairwise

import pytest
import torch


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Tiny models are measured on a CPU, wherever the tests run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def cells():
    """`cells(text)`: those of the Markdown tables in it, row by row, without their heads."""

    def read(text):
        lines = [line for line in text.splitlines() if line.startswith("|")]
        rows = [row for row, below in pairwise([*lines, ""]) if "|---" not in row + below]
        return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]

    return read
