"""From generated text to the parts of a chat answer; streaming and not go through the same code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pymllm_core.output import Delta
from pymllm_core.protocols.parser import ReasoningParser, ReasoningPiece, ToolCallParser, ToolCallPiece
from pymllm_server.generation import new_id

Part = dict[str, Any]
"""A chunk's ``delta``: content, reasoning (under both names in use) or tool calls."""


class ChatAssembler:
    """One choice. Text goes through the reasoning parser, what is content then through the tool parser."""

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        tools: ToolCallParser | None,
        *,
        stream_reasoning: bool = True,
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._stream_reasoning = stream_reasoning
        self._held = ""
        self._in_reasoning = False
        self._called = False
        self.reasoning_tokens = 0

    def feed(self, delta: Delta) -> list[Part]:
        """The parts which this delta decides, with the last one all that was held back."""
        pieces = self._split(delta.text)
        if self._in_reasoning:
            self.reasoning_tokens += len(delta.token_ids)
        if delta.finish_reason is not None and self._reasoning:
            pieces += self._reasoning.finish()
        parts: list[Part] = []
        for piece in pieces:
            if piece.kind == "reasoning":
                self._held += piece.text
                if self._stream_reasoning:
                    parts += self._release()
            elif piece.text:
                parts += self._release()
                parts += self._content(piece.text)
        if delta.finish_reason is not None:
            parts += self._release()
            if self._tools:
                parts += self._calls(self._tools.finish())
        return parts

    def finish_reason(self, delta: Delta) -> str | None:
        """The engine's reason, except that a complete answer with tool calls is ``tool_calls``."""
        return "tool_calls" if delta.finish_reason == "stop" and self._called else delta.finish_reason

    def _split(self, text: str) -> list[ReasoningPiece]:
        if not self._reasoning:
            return [ReasoningPiece("content", text)]
        pieces = list(self._reasoning.feed(text))
        if pieces:
            self._in_reasoning = pieces[-1].kind == "reasoning"
        return pieces

    def _release(self) -> list[Part]:
        text, self._held = self._held, ""
        return [{"reasoning_content": text, "reasoning": text}] if text else []

    def _content(self, text: str) -> list[Part]:
        return self._calls(self._tools.feed(text)) if self._tools else [{"content": text}]

    def _calls(self, pieces: Iterable[ToolCallPiece]) -> list[Part]:
        parts: list[Part] = []
        for piece in pieces:
            if piece.content:
                parts.append({"content": piece.content})
            if piece.index is None:
                continue
            self._called = True
            call: dict[str, Any] = {"index": piece.index, "function": {"arguments": piece.arguments}}
            if piece.name is not None:
                function = {"name": piece.name, "arguments": piece.arguments}
                call = {"index": piece.index, "id": new_id("call_"), "type": "function", "function": function}
            parts.append({"tool_calls": [call]})
        return parts


class MessageBuilder:
    """Folds the parts of one choice into a whole message."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}

    def add(self, part: Part) -> None:
        """Append one part."""
        if "content" in part:
            self._content.append(part["content"])
        if "reasoning" in part:
            self._reasoning.append(part["reasoning"])
        for call in part.get("tool_calls", ()):
            if "id" in call:
                whole = {"id": call["id"], "type": "function", "function": dict(call["function"])}
                self._calls[call["index"]] = whole
            else:
                self._calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]

    def message(self) -> dict[str, Any]:
        """The message. Beside calls, mere white space is no content."""
        content: str | None = "".join(self._content)
        reasoning = "".join(self._reasoning) or None
        if self._calls and not (content or "").strip():
            content = None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content,
            "refusal": None,
            "reasoning_content": reasoning,
            "reasoning": reasoning,
        }
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        return message
