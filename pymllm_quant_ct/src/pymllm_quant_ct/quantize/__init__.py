"""``pymllm quantize``: weights rounded to nearest, written as a compressed-tensors checkpoint."""
