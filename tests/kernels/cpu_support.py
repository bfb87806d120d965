"""What the CPU kernel tests share: the skip condition, random tensors, the error measure."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pymllm_kernels.cpu_library import REQUIRED_CPU_FLAGS, default_compiler


def _missing() -> str | None:
    if not shutil.which(default_compiler()):
        return f"no C++ compiler {default_compiler()!r}"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    absent = sorted(REQUIRED_CPU_FLAGS - set(flags))
    return f"the CPU lacks {', '.join(absent)}" if absent else None


needs_cpu_kernels = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


def randn(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal bf16 values."""
    return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16)


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A buffer in which nothing may be left as it is."""
    return torch.full((rows, columns), float("nan"), dtype=dtype)


def rel_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, NaN where got has one."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The norm in float64 with the two roundings to bf16 that transformers makes."""
    wide = x.double()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(torch.bfloat16)
    if weight is None:
        return normed.double()
    return (normed.double() * weight.double()).to(torch.bfloat16).double()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
