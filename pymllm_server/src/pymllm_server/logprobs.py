"""Log probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pymllm_core.output import TokenLogprob
from pymllm_server.interface import Processor

FLOOR = -9999.0
"""What OpenAI and vLLM report for an impossible token; JSON knows no infinity."""


def chat_logprobs(processor: Processor, tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """Items of ``logprobs.content``."""
    items = []
    for token in tokens:
        item = _chat_item(processor, token.token_id, token.logprob)
        item["top_logprobs"] = [_chat_item(processor, *alternative) for alternative in token.top]
        items.append(item)
    return items


def _chat_item(processor: Processor, token_id: int, logprob: float) -> dict[str, Any]:
    text = processor.token_text(token_id)
    return {"token": text, "logprob": max(logprob, FLOOR), "bytes": list(processor.token_bytes(token_id))}


class CompletionLogprobs:
    """Items of a completion's ``logprobs``; counts the text to give each token's offset."""

    def __init__(self, processor: Processor, offset: int = 0) -> None:
        self._processor = processor
        self._offset = offset

    def items(self, tokens: Iterable[TokenLogprob]) -> dict[str, list[Any]]:
        """The four lists for `tokens`, which follow those of the call before."""
        names: list[str] = []
        values: list[float] = []
        tops: list[dict[str, float]] = []
        offsets: list[int] = []
        for token in tokens:
            text = self._processor.token_text(token.token_id)
            names.append(text)
            values.append(max(token.logprob, FLOOR))
            # The chosen token is always among them, as OpenAI documents.
            top = {self._processor.token_text(token_id): max(value, FLOOR) for token_id, value in token.top}
            top.setdefault(text, max(token.logprob, FLOOR))
            tops.append(top)
            offsets.append(self._offset)
            self._offset += len(text)
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
