"""compressed-tensors checkpoints for pymllm."""
