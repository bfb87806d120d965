"""A fixed batch through the engine's own runner: one prefill, then decode steps, without the scheduler."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from typing_extensions import Self

from pymllm_core.engine.batch import Batch, Chunk
from pymllm_core.engine.engine import Engine
from pymllm_core.engine.runner import Launched
from pymllm_core.engine.sequence import Sequence as EngineSequence
from pymllm_core.engine.sequence import Status
from pymllm_core.request import Request, SamplingParams


class StaticBatch:
    """Prompts of token ids that are computed together from their first token to their last.

    The engine must be idle: the batch uses its runner's first rows, and pages of its pool, which it gives
    back when it is closed. Sampling is greedy and nothing stops a sequence before `output_len` tokens.
    """

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], output_len: int) -> None:
        assert not engine.has_work
        self._runner = engine.runner
        self._pool = engine.scheduler.pool
        params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
        self._sequences: list[EngineSequence] = []
        for row, prompt in enumerate(prompts):
            request = Request(str(row), tuple(prompt), params)
            sequence = EngineSequence(request, max_tokens=output_len, seed=row)
            sequence.row = row
            sequence.status = Status.RUNNING
            sequence.pages = self._pool.take(self._pool.pages_for(len(prompt) + output_len))
            self._sequences.append(sequence)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sequence in self._sequences:
            self._pool.give_back(sequence.pages)
            sequence.pages = []

    def prefill(self) -> Launched:
        """Launch all prompts as one step, whatever the limits on rounds of prompts."""
        return self._launch(admitted=tuple(self._sequences))

    def decode(self) -> Launched:
        """Launch one token of each sequence; the step before may still be on its way."""
        return self._launch()

    def read(self, launched: Launched) -> None:
        """Wait for a step and append its tokens."""
        for sampled in launched.read():
            sampled.sequence.pending -= 1
            sampled.sequence.append(sampled.token)

    @property
    def generated(self) -> list[list[int]]:
        """The tokens that were read so far, by prompt."""
        return [sequence.tokens[sequence.prompt_len :] for sequence in self._sequences]

    def _launch(self, admitted: tuple[EngineSequence, ...] = ()) -> Launched:
        chunks = []
        for sequence in self._sequences:
            start, end = sequence.num_computed, sequence.num_tokens
            on_device = start >= len(sequence.tokens)
            chunks.append(Chunk(sequence, start, end - start, samples=True, from_device=on_device))
            sequence.num_computed = end
            sequence.pending += 1
        # A chunk of one token is a decode to the kernels, and these come first.
        chunks.sort(key=lambda chunk: chunk.count != 1)
        decodes = sum(chunk.count == 1 for chunk in chunks)
        return self._runner.launch(Batch(tuple(chunks), decodes, admitted))


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: of the prefill, and between the ends of successive decode steps."""

    prefill: float
    decodes: tuple[float, ...]

    @property
    def total(self) -> float:
        return self.prefill + sum(self.decodes)


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_batch(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    output_len: int,
    on_step: Callable[[int, float], None] = lambda _step, _seconds: None,
) -> Timing:
    """Run a static batch against the clock; a time ends when the step's tokens are on the host.

    Where the engine overlaps steps, the next one is launched before the last is read, as when it serves.
    on_step is called with the number of each decode step, from 1, and its seconds.
    """
    ahead = 1 if engine.runner.config.overlap else 0
    with StaticBatch(engine, prompts, output_len) as batch:
        synchronize(engine.runner.config.device)
        begin = time.perf_counter()
        batch.read(batch.prefill())
        last = time.perf_counter()
        prefill = last - begin
        decodes: list[float] = []
        in_flight: deque[Launched] = deque()
        for step in range(output_len - 1 + ahead):
            if step < output_len - 1:
                in_flight.append(batch.decode())
            if not in_flight or (len(in_flight) <= ahead and step < output_len - 1):
                continue
            batch.read(in_flight.popleft())
            now = time.perf_counter()
            decodes.append(now - last)
            last = now
            on_step(len(decodes), decodes[-1])
    return Timing(prefill, tuple(decodes))
