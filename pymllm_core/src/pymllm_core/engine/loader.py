"""Fill a graph's nodes, one after another, so that never more than one node is held twice."""

from __future__ import annotations

import threading
import zlib

import torch
from torch import Tensor

from pymllm_core.engine.checkpoint import Checkpoint
from pymllm_core.engine.status import Cancelled, Progress, ProgressCallback
from pymllm_core.nn.builder import Builder
from pymllm_core.nn.memory import return_freed_memory
from pymllm_core.protocols.quant import Reader, WeightSlot

TRIM_AFTER = 32 << 20
"""Bytes of weights after which what loading freed is given back to the system; half a millisecond each."""


def load_weights(
    builder: Builder,
    checkpoint: Checkpoint | None,
    device: torch.device,
    *,
    seed: int,
    progress: ProgressCallback,
    cancel: threading.Event,
) -> None:
    """Load every node of the graph from the checkpoint, or seeded random numbers where it is None.

    Raises CheckpointError before the first tensor is read if names or shapes do not fit, and Cancelled
    soon after `cancel` is set.
    """
    if checkpoint is None:
        read: Reader = DummyReader(seed, device)
    else:
        checkpoint.check([slot for node in builder.nodes for slot in node.slots()], builder.ignored)
        read = checkpoint.read
    # Of what is read: a node may keep less (an output head that is quantised as it is loaded).
    sizes = {id(node): sum(slot.num_bytes for slot in node.slots()) for node in builder.nodes}
    total, done = sum(sizes.values()), 0
    progress(Progress("loading weights", 0, total))
    kept = 0
    # The largest first: while a node is packed it is held twice, and then the others are not there yet.
    for node in sorted(builder.nodes, key=lambda node: -sizes[id(node)]):
        if cancel.is_set():
            raise Cancelled("loading was interrupted")
        node.load(read, device)
        if checkpoint is not None:
            checkpoint.release()
        size = sizes[id(node)]
        done, kept = done + size, kept + size
        if kept >= TRIM_AFTER:
            return_freed_memory()
            kept = 0
        progress(Progress("loading weights", done, total))


class DummyReader:
    """Seeded random weights for any shape (``load_format dummy``).

    One block of normal numbers is made a tensor and repeated: timings need unlike numbers, not
    independent ones, and an 8B model is filled in a second. Vectors of floats (norms) are ones, those of
    integers (indices, zero points) zeros; optional tensors are absent. Quantisation scales, known by their
    names' ending, are positive and so small that dequantised weights spread no wider than `STD`: with others
    the activations of a deep model leave float16's range.
    """

    BLOCK = 1 << 22
    STD = 0.02
    CODE_STD = 256 / 12**0.5
    """Of uniform 8-bit codes; 4-bit ones spread less, and so do the weights that they stand for."""
    INPUT_STEP = 0.05
    """Scale of static int8 activations: normalised inputs lie within 127 times that."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device

    def __call__(self, slot: WeightSlot) -> Tensor | None:
        if slot.optional:
            return None
        if slot.name.endswith("input_scale"):
            return torch.full(slot.shape, self.INPUT_STEP, dtype=slot.dtype, device=self._device)
        scale = slot.name.endswith("scale")
        if len(slot.shape) == 1 and not scale:
            value = int(slot.dtype.is_floating_point)
            return torch.full(slot.shape, value, dtype=slot.dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(self._seed ^ zlib.crc32(slot.name.encode()))
        count = slot.num_bytes // slot.dtype.itemsize
        size = min(count, self.BLOCK)
        if slot.dtype.is_floating_point:
            block = torch.empty(size, dtype=torch.float32, device=self._device)
            if scale:
                mean = self.STD / self.CODE_STD
                block.uniform_(0.5 * mean, 1.5 * mean, generator=generator)
            else:
                block.normal_(0.0, self.STD, generator=generator)
            block = block.to(slot.dtype)
        else:
            low, high = torch.iinfo(slot.dtype).min, torch.iinfo(slot.dtype).max
            block = torch.randint(
                low, high, (size,), generator=generator, dtype=slot.dtype, device=self._device
            )
        tensor = torch.empty(count, dtype=slot.dtype, device=self._device)
        for start in range(0, count, size):
            piece = tensor[start : start + size]
            piece.copy_(block[: piece.numel()])
        return tensor.view(slot.shape)
