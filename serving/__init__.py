"""Serving a checkpoint: vLLM's plug-in, checks of requests and images, and a cache of image features."""
