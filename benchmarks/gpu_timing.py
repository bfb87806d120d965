"""What the GPU benchmarks share: timing inside a CUDA graph, rows of JSON, the shapes of the models."""

from __future__ import annotations

import functools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COLD_BYTES = 160 << 20
"""Weights that are rotated through: more than any second-level cache."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Qwen3 model."""

    hidden: int
    heads: int
    kv_heads: int
    inter: int
    layers: int
    vocab: int = 151936
    dim: int = 128

    def linears(self) -> dict[str, tuple[int, int, bool, bool, bool]]:
        """Name: N, K, gated, with norm, with residual."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.dim, self.hidden, False, True, False),
            "o": (self.hidden, self.heads * self.dim, False, False, True),
            "gate_up": (2 * self.inter, self.hidden, True, True, False),
            "down": (self.hidden, self.inter, False, False, True),
        }


MODELS = {
    "0.6B": Shape(1024, 16, 8, 3072, 28),
    "4B": Shape(2560, 32, 8, 9728, 36),
    "8B": Shape(4096, 32, 8, 12288, 36),
}


def graph_us(calls: Sequence[Callable[[], Any]], *, repeats: int = 7) -> float:
    """Median microseconds of one of the calls, captured one after another in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return replay_us(graph, repeats=repeats) / len(calls)


def replay_us(graph: torch.cuda.CUDAGraph, *, repeats: int = 7) -> float:
    """Median microseconds of a replay."""
    times = []
    for turn in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def copies_of(weight_bytes: int) -> int:
    """How many distinct weights make a chain cold, at least two."""
    return max(-(-COLD_BYTES // weight_bytes), 2)


def rel_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """||got - expected|| / ||expected||."""
    return float((got.double() - expected).norm() / expected.norm())


class Report:
    """Prints rows and appends them to a file, after a row that says where and how they were made."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        import triton

        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True
        ).stdout.strip()
        properties = torch.cuda.get_device_properties(0)
        self._write(
            {
                "_": " ".join(sys.argv),
                "commit": commit,
                "gpu": properties.name,
                "sms": properties.multi_processor_count,
                "torch": torch.__version__,
                "triton": triton.__version__,
            }
        )

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def row(self, us: float, *, moved: int = 0, operations: int = 0, **fields: Any) -> None:
        """One result; moved: bytes, operations: multiplications and additions."""
        fields |= {"us": round(us, 3)}
        if moved:
            fields["GB/s"] = round(moved / us / 1e3)
        if operations:
            fields["TFLOP/s"] = round(operations / us / 1e6, 1)
        self._write(fields)

    def candidates(
        self,
        title: str,
        calls: Sequence[tuple[str, Callable[[Any], torch.Tensor]]],
        items: Sequence[Any],
        expected: torch.Tensor | None,
        *,
        moved: int,
        operations: int,
        **fields: Any,
    ) -> None:
        """Check each call on the first item, time it over a chain of all items, print the best.

        expected: the first rows of the first item's result, in float64. A call that fails, as one does that
        asks for more shared memory than there is, is named and left out; one that is wrong is marked.
        """
        shown = []
        for name, call in calls:
            try:
                error = math.nan
                if expected is not None and not name.startswith("without"):
                    error = rel_error(call(items[0])[: expected.shape[0]], expected)
                us = graph_us([functools.partial(call, item) for item in items])
            except Exception as problem:
                print(f"  {name}: {type(problem).__name__}: {str(problem).splitlines()[0][:100]}")
                continue
            self.row(us, moved=moved, operations=operations, candidate=name, error=error, **fields)
            wrong = " WRONG" if expected is not None and error >= 0.02 else ""
            shown.append((us, name + wrong, error))
        self.show(title, shown, moved=moved, operations=operations)

    def show(self, title: str, rows: list[tuple[float, str, float]], *, moved: int, operations: int) -> None:
        """A table of (us, candidate, error): the best five and all that no variant stands for."""
        rows = sorted(rows)
        print(f"{title}: floor of reading at 4.56 TB/s {moved / 4.56e6:.2f} us")
        for place, (us, name, error) in enumerate(rows):
            if place < 5 or not name.startswith("("):
                speed = f"{moved / us / 1e3:6.0f} GB/s {operations / us / 1e6:7.1f} TFLOP/s"
                print(f"  {us:9.2f} us {speed}  error {error:.1e}  {name}", flush=True)
