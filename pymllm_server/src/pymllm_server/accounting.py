"""Token counts and timings as answers report them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymllm_core.output import Delta, Usage


class Tally:
    """Adds up the choices of one answer. n choices of one prompt count its tokens once, as OpenAI does."""

    def __init__(self, choices_per_prompt: int) -> None:
        self._n = choices_per_prompt
        self._usage: dict[int, Usage] = {}

    def note(self, index: int, usage: Usage) -> None:
        """Remember the latest counts of a choice."""
        self._usage[index] = usage

    def usage(self, reasoning_tokens: int | None = None) -> dict[str, Any]:
        """``usage``; cached tokens are those of the first choice, as later ones find the first's prompt."""
        firsts = [usage for index, usage in self._usage.items() if index % self._n == 0]
        prompt = sum(usage.prompt_tokens for usage in firsts)
        generated = sum(usage.completion_tokens for usage in self._usage.values())
        cached = sum(usage.cached_tokens for usage in firsts)
        result: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if reasoning_tokens is not None:
            result["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
        return result


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 3) if seconds > 0 else None


def debug_timing(last: Delta | None) -> Mapping[str, Any] | None:
    """The original's ``debug_timing`` of one request, None where the engine gave no timings.

    The first token belongs to prefill, so decoding yields one less.
    """
    if last is None or last.timings is None:
        return None
    timings, usage = last.timings, last.usage
    return {
        "experimental_vit_prefill_ms": None,
        "experimental_llm_prefill_ms": round(1000 * timings.prefill_s, 3),
        "decode_phase_wall_ms": round(1000 * timings.decode_s, 3),
        "prefill_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "experimental_vit_prefill_tps": None,
        "experimental_llm_prefill_tps": _rate(usage.prompt_tokens, timings.prefill_s),
        "decode_phase_output_tps": _rate(max(0, usage.completion_tokens - 1), timings.decode_s),
    }
