"""Training: both stages, their data and their recipes."""

from importlib.util import find_spec


if not all(map(find_spec, ("datasets", "trl", "peft", "matplotlib", "filelock", "pyarrow"))):
    raise ImportError('Training needs more packages: run `pip install "delta-llava[train]"`.')
