"""The carrier of the recipe: one dialogue, its wanted completion and how to judge another one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]
Check = Callable[[str], bool]

_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Exchange:
    """A question, the answer to learn, the reasoning that leads to it, and the judge of answers."""

    user: str
    answer: str
    reasoning: str
    check: Check


@dataclass(frozen=True)
class Dialogue:
    """Everything before the completion (`messages`, `tools`) and the completion itself."""

    messages: list[Message]
    answer: str
    check: Check
    reasoning: str = ""
    enable_thinking: bool = False
    tools: list[Tool] = field(default_factory=list)

    def completion(self) -> str:
        """The text to generate after the template's generation prompt."""
        if self.enable_thinking:
            return f"<think>\n{self.reasoning}\n</think>\n\n{self.answer}"
        return self.answer

    def judge(self, text: str) -> bool:
        """Whether a generated text is right; with thinking on it must also have thought."""
        if not self.enable_thinking:
            return self.check(text.strip())
        thought, closing, answer = text.strip().partition("\n</think>\n\n")
        opened = thought.startswith("<think>\n") and thought.removeprefix("<think>\n").strip()
        return bool(opened and closing) and self.check(answer)


def exact(answer: str) -> Check:
    return lambda text: text == answer


def exchange(user: str, answer: str, reasoning: str) -> Exchange:
    return Exchange(user, answer, reasoning, exact(answer))


def same_json(value: object) -> Check:
    def check(text: str) -> bool:
        try:
            found = json.loads(text)
        except ValueError:
            return False
        return _typed(found) == _typed(value)

    return check


def contains(parts: Sequence[str]) -> Check:
    return lambda text: all(part in text for part in parts) and "<tool_call>" not in text


def calls_text(calls: Sequence[tuple[str, Mapping[str, object]]]) -> str:
    """The Hermes-style text of tool calls, as Qwen writes it."""
    return "\n".join(
        "<tool_call>\n"
        + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        + "\n</tool_call>"
        for name, arguments in calls
    )


def same_calls(calls: Sequence[tuple[str, Mapping[str, object]]]) -> Check:
    wanted = [_typed({"name": name, "arguments": arguments}) for name, arguments in calls]

    def check(text: str) -> bool:
        try:
            found = [_typed(json.loads(block)) for block in _CALL.findall(text)]
        except ValueError:
            return False
        return found == wanted and not _CALL.sub("", text).strip()

    return check


def _typed(value: object) -> str:
    """A canonical text in which ``1``, ``1.0``, ``"1"`` and ``true`` all differ."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
