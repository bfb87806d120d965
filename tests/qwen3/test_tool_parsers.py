"""Tool-call parsers: the right calls from examples of each format, at every split."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from pymllm_core.protocols.parser import ToolCallParser, ToolCallPiece
from pymllm_qwen3.tool_parsers import HermesToolCallParser, Llama3ToolCallParser, Qwen3CoderToolCallParser

Result = tuple[str, list[tuple[str, str]]]


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


def check(cls: Callable[[], ToolCallParser], text: str, want: Result) -> None:
    """The same result whole, character by character, and at every split in two."""
    assert run(cls, [text]) == want
    assert run(cls, text) == want
    for at in range(1, len(text)):
        assert run(cls, [text[:at], text[at:]]) == want


ONE = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Paris"}}\n</tool_call>'
PARIS = ("get_time", '{"city": "Paris"}')
TRICKY = (
    r'{"a": "</tool_call> \" } \\", "b": [{"c": {}}, "\u00e9\ud83d\ude00", -1.5e+3], "<tool_call>": null}'
)

HERMES: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("", "", []),
    ("\nplain\n", "\nplain\n", []),
    (ONE, "", [PARIS]),
    (f"Let me see.\n\n{ONE}\n", "Let me see.", [PARIS]),
    (f"\n\na\n\nb\n{ONE}\n{ONE}\n\nc\n\n", "\n\na\n\nbc\n\n", [PARIS, PARIS]),
    (f'<tool_call>{{"name":"f","arguments":{TRICKY}}}</tool_call>', "", [("f", TRICKY)]),
    ('<tool_call>{"name":"f","parameters":{ "x" : 1 } } </tool_call>', "", [("f", '{ "x" : 1 }')]),
    ('<tool_call>{"arguments": {"x": 1}, "id": 7, "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
    (
        r'<tool_call>{"name": "f", "arguments": "{\"x\": \"\\n\u00e9\"}"}</tool_call>',
        "",
        [("f", r'{"x": "\né"}')],
    ),
    (r'<tool_call>{"arguments": "{\"x\": 1}", "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
    (
        r'<tool_call>{"name": "f", "arguments": "{\"x\": \"1\n2\"}"}</tool_call>',
        "",
        [("f", r'{"x": "1\n2"}')],
    ),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', "", [("f", "{}")]),
    (r'<tool_call>{"name": "f\u00e9", "arguments": {}}</tool_call>', "", [("fé", "{}")]),
    # raw control characters in strings are mended
    (
        '<tool_call>{"name": "f", "arguments": {"code": "a\n\tb"}}</tool_call>',
        "",
        [("f", r'{"code": "a\n\tb"}')],
    ),
    # a missing closing tag is forgiven
    ('x\n<tool_call>{"name": "f", "arguments": {}}', "x", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": {}}\n' + ONE + "y", "y", [("f", "{}"), PARIS]),
    ('<tool_call>{"name": "f", "arguments": {}} x  y', "x  y", [("f", "{}")]),
    # any other closing tag is content
    (f"{ONE}a\n</tool_call>", "a\n</tool_call>", [PARIS]),
    # cut off
    ('<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    ('<tool_call>{"name": "f", "argum', "", [("f", "")]),
    (r'<tool_call>{"name": "f", "arguments": "{\"x', "", [("f", "")]),
    ('a\n<tool_call>\n{"name": "f', 'a\n<tool_call>\n{"name": "f', []),
    ('<tool_call>{"arguments": {"a": 1}', '<tool_call>{"arguments": {"a": 1}', []),
    ("a\n<tool_ca", "a\n<tool_ca", []),
    ("a\n<tool_call>\n", "a\n<tool_call>\n", []),
    # broken once it had started: the rest is content
    ('<tool_call>{"name": "f", "arguments": {"a": x}}\n</tool_call>\nb', "x}}b", [("f", '{"a": ')]),
    ('<tool_call>{"name": "f", "arguments": {}}}\n</tool_call>b', "}b", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": {}, }</tool_call>b', "}b", [("f", "{}")]),
    # a call after rejected text
    (f"<tool_call>\n{ONE}", "<tool_call>", [PARIS]),
    (f"{ONE}\n<tool_call>bad</tool_call>\n{ONE}", "<tool_call>bad</tool_call>", [PARIS, PARIS]),
]
REJECTED = [
    "not json",
    "[]",
    "{}",
    '{"a": 1}',
    '{"name": 5, "arguments": {}}',
    '{"name": "", "arguments": {}}',
    r'{"name": "\ud800", "arguments": {}}',
    '{"name": "f", "arguments": [1]}',
    '{"name": "f", "arguments": 1}',
    '{"name": "f", "arguments": "text"}',
    r'{"name": "f", "arguments": "{\"a\": \"\ud800\"}"}',
    r'{"name": "f", "arguments": "{} {}"}',
    '{"name": "f", "arguments": nul}',
    '{"name": "f", "name": "g"}',
    '{"name": "f" "arguments": {}}',
    '{"arguments": {}, "parameters": {}, "name": "f"}',
    '{"arguments": {"a": 01}, "name": "f"}',
    '{"arguments": {"a": tru}, "name": "f"}',
    r'{"arguments": {"a": "\x"}, "name": "f"}',
    r'{"arguments": {"a": "\u12g4"}, "name": "f"}',
    '{"arguments": {"a": 1]}, "name": "f"}',
    '{"arguments": {"a": 1,}, "name": "f"}',
    "{'name': 'f', 'arguments': {}}",
]


@pytest.mark.parametrize(("text", "content", "calls"), HERMES)
def test_hermes(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    check(HermesToolCallParser, text, (content, calls))


@pytest.mark.parametrize("body", REJECTED)
def test_rejected_is_content_as_written(body: str) -> None:
    text = f"a\n<tool_call>\n{body}\n</tool_call>\n"
    check(HermesToolCallParser, text, (text, []))
    check(Llama3ToolCallParser, f"\n{body};", (f"\n{body};", []))


def xml(name: str, *parameters: tuple[str, str]) -> str:
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ("Paris", '"Paris"'),
        ("12", "12"),
        (" -1.5e3 ", "-1.5e3"),
        ("007", '"007"'),
        ("true", "true"),
        ("True", '"True"'),
        ("null", "null"),
        ('{"a": [1, "</function>"]}', '{"a": [1, "</function>"]}'),
        ("[1, 2", '"[1, 2"'),
        ('"quoted"', r'"\"quoted\""'),
        ("NaN", '"NaN"'),
        ("", '""'),
        ("\n  a\n\nb\\\n", r'"\n  a\n\nb\\\n"'),
        ("a </parameter <parameter=b> </tool_call> é", '"a </parameter <parameter=b> </tool_call> é"'),
    ],
)
def test_coder_values(value: str, want: str) -> None:
    check(
        Qwen3CoderToolCallParser,
        "Well.\n" + xml("f", ("k e", value), ("l", "x")) + "\n",
        ("Well.", [("f", f'{{"k e": {want}, "l": "x"}}')]),
    )


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (xml("f"), "", [("f", "{}")]),
        (xml("f", ("a", "1")) + "\n" + xml("g") + "\nbye\n", "bye\n", [("f", '{"a": 1}'), ("g", "{}")]),
        ("<tool_call><function=f><parameter=a>1</parameter></function></tool_call>", "", [("f", '{"a": 1}')]),
        ("<tool_call><function=f><parameter=a>1</parameter></tool_call>x", "x", [("f", '{"a": 1}')]),
        ("<tool_call><function=f></tool_call>x</tool_call>", "x</tool_call>", [("f", "{}")]),
        ("<tool_call><function=f></function>" + xml("g"), "", [("f", "{}"), ("g", "{}")]),
        ("<tool_call>\n<tool_call>\n<function=f></function></tool_call>", "<tool_call>", [("f", "{}")]),
        # cut off
        ("<tool_call><function=f", "<tool_call><function=f", []),
        ("a\n<tool_call><function=f>\n<par", "a", [("f", "")]),
        ("<tool_call><function=f><parameter=a>1</parameter><parameter=b>2</para", "", [("f", '{"a": 1')]),
        ("<tool_call>\n<fun", "<tool_call>\n<fun", []),
        # wrong
        ('<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f"}</tool_call>', []),
        ("<tool_call><function=></function>", "<tool_call><function=></function>", []),
        ("<tool_call><function=a\nb></function>", "<tool_call><function=a\nb></function>", []),
        ("<tool_call><function=f>text</function>", "<tool_call><function=f>text</function>", []),
        ("<tool_call><function=f><parameter=<", "<tool_call><function=f><parameter=<", []),
        (
            "<tool_call><function=f><parameter=a>1</parameter>?</function></tool_call>",
            "?</function>",
            [("f", '{"a": 1')],
        ),
    ],
)
def test_coder_blocks(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    check(Qwen3CoderToolCallParser, text, (content, calls))


LLAMA = '{"name": "get_time", "parameters": {"city": "Paris"}}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (LLAMA, "", [PARIS]),
        (f"\n<|python_tag|>{LLAMA}\n", "", [PARIS]),
        (f"<|python_tag|>{LLAMA}; {LLAMA}\n{LLAMA};", "", [PARIS] * 3),
        (f"{LLAMA}\n\nDone.\n", "Done.\n", [PARIS]),
        (f"{LLAMA};\n{{}} {LLAMA}", f";\n{{}} {LLAMA}", [PARIS]),
        (f"I call {LLAMA}", f"I call {LLAMA}", []),
        ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        ("<|python_tag|>", "<|python_tag|>", []),
        (" <|pyth", " <|pyth", []),
        (" <|python\n", " <|python\n", []),
        ("\n \n", "\n \n", []),
        ('{"answer": 42}\n', '{"answer": 42}\n', []),
        ('{"name": "f", "parameters": {"a": 1', "", [("f", '{"a": 1')]),
        ('{"name": "f", "parameters": {"a": ?}}', "?}}", [("f", '{"a": ')]),
        ('{"name": "f', '{"name": "f', []),
    ],
)
def test_llama3(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    check(Llama3ToolCallParser, text, (content, calls))


def test_arguments_stream_as_written() -> None:
    parser = HermesToolCallParser()
    assert parser.feed('Hi\n<tool_call>\n{"name": "f", "arguments": ') == [ToolCallPiece(content="Hi")]
    assert parser.feed('{"a": "x') == [ToolCallPiece(index=0, name="f", arguments='{"a": "x')]
    assert parser.feed("y") == [ToolCallPiece(index=0, arguments="y")]
    assert parser.feed('"} ') == [ToolCallPiece(index=0, arguments='"}')]
    assert parser.feed("}") == []
    coder = Qwen3CoderToolCallParser()
    assert coder.feed("<tool_call><function=f><parameter=a>") == [ToolCallPiece(index=0, name="f")]
    assert coder.feed("1</parameter>") == [ToolCallPiece(index=0, arguments='{"a": 1')]
