"""Contract of quantisation methods: which scheme serves a linear, and what a scheme stores and runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """A tensor that the checkpoint must hold. optional: a missing one is not an error.

    exact: the stored dtype must be `dtype` itself, as for packed codes, whose bits mean nothing in another.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    optional: bool = False
    exact: bool = False

    def accepts(self, dtype: torch.dtype) -> bool:
        """Whether a tensor stored in `dtype` can fill this slot.

        Floats of 16 bits and more become each other; those of 8 bits mean nothing without their scales.
        """
        if self.exact:
            return dtype == self.dtype
        if self.dtype.is_floating_point:
            return dtype.is_floating_point and dtype.itemsize > 1
        return not dtype.is_floating_point

    @property
    def num_bytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


Reader = Callable[[WeightSlot], "Tensor | None"]
"""Gives a slot's tensor as stored (memory-mapped, on the CPU); None for an absent optional one."""


Stored = Mapping[str, tuple[int, ...]]
"""Names and shapes of a checkpoint's tensors."""


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One projection of a fused linear: its name in the checkpoint and its rows."""

    name: str
    out_features: int


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear as the model asks for it: parts stacked along the rows, one input.

    act: None, or ``silu_mul`` where the parts are gate and up. module: the class of the parts in the
    original model, by which configs may name them; ``Embedding`` for an embedding and a head tied to it,
    ``Router`` for the router of experts, which is a Linear in some versions of transformers and not in others,
    and quantised only where the stored tensors say so.
    """

    parts: tuple[LinearPart, ...]
    in_features: int
    bias: bool = False
    act: str | None = None
    module: str = "Linear"

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)


class LinearScheme(Protocol):
    """How one linear is stored and which named operation runs it.

    operation: a name of `nn.ops`, e.g. ``linear`` or ``w8a8_linear``. shape: the dimensions by which a
    kernel for it is chosen, at least ``K`` and ``N``.
    """

    name: str
    operation: str
    shape: Mapping[str, int]

    def slots(self) -> list[WeightSlot]:
        """The tensors to be read from the checkpoint."""
        ...

    def load(self, read: Reader, device: torch.device) -> dict[str, Tensor]:
        """Read the slots into the fused tensors which the operation's kernels `pack`."""
        ...


class QuantMethod(Protocol):
    """Decides the scheme of every linear and embedding of one checkpoint.

    stored: what the checkpoint holds, None where that is not known (dummy weights, a plan without files).
    """

    def fuses(self, layer: LinearLayer, stored: Stored | None) -> bool:
        """Whether one scheme can serve all parts; where not, each part becomes a linear of its own."""
        ...

    def linear(self, layer: LinearLayer, dtype: torch.dtype, stored: Stored | None) -> LinearScheme | None:
        """The scheme, or None where the layer is stored unquantised. Raises CheckpointError naming a field.

        An embedding's scheme must have the operation ``w4a16_linear`` or ``w8a16_linear``.
        """
        ...


QuantMethodFactory = Callable[[Mapping[str, Any]], QuantMethod]
"""From a checkpoint's ``quantization_config``; raises CheckpointError naming the field not supported."""
