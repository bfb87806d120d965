"""What every launch asks about: the device's multiprocessors, and programmatic dependent launch (PDL).

With PDL (CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; capability 9.0) a
kernel of a chain starts while the one before it drains. Each kernel of ours then waits before it reads or
writes anything that another kernel makes; weights, which none makes, are read before. A kernel of another
library in the chain is ordered as ever, because it lacks the launch attribute.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

_CPU_INTERPRETER_SMS = 4
"""Triton's interpreter runs on the CPU; a small number there makes small shapes take the paths of large ones."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """sms: streaming multiprocessors. major: of the compute capability."""

    sms: int
    major: int

    @property
    def pdl(self) -> bool:
        """Whether programmatic dependent launch works."""
        return self.major >= 9


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """The device's properties, asked for once."""
    if device.type != "cuda":
        return Gpu(_CPU_INTERPRETER_SMS, major=8)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, properties.major)


def power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
