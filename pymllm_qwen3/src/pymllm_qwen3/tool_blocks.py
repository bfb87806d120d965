"""One tool call as models write it, read piece by piece: as a JSON object, or as Qwen3-Coder's XML."""

from __future__ import annotations

import json
import re
from typing import Literal, Protocol

from pymllm_qwen3.json_scan import (
    SPACE,
    JsonScanner,
    decode_object,
    decode_string,
    escape_controls,
    is_json,
)
from pymllm_qwen3.parsers import possible_tag


class CallBlock(Protocol):
    """The reader of one call.

    started: that this is a call, named `name`, is decided and will not be taken back. Until then the text
    may still turn out to be content; from then on `take` returns new text of the arguments.
    """

    status: Literal["open", "done", "failed"]
    started: bool
    name: str

    def feed(self, text: str, pos: int) -> int:
        """Consume from `pos` on; return where it stopped.

        Stopping before the end while still open means that the rest must come again, with more text.
        """
        ...

    def take(self) -> str:
        """The text of the arguments that is new since the last call of this."""
        ...

    def finish(self) -> None:
        """The text ended here."""
        ...


class _Block:
    def __init__(self) -> None:
        self.status: Literal["open", "done", "failed"] = "open"
        self.started = False
        self.name = ""
        self._arguments: list[str] = []

    def take(self) -> str:
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def finish(self) -> None:
        """A call cut off after its name is a call all the same: the client sees from its end that it was."""
        self.started = self.started or bool(self.name)

    def _fail(self) -> None:
        self.status = "failed"


class JsonCall(_Block):
    """``{"name": …, "arguments": {…}}``, keys in any order; other keys are skipped.

    The arguments are handed on as written, with one exception: raw control characters in strings become
    escapes, because models write newlines in code that way and JSON does not allow it. Arguments that are
    missing, null or an empty string are ``{}``; those given as a JSON string are decoded once it is complete.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state = "open"
        self._scanner: JsonScanner | None = None
        self._role = ""  # of the token being scanned: key, name, object, text, null, other
        self._token: list[str] = []
        self._key: str | None = None
        self._has_arguments = False

    def feed(self, text: str, pos: int) -> int:
        while pos < len(text) and self.status == "open":
            pos = self._between(text, pos) if self._scanner is None else self._scan(self._scanner, text, pos)
        return pos

    def _between(self, text: str, pos: int) -> int:
        """Between the tokens of the outer object. A character that begins a token is left to its scanner."""
        pos = SPACE.match(text, pos).end()  # type: ignore[union-attr]  # matches anything
        if pos == len(text):
            return pos
        char, state = text[pos], self._state
        if state == "value":
            self._value(char)
            return pos
        if state in ("key", "first_key") and char == '"':
            self._begin("key", JsonScanner())
            return pos
        if state == "open" and char == "{":
            self._state = "first_key"
        elif state == "colon" and char == ":":
            self._state = "value"
        elif state == "after" and char == ",":
            self._state = "key"
        elif state in ("after", "first_key") and char == "}" and self.name:
            if not self._has_arguments:
                self._arguments.append("{}")
            self.started = True
            self.status = "done"
        else:
            self._fail()
            return pos
        return pos + 1

    def _value(self, char: str) -> None:
        if self._key == "name":
            if char != '"' or self.name:
                self._fail()
            self._begin("name", JsonScanner())
        elif self._key in ("arguments", "parameters"):
            role = {"{": "object", '"': "text", "n": "null"}.get(char)
            if role is None or self._has_arguments:
                self._fail()
                return
            self._has_arguments = True
            self._begin(role, JsonScanner(allow_controls=True))
            self.started = role == "object" and bool(self.name)
        else:
            self._begin("other", JsonScanner())

    def _begin(self, role: str, scanner: JsonScanner) -> None:
        self._role, self._scanner = role, scanner
        self._token.clear()

    def _scan(self, scanner: JsonScanner, text: str, pos: int) -> int:
        end = scanner.feed(text, pos)
        if self._role == "object":
            self._arguments.append(escape_controls(text, pos, end, scanner.controls))
        elif self._role != "other":
            self._token.append(text[pos:end])
        if scanner.failed:
            self._fail()
        elif scanner.done:
            self._scanner = None
            self._ends()
        return end

    def _ends(self) -> None:
        """A token ended: what it was for."""
        token = "".join(self._token)
        self._state = "colon" if self._role == "key" else "after"
        if self._role == "key":
            self._key = decode_string(token)
        elif self._role == "name":
            self.name = decode_string(token) or ""
            if not self.name:
                self._fail()
        elif self._role == "text":
            arguments = decode_object(token)
            if arguments is None:
                self._fail()
                return
            self._arguments.append(arguments)
        elif self._role == "null":
            self._arguments.append("{}")
        self.started = self.status == "open" and self._has_arguments and bool(self.name)


_NAME = re.compile(r"[^<>\n]*")


class XmlCall(_Block):
    """``<function=NAME>``, any number of ``<parameter=KEY>VALUE</parameter>``, ``</function>``.

    A value that reads as a JSON number, boolean, null, object or array is one; any other is a string: the
    format does not tell, e.g., the string 5 from the number. One newline on either side of it is layout.
    It ends at the first ``</parameter>``, which the format has no way to escape.
    A missing ``</function>`` is forgiven where the block ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state = "function"
        self._token: list[str] = []
        self._key = ""
        self._first = True

    def feed(self, text: str, pos: int) -> int:
        while pos < len(text) and self.status == "open":
            if self._state == "function":
                pos, tag = self._tag(text, pos, ("<function=",))
                self._state = "name" if tag else "function"
            elif self._state == "body":
                pos, tag = self._tag(text, pos, ("<parameter=", "</function>", "</tool_call>"))
                if tag == "<parameter=":
                    self._state = "key"
                elif tag:
                    self._arguments.append("{}" if self._first else "}")
                    self.started = True
                    self.status = "done"
                    # The end of the block is not this object's to consume.
                    pos -= len(tag) if tag == "</tool_call>" else 0
            elif self._state == "value":
                pos, tag = self._value(text, pos)
            else:
                pos = self._name(text, pos)
                continue
            if not tag:
                break
        return pos

    def _tag(self, text: str, pos: int, tags: tuple[str, ...]) -> tuple[int, str]:
        """Skip space and one of `tags`; without a tag, fail unless it may still come."""
        pos = SPACE.match(text, pos).end()  # type: ignore[union-attr]  # matches anything
        for tag in tags:
            if text.startswith(tag, pos):
                return pos + len(tag), tag
        if possible_tag(text, pos, tags) != pos:
            self._fail()
        return pos, ""

    def _name(self, text: str, pos: int) -> int:
        """A function's or parameter's name, and the ``>`` after it."""
        end = _NAME.match(text, pos).end()  # type: ignore[union-attr]  # matches anything
        self._token.append(text[pos:end])
        if end == len(text):
            return end
        name = "".join(self._token).strip()
        self._token.clear()
        if text[end] != ">" or not name:
            self._fail()
            return end
        if self._state == "name":
            self.name = name
            self._state = "body"
        else:
            self._key = name
            self._state = "value"
            self.started = True
        return end + 1

    def _value(self, text: str, pos: int) -> tuple[int, str]:
        closing = "</parameter>"
        end = text.find(closing, pos)
        if end < 0:
            end = possible_tag(text, pos, (closing,))
            self._token.append(text[pos:end])
            return end, ""
        self._token.append(text[pos:end])
        value = "".join(self._token).removeprefix("\n").removesuffix("\n")
        self._token.clear()
        bare = value.strip()
        if bare.startswith('"') or not is_json(bare):
            bare = json.dumps(value, ensure_ascii=False)
        separator = "{" if self._first else ", "
        self._first = False
        self._arguments.append(f"{separator}{json.dumps(self._key, ensure_ascii=False)}: {bare}")
        self._state = "body"
        return end + len(closing), closing
