"""What leaves the engine: deltas of one request, the last of which carries the reason it finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token after penalties and bias, before temperature and filters.

    top: the most likely alternatives as (token id, logprob), best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


# One of each is made for every token: a frozen dataclass takes four times as long to make as a tuple.
class Usage(NamedTuple):
    """Counts in tokens; cached_tokens of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: waiting for admission, from admission to the first token, from there to the last."""

    queue_s: float
    prefill_s: float
    decode_s: float


class Delta(NamedTuple):
    """News of one request. text never holds part of a character or of a stop string.

    finish_reason is None except in the last delta; matched_stop is the stop string or token id that
    ended it; error says what went wrong where the reason is ``error``. timings comes with the last.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None
    timings: Timings | None = None

    @classmethod
    def merge(cls, deltas: Sequence[Delta]) -> Delta:
        """Successive deltas of one request as one."""
        last = deltas[-1]
        if len(deltas) == 1:
            return last
        logprobs = None
        if last.logprobs is not None:
            logprobs = tuple(entry for delta in deltas for entry in delta.logprobs or ())
        return last._replace(
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            logprobs=logprobs,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer, as the offline API returns it."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    matched_stop: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    timings: Timings | None = None

    @classmethod
    def join(cls, deltas: Sequence[Delta]) -> Completion:
        """All deltas of one request, of which the last has a finish reason."""
        whole = Delta.merge(deltas)
        assert whole.finish_reason is not None
        return cls(
            request_id=whole.request_id,
            text=whole.text,
            token_ids=whole.token_ids,
            finish_reason=whole.finish_reason,
            usage=whole.usage,
            matched_stop=whole.matched_stop,
            logprobs=whole.logprobs,
            timings=whole.timings,
        )
