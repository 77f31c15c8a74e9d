"""Evaluation of a checkpoint: the paper's benchmarks, their metrics, and pictures of where an answer comes from."""
