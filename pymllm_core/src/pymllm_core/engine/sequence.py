"""A sequence: one request on its way through the engine, the only mutable request state."""

from __future__ import annotations

import time
from enum import Enum
from typing import TYPE_CHECKING

from pymllm_core.output import Timings, Usage
from pymllm_core.protocols.cache import PrefixMatch
from pymllm_core.request import Request

if TYPE_CHECKING:
    from pymllm_core.engine.detokenizer import Detokenizer


class Status(Enum):
    """Where a sequence is; only the scheduler changes it."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """tokens are the prompt and what was generated; `num_computed` of them have their K and V in `pages`.

    num_computed runs ahead of the tokens by `pending`: launched steps whose sampled token has not been
    read yet. row is the sequence's place in the runner's per-sequence buffers while it runs.
    max_tokens: generated tokens after which it must end, already bounded by context and pool.
    """

    __slots__ = (
        "admitted_at",
        "cached_tokens",
        "detokenizer",
        "finished_at",
        "first_token_at",
        "key_ids",
        "last_output",
        "match",
        "max_tokens",
        "num_computed",
        "pages",
        "pending",
        "prompt_len",
        "request",
        "row",
        "seed",
        "status",
        "tokens",
    )

    def __init__(
        self, request: Request, *, max_tokens: int, seed: int, detokenizer: Detokenizer | None = None
    ) -> None:
        self.request = request
        self.tokens = list(request.token_ids)
        self.key_ids = list(request.key_ids or request.token_ids)
        self.prompt_len = len(self.tokens)
        self.max_tokens = max_tokens
        self.seed = seed
        self.detokenizer = detokenizer
        self.status = Status.WAITING
        self.num_computed = 0
        self.pending = 0
        self.pages: list[int] = []
        self.match = PrefixMatch()
        self.row = -1
        self.cached_tokens = 0
        self.last_output = 0
        self.admitted_at = 0.0
        self.first_token_at = 0.0
        self.finished_at = 0.0

    @property
    def num_generated(self) -> int:
        """Tokens generated and read."""
        return len(self.tokens) - self.prompt_len

    @property
    def num_tokens(self) -> int:
        """Tokens including those that are sampled but not read yet."""
        return len(self.tokens) + self.pending

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_len, self.num_generated, self.cached_tokens)

    @property
    def timings(self) -> Timings:
        """Of a finished sequence; phases that it never reached are 0."""
        end = self.finished_at or time.monotonic()
        admitted = self.admitted_at or end
        first = self.first_token_at or end
        return Timings(admitted - self.request.arrival, first - admitted, end - first)

    def append(self, token: int) -> None:
        """Add a generated token."""
        self.tokens.append(token)
        self.key_ids.append(token)
