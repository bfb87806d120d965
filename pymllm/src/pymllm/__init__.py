"""pymllm as one requirement, and the entry points of the original runtime under their names."""
