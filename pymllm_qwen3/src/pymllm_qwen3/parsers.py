r"""Reasoning parsers: generated text becomes reasoning and content, however it is cut into pieces.

Every format here is one pair of tags around the reasoning, at the start of the answer. They differ in the
tags, and in whether reasoning is taken for granted when neither prompt nor answer opens it.

Newlines next to a tag are layout (Qwen3's template writes ``<think>\n…\n</think>\n\n`` and removes them
again when it reads an answer back), so they belong to neither text: reasoning is ``strip("\n")`` of what
is between the tags, content is ``lstrip("\n")`` of what follows. Text without a tag is left as it is.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pymllm_core.protocols.parser import ReasoningPiece

_ROLE_MARK = re.compile(r"<[|｜][^<>]{1,64}[|｜]>")
"""The special tokens between turns: ``<|im_start|>``, ``<|assistant|>``, ``<｜Assistant｜>`` and others."""

_ROLE_NAME = re.compile(r"\s*\w*\s*")


def possible_tag(text: str, start: int, tags: tuple[str, ...]) -> int:
    """Where text[start:] ends in what could become one of `tags`; len(text) where it does not.

    Looks at no more characters than the longest tag has, so it costs the same however long the text is.
    """
    longest = max(len(tag) for tag in tags)
    for at in range(max(start, len(text) - longest + 1), len(text)):
        end = text[at:]
        for tag in tags:  # a generator expression would cost more than the comparison
            if tag.startswith(end):
                return at
    return len(text)


class TrimmedText:
    """Text that loses its newlines where a tag follows or precedes, without knowing yet what follows.

    Newlines at the end are counted rather than kept as text: a million of them cost nothing to hold.
    """

    def __init__(self, *, after_tag: bool) -> None:
        self._after_tag = after_tag
        self._newlines = 0

    def add(self, text: str) -> str:
        """Take text; return what is certain by now."""
        if self._after_tag:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        if not body:
            self._newlines += len(text)
            return ""
        certain = "\n" * self._newlines + body
        self._after_tag = False
        self._newlines = len(text) - len(body)
        return certain

    def tag(self) -> None:
        """A tag is here: newlines on both sides of it are dropped."""
        self._after_tag = True
        self._newlines = 0

    def rest(self) -> str:
        """The newlines still held, where no tag came."""
        held, self._newlines = "\n" * self._newlines, 0
        return held


class TagReasoningParser:
    """`ReasoningParser` for one pair of tags, which a subclass names.

    forced: reasoning is assumed where neither the prompt nor the answer opens it, as for models whose
    template opens it but whose output does not repeat the tag.

    What the rendered prompt holds decides, not the flag `thinking`: templates without a switch ignore that
    flag, and a model which was asked not to think but writes the tag does think. A prompt which closed the
    reasoning leaves content only, in which any further tag is text.
    """

    opening: ClassVar[str] = "<think>"
    closing: ClassVar[str] = "</think>"
    forced: ClassVar[bool] = False

    def __init__(self, *, prompt_tail: str = "", thinking: bool | None = None) -> None:
        del thinking
        self._kind: Literal["content", "reasoning"] = "reasoning" if self.forced else "content"
        self._undecided = True  # whether an opening tag may still come
        self._held = ""
        self._space: list[str] = []  # whitespace at the start, dropped if an opening tag follows
        self._reasoning = TrimmedText(after_tag=True)
        self._content_starts = False  # a closing tag came, but no content yet
        self._look_at_prompt(prompt_tail)

    def _look_at_prompt(self, tail: str) -> None:
        marks = list(_ROLE_MARK.finditer(tail))
        if marks:
            answer = tail[marks[-1].end() :]
        else:
            # No turn is recognisable, and earlier turns may well speak about tags: trust the very end only.
            answer = next((tag for tag in (self.opening, self.closing) if tail.rstrip().endswith(tag)), "")
        before, opened, begun = answer.partition(self.opening)
        if opened and _ROLE_NAME.fullmatch(before):
            if self.closing in begun:
                self._kind, self._undecided = "content", False
            else:
                self._kind = "reasoning"
                if begun.strip("\n"):  # the prompt is continued in the midst of reasoning: newlines count
                    self._undecided = False
                    self._reasoning = TrimmedText(after_tag=False)
        elif self.closing in answer:  # DeepSeek V3.1 writes a lone closing tag to switch reasoning off
            self._kind, self._undecided = "content", False

    def feed(self, text: str) -> list[ReasoningPiece]:
        """Take the next text; return what is decided."""
        pieces: list[ReasoningPiece] = []
        text = self._held + text
        self._held = ""
        if self._undecided:
            text = self._start(text)
        if text and self._kind == "reasoning":
            text = self._reason(text, pieces)
        if text:
            self._answer(text, pieces)
        return pieces

    def finish(self) -> list[ReasoningPiece]:
        """The rest: what looked like the beginning of a tag was none."""
        pieces: list[ReasoningPiece] = []
        rest = "".join(self._space) + self._held
        self._held = ""
        self._space.clear()
        self._undecided = False
        if self._kind == "reasoning":
            _append(pieces, "reasoning", self._reasoning.add(rest))
        else:
            self._answer(rest, pieces)
        return pieces

    def _start(self, text: str) -> str:
        body = text.lstrip()
        self._space.append(text[: len(text) - len(body)])
        if len(body) < len(self.opening) and self.opening.startswith(body):
            self._held = body
            return ""
        self._undecided = False
        if body.startswith(self.opening):
            self._kind = "reasoning"
            text = body[len(self.opening) :]
        else:
            text = "".join(self._space) + body
        self._space.clear()
        return text

    def _reason(self, text: str, pieces: list[ReasoningPiece]) -> str:
        """Consume reasoning; return what follows its end."""
        end = text.find(self.closing)
        if end < 0:
            sure = possible_tag(text, 0, (self.closing,))
            self._held = text[sure:]
            _append(pieces, "reasoning", self._reasoning.add(text[:sure]))
            return ""
        _append(pieces, "reasoning", self._reasoning.add(text[:end]))
        self._kind = "content"
        self._content_starts = True
        return text[end + len(self.closing) :]

    def _answer(self, text: str, pieces: list[ReasoningPiece]) -> None:
        if self._content_starts:
            text = text.lstrip("\n")
            self._content_starts = not text
        _append(pieces, "content", text)


def _append(pieces: list[ReasoningPiece], kind: Literal["content", "reasoning"], text: str) -> None:
    if text:
        pieces.append(ReasoningPiece(kind, text))


class Qwen3Reasoning(TagReasoningParser):
    """Qwen3's hybrid models. Source: chat template of Qwen/Qwen3-0.6B.

    The model writes both tags; with ``enable_thinking=false`` the template writes an empty block instead.
    """


class Qwen3ThinkingReasoning(TagReasoningParser):
    """Qwen3-*-Thinking-2507. Source: their model cards; the template opens the block, the model closes it."""

    forced = True


class DeepseekR1Reasoning(TagReasoningParser):
    r"""DeepSeek-R1 and its distillations. Source: their templates, which end in ``<｜Assistant｜><think>\n``.

    Earlier templates lack the tag there, and the model writes it; either is understood.
    """

    forced = True


class Glm45Reasoning(TagReasoningParser):
    """GLM-4.5 and its successors. Source: chat template of zai-org/GLM-4.5; an empty block switches off."""


class KimiReasoning(TagReasoningParser):
    """Kimi-VL-Thinking. Source: its model card. (Kimi-K2-Thinking writes ``<think>``: use another parser.)"""

    opening = "◁think▷"
    closing = "◁/think▷"
