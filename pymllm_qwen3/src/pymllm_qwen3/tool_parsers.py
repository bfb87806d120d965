"""Tool-call parsers: generated text becomes content and tool calls, however it is cut into pieces.

Rules common to all formats:

- What cannot be a call is content, as written. That is decided until a call *starts*: once its name is
  known and its arguments begin. A started call cannot be taken back; if its block then breaks, it keeps
  the arguments so far, and the rest of the block is content. Broken arguments are not mended: a client
  which parses them notices, one which got a guess would act on it.
- A call that the end of the text cuts off after its name is a call with the arguments so far.
- Newlines between content and a call are layout and dropped.
"""

from __future__ import annotations

import re

from pymllm_core.protocols.parser import ToolCallPiece
from pymllm_qwen3.json_scan import SPACE
from pymllm_qwen3.parsers import TrimmedText, possible_tag
from pymllm_qwen3.tool_blocks import CallBlock, JsonCall, XmlCall

_TAGS = ("<tool_call>", "</tool_call>")
_OPEN = re.compile(_TAGS[0])
_EITHER = re.compile("|".join(_TAGS))
_PYTHON_TAG = "<|python_tag|>"
_SEPARATOR = re.compile(r"[ \t\r\n;]*")


class _CallParser:
    """What the formats share: the text outside calls is theirs, a call is read by a `CallBlock`."""

    def __init__(self) -> None:
        self._pieces: list[ToolCallPiece] = []
        self._held = ""
        self._text = TrimmedText(after_tag=False)
        self._block: CallBlock | None = None
        self._raw: list[str] = []  # what becomes content if the call being read is none
        self._announced = False  # whether the call being read was handed out
        self._calls = 0

    def feed(self, text: str) -> list[ToolCallPiece]:
        """Take the next text; return what is decided."""
        text = self._held + text
        pos = 0
        while pos < len(text):
            block = self._block
            end = self._outside(text, pos) if block is None else self._inside(block, text, pos)
            if end == pos and block is self._block:
                break  # the rest could become a tag
            pos = end
        self._held = text[pos:]
        return self._take()

    def finish(self) -> list[ToolCallPiece]:
        """The rest: what looked like the beginning of a tag was none."""
        if self._block is not None:
            self._block.finish()
            self._advance(self._block)
            if not self._block.started:
                self._reject(self._held)
            self._block = None
        else:
            self._last(self._held)
        self._held = ""
        self._content(self._text.rest())
        return self._take()

    def _outside(self, text: str, pos: int) -> int:
        """Consume text outside calls; return where it stopped, having called `_begin` if a call may begin."""
        raise NotImplementedError

    def _ended(self, block: CallBlock) -> None:
        """A block ended within the text; what follows is up to the format."""
        raise NotImplementedError

    def _last(self, held: str) -> None:
        """The text ended outside calls."""
        raise NotImplementedError

    def _begin(self, block: CallBlock) -> None:
        self._block = block
        self._announced = False

    def _inside(self, block: CallBlock, text: str, pos: int) -> int:
        end = block.feed(text, pos)
        if not block.started:
            self._raw.append(text[pos:end])
        self._advance(block)
        if block.status != "open":
            self._block = None
            if not block.started:
                self._reject()
            self._ended(block)
        return end

    def _advance(self, block: CallBlock) -> None:
        """Hand on what is new of a call, its name in the first piece."""
        if not block.started:
            return
        arguments = block.take()
        if not self._announced:
            self._announced = True
            self._raw.clear()
            self._text.tag()
            self._pieces.append(ToolCallPiece(index=self._calls, name=block.name, arguments=arguments))
            self._calls += 1
        elif arguments:
            self._pieces.append(ToolCallPiece(index=self._calls - 1, arguments=arguments))

    def _reject(self, more: str = "") -> None:
        """What was read of a call, and `more`, is content."""
        self._content(self._text.add("".join(self._raw) + more))
        self._raw.clear()

    def _content(self, text: str) -> None:
        if text:
            self._pieces.append(ToolCallPiece(content=text))

    def _take(self) -> list[ToolCallPiece]:
        pieces, self._pieces = self._pieces, []
        return pieces


class TaggedToolCallParser(_CallParser):
    """`ToolCallParser` for calls within ``<tool_call>`` and ``</tool_call>``, one in each block.

    A missing ``</tool_call>`` is forgiven: a call ends where its object does.
    """

    block: type[JsonCall] | type[XmlCall]

    def __init__(self) -> None:
        super().__init__()
        self._unclosed = False  # a call ended, its closing tag is due
        self._just_ended = False  # and nothing but space came since

    def _outside(self, text: str, pos: int) -> int:
        if self._just_ended:
            pos = SPACE.match(text, pos).end()  # type: ignore[union-attr]  # matches anything
            if pos == len(text):
                return pos
        found = (_EITHER if self._unclosed else _OPEN).search(text, pos)
        tags = _TAGS if self._unclosed else _TAGS[:1]
        end = found.start() if found else possible_tag(text, pos, tags)
        if end > pos:
            self._just_ended = False
            self._content(self._text.add(text[pos:end]))
        if found is None:
            return end
        self._unclosed = self._just_ended = False
        if found[0] == _TAGS[0]:
            self._raw.append(found[0])
            self._begin(self.block())
        else:
            self._text.tag()
        return found.end()

    def _ended(self, block: CallBlock) -> None:
        self._unclosed = block.started
        self._just_ended = block.started and block.status == "done"

    def _last(self, held: str) -> None:
        self._content(self._text.add(held))


class HermesToolCallParser(TaggedToolCallParser):
    r"""``<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>``; ``parameters`` is accepted, too.

    Source: the function-calling format of NousResearch's Hermes 2 Pro, and the chat templates of Qwen2.5,
    Qwen3 and Qwen3-VL, which ask for it in these words.
    """

    block = JsonCall


class Qwen3CoderToolCallParser(TaggedToolCallParser):
    r"""``<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>``.

    Source: chat template of Qwen/Qwen3-Coder-30B-A3B-Instruct, also used by Qwen3.5. The arguments become a
    JSON object that grows by one parameter at a time.
    """

    block = XmlCall


class Llama3ToolCallParser(_CallParser):
    """``{"name": …, "parameters": {…}}`` as the whole answer; several are separated by ``;`` or newlines.

    Source: prompt format of Llama 3.1 and 3.2 (JSON-based tool calling), optionally after ``<|python_tag|>``.
    There is no closing tag: text that begins otherwise, or follows a call, is content to its end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._plain = False  # content, to the end
        self._tag_seen = False

    def _outside(self, text: str, pos: int) -> int:
        if self._plain:
            self._content(self._text.add(text[pos:]))
            return len(text)
        space = _SEPARATOR if self._calls else SPACE
        end = space.match(text, pos).end()  # type: ignore[union-attr]  # matches anything
        self._raw.append(text[pos:end])
        if end == len(text):
            return end
        if text[end] == "{":
            self._begin(JsonCall())
        elif self._tag_seen or self._calls:
            self._end_calls()
        elif text.startswith(_PYTHON_TAG, end):
            self._tag_seen = True
            self._raw.append(_PYTHON_TAG)
            return end + len(_PYTHON_TAG)
        elif possible_tag(text, end, (_PYTHON_TAG,)) != end:
            self._end_calls()
        return end

    def _end_calls(self) -> None:
        self._plain = True
        self._reject()

    def _ended(self, block: CallBlock) -> None:
        self._plain = block.status == "failed"

    def _last(self, held: str) -> None:
        if not self._calls or self._plain:
            self._reject(held)
