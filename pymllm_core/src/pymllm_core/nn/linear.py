"""The linear node: norm, projection, activation and residual as one call, in whatever format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pymllm_core.nn import ops
from pymllm_core.nn.int8_head import Int8HeadScheme
from pymllm_core.nn.norm import RMSNorm
from pymllm_core.protocols.kernel import LinearKernel
from pymllm_core.protocols.quant import LinearLayer, LinearScheme, Reader, WeightSlot


class DenseScheme:
    """Weights in the computation's dtype: the scheme of a linear that no method quantises."""

    name = "dense"
    operation = ops.LINEAR

    def __init__(self, layer: LinearLayer, dtype: torch.dtype) -> None:
        self.shape: Mapping[str, int] = {"K": layer.in_features, "N": layer.out_features}
        self._layer = layer
        self._dtype = dtype

    def slots(self) -> list[WeightSlot]:
        layer, dtype = self._layer, self._dtype
        slots = [
            WeightSlot(f"{part.name}.weight", (part.out_features, layer.in_features), dtype)
            for part in layer.parts
        ]
        if layer.bias:
            slots += [WeightSlot(f"{part.name}.bias", (part.out_features,), dtype) for part in layer.parts]
        return slots

    def load(self, read: Reader, device: torch.device) -> dict[str, Tensor]:
        slots = self.slots()
        count = len(self._layer.parts)
        tensors = {"weight": fuse(slots[:count], read, device)}
        if self._layer.bias:
            tensors["bias"] = fuse(slots[count:], read, device)
        return tensors


def fuse(slots: list[WeightSlot], read: Reader, device: torch.device) -> Tensor:
    """Stack the slots' tensors along dimension 0 on `device`; a single one that is there is not copied."""
    if len(slots) == 1:
        tensor = read(slots[0])
        assert tensor is not None
        return tensor.to(device=device, dtype=slots[0].dtype)
    rows = sum(slot.shape[0] for slot in slots)
    fused = torch.empty((rows, *slots[0].shape[1:]), dtype=slots[0].dtype, device=device)
    start = 0
    for slot in slots:
        tensor = read(slot)
        assert tensor is not None
        fused[start : start + slot.shape[0]].copy_(tensor)
        start += slot.shape[0]
    return fused


class Linear:
    """``y = act(norm(x) @ W.T + bias) + residual``; see `protocols.kernel.LinearKernel`.

    What the kernel does not fuse is composed here from plain torch.
    """

    __slots__ = ("_apply", "_fuses", "_packed", "kernel", "layer", "scheme")

    def __init__(self, layer: LinearLayer, scheme: LinearScheme, kernel: LinearKernel) -> None:
        self.layer = layer
        self.scheme = scheme
        self.kernel = kernel
        # A bias added from outside comes before activation and residual, which then stay outside too.
        outside = {"silu_mul", "residual"} if layer.bias and "bias" not in kernel.fuses else set()
        self._fuses = kernel.fuses - outside
        self._apply = kernel.apply
        self._packed: Any = None

    def slots(self) -> list[WeightSlot]:
        """What the checkpoint must hold for this node."""
        return self.scheme.slots()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights once they are loaded, in their format; every step reads them once."""
        if isinstance(self.scheme, Int8HeadScheme):
            return self.scheme.resident_bytes
        return sum(slot.num_bytes for slot in self.slots() if not slot.optional)

    def load(self, read: Reader, device: torch.device) -> None:
        """Read and repack the weights; afterwards the node can be called."""
        tensors = self.scheme.load(read, device)
        act = self.layer.act if self.layer.act in self._fuses else None
        bias = None if "bias" in self._fuses else tensors.pop("bias", None)
        self._packed = self.kernel.pack(tensors, act=act)
        if bias is not None:
            self._apply = _with_bias(self.kernel, bias)

    def __call__(
        self,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x: [M, in_features]. norm is applied to x first; residual is added to the result last."""
        fuses = self._fuses
        before = None
        if norm is not None:
            if "norm" in fuses:
                before = (norm.weight, norm.eps)
            else:
                x = norm(x)
        act = self.layer.act
        if (act is None or act in fuses) and (residual is None or "residual" in fuses):
            return self._apply(x, self._packed, norm=before, residual=residual, out_dtype=out_dtype)
        y = self._apply(x, self._packed, norm=before, out_dtype=out_dtype)
        if act is not None and act not in fuses:
            y = ops.silu_mul(y)
        return y if residual is None else y + residual


def _with_bias(kernel: LinearKernel, bias: Tensor) -> Any:
    """The kernel's `apply` with the bias added, for kernels that fuse none."""

    def apply(x: Tensor, packed: Any, *, norm: Any = None, out_dtype: Any = None, **_: None) -> Tensor:
        return kernel.apply(x, packed, norm=norm, out_dtype=out_dtype) + bias

    return apply
