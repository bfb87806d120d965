"""What a step is given: numbers written on the host as NumPy arrays, read on the device as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymllm_core.engine.sequence import Sequence


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of these numbers (nested lists, or a NumPy array) on the device.

    `torch.tensor(values, device=...)` waits until a CUDA device has done all that it was given, because the memory it
    copies from may go away. This does not, so that the next step is launched while the last one runs.
    """
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class PageTables:
    """The pages of every running sequence, on the host: one row each.

    table: [max_rows, max_pages] int32; known: how many entries of a row are in it.
    """

    def __init__(self, max_rows: int, max_pages: int) -> None:
        self.table = np.zeros((max_rows, max_pages), dtype=np.int32)
        self.known = [0] * max_rows

    def forget(self, row: int) -> None:
        """The row has a new owner."""
        self.known[row] = 0

    def learn(self, sequence: Sequence) -> bool:
        """Copy the pages that a sequence gained since its last step; whether there were any."""
        row, pages = sequence.row, sequence.pages
        known = self.known[row]
        if known == len(pages):
            return False
        self.table[row, known : len(pages)] = pages[known:]
        self.known[row] = len(pages)
        return True


class StepInputs:
    """One set of the buffers of a step that is not captured: up to max_tokens tokens of max_rows sequences."""

    def __init__(self, max_tokens: int, max_rows: int, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._host: dict[str, Tensor] = {}
        self._there: dict[str, Tensor] = {}
        self.ids = self._make("ids", max_tokens, torch.int64)
        self.positions = self._make("positions", max_tokens, torch.int64)
        self.slots = self._make("slots", max_tokens, torch.int64)
        self.query_start = self._make("query_start", max_rows + 1, torch.int32)
        self.kv_lens = self._make("kv_lens", max_rows, torch.int32)

    def _make(self, name: str, size: int, dtype: torch.dtype) -> np.ndarray:
        host = torch.zeros(size, dtype=dtype, pin_memory=self._cuda)
        self._host[name] = host
        self._there[name] = torch.zeros(size, dtype=dtype, device=self._device) if self._cuda else host
        array: np.ndarray = host.numpy()
        return array

    def send(self, name: str, count: int) -> Tensor:
        """The first `count` entries, on the device."""
        there = self._there[name][:count]
        return there.copy_(self._host[name][:count], non_blocking=True) if self._cuda else there
