"""What serves a checkpoint: vLLM's plug-in, the network policy for images, features kept for the next question."""
