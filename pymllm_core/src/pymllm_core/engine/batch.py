"""A batch: what one step computes. Plain data, complete when built, free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from pymllm_core.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + count) of a sequence; `samples` where they end at its last token.

    from_device: the (single) input token is still on the device, sampled by the step before.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    from_device: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """The chunks of one step; the first `num_decodes` have one token each.

    admitted: sequences that received their row in this step, whose per-sequence buffers must be reset.
    """

    chunks: tuple[Chunk, ...]
    num_decodes: int
    admitted: tuple[Sequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)
