"""What captured decode steps read, in buffers that never move, and how the host writes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pymllm_core.engine.batch import Chunk
from pymllm_core.engine.inputs import PageTables, on_device
from pymllm_core.nn.step_ops import DecodeState

TURNS = 4
"""Steps whose tokens the host finds at one time; an engine reads a step's before it launches the next but one."""


class _Host:
    """One set of pinned buffers: the numbers of a step and its page table."""

    def __init__(self, size: int, pages: int, cuda: bool) -> None:
        # positions and slots (int64), lengths and steps (int32) in one piece: one copy instead of four.
        self.numbers = torch.zeros(6 * size, dtype=torch.int32, pin_memory=cuda)
        self.positions, self.slots, self.kv_lens, self.steps = _views(self.numbers, size)
        self.table = torch.zeros((size, pages), dtype=torch.int32, pin_memory=cuda)
        self.ids = torch.zeros(size, dtype=torch.int64, pin_memory=cuda)
        self.draws = torch.zeros(size, dtype=torch.float64, pin_memory=cuda)


def _views(numbers: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = numbers[: 4 * size].view(torch.int64)
    return wide[:size], wide[size:], numbers[4 * size : 5 * size], numbers[5 * size :]


class DecodeBuffers:
    """For up to `rows` sequences; `spare` is the page of nobody, which rows without a sequence read and write.

    uniforms: [rows] float64, the numbers in [0, 1) of a draw.
    """

    def __init__(
        self, rows: int, pages: PageTables, page_size: int, spare: int, device: torch.device
    ) -> None:
        cuda, width = device.type == "cuda", pages.table.shape[1]
        self._pages, self._page_size, self._spare = pages, page_size, spare
        self._numbers = torch.zeros(6 * rows, dtype=torch.int32, device=device)
        positions, slots, kv_lens, steps = _views(self._numbers, rows)
        self.state = DecodeState(
            torch.zeros(rows, dtype=torch.int64, device=device),
            positions,
            slots,
            kv_lens,
            steps,
            torch.full((rows, width), spare, dtype=torch.int32, device=device),
            page_size,
            torch.zeros((TURNS, rows), dtype=torch.int64, pin_memory=cuda),
            torch.zeros(1, dtype=torch.int32, device=device),
        )
        self.uniforms = torch.zeros(rows, dtype=torch.float64, device=device)
        # Steps launched, as the device counts them.
        self._launched = 0
        # Two sets: the copies of the step in flight may not have happened when the next is prepared.
        self._hosts = [_Host(rows, width, cuda) for _ in range(2)]
        for host in self._hosts:
            host.slots.fill_(spare * page_size)
            host.kv_lens.fill_(1)
        self._host = self._hosts[0]
        self._numbers.copy_(self._host.numbers)

    def begin(self) -> None:
        """Another step is prepared."""
        self._hosts.reverse()
        self._host = self._hosts[0]

    def forget_turns(self) -> None:
        """What was launched so far counts for nothing."""
        self.state.turn.zero_()
        self._launched = 0

    def launched(self, count: int) -> Tensor:
        """A step was launched; [count] int64, where the host finds its tokens if its end reports them."""
        turn = self._launched % TURNS
        self._launched += 1
        return self.state.chosen[turn, :count]

    def send_numbers(self, rows: np.ndarray, positions: np.ndarray, size: int) -> None:
        """Positions, slots, lengths and page tables. rows: the sequences', of the page tables. size: of the graph."""
        host, count, page_size = self._host, len(rows), self._page_size
        pages = self._pages.table[rows, positions // page_size].astype(np.int64)
        for numbers, values, padding in (
            (host.positions, positions, 0),
            (host.slots, pages * page_size + positions % page_size, self._spare * page_size),
            (host.kv_lens, positions + 1, 1),
            (host.steps, 1, 0),
        ):
            array = numbers.numpy()
            array[:count] = values
            array[count:size] = padding
        self._numbers.copy_(host.numbers, non_blocking=True)
        # All that is known: pages that a sequence will need later may never be news again.
        width = max(self._pages.known[row] for row in rows)
        host.table[:count, :width].copy_(torch.from_numpy(self._pages.table[rows, :width]))
        host.table[count:size, :width] = self._spare
        self.state.page_table[:size, :width].copy_(host.table[:size, :width], non_blocking=True)

    def send_ids(self, chunks: Sequence[Chunk], earlier: Tensor, where: dict[int, int]) -> None:
        """The tokens that a step begins with; see `DecodeGraphs.run`."""
        ids = self._host.ids.numpy()
        ids[:] = 0
        here, there = [], []
        for index, chunk in enumerate(chunks):
            if chunk.from_device:
                here.append(index)
                there.append(where[chunk.sequence.row])
            else:
                ids[index] = chunk.sequence.tokens[chunk.start]
        device = self.state.ids.device
        taken = earlier[on_device(there, device)] if there else None
        self.state.ids.copy_(self._host.ids, non_blocking=True)
        if taken is not None:
            self.state.ids[on_device(here, device)] = taken

    def send_uniforms(self, numbers: list[float]) -> None:
        """For the step that was launched last."""
        self._host.draws.numpy()[: len(numbers)] = numbers
        self.uniforms.copy_(self._host.draws, non_blocking=True)
