"""Tool-call parsers: any text, in any pieces, in linear time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymllm_core.protocols.parser import ToolCallParser, ToolCallPiece
from pymllm_qwen3.json_scan import MAX_DEPTH, JsonScanner, is_json
from pymllm_qwen3.tool_parsers import HermesToolCallParser, Llama3ToolCallParser, Qwen3CoderToolCallParser

Result = tuple[str, list[tuple[str, str]]]
CLASSES: list[Callable[[], ToolCallParser]] = [
    HermesToolCallParser,
    Qwen3CoderToolCallParser,
    Llama3ToolCallParser,
]


def collect(pieces: Iterable[ToolCallPiece]) -> Result:
    """(content, [(name, arguments)]), checking the order of the pieces."""
    content = ""
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if piece.index is None:
            assert piece.content
            assert piece.name is None
            assert not piece.arguments
            content += piece.content
            continue
        assert not piece.content
        if piece.name is None:
            assert piece.arguments
            assert piece.index == len(calls) - 1
            calls[-1] = calls[-1][0], calls[-1][1] + piece.arguments
        else:
            assert piece.index == len(calls)
            calls.append((piece.name, piece.arguments))
    return content, calls


def run(cls: Callable[[], ToolCallParser], pieces: Iterable[str]) -> Result:
    parser = cls()
    result = collect([piece for text in pieces for piece in parser.feed(text)] + parser.finish())
    assert parser.finish() == []
    return result


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces: list[str] = []
    pos = 0
    while pos < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[pos : pos + size])
        pos += size
    return pieces


ONE = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Paris"}}\n</tool_call>'
LLAMA = '{"name": "get_time", "parameters": {"city": "Paris"}}'


def xml(name: str, *parameters: tuple[str, str]) -> str:
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ARGUMENTS = st.dictionaries(st.text() | st.just("</tool_call>"), JSON, max_size=4)
PROSE = st.text(alphabet="ab <>/{\"'é思", max_size=8)
SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any)


@settings(max_examples=250, deadline=None)
@given(st.data(), PROSE, st.lists(st.tuples(ARGUMENTS, PROSE), max_size=3), SIZES)
def test_hermes_round_trip(
    data: st.DataObject, before: str, calls: list[tuple[dict[str, Any], str]], sizes: list[int]
) -> None:
    text, content, want = before, before, []
    for number, (arguments, after) in enumerate(calls):
        indent = data.draw(st.sampled_from([None, 1]))
        written = json.dumps(arguments, ensure_ascii=data.draw(st.booleans()), indent=indent)
        value = json.dumps(written) if data.draw(st.booleans()) else written
        items = [f'"name": "f{number}"', f'"arguments": {value}']
        if data.draw(st.booleans()):
            items.reverse()
        text += "\n<tool_call>\n{" + ", ".join(items) + "}\n</tool_call>\n" + after
        content += after
        want.append((f"f{number}", written))
    result = run(HermesToolCallParser, cut(text, sizes))
    assert result == (content, want)
    assert [json.loads(written) for _, written in result[1]] == [arguments for arguments, _ in calls]


def written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# A value cannot hold its own closing tag: the format has no escape for it.
PARAMETERS = st.tuples(
    st.sampled_from("abc"), JSON.filter(lambda value: "</parameter>" not in written(value))
)


def top_level_pairs(text: str) -> list[tuple[str, Any]]:
    """The items of a JSON object, repeated keys included."""
    last: list[tuple[str, Any]] = []

    def hook(items: list[tuple[str, Any]]) -> dict[str, Any]:
        last[:] = items  # the outermost object comes last
        return dict(items)

    json.loads(text, object_pairs_hook=hook)
    return last


@settings(max_examples=250, deadline=None)
@given(st.lists(st.lists(PARAMETERS, max_size=3), max_size=3), SIZES)
def test_coder_round_trip(calls: list[list[tuple[str, Any]]], sizes: list[int]) -> None:
    text = "\n".join(xml(f"f{i}", *((k, written(v)) for k, v in call)) for i, call in enumerate(calls))
    content, found = run(Qwen3CoderToolCallParser, cut(text, sizes))
    assert content == ""
    assert [name for name, _ in found] == [f"f{i}" for i in range(len(calls))]
    for (_, arguments), call in zip(found, calls, strict=True):
        pairs = top_level_pairs(arguments)
        assert [key for key, _ in pairs] == [key for key, _ in call]
        for (_, value), (_, got) in zip(call, pairs, strict=True):
            if not isinstance(value, str) or not is_json(value):  # a string like "5" reads as a number
                assert got == value


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<tool_call>\n{", '{"name": "f", ', '"arguments": ', '"parameters": {',
    "{", "}", "[", "]", '"', "\\", '\\"', "\\u00", "e9", ":", ",", "1", "-", "0.", "e5", "null", "tru",
    "\n", " ", "<", "</", "<function=f>", "</function>", "<parameter=a>", "</parameter>", "<function=",
    "x", ">", ";", "思", "<|python_tag|>", "}}\n</tool_call>", '"name": "g"', '"{\\"a\\": 1}"', "\x01", "\ud800",
]  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(
    st.sampled_from(CLASSES), st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=2), max_size=25), SIZES
)
def test_any_chunks(cls: Callable[[], ToolCallParser], parts: list[str], sizes: list[int]) -> None:
    """Whatever the text, it parses the same however it is cut, and text without a call is unchanged."""
    text = "".join(parts)
    want = run(cls, [text])
    assert run(cls, text) == want
    assert run(cls, cut(text, sizes)) == want
    if not want[1]:
        assert want[0] == text


@settings(max_examples=800, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=2), max_size=8) | JSON.map(json.dumps), SIZES)
def test_scanner_agrees_with_json(parts: list[str] | str, sizes: list[int]) -> None:
    text = "".join(parts)

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        assert not is_json(text)
    else:
        assert is_json(text)
    scanner = JsonScanner()
    for piece in cut(text + " ", sizes):
        if scanner.feed(piece) < len(piece):
            break
    assert scanner.done or not is_json(text)


def test_depth_is_bounded() -> None:
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    call = '<tool_call>{"arguments": {"a": %s}, "name": "f"}</tool_call>'
    assert run(HermesToolCallParser, [call % deep]) == ("", [("f", '{"a": ' + deep + "}")])
    assert run(HermesToolCallParser, [call % f"[{deep}]"]) == (call % f"[{deep}]", [])


HOSTILE = [
    "<", "<tool_call>", "</tool_call>", "\n", "\n<", "<tool_cal", "{", "[", '<tool_call>{"',
    '<tool_call>{"a":', ONE, xml("f", ("a", "1")), LLAMA, LLAMA + ";", " ", "a",
]  # fmt: skip
PREFIXES = [
    "", "<tool_call>", '<tool_call>{"name": "f", "arguments": {"a": ', LLAMA, '{"x": "', '{"x": ',
    '<tool_call>{"name": "f", "arguments": {"a": "', '<tool_call>{"name": "f", "arguments": "',
    '<tool_call>{"arguments": {"a": "', "<tool_call><function=f><parameter=a>", "<tool_call><function=",
    "<tool_call><function=f>",
]  # fmt: skip


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("size", "total"), [(1, 1 << 12), (512, 1 << 16), (1 << 17, 1 << 17)])
def test_linear(cls: Callable[[], ToolCallParser], size: int, total: int) -> None:
    """Each takes a second at most on an idle machine; see also `test_held_text_is_bounded`."""
    for unit in HOSTILE:
        for prefix in PREFIXES:
            text = (prefix + unit * (total // len(unit) + 1))[:total]
            parser = cls()
            began = time.perf_counter()
            for at in range(0, len(text), size):
                parser.feed(text[at : at + size])
            parser.finish()
            assert time.perf_counter() - began < 20


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_megabyte_of_one_character(cls: Callable[[], ToolCallParser], prefix: str) -> None:
    text = prefix + "<" * (1 << 20)
    began = time.perf_counter()
    content, calls = run(cls, (text[at : at + 300] for at in range(0, len(text), 300)))
    assert time.perf_counter() - began < 20
    assert calls or content == text


@pytest.mark.parametrize("cls", [HermesToolCallParser, Qwen3CoderToolCallParser, Llama3ToolCallParser])
def test_held_text_is_bounded(
    cls: type[HermesToolCallParser | Qwen3CoderToolCallParser | Llama3ToolCallParser],
) -> None:
    """What is looked at again with every piece is shorter than a tag: this makes the work linear."""
    for unit in HOSTILE:
        for prefix in PREFIXES:
            parser = cls()
            for char in prefix + (unit * 60)[:200]:
                parser.feed(char)
                assert len(parser._held) < len("<|python_tag|>")
