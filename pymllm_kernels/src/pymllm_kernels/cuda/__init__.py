"""Kernels in plain CUDA C++, compiled with nvcc at their first use or ahead of time."""
