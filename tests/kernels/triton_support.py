"""What the tests of the Triton kernels share: where they run, random tensors, the error measure.

Where torch sees a CUDA device they run on it, elsewhere in Triton's interpreter, which executes a kernel as
NumPy on the CPU (`tests/kernels/conftest.py` switches it on before Triton is imported).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; it has wheels for Linux only")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""Half a unit in the last place: the relative error of one rounding at worst, thrice what it is in the norm."""


def _mend_interpreter() -> None:
    """Three faults of Triton 3.6's interpreter.

    It keeps bfloat16 as 16-bit integers: `tl.dot` multiplies the bit patterns, and a conversion from float32
    cuts off instead of rounding to even. And it makes a loop's bounds of arrays of one number, which
    NumPy 2.4 no longer converts.
    """
    from triton.runtime import interpreter

    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
    patch_tensor = interpreter._patch_lang_tensor

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), d, *rest)

    def round_to_even(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != interpreter.tl.float32 or target != interpreter.tl.bfloat16:
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded).astype(np.uint16)

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_index
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = round_to_even


if DEVICE.type == "cpu":
    _mend_interpreter()


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Normal values on the test's device, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def rel_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, NaN where got has one."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm in float64, without a rounding."""
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def swiglu(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
