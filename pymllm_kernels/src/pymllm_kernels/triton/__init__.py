"""Triton kernels for NVIDIA GPUs from compute capability 8.0 on (Ampere, Orin, Ada, Hopper)."""
