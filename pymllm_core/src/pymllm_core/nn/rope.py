"""Rotary position tables (Su et al., arXiv:2104.09864), with the scalings that checkpoints ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymllm_core.errors import CheckpointError
from pymllm_core.protocols.quant import Reader, WeightSlot


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """theta: base of the frequencies. scaling: the checkpoint's parameters, empty for none."""

    theta: float
    scaling: Mapping[str, Any]

    @classmethod
    def read(cls, config: Mapping[str, Any], *, default_theta: float) -> RopeConfig:
        """From config.json in either form: ``rope_theta`` with ``rope_scaling``, or ``rope_parameters``.

        transformers 5 writes the second (one mapping with theta inside), published checkpoints the first.
        """
        stored = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(stored, Mapping):
            raise CheckpointError(f"config.json: the rope scaling is {stored!r}, expected an object")
        parameters = dict(stored)
        theta = parameters.pop("rope_theta", None) or config.get("rope_theta") or default_theta
        kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
        parameters.pop("type", None)
        if not isinstance(kind, str) or kind not in ("default", *_SCALINGS):
            raise CheckpointError(
                f"config.json: rope type {kind!r} is not supported; known: default, {', '.join(_SCALINGS)}"
            )
        for name, value in {"rope_theta": theta, **{n: parameters.get(n) for n in _NUMBERS}}.items():
            if value is None and name not in _REQUIRED.get(kind, ()):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise CheckpointError(
                    f"config.json: {name} of rope type {kind!r} is {value!r}, expected a positive number"
                )
        if parameters.get("partial_rotary_factor", 1) not in (None, 1):
            raise CheckpointError(
                "config.json: partial_rotary_factor of the rope parameters is not supported"
            )
        if kind == "default":
            return cls(float(theta), {})
        return cls(float(theta), {**parameters, "rope_type": kind})


def rotary_table(
    rope: RopeConfig, head_dim: int, max_positions: int, trained_positions: int, device: torch.device
) -> Tensor:
    """[max_positions, head_dim] float32: cosines of the head_dim / 2 frequencies, then their sines.

    trained_positions: ``max_position_embeddings``, which scalings relate to.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    factor = 1.0
    if rope.scaling:
        scale = _SCALINGS[rope.scaling["rope_type"]]
        frequencies, factor = scale(frequencies, rope, head_dim, trained_positions)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=1).to(device)


def _linear(frequencies: Tensor, rope: RopeConfig, head_dim: int, trained: int) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al., arXiv:2306.15595)."""
    return frequencies / float(rope.scaling["factor"]), 1.0


def _llama3(frequencies: Tensor, rope: RopeConfig, head_dim: int, trained: int) -> tuple[Tensor, float]:
    """Llama 3.1's scaling: long wavelengths are interpolated, short ones kept, a ramp in between."""
    scaling = rope.scaling
    factor, old = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = old / (2 * math.pi / frequencies)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / factor + keep * frequencies, 1.0


def _yarn(frequencies: Tensor, rope: RopeConfig, head_dim: int, trained: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., arXiv:2309.00071): NTK by parts and a softmax temperature.

    Frequencies that turn more than beta_fast times within the trained length are kept, those under
    beta_slow interpolated by `factor`, with a linear ramp over the dimensions between (their section 3.2).
    """
    scaling = rope.scaling
    old = float(scaling.get("original_max_position_embeddings") or trained)
    # As in transformers, an absent factor follows from the two lengths.
    factor = float(scaling.get("factor") or trained / old)
    fast, slow = float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1)

    def dimension(turns: float) -> float:
        return head_dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(fast), dimension(slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    # In the order of transformers: one unit in the last place is 1e-3 of a turn at position 40,000.
    keep = 1 - ramp
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    interpolated = 1.0 / (factor * rope.theta**exponents)
    frequencies = interpolated * (1 - keep) + frequencies * keep
    temperature = scaling.get("attention_factor")
    if temperature is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all:
            temperature = _mscale(factor, float(mscale)) / _mscale(factor, float(mscale_all))
        else:
            temperature = _mscale(factor, 1.0)
    return frequencies, float(temperature)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


_SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_NUMBERS = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)


class Rotary:
    """The table as a node of the graph, shared by all layers and made when weights are loaded."""

    __slots__ = ("_head_dim", "_positions", "_rope", "_trained", "table")

    def __init__(self, rope: RopeConfig, head_dim: int, positions: int, trained_positions: int) -> None:
        self._rope = rope
        self._head_dim = head_dim
        self._positions = positions
        self._trained = trained_positions
        self.table = torch.empty(0)

    def slots(self) -> list[WeightSlot]:
        return []

    def load(self, read: Reader, device: torch.device) -> None:
        self.table = rotary_table(self._rope, self._head_dim, self._positions, self._trained, device)
