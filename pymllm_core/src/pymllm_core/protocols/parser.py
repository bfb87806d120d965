"""Contract of output parsers: generated text, in arbitrary pieces, becomes content and other parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class ReasoningPiece:
    """A piece of text and where it belongs."""

    kind: Literal["content", "reasoning"]
    text: str


class ReasoningParser(Protocol):
    """Separates reasoning from content for one answer; the pieces do not depend on how text is cut.

    thinking: whether the prompt asked for reasoning (None: the template's default). prompt_tail: the end
    of the rendered prompt, in which the template may already have opened or closed the reasoning.
    """

    def __init__(self, *, prompt_tail: str = "", thinking: bool | None = None) -> None: ...

    def feed(self, text: str) -> list[ReasoningPiece]:
        """Take the next text; return what is decided. May hold back what could begin a tag."""
        ...

    def finish(self) -> list[ReasoningPiece]:
        """The rest, after the last text."""
        ...


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """Content, or part of a tool call: `name` comes with the first piece of call `index`, then arguments."""

    content: str = ""
    index: int | None = None
    name: str | None = None
    arguments: str = ""


class ToolCallParser(Protocol):
    """Separates tool calls from content for one answer; same rules as `ReasoningParser`.

    Text that turns out to be no valid call is content.
    """

    def __init__(self) -> None: ...

    def feed(self, text: str) -> list[ToolCallPiece]: ...

    def finish(self) -> list[ToolCallPiece]: ...
