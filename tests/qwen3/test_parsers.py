"""Reasoning parsers: the right split, whatever the pieces, in linear time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymllm_core.protocols.parser import ReasoningParser
from pymllm_qwen3 import parsers
from pymllm_qwen3.parsers import possible_tag

QWEN_PROMPT = "<|im_start|>user\nWhat does <think> mean?<|im_end|>\n<|im_start|>assistant\n"
CLOSED_PROMPT = QWEN_PROMPT + "<think>\n\n</think>\n\n"
OPENED_PROMPT = QWEN_PROMPT + "<think>\n"

CLASSES = [
    parsers.Qwen3Reasoning,
    parsers.Qwen3ThinkingReasoning,
    parsers.DeepseekR1Reasoning,
    parsers.Glm45Reasoning,
    parsers.KimiReasoning,
]

ANSWERS = [
    "<think>\nFirst, 2 < 3.\n\nThen 4.\n</think>\n\nThe answer\nis 4.\n",
    "\n <think>\n\n</think>\n\nHello",
    "<think>unclosed </thin",
    "<think>\na\n</thi\n\nnk></think></think>\n\nb</think>",
    "no tags\n\nat all <think>not reasoning</think>\n",
    " \n<thin air",
    "\n\n",
    "",
    "<think>\n\n\n",
    "lone</think>\n\n\n\nrest",
    "</think>x",
    "<think><think>\nnested</think>\n<think>content</think>",
]


def run(parser: ReasoningParser, pieces: Iterable[str]) -> tuple[str, str]:
    """(reasoning, content), checking that pieces are not empty and that reasoning comes first."""
    texts = {"reasoning": "", "content": ""}
    found = [piece for text in pieces for piece in parser.feed(text)] + parser.finish()
    for piece in found:
        assert piece.text
        assert piece.kind == "content" or not texts["content"]
        texts[piece.kind] += piece.text
    assert parser.finish() == []
    return texts["reasoning"], texts["content"]


def expected(cls: type[parsers.TagReasoningParser], text: str, start: str) -> tuple[str, str]:
    """The same by looking at the whole text. start: none, opened or closed, by the prompt."""
    if start == "closed":
        return "", text
    if text.lstrip().startswith(cls.opening):
        text = text.lstrip().removeprefix(cls.opening)
    elif start == "none" and not cls.forced:
        return "", text
    reasoning, _, content = text.partition(cls.closing)
    return reasoning.strip("\n"), content.lstrip("\n")


def translated(cls: type[parsers.TagReasoningParser], text: str) -> str:
    return text.replace("<think>", cls.opening).replace("</think>", cls.closing)


STARTS = {"none": QWEN_PROMPT, "opened": OPENED_PROMPT, "closed": CLOSED_PROMPT}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_every_split(cls: type[parsers.TagReasoningParser], answer: str, start: str) -> None:
    answer = translated(cls, answer)
    prompt = translated(cls, STARTS[start])
    want = expected(cls, answer, start)
    assert run(cls(prompt_tail=prompt), list(answer)) == want
    for one in range(len(answer) + 1):
        for two in range(one, len(answer) + 1):
            assert run(cls(prompt_tail=prompt), [answer[:one], answer[one:two], answer[two:]]) == want


FRAGMENTS = ["<think>", "</think>", "<", "</", "think>", ">", "\n", " ", "a", "思", "◁", "<thi", "</th"]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(CLASSES),
    st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=25),
    st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    st.sampled_from(list(STARTS)),
)
def test_any_chunks(
    cls: type[parsers.TagReasoningParser], parts: list[str], sizes: list[int], start: str
) -> None:
    text = translated(cls, "".join(parts))
    pieces: list[str] = []
    pos = 0
    while pos < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[pos : pos + size])
        pos += size
    want = expected(cls, text, start)
    assert run(cls(prompt_tail=translated(cls, STARTS[start])), pieces) == want
    assert run(cls(prompt_tail=translated(cls, STARTS[start])), [text]) == want


def test_nothing_is_held_back_without_need() -> None:
    parser = parsers.Qwen3Reasoning()
    assert parser.feed(" <thi") == []
    assert parser.feed("nk>\n") == []
    assert [piece.text for piece in parser.feed("why")] == ["why"]
    assert [piece.text for piece in parser.feed("\na <")] == ["\na "]
    assert [piece.text for piece in parser.feed("b")] == ["<b"]
    assert parser.feed("\n</think") == []
    assert parser.feed(">\n") == []
    assert [(piece.kind, piece.text) for piece in parser.feed("so\n<")] == [("content", "so\n<")]


@pytest.mark.parametrize("thinking", [None, True, False])
def test_without_tag_is_content(thinking: bool | None) -> None:
    assert run(parsers.Qwen3Reasoning(thinking=thinking), ["a</think>b"]) == ("", "a</think>b")
    assert run(parsers.Qwen3ThinkingReasoning(thinking=thinking), ["a</think>b"]) == ("a", "b")


@pytest.mark.parametrize(
    ("tail", "want"),
    [
        ("", ("", "x</think>y")),
        ("<think>", ("x", "y")),
        ("cut off here<think>\n", ("x", "y")),
        ("<think>\n\n</think>\n\n", ("", "x</think>y")),
        ("[INST] is <think> a tag?[/INST]", ("", "x</think>y")),
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", ("", "x</think>y")),
        ("<|im_start|>assistant\n<think>\nSo far", ("x", "y")),
        ("<|im_start|>assistant\n<think>\nDone.\n</think>\n\nAnd", ("", "x</think>y")),
        ("<|im_start|>assistant\nThe tag <think> is", ("", "x</think>y")),
        ("<|assistant|>\n<think></think>", ("", "x</think>y")),
        ("<｜Assistant｜><think>\n", ("x", "y")),
        ("<｜Assistant｜></think>", ("", "x</think>y")),
    ],
)
def test_prompt_decides(tail: str, want: tuple[str, str]) -> None:
    assert run(parsers.Qwen3Reasoning(prompt_tail=tail), ["x</th", "ink>y"]) == want


def test_continued_reasoning_keeps_its_newlines() -> None:
    tail = "<|im_start|>assistant\n<think>\nSo far"
    assert run(parsers.Qwen3Reasoning(prompt_tail=tail), ["\n\n", "on\n</think>\ny"]) == ("\n\non", "y")


def test_recorded_templates(shared_qwen: Path) -> None:
    """What Qwen3's own template renders is understood, where its fixtures are at hand."""
    path = shared_qwen / "fixtures" / "chat_qwen3.json"
    texts = [case["text"] for case in json.loads(path.read_text()) if "text" in case]
    seen = 0
    for text in texts:
        if text.endswith("assistant\n<think>\n\n</think>\n\n"):
            assert run(parsers.Qwen3Reasoning(prompt_tail=text), ["<think>"]) == ("", "<think>")
        elif text.endswith("assistant\n"):
            assert run(parsers.Qwen3Reasoning(prompt_tail=text), ["<think>\na\n</think>\n\nb"]) == ("a", "b")
        else:
            continue
        seen += 1
    assert seen


def test_possible_tag() -> None:
    tags = ("<tool_call>", "</tool_call>")
    assert possible_tag("ab<", 0, tags) == 2
    assert possible_tag("ab<", 3, tags) == 3
    assert possible_tag("<<", 0, tags) == 1
    assert possible_tag("a</tool_call", 0, tags) == 1
    assert possible_tag("abc", 0, tags) == 3


@pytest.mark.parametrize("unit", ["<", "</thin", "\n<", " "])
def test_held_text_is_bounded(unit: str) -> None:
    """What is looked at again with every piece is shorter than a tag: this makes the work linear."""
    parser = parsers.Qwen3Reasoning(prompt_tail=OPENED_PROMPT)
    for char in unit * 100:
        parser.feed(char)
        assert len(parser._held) < len("</think>")


@pytest.mark.parametrize("unit", ["<", "\n", " ", "</thin", "<think>", "</think>", "\n<", "a"])
@pytest.mark.parametrize(("size", "total"), [(1, 1 << 16), (512, 1 << 20), (1 << 20, 1 << 20)])
def test_linear(unit: str, size: int, total: int) -> None:
    """Takes well under a second on an idle machine; see also `test_held_text_is_bounded`."""
    text = (unit * (total // len(unit) + 1))[:total]
    for prefix in ("", "<think>"):
        whole = prefix + text
        began = time.perf_counter()
        got = run(parsers.Qwen3Reasoning(), (whole[i : i + size] for i in range(0, len(whole), size)))
        assert time.perf_counter() - began < 20
        assert got == expected(parsers.Qwen3Reasoning, whole, "none")
