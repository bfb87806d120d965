"""Steps with prompts, piece by piece from CUDA graphs: all that lies between two attentions is one launch.

Attention depends on how many sequences there are and how long they are; everything else of a layer only on
the number of tokens. So for a few numbers of tokens the pieces between the attentions are captured, and a step
replays them with the attention launched in between, as ever. A step whose number lies between is filled up
with rows that write to the page of nobody. Launching a layer operator by operator takes the host ten times as
long, which is longer than a GPU needs for a short prompt.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pymllm_core.protocols.attention import AttentionBackend, ForwardContext, LayerKV
from pymllm_core.protocols.model import Model

logger = logging.getLogger(__name__)

MAX_TOKENS = 2048
"""Longer steps keep a GPU busy for longer than the host needs to launch them."""

OUTPUTS = (16, 64)
"""Numbers of rows of which logits are computed; a step that samples more is launched operator by operator.

A prompt that comes while many sequences decode makes a step that samples for all of them.
"""

SIZES = (*range(16, 64, 16), *range(64, 512, 64), *range(512, 1024, 128), *range(1024, MAX_TOKENS + 1, 256))
"""Numbers of tokens: at most a fifth of a step is padding from 256 tokens on."""

SLOW_S = 0.1
"""A capture beforehand that takes longer keeps requests waiting, for a device that is the slower one anyway: two in a
row (the first may have compiled its kernels) end it."""

Attend = Callable[[Tensor, LayerKV], Tensor]
Step = Callable[[AttentionBackend], Tensor]


class Capture(Protocol):
    """From a step, given the attention that it is to call, to what repeats it around another attention."""

    def __call__(self, step: Step, out: Tensor) -> Callable[[Attend], Tensor]:
        """out: [T, num_heads, head_dim], where the attention's result is read by what follows it."""
        ...


class PieceGraphs:
    """The captured pieces of one model.

    Captured one after another while the engine has nothing to do (`capture_next`), or when numbers of tokens and
    outputs come for the second time. kv: one `LayerKV` a layer.
    """

    def __init__(
        self,
        *,
        model: Model,
        attention: AttentionBackend,
        kv: list[LayerKV],
        page_size: int,
        num_heads: int,
        spare_slot: int,
        max_tokens: int,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        self.sizes = [size for size in SIZES if size <= max_tokens]
        self._model, self._attention, self._spare = model, attention, spare_slot
        self._kv, self._page_size = kv, page_size
        self._num_heads, self._dtype, self._device = num_heads, dtype, device
        # Numbers of rows that decodes have, too, so that no kernel is compiled for the first prompt.
        self._outputs = sorted({min(outputs, max_rows) for outputs in OUTPUTS})
        self._capture = capture or CudaPieces(device)
        self._seen: Counter[tuple[int, int]] = Counter()
        self._replays: dict[tuple[int, int], Callable[[Attend], Tensor]] = {}
        largest = self.sizes[-1] if self.sizes else 0
        self._ids = torch.zeros(largest, dtype=torch.int64, device=device)
        self._positions = torch.zeros(largest, dtype=torch.int64, device=device)
        self._slots = torch.zeros(largest, dtype=torch.int64, device=device)
        self._rows = torch.zeros(self._outputs[-1], dtype=torch.int64, device=device)
        self._out = torch.empty(0)
        # Those that have not been captured yet, small ones first, and those for which there was no memory.
        self._missing = [(size, outputs) for size in self.sizes for outputs in self._outputs][::-1]
        self._slow = False
        self._refused: set[tuple[int, int]] = set()

    def capture_next(self) -> bool:
        """Capture one that has not come yet; False where there is none, or it takes too long (`SLOW_S`).

        Not while a step is under way.
        """
        while self._missing:
            size, count = self._missing.pop()
            if (size, count) in self._replays or (size, count) in self._refused:
                continue
            self._ids[:size], self._positions[:size], self._slots[:size] = 0, 0, self._spare
            self._rows[:count] = 0
            begin = time.monotonic()
            self._capture_piece(size, count)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            slow, self._slow = self._slow, time.monotonic() - begin > SLOW_S
            if slow and self._slow:
                self._missing.clear()
            return True
        return False

    def run(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor | None:
        """Logits [R, vocab] of `ctx.output_rows`, valid until the next call; None where no piece fits.

        The backend has planned the pass.
        """
        tokens = len(input_ids)
        rows = ctx.output_rows
        outputs = tokens if rows is None else len(rows)
        if not 0 < outputs <= self._outputs[-1] or not self.sizes or tokens > self.sizes[-1]:
            return None
        size = self.sizes[bisect.bisect_left(self.sizes, tokens)]
        count = self._outputs[bisect.bisect_left(self._outputs, outputs)]
        self._seen[size, count] += 1
        if (size, count) in self._refused:
            return None
        if self._seen[size, count] == 1 and (size, count) not in self._replays:
            return None  # compiles its kernels, and may be the only one of its size
        for buffer, values, padding in (
            (self._ids, input_ids, 0),
            (self._positions, ctx.positions, 0),
            (self._slots, ctx.slots, self._spare),
        ):
            buffer[:tokens] = values
            buffer[tokens:size] = padding
        self._rows[:outputs] = torch.arange(tokens, device=self._device) if rows is None else rows
        self._rows[outputs:count] = 0
        if (size, count) not in self._replays and not self._capture_piece(size, count):
            return None
        out = self._out[:size]

        ctx.out = out[:tokens]

        def attend(q: Tensor, kv: LayerKV) -> Tensor:
            result = self._attention.attend(q[:tokens], kv, ctx)
            if result.data_ptr() != out.data_ptr():
                out[:tokens] = result
            return out

        return self._replays[size, count](attend)[:outputs]

    def _capture_piece(self, size: int, outputs: int) -> bool:
        """Whether there was memory for it."""
        if not self._out.numel():
            self._out = torch.zeros(
                (self.sizes[-1], self._num_heads, self._kv[0].k.shape[-1]),
                dtype=self._dtype,
                device=self._device,
            )
        step = partial(self._step, size=size, outputs=outputs)
        try:
            self._replays[size, outputs] = self._capture(step, self._out[:size])
        except torch.OutOfMemoryError as error:
            self._refused.add((size, outputs))
            logger.warning("steps of %d tokens are launched operator by operator: %s", size, error)
            return False
        return True

    def _step(self, attention: AttentionBackend, size: int, outputs: int) -> Tensor:
        """The whole pass over the standing buffers; what only attention reads is not there."""
        nothing = self._rows[:0].int()
        standing = ForwardContext(
            positions=self._positions[:size],
            slots=self._slots[:size],
            query_start=nothing,
            kv_lens=nothing,
            page_table=nothing.view(0, 0),
            num_decodes=0,
            query_lens=[size],
            kv_lens_host=[size],
            page_size=self._page_size,
            kv=self._kv,
            attention=attention,
            output_rows=self._rows[:outputs],
        )
        return self._model.logits(self._model.forward(self._ids[:size], standing))


class AttentionSeam:
    """An attention backend that does nothing but hand the queries to `attend`."""

    graph_safe = False
    prepares_decodes = False

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def plan(self, ctx: ForwardContext) -> None:
        """The real backend has planned."""

    def attend(self, q: Tensor, kv: LayerKV, ctx: ForwardContext) -> Tensor:
        return self._attend(q, kv)


class CudaPieces:
    """Captures CUDA graphs from one attention to the next; all share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, step: Step, out: Tensor) -> Callable[[Attend], Tensor]:
        pieces: list[torch.cuda.CUDAGraph] = []
        queries: list[tuple[Tensor, LayerKV]] = []

        def begin() -> None:
            pieces.append(torch.cuda.CUDAGraph())
            pieces[-1].capture_begin(pool=self._pool)

        def seam(q: Tensor, kv: LayerKV) -> Tensor:
            pieces[-1].capture_end()
            queries.append((borrow(q), kv))
            begin()
            return out

        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream):
            # Once outside of the capture: numbers of rows that are new compile or load their kernels. What it
            # writes to the cache is written again by the replay, before anything reads it.
            step(AttentionSeam(lambda q, kv: out))
            begin()
            try:
                result = step(AttentionSeam(seam))
            finally:
                pieces[-1].capture_end()
        result = borrow(result)

        def replay(attend: Attend) -> Tensor:
            for piece, (q, kv) in zip(pieces, queries, strict=False):
                piece.replay()
                attend(q, kv)
            pieces[-1].replay()
            return result

        return replay


class _Borrowed:
    """Device memory by address (https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html)."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self.__cuda_array_interface__ = {
            "shape": (tensor.numel() * tensor.element_size(),),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def borrow(tensor: Tensor) -> Tensor:
    """The same memory without owning it.

    What one graph leaves for the next would take gigabytes side by side, for all sizes and layers. Not being
    owned, the memory is used by what is captured afterwards as well, and holds these values until that is
    replayed.
    """
    raw = torch.as_tensor(_Borrowed(tensor), device=tensor.device)
    return raw.view(tensor.dtype).view(tensor.shape)
