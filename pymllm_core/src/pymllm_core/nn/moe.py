"""The node of routed experts: norm, router, a few of many SwiGLU experts, residual, as one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pymllm_core.errors import CheckpointError
from pymllm_core.nn import ops
from pymllm_core.nn.linear import Linear
from pymllm_core.nn.moe_ops import Route
from pymllm_core.nn.norm import RMSNorm
from pymllm_core.nn.split_linear import SplitLinear
from pymllm_core.protocols.kernel import ExpertsKernel
from pymllm_core.protocols.quant import LinearLayer, LinearScheme, Reader, WeightSlot

Format = tuple[LinearLayer, LinearScheme]
"""A projection and how it is stored."""

Formats = list[Format]
"""Those of a fused linear: one, or one for each part where the parts are stored unlike."""

T = TypeVar("T")
Pair = tuple[T, T]
"""Of an expert: what concerns gate and up, and what concerns down."""


class Experts(Protocol):
    """All experts of a layer. graph_safe: whether a call may be captured in a CUDA graph."""

    graph_safe: bool

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor, residual: Tensor | None) -> Tensor: ...


class MoE:
    """``residual + Σ weight_e · expert_e(norm(x))`` over the `top_k` experts that the router gives a token."""

    __slots__ = ("_experts", "_renormalise", "_route", "_router", "_top_k", "graph_safe")

    def __init__(
        self, router: Linear, route: Route, experts: Experts, *, top_k: int, renormalise: bool
    ) -> None:
        self._router = router
        self._route = route
        self._experts = experts
        self._top_k = top_k
        self._renormalise = renormalise
        self.graph_safe = experts.graph_safe

    def __call__(self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """x: [T, hidden]. norm is applied to x first; residual is added to the result last."""
        if norm is not None:
            x = norm(x)
        # In float32, so that rounding makes no two experts equal.
        logits = self._router(x, out_dtype=torch.float32)
        weights, ids = self._route(logits, self._top_k, self._renormalise)
        return self._experts(x, weights, ids, residual)


def common_format(experts: Sequence[Pair[Formats]], top_k: int) -> tuple[str, Mapping[str, int]]:
    """The operation that serves experts which are stored like these, and its dimensions."""
    (first, *_), (last, *_) = experts[0]
    dimensions = {
        "experts": len(experts),
        "top_k": top_k,
        "K": first[0].in_features,
        "N": sum(layer.out_features for layer, _ in experts[0][0]),
    }
    found = {
        tuple((scheme.operation, *sorted(scheme.shape.items())) for _, scheme in (*gate_up, *down))
        for gate_up, down in experts
    }
    if len(found) > 1 or len(experts[0][0]) > 1 or first[1].operation != last[1].operation:
        return ops.MIXED_EXPERTS, dimensions
    for name, value in first[1].shape.items():
        dimensions.setdefault(name, value)
    for name, value in last[1].shape.items():
        if name not in ("K", "N"):
            dimensions[f"down_{name}"] = value
    return ops.EXPERTS_OF[first[1].operation], dimensions


class OneByOne:
    """The implementation of every operation of experts by linears, each with the kernel chosen for its shape."""


ONE_BY_ONE = f"{__name__}:OneByOne"


class Expert:
    """One expert of its own linears. active_share: how many of the tokens need it, on average (0 to 1)."""

    __slots__ = ("active_share", "down", "gate_up")

    def __init__(
        self, gate_up: Linear | SplitLinear, down: Linear | SplitLinear, active_share: float
    ) -> None:
        self.gate_up = gate_up
        self.down = down
        self.active_share = active_share

    @property
    def formats(self) -> Formats:
        """Every projection and how it is stored."""
        nodes = [
            linear
            for node in (self.gate_up, self.down)
            for linear in (node.parts if isinstance(node, SplitLinear) else [node])
        ]
        return [(node.layer, node.scheme) for node in nodes]

    def slots(self) -> list[WeightSlot]:
        return self.gate_up.slots() + self.down.slots()

    def load(self, read: Reader, device: torch.device) -> None:
        self.gate_up.load(read, device)
        self.down.load(read, device)


class SingleExperts:
    """Experts that run one after another, each over the rows that were routed to it.

    Which experts are needed is read by the host, so that no graph can hold this. An expert's rows are added in
    the order of the experts' numbers, whatever else is in the batch.
    """

    graph_safe = False

    def __init__(self, experts: list[Expert]) -> None:
        self._experts = experts

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor, residual: Tensor | None) -> Tensor:
        tokens, top_k = ids.shape
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if residual is not None:
            total.copy_(residual)
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self._experts)).tolist()
        rows = order // top_k
        scale = weights.reshape(-1, 1)[order]
        start = 0
        for expert, count in zip(self._experts, counts, strict=True):
            if not count:
                continue
            piece = slice(start, start + count)
            mine = x if tokens == 1 else x[rows[piece]]
            y = expert.down(expert.gate_up(mine), out_dtype=torch.float32)
            total.index_add_(0, rows[piece], y * scale[piece])
            start += count
        return total.to(x.dtype)


class StackedExpert:
    """One expert as rows of stacked tensors; the last one to be loaded hands them to the kernel."""

    __slots__ = ("_index", "_stack", "active_share", "formats")

    def __init__(self, stack: StackedExperts, index: int, formats: Formats, active_share: float) -> None:
        self._stack = stack
        self._index = index
        self.formats = formats
        self.active_share = active_share

    def slots(self) -> list[WeightSlot]:
        return [slot for _, scheme in self.formats for slot in scheme.slots()]

    def load(self, read: Reader, device: torch.device) -> None:
        loaded = [scheme.load(read, device) for _, scheme in self.formats]
        self._stack.put(self._index, loaded, self.formats[0][0].parts[0].name)


class StackedExperts:
    """Experts of one format, whose tensors lie behind one another, [experts, ...], for one grouped kernel."""

    def __init__(self, kernel: ExpertsKernel, count: int) -> None:
        self.graph_safe = kernel.graph_safe
        self._kernel = kernel
        self._missing = set(range(count))
        self._count = count
        self._tensors: list[dict[str, Tensor]] = []
        self._packed: Any = None

    def put(self, index: int, loaded: list[dict[str, Tensor]], name: str) -> None:
        """Copy the tensors of gate and up, and of down, to their place; name: for messages."""
        if not self._tensors:
            self._tensors = [
                {key: t.new_empty((self._count, *t.shape)) for key, t in tensors.items()}
                for tensors in loaded
            ]
        for stacked, tensors in zip(self._tensors, loaded, strict=True):
            if stacked.keys() != tensors.keys():
                unlike = ", ".join(sorted(stacked.keys() ^ tensors.keys()))
                raise CheckpointError(
                    f"the experts beside {name} are not stored alike: only some have {unlike}; store them alike"
                )
            for key, tensor in tensors.items():
                stacked[key][index].copy_(tensor)
        self._missing.discard(index)
        if not self._missing:
            gate_up, down = self._tensors
            self._packed = self._kernel.pack(gate_up, down)
            self._tensors = []

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor, residual: Tensor | None) -> Tensor:
        return self._kernel.apply(x, weights, ids, self._packed, residual=residual)
