"""The operation ``greedy_step``: the end of a decode step, and what the next one of the same sequences is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeState:
    """What steps of up to R decodes read and leave behind, on the device.

    ids, positions, slots: [R] int64; kv_lens: [R] int32. steps: [R] int32, by how much a row's position grows: 1,
    or 0 for a row that belongs to no sequence. page_table: [R, W] int32, pages of `page_size` tokens.
    chosen: [turns, R] int64 in pinned memory of the host, where it finds what was chosen without a copy; turn: [1]
    int32, how many steps there were: the next one writes to row turn % turns.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    kv_lens: Tensor
    steps: Tensor
    page_table: Tensor
    page_size: int
    chosen: Tensor
    turn: Tensor


class GreedyStep(Protocol):
    """The operation's implementation. reports: whether it writes to `DecodeState.chosen`, and counts the turns."""

    reports: bool

    def __call__(self, logits: Tensor, state: DecodeState) -> None:
        """logits: [B, vocab] float32, of the first B rows; may have gaps between its rows."""
        ...


class TorchGreedyStep:
    """``greedy_step`` by its definition. It does not report: torch does not write to the host from a device."""

    reports = False

    def __call__(self, logits: Tensor, state: DecodeState) -> None:
        rows = len(logits)
        torch.argmax(logits, dim=-1, out=state.ids[:rows])
        positions, table = state.positions[:rows], state.page_table[:rows]
        positions += state.steps[:rows]
        state.kv_lens[:rows] += state.steps[:rows]
        # After a sequence's last token there may be no page: the slot is then never used.
        places = (positions // state.page_size).clamp_(max=table.shape[1] - 1)
        pages = table.gather(1, places[:, None])[:, 0].long()
        state.slots[:rows] = pages * state.page_size + positions % state.page_size
