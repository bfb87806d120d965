"""Decode steps as CUDA graphs: one replay, no launch from Python.

A graph holds a whole step of `size` sequences, from the token ids to the greedy choice, over buffers that
never move. Its last node (`nn.step_ops`) leaves in them what the next step of the same sequences reads, ids,
positions and slots, and puts the greedy tokens where the host finds them: as long as the same sequences run on pages
that the device knows, nothing is copied between greedy steps. A batch that is smaller than its graph is filled up
with rows that read and write the page of nobody.

Attention takes as many launches as the longest possible sequence needs, of which a short one leaves most without
work. So small batches have a second graph, for sequences that fit a narrow page table, where the backend asks for it
(`AttentionBackend.short_context`).

Sampling by the usual parameters (temperature, top_k with or without top_p and min_p) has graphs of its own,
which are replayed after the step's. What is rarer is launched operator by operator (`Sampler.sample`).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pymllm_core.engine.batch import Chunk
from pymllm_core.engine.decode_buffers import DecodeBuffers
from pymllm_core.engine.inputs import PageTables
from pymllm_core.engine.pieces import borrow
from pymllm_core.engine.sampler import Group, draw
from pymllm_core.nn.step_ops import GreedyStep
from pymllm_core.protocols.attention import AttentionBackend, ForwardContext, LayerKV
from pymllm_core.protocols.model import Model


def graph_sizes(max_running: int) -> tuple[int, ...]:
    """The ladder of batch sizes for up to `max_running` sequences.

    Steps of small batches are limited by the weights that they read, so that padding costs little there;
    every size costs time at the start.
    """
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, max_running + 128, 128)]
    return (*(size for size in steps if size < max_running), max_running)


SHORT_SIZES = 32
"""Up to so many sequences a batch has a graph for short sequences: with more, attention has work enough."""

Key = tuple[int, bool]
"""Which graph: of how many sequences, and whether for short ones."""

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""From a step to what repeats it, and the tensor that holds the step's result after each repetition."""

CAPTURED_DRAWS = (0, 64)
"""The numbers of candidates (`sampler.Group`) for which sampling is captured."""

MAX_DRAW_BYTES = 256 << 20
"""What a captured draw may hold: one from the whole vocabulary takes four numbers in float64 for each logit."""


def draw_bytes(candidates: int, size: int, vocab_size: int) -> int:
    """About what a draw of `size` rows holds beside the logits."""
    return 32 * size * (candidates or vocab_size)


class StepResult(NamedTuple):
    """tokens: [B] int64, the greedy ones; logits: [B, vocab] float32: valid until the next step is launched.

    reported: [B] int64, where the host finds the tokens when the step is done; None where they have to be copied.
    """

    tokens: Tensor
    logits: Tensor
    reported: Tensor | None


class DecodeGraphs:
    """Captured decode steps of up to max(sizes) sequences; see the module.

    ids: [max size] int64, the tokens chosen by the last replay. capture: see `Capture`; by default CUDA graphs.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        model: Model,
        attention: AttentionBackend,
        greedy_step: GreedyStep,
        kv: list[LayerKV],
        pages: PageTables,
        page_size: int,
        vocab_size: int,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        self.sizes = sorted(sizes)
        largest = self.sizes[-1]
        self._model, self._attention, self._kv = model, attention, kv
        self._pages, self._page_size, self._vocab_size = pages, page_size, vocab_size
        self._capture = capture or _CudaCapture(device)
        self._replays: dict[Key, Callable[[], None]] = {}
        self._logits: dict[Key, Tensor] = {}
        self._contexts: dict[Key, ForwardContext] = {}
        # The page after the last belongs to nobody (`Runner`).
        self._spare = kv[0].k.shape[0] // page_size - 1
        width = pages.table.shape[1]
        short = -(-getattr(attention, "short_context", 0) // page_size)
        # Pages of the narrow table; 0: there is none.
        self._short = short if short < width else 0
        self._buffers = DecodeBuffers(largest, pages, page_size, self._spare, device)
        self.ids = self._buffers.state.ids
        self._greedy_step = greedy_step
        self._query_start = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._order: list[object] = []
        self._key: Key = (0, False)
        self._draw_replays: dict[tuple[int, Key], Callable[[], None]] = {}
        # temperature, top_k, top_p and min_p of each row
        self._parameters = torch.ones((4, largest, 1), dtype=torch.float64, device=device)
        self._group: Group | None = None

    def fits(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a graph can compute this step: nothing but decodes, each of which samples."""
        return len(chunks) <= self.sizes[-1] and all(c.count == 1 and c.samples for c in chunks)

    def prepare(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Capture every size, the largest first, so that the others find their memory in its pool."""
        keys = [
            (size, short)
            for size in reversed(self.sizes)
            for short in ((False, True) if self._short and size <= SHORT_SIZES else (False,))
        ]
        for done, key in enumerate(keys):
            progress(done, len(keys))
            size, _ = key
            ctx = self._contexts[key] = self._context(key)
            self._attention.plan(ctx)
            self._replays[key], logits = self._capture(partial(self._step, ctx, size))
            for candidates in CAPTURED_DRAWS:
                needed = draw_bytes(candidates, size, self._vocab_size)
                if candidates < self._vocab_size and needed <= MAX_DRAW_BYTES:
                    draw_step = partial(self._draw_step, candidates, logits)
                    self._draw_replays[candidates, key], _ = self._capture(draw_step)
            # Only now: what samples from the logits must not have its intermediate results in their memory.
            self._logits[key] = borrow(logits) if logits.is_cuda else logits
        if self.ids.is_cuda:
            torch.cuda.empty_cache()  # what the runs before the captures took
        self._buffers.forget_turns()
        progress(len(keys), len(keys))

    def run(self, chunks: Sequence[Chunk], earlier: Tensor, where: dict[int, int]) -> StepResult:
        """Start a step.

        earlier, where: the tokens of the step before, and which of them belongs to a sequence's row: those that the
        host does not know yet are taken from there.
        """
        count = len(chunks)
        size = self.sizes[bisect.bisect_left(self.sizes, count)]
        self._buffers.begin()
        sequences = [chunk.sequence for chunk in chunks]
        news = False
        for sequence in sequences:
            news |= self._pages.learn(sequence)
        rows = np.fromiter((s.row for s in sequences), np.int64, count)
        positions = np.fromiter((chunk.start for chunk in chunks), np.int64, count)
        # Tokens that the step before has left where this one reads them come from the positions before these.
        steady = (
            size == self._key[0]
            and earlier.data_ptr() == self.ids.data_ptr()
            and all(chunk.from_device for chunk in chunks)
            and len(self._order) == count
            and all(one is other for one, other in zip(self._order, sequences, strict=True))
        )
        same_pages = steady and not news
        if not same_pages:
            # The slots that the device has worked out came from the table as it was.
            self._buffers.send_numbers(rows, positions, size)
        if not steady:
            self._order = list(sequences)
            self._buffers.send_ids(chunks, earlier, where)
        width = int(positions.max()) // self._page_size + 1
        key = self._key = (size, size <= SHORT_SIZES and width <= self._short)
        ctx = self._contexts[key]
        ctx.kv_lens_host, ctx.same_pages = [*(positions + 1).tolist(), *[1] * (size - count)], same_pages
        self._attention.plan(ctx)
        self._replays[key]()
        tokens = self._buffers.launched(count)
        reported = tokens if self._greedy_step.reports else None
        return StepResult(self.ids[:count], self._logits[key][:count], reported)

    def draws(self, group: Group) -> bool:
        """Whether sampling of this kind is captured."""
        return (group.candidates, self._key) in self._draw_replays

    def draw(self, group: Group, numbers: list[float]) -> Tensor:
        """Sample from the logits of the step just started: [B] int64, valid until the next call of `run`.

        numbers: one in [0, 1) for each row. All rows are of the one group.
        """
        count = len(numbers)
        self._buffers.send_uniforms(numbers)
        if group is not self._group:
            self._group = group
            columns = (group.temperature, group.top_k, group.top_p, group.min_p)
            for parameter, column in zip(self._parameters, columns, strict=True):
                parameter[:count] = column
        self._draw_replays[group.candidates, self._key]()
        return self.ids[:count]

    def _context(self, key: Key) -> ForwardContext:
        (size, short), state = key, self._buffers.state
        return ForwardContext(
            positions=state.positions[:size],
            slots=state.slots[:size],
            query_start=self._query_start[: size + 1],
            kv_lens=state.kv_lens[:size],
            page_table=state.page_table[:size, : self._short] if short else state.page_table[:size],
            num_decodes=size,
            query_lens=[1] * size,
            kv_lens_host=[1] * size,
            page_size=self._page_size,
            kv=self._kv,
            attention=self._attention,
            captured=True,
        )

    def _step(self, ctx: ForwardContext, size: int) -> Tensor:
        logits = self._model.logits(self._model.forward(self.ids[:size], ctx))
        self._greedy_step(logits[:, : self._vocab_size], self._buffers.state)
        return logits

    def _draw_step(self, candidates: int, logits: Tensor) -> Tensor:
        size = len(logits)
        temperature, top_k, top_p, min_p = self._parameters[:, :size]
        group = Group(candidates, [], self.ids, temperature, top_k, top_p, min_p)
        tokens = draw(logits[:, : self._vocab_size], group, self._buffers.uniforms[:size])
        self.ids[:size] = tokens
        return tokens


class _CudaCapture:
    """Makes CUDA graphs that share one memory pool: replays never overlap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        assert self._stream is not None
        # Once outside of the capture: kernels compile and libraries take their workspace at their first call.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
            # Not `torch.cuda.graph`, which waits for the device and empties the allocator's cache before each.
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool)
            try:
                result = step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay, result
