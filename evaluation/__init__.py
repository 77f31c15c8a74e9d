"""What a checkpoint is worth: the paper's benchmarks, their metrics, and pictures of where an answer comes from."""
