"""Checkpoints in and out: Hugging Face safetensors, converted Orbax folders, and the state of a training run."""
