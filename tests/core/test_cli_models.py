"""``pymllm plan``, ``generate`` and ``chat``, over a model that says what the test wants."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pymllm_core
from pymllm_core import cli
from pymllm_core.commands import plan as plan_command
from pymllm_core.commands.base import console
from pymllm_core.commands.chat import Conversation, answer
from pymllm_core.config import Settings
from pymllm_core.device import DeviceInfo
from pymllm_core.errors import EngineError, RequestError
from pymllm_core.output import Delta, Usage
from pymllm_core.plan import Limits, MemoryPlan, Plan
from pymllm_core.protocols.parser import ReasoningPiece
from pymllm_core.request import SamplingParams
from pymllm_core.select import Choice, Refusal
from pymllm_core.specs import AttentionBackendSpec, CachePolicySpec, KernelSpec, ModelSpec


class FakeLLM:
    """Answers every prompt with its own words, in pieces; remembers what it was asked."""

    last: FakeLLM

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.asked: list[Any] = []
        self.closed = False
        self.aborted = 0
        self.pieces: list[str | BaseException] = ["Hel", "lo"]
        self.processor = SimpleNamespace(
            from_chat=self._from_chat, reasoning_parser=self._parser, sampling=self._sampling
        )
        self.reasoning = False
        FakeLLM.last = self

    @classmethod
    def from_settings(cls, settings: Settings, *, progress: object = None) -> FakeLLM:
        return cls(settings)

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    @staticmethod
    def _sampling(**fields: Any) -> SamplingParams:
        return SamplingParams(**{name: value for name, value in fields.items() if value is not None})

    def _from_chat(self, messages: list[dict[str, str]], params: SamplingParams) -> Any:
        self.asked.append(([dict(message) for message in messages], params))
        if len(messages) > 5:
            raise RequestError("the prompt is too long")
        return SimpleNamespace(request="request", prompt_tail="")

    def _parser(self, *, prompt_tail: str, thinking: bool | None) -> Any:
        return Thinker() if self.reasoning else None

    def generate(self, prompt: str, params: SamplingParams, *, stream: bool) -> Iterator[Delta]:
        self.asked.append((prompt, params))
        return self.stream(None)

    def chat(self, messages: list[Any], params: SamplingParams, *, stream: bool) -> Iterator[Delta]:
        self.asked.append((messages, params))
        return self.stream(None)

    def stream(self, request: object) -> Iterator[Delta]:
        finished = False
        try:
            for number, piece in enumerate(self.pieces):
                if isinstance(piece, BaseException):
                    raise piece
                finished = number + 1 == len(self.pieces)
                usage = Usage(3, number + 1)
                yield Delta("0", piece, (number,), usage, "stop" if finished else None)
        finally:
            self.aborted += not finished


class Thinker:
    """Text in angle brackets is reasoning."""

    def feed(self, text: str) -> list[ReasoningPiece]:
        thought = text.startswith("<")
        return [ReasoningPiece("reasoning" if thought else "content", text.strip("<>"))]

    def finish(self) -> list[ReasoningPiece]:
        return [ReasoningPiece("content", "!")]


@pytest.fixture(autouse=True)
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pymllm_core, "LLM", FakeLLM, raising=False)


def run(monkeypatch: pytest.MonkeyPatch, stdin: str, *argv: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    return cli.run(list(argv))


# generate


def test_generate_streams_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "generate",
        "M",
        "Hi",
        "--max-tokens",
        "5",
        "--temperature",
        "0",
        "--seed",
        "7",
        "--server.port",
        "9",
    ]
    assert run(monkeypatch, "", *argv) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("Hello\n", "")
    messages, params = FakeLLM.last.asked[0]
    assert messages == [{"role": "user", "content": "Hi"}]
    assert (params.max_tokens, params.temperature, params.seed) == (5, 0.0, 7)
    assert FakeLLM.last.settings.server.port == 9
    assert FakeLLM.last.closed


@pytest.mark.parametrize("argv", [["generate", "M", "-", "--raw"], ["generate", "M", "--raw"]])
def test_generate_reads_standard_input(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "two\nlines\n", *argv) == 0
    assert FakeLLM.last.asked[0][0] == "two\nlines"


def test_settings_may_stand_between_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["generate", "--server.port", "9", "M", "--server.disable_radix_cache", "Hi", "--raw"]
    assert run(monkeypatch, "", *argv) == 0
    assert FakeLLM.last.asked[0][0] == "Hi"
    assert FakeLLM.last.settings.server.model_path == "M"
    assert FakeLLM.last.settings.server.disable_radix_cache is True


def test_generate_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "", "generate", "M", "Hi", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == "Hello"
    assert found["token_ids"] == [0, 1]
    assert found["finish_reason"] == "stop"
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0}


def test_an_error_of_the_engine_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        FakeLLM, "stream", lambda *_: iter([Delta("0", "", (), Usage(1, 0), "error", error="no KV")])
    )
    assert run(monkeypatch, "", "generate", "M", "Hi") == 1
    assert "error: no KV" in capsys.readouterr().err


# chat


def test_chat_keeps_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "one\n\ntwo\n/reset\n/system be brief\nthree\n/exit\nnever\n"
    assert run(monkeypatch, lines, "chat", "M", "--system", "be kind") == 0
    assert capsys.readouterr().out == "Hello\nHello\nHello\n"
    first, second, third = [messages for messages, _ in FakeLLM.last.asked]
    assert first == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "one"}]
    assert second[1:] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "two"},
    ]
    assert third == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "three"}]


def test_a_refused_request_does_not_end_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "1\n2\n3\n4\n/reset\n5\n", "chat", "M", "--system", "x") == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello\n" * 3
    assert captured.err.count("error: the prompt is too long; /reset starts anew") == 2


def make_answer(pieces: list[Any], *, reasoning: bool) -> tuple[str, str, FakeLLM]:
    llm = FakeLLM(Settings.of("M"))
    llm.pieces, llm.reasoning = pieces, reasoning
    shown = io.StringIO()
    content = answer(llm, [{"role": "user", "content": "x"}], SamplingParams(), console(shown))
    return content, shown.getvalue(), llm


def test_reasoning_is_shown_and_not_kept() -> None:
    content, shown, _ = make_answer(["<thinking>", "the ", "answer"], reasoning=True)
    assert content == "the answer!"
    assert shown == "thinkingthe answer!\n"


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said() -> None:
    content, shown, llm = make_answer(["Once ", KeyboardInterrupt()], reasoning=False)
    assert content == "Once"
    assert shown == "Once  (stopped)\n"
    assert llm.aborted == 1


def test_an_engine_error_is_not_swallowed() -> None:
    with pytest.raises(EngineError):
        make_answer(["a", EngineError("x")], reasoning=False)


def test_text_is_shown_as_it_is() -> None:
    _, shown, _ = make_answer(["[bold]:smile: \x41" + "x" * 300, " [/nothing]"], reasoning=False)
    assert shown == "[bold]:smile: A" + "x" * 300 + " [/nothing]\n"


def test_unknown_slash_commands_are_explained() -> None:
    conversation = Conversation()
    assert "there is no /rest" in (conversation.command("/rest") or "")
    assert "/system TEXT" in (conversation.command("/help") or "")
    assert conversation.command("/exit") is None
    assert conversation.command("/system") == "no system prompt"


# plan


def a_plan() -> Plan:
    def choice(spec: Any, *refused: Refusal) -> Choice[Any]:
        return Choice(spec, "dist", f"highest priority ({spec.priority}) of 1 that fit", refused)

    slow = Refusal("slow", "other", "lower priority (0 < 5)")
    unasked = Refusal("chunk", "core", "'radix' was asked for")
    kernel = KernelSpec(operation="linear", name="fast", implementation="a:b", priority=5)
    kernels = {f"linear K={size} N=64": choice(kernel, slow) for size in (64, 128)}
    fields: dict[str, Any] = {
        "settings": Settings.of("M", api_key="secret"),
        "model_path": Path("/models/m"),
        "architecture": "TinyForCausalLM",
        "dtype": "bfloat16",
        "kv_dtype": "float16",
        "vocab_size": 8,
        "device": DeviceInfo("cuda", "A GPU", 8 << 30, 7 << 30, capability=(8, 7)),
        "model": choice(ModelSpec(name="TinyForCausalLM", implementation="a:b")),
        "quant": None,
        "attention": choice(AttentionBackendSpec(name="pytorch", implementation="a:b")),
        "cache": choice(CachePolicySpec(name="radix", implementation="a:b"), unasked),
        "kernels": kernels,
        "parsers": {"reasoning": None, "tool_calls": None},
        "memory": MemoryPlan(7 << 30, 6 << 30, 1 << 30, 1 << 20, 3 << 20, 2048, 16, 100),
        "limits": Limits(4096, 4, None, 2048, 1024, 1600),
        "notes": ("--server.gdn_decode_backend is unused",),
    }
    return Plan(**{name: value for name, value in fields.items() if name in Plan.__dataclass_fields__})


def test_the_plan_is_rendered_for_a_person() -> None:
    shown = io.StringIO()
    plan_command.render(a_plan(), console(shown))
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    assert "TinyForCausalLM from /models/m" in lines
    assert "on cuda: A GPU, compute capability 8.7; bfloat16, KV in float16" in lines
    assert "quantisation none" in lines
    assert "kernel linear K=128 N=64 fast (dist) highest priority (5) of 1 that fit" in lines
    assert "kernel linear (2 shapes) slow (other) lower priority (0 < 5)" in lines
    assert "KV cache 3.1 MiB: 1600 tokens in 100 pages of 16, 2.0 KiB a token" in lines
    assert "CUDA graphs 3.0 MiB" in lines
    assert "queued requests unlimited" in lines
    assert "note: --server.gdn_decode_backend is unused" in lines
    assert "chunk" not in shown.getvalue()
    assert "\x1b" not in shown.getvalue()


def test_the_plan_as_json_holds_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pymllm_core.engine import build

    monkeypatch.setattr(build, "make_plan", lambda settings, registry: a_plan())
    assert cli.run(["plan", "M", "--json"]) == 0
    text = capsys.readouterr().out
    assert "secret" not in text
    assert json.loads(text)["architecture"] == "TinyForCausalLM"
