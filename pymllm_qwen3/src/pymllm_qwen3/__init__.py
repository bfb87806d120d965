"""Qwen3 for pymllm."""
