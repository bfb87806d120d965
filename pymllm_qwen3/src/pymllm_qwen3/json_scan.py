"""An incremental JSON validator (RFC 8259), which says where a value ends as its text arrives.

It keeps no text, only what is open, and looks at every character once.
"""

from __future__ import annotations

import json
import re

MAX_DEPTH = 200
"""Deeper nesting is refused: it is no tool call, and recursive readers of it would fail."""

SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_HEX = frozenset("0123456789abcdefABCDEF")
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_DIGITS = frozenset("0123456789")

# The number grammar as an automaton: state → characters → next state.
_NUMBER: dict[str, dict[str, str]] = {
    "-": {"0": "zero"} | dict.fromkeys("123456789", "int"),
    "zero": {".": "point", "e": "e", "E": "e"},
    "int": dict.fromkeys("0123456789", "int") | {".": "point", "e": "e", "E": "e"},
    "point": dict.fromkeys("0123456789", "fraction"),
    "fraction": dict.fromkeys("0123456789", "fraction") | {"e": "e", "E": "e"},
    "e": dict.fromkeys("0123456789", "exponent") | {"+": "sign", "-": "sign"},
    "sign": dict.fromkeys("0123456789", "exponent"),
    "exponent": dict.fromkeys("0123456789", "exponent"),
}
_NUMBER_ENDS = frozenset({"zero", "int", "fraction", "exponent"})


class JsonScanner:
    """Follows one JSON value. After `feed`: `done`, `failed`, or more text is needed.

    allow_controls: accept raw control characters in strings, which JSON forbids but models write; their
    places in the text of the last `feed` are in `controls`.
    """

    def __init__(self, *, allow_controls: bool = False) -> None:
        self.done = False
        self.failed = False
        self.controls: list[int] = []
        self._allow_controls = allow_controls
        self._open: list[str] = []  # the closing brackets that are due
        self._mode = "value"
        self._key = False  # whether the string being read is a key
        self._due = ""  # the rest of a literal
        self._hex = 0  # digits due of a \u escape
        self._number = ""

    def feed(self, text: str, pos: int = 0) -> int:
        """Consume from `pos` on; return the end of the value, the first wrong character, or len(text)."""
        self.controls = []
        while pos < len(text) and not self.done and not self.failed:
            if self._mode == "string":
                pos = self._string(text, pos)
            elif self._mode == "number":
                pos = self._digits(text, pos)
            elif self._mode in ("escape", "hex", "literal"):
                self._inside(text[pos])
                pos += not self.failed
            else:
                pos = SPACE.match(text, pos).end()  # type: ignore[union-attr]  # matches anything
                if pos < len(text):
                    self._structure(text[pos])
                    pos += not self.failed
        return pos

    def _string(self, text: str, pos: int) -> int:
        pos = _PLAIN.match(text, pos).end()  # type: ignore[union-attr]  # matches anything
        if pos == len(text):
            return pos
        char = text[pos]
        if char == '"':
            if self._key:
                self._mode = "colon"
            else:
                self._value_ends()
        elif char == "\\":
            self._mode = "escape"
        elif self._allow_controls:
            self.controls.append(pos)
        else:
            self.failed = True
            return pos
        return pos + 1

    def _digits(self, text: str, pos: int) -> int:
        while pos < len(text):
            state = _NUMBER[self._number].get(text[pos])
            if state is None:
                if self._number in _NUMBER_ENDS:
                    self._value_ends()
                else:
                    self.failed = True
                break
            self._number = state
            pos += 1
        return pos

    def _inside(self, char: str) -> None:
        """One character of an escape or of a literal."""
        if self._mode == "literal":
            self.failed = char != self._due[0]
            self._due = self._due[1:]
            if not self._due and not self.failed:
                self._value_ends()
        elif self._mode == "hex":
            self.failed = char not in _HEX
            self._hex -= 1
            if not self._hex:
                self._mode = "string"
        elif char == "u":
            self._mode, self._hex = "hex", 4
        else:
            self.failed = char not in '"\\/bfnrt'
            self._mode = "string"

    def _structure(self, char: str) -> None:
        """One character between tokens, or the first of a token."""
        mode = self._mode
        if mode in ("after", "first_key", "first_value") and self._open and char == self._open[-1]:
            self._open.pop()
            self._value_ends()
        elif mode == "after":
            self.failed = char != ","
            self._mode = "key" if self._open[-1] == "}" else "value"
        elif mode == "colon":
            self.failed = char != ":"
            self._mode = "value"
        elif mode in ("key", "first_key"):
            self.failed = char != '"'
            self._mode, self._key = "string", True
        elif char in "{[":
            self.failed = len(self._open) == MAX_DEPTH
            self._open.append("}" if char == "{" else "]")
            self._mode = "first_key" if char == "{" else "first_value"
        elif char == '"':
            self._mode, self._key = "string", False
        elif char in _LITERALS:
            self._mode, self._due = "literal", _LITERALS[char]
        elif char == "-" or char in _DIGITS:
            self._mode = "number"
            self._number = "-" if char == "-" else _NUMBER["-"][char]
        else:
            self.failed = True

    def _value_ends(self) -> None:
        self._mode = "after"
        self.done = not self._open


def is_json(text: str) -> bool:
    """Whether `text` is one JSON value and nothing else but space."""
    scanner = JsonScanner()
    end = scanner.feed(text + " ")  # the space ends a number
    return scanner.done and not text[end:].strip(" \t\n\r")


def escape_controls(text: str, start: int, end: int, controls: list[int]) -> str:
    """text[start:end] with the control characters at `controls` as JSON escapes."""
    parts: list[str] = []
    for at in controls:
        parts += text[start:at], json.dumps(text[at])[1:-1]
        start = at + 1
    parts.append(text[start:end])
    return "".join(parts)


def decode_string(token: str) -> str | None:
    """The text of a JSON string which a scanner accepted; None for a lone surrogate in it."""
    text: str = json.loads(token, strict=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text


def decode_object(token: str) -> str | None:
    """The JSON object within a JSON string which a scanner accepted; ``{}`` for none; None if it is wrong."""
    text = decode_string(token)
    if text is None:
        return None
    if not text.strip():
        return "{}"
    scanner = JsonScanner(allow_controls=True)
    end = scanner.feed(text)
    if not text.lstrip().startswith("{") or not scanner.done or SPACE.fullmatch(text, end) is None:
        return None
    return escape_controls(text, 0, end, scanner.controls)
