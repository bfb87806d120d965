"""Kernels of the pymllm serving runtime, compiled on the machine that runs them."""

__version__ = "0.1.0"
