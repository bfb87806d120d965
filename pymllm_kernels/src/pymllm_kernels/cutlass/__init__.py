"""Products of int8 matrices by CUTLASS, compiled with nvcc at their first use or ahead of time."""
