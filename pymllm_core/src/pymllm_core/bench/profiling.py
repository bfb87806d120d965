"""Profiles of a static batch: one Chrome trace a stage, from a run of its own that is not timed."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pymllm_core.bench.static_batch import StaticBatch, synchronize
from pymllm_core.engine.engine import Engine

FOLDER_VARIABLE = "PYMLLM_TORCH_PROFILER_DIR"


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """activities: of CPU, GPU. stage: all, prefill, decode. start_step: None for the middle decode step."""

    activities: tuple[str, ...]
    record_shapes: bool
    stage: str
    prefix: str
    start_step: int | None
    steps: int

    def start(self, output_len: int) -> int:
        """The first decode step (from 0) to be profiled."""
        return (output_len - 1) // 2 if self.start_step is None else self.start_step


def profile_batch(
    engine: Engine, prompts: Sequence[Sequence[int]], output_len: int, options: ProfileOptions, label: str
) -> list[Path]:
    """Run a static batch under the profiler and write its traces; returns their paths.

    Each step is read before the next is launched, so that the ranges ``prefill`` and ``decode step N`` hold
    what belongs to them. Files go into the folder that PYMLLM_TORCH_PROFILER_DIR names, else the temporary one.
    """
    device = engine.runner.config.device
    folder = Path(os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    stem = "_".join(re.sub(r"[^A-Za-z0-9._-]+", "_", part) for part in (options.prefix, label))
    written: list[Path] = []

    def traced(stage: str, run: Callable[[], None]) -> None:
        path = folder / f"{stem}_{stage}.trace.json"
        with profile(activities=_activities(options, device), record_shapes=options.record_shapes) as trace:
            run()
            synchronize(device)
        trace.export_chrome_trace(str(path))
        written.append(path)

    with StaticBatch(engine, prompts, output_len) as batch:

        def prefill() -> None:
            with record_function("prefill"):
                batch.read(batch.prefill())

        def decode(first: int, last: int) -> None:
            for step in range(first, last):
                with record_function(f"decode step {step}"):
                    batch.read(batch.decode())

        if options.stage in ("all", "prefill"):
            traced("prefill", prefill)
        else:
            prefill()
        start = options.start(output_len)
        stop = min(start + options.steps, output_len - 1)
        if options.stage in ("all", "decode") and stop > start:
            decode(0, start)
            traced(f"decode_step{start}", lambda: decode(start, stop))
    return written


def _activities(options: ProfileOptions, device: torch.device) -> list[Any]:
    found = [ProfilerActivity.CPU] if "CPU" in options.activities else []
    if "GPU" in options.activities and device.type == "cuda":
        found.append(ProfilerActivity.CUDA)
    return found
