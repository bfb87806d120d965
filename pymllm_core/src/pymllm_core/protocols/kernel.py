"""Contracts of kernels: implementations of the named operations of `nn.ops`."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

Norm = tuple[Tensor, float]
"""An RMSNorm in front of a linear: its weight [K] and epsilon."""


class LinearKernel(Protocol):
    """A linear node: ``y = act(norm(x) @ weight.T + bias) + residual``.

    fuses: which of ``norm``, ``bias``, ``silu_mul``, ``residual`` the kernel does itself; the core composes
    the rest from plain torch. The operation's name says which tensors `pack` receives; for ``linear`` it is
    ``weight`` [N, K] and an optional ``bias`` [N]. With act ``silu_mul`` the rows are [gate; up], N = 2 I,
    and the result has I columns.
    """

    fuses: frozenset[str]

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> Any:
        """Repack the loaded tensors once. The caller drops its own references afterwards."""
        ...

    def apply(
        self,
        x: Tensor,
        packed: Any,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x: [M, K] in the computation's dtype. Returns [M, N], or [M, N / 2] after ``silu_mul``.

        residual may be overwritten, and the result may lie in its memory: the caller has no more use for it.
        """
        ...


class ExpertsKernel(Protocol):
    """Routed experts of one format, all in one call; defined by `nn.moe_ops.moe_experts`.

    graph_safe: `apply` neither reads the device nor depends on what the tensors hold, so that it may be captured
    in a CUDA graph.
    """

    graph_safe: bool

    def pack(self, gate_up: dict[str, Tensor], down: dict[str, Tensor]) -> Any:
        """Repack the loaded tensors once. The caller drops its own references afterwards.

        Each holds the tensors of the experts' linear, stacked: ``weight`` [E, N, K], ``scale`` [E, N, G], and so
        on. The rows of gate_up are [gate; up].
        """
        ...

    def apply(
        self, x: Tensor, weights: Tensor, ids: Tensor, packed: Any, *, residual: Tensor | None = None
    ) -> Tensor:
        """x, residual: [T, H]; weights: [T, k] float32; ids: [T, k] integers. Returns [T, H] in x's dtype."""
        ...
