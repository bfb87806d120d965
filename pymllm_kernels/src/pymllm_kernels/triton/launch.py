"""What every launch asks about: the device's multiprocessors, and programmatic dependent launch (PDL).

With PDL (CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; capability 9.0) a
kernel of a chain starts while the one before it drains. Each kernel of ours then waits before it reads or
writes anything that another kernel makes; weights, which none makes, are read before. A kernel of another
library in the chain is ordered as ever, because it lacks the launch attribute.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_CPU_INTERPRETER_SMS = 4
"""Triton's interpreter runs on the CPU; a small number there makes small shapes take the paths of large ones."""

LEAST_SHARED = 99 << 10
SHARED = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10}
"""Bytes of shared memory that a block may have, where more than LEAST_SHARED (CUDA programming guide, 5.1)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """sms: streaming multiprocessors. major: of the compute capability. shared: bytes of shared memory that a
    block may have. pdl: whether PDL is used.
    """

    sms: int
    major: int
    shared: int
    pdl: bool


def _name_the_compiler() -> None:
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # it lies elsewhere in other versions, which then hash at the first launch
        return
    triton_key()


@functools.cache
def name_the_compiler() -> threading.Thread:
    """Let Triton work out the name of itself in its compile cache, which it keeps for all kernels.

    It is a hash over the whole compiler, a third of a second in which the interpreter is free for others: for what
    is loaded between the making of the kernels' nodes and the first launch. Returns the thread that does it, of which
    a process has one.
    """
    thread = threading.Thread(target=_name_the_compiler, name="pymllm-triton-key", daemon=True)
    thread.start()
    return thread


_pretended: list[Gpu] = []


def gpu(device: torch.device) -> Gpu:
    """The device's properties."""
    return _pretended[-1] if _pretended else _ask(device)


@functools.cache
def _ask(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu(_CPU_INTERPRETER_SMS, 8, LEAST_SHARED, pdl=False)
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    shared = SHARED.get(capability, LEAST_SHARED)
    return Gpu(properties.multi_processor_count, properties.major, shared, pdl=properties.major >= 9)


@contextmanager
def pretend(properties: Gpu) -> Iterator[None]:
    """Let launches be made for these properties, whatever the device: for measurements and `aot`."""
    _pretended.append(properties)
    try:
        yield
    finally:
        _pretended.pop()


def power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
