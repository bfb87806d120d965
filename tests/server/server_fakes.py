"""An engine without a model: scripted texts, delays and failures behind the real engine's interface."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pymllm_core.errors import QueueFullError, RequestError
from pymllm_core.output import Delta, Timings, TokenLogprob, Usage
from pymllm_core.protocols.parser import ReasoningPiece, ToolCallPiece
from pymllm_core.request import Request, SamplingParams


@dataclass(frozen=True)
class FakeProgress:
    stage: str = "loading weights"
    done: int = 40
    total: int = 100
    fraction: float = 0.4


@dataclass(frozen=True)
class FakeStats:
    running: int = 0
    waiting: int = 0
    pages_used: int = 3
    pages_total: int = 12
    cache_hit_tokens: int = 5
    prompt_tokens: int = 50
    generated_tokens: int = 70
    steps: int = 70
    last_step_age_s: float = 0.1


@dataclass(frozen=True)
class FakeLimits:
    context_length: int = 4096


@dataclass(frozen=True)
class FakePlan:
    model_path: str = "."
    architecture: str = "FakeForCausalLM"
    limits: FakeLimits = FakeLimits()

    def to_json(self) -> dict[str, Any]:
        return {"model": "fake"}


class TagReasoning:
    """<think>...</think>; holds back what could begin a tag."""

    def __init__(self, *, prompt_tail: str = "", thinking: bool | None = None) -> None:
        self.kind = "reasoning" if prompt_tail.endswith("<think>") else "content"
        self.buffer = ""

    def feed(self, text: str) -> list[ReasoningPiece]:
        self.buffer += text
        pieces = []
        while True:
            tag = "</think>" if self.kind == "reasoning" else "<think>"
            before, found, after = self.buffer.partition(tag)
            if not found:
                break
            pieces.append(ReasoningPiece(self.kind, before))
            self.kind = "content" if self.kind == "reasoning" else "reasoning"
            self.buffer = after
        hold = next((n for n in range(len(tag) - 1, 0, -1) if self.buffer.endswith(tag[:n])), 0)
        ready = self.buffer[: len(self.buffer) - hold]
        self.buffer = self.buffer[len(ready) :]
        return [piece for piece in [*pieces, ReasoningPiece(self.kind, ready)] if piece.text]

    def finish(self) -> list[ReasoningPiece]:
        rest, self.buffer = self.buffer, ""
        return [ReasoningPiece(self.kind, rest)] if rest else []


class TagTools:
    """Reads all, and at the end splits off <tool_call>JSON</tool_call>, arguments in two pieces."""

    def __init__(self) -> None:
        self.text = ""

    def feed(self, text: str) -> list[ToolCallPiece]:
        self.text += text
        return []

    def finish(self) -> list[ToolCallPiece]:
        content, *calls = self.text.split("<tool_call>")
        pieces = [ToolCallPiece(content=content)] if content else []
        for index, call in enumerate(calls):
            parsed = json.loads(call.partition("</tool_call>")[0])
            arguments = json.dumps(parsed["arguments"])
            pieces.append(ToolCallPiece(index=index, name=parsed["name"], arguments=arguments[:3]))
            pieces.append(ToolCallPiece(index=index, arguments=arguments[3:]))
        return pieces


@dataclass(frozen=True)
class FakeChat:
    request: Request
    prompt_tail: str


@dataclass
class FakeProcessor:
    """A character is a token."""

    tail: str = "<assistant>"
    tokenizer: Any = None
    seen: list[dict[str, Any]] = field(default_factory=list)

    def sampling(self, **fields: Any) -> SamplingParams:
        return SamplingParams(**{name: value for name, value in fields.items() if value is not None})

    def from_ids(self, ids: Any, params: SamplingParams, *, request_id: str) -> Request:
        return Request(request_id, tuple(ids), params)

    def from_text(self, text: str, params: SamplingParams, *, request_id: str) -> Request:
        return Request(request_id, tuple(map(ord, text)), params)

    def from_chat(
        self, messages: Any, params: Any, *, request_id: str, tools: Any = None, template_kwargs: Any = None
    ) -> FakeChat:
        self.seen.append({"messages": messages, "tools": tools, "template_kwargs": template_kwargs})
        text = "".join(f"{message['role']}:{message['content']}\n" for message in messages) + self.tail
        return FakeChat(self.from_text(text, params, request_id=request_id), self.tail)

    def reasoning_parser(self, *, prompt_tail: str, thinking: bool | None) -> TagReasoning:
        return TagReasoning(prompt_tail=prompt_tail, thinking=thinking)

    def tool_call_parser(self) -> TagTools:
        return TagTools()

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


class FakeStream:
    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self.engine, self.request = engine, request
        self.text = engine.answer(request)
        self.made = 0
        self.ended = False
        self.aborted = asyncio.Event()

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> Delta:
        if self.ended:
            raise StopAsyncIteration
        if self.engine.delay_s:
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self.aborted.wait(), self.engine.delay_s)
        params = self.request.params
        limit = min(params.max_tokens or 10**9, len(self.text))
        if self.aborted.is_set():
            return self._delta("", "abort")
        if self.engine.fail_after is not None and self.made >= self.engine.fail_after:
            return self._delta("", "error", error="the device caught fire")
        piece = self.text[self.made : min(self.made + self.engine.step, limit)]
        self.made += len(piece)
        for stop in params.stop:
            if stop in self.text[: self.made]:
                return self._delta(piece.split(stop)[0], "stop")
        if self.made < limit:
            return self._delta(piece, None)
        return self._delta(piece, "length" if limit < len(self.text) else "stop")

    def _delta(self, text: str, reason: Any, error: str | None = None) -> Delta:
        logprobs = None
        wanted = self.request.params.logprobs
        if wanted is not None:
            top = tuple((ord("a") + n, -float(n)) for n in range(wanted))
            logprobs = tuple(TokenLogprob(ord(char), -0.5, top) for char in text)
        usage = Usage(len(self.request.token_ids), self.made, min(2, len(self.request.token_ids)))
        delta = Delta(
            self.request.id, text, tuple(map(ord, text)), usage, reason, logprobs=logprobs, error=error
        )
        if reason:
            self.ended = True
            self.engine.running.pop(self.request.id, None)
            delta = delta._replace(timings=Timings(0.001, 0.02, 0.5))
        return delta

    async def aclose(self) -> None:
        if not self.ended:
            self.ended = True
            self.engine.abort(self.request.id)
            self.engine.running.pop(self.request.id, None)


class FakeEngine:
    def __init__(
        self,
        answer: str | Callable[[Request], str] = "Hello world",
        *,
        delay_s: float = 0.0,
        step: int = 1,
        load_s: float = 0.0,
        load_error: BaseException | None = None,
        fail_after: int | None = None,
        queue_full: bool = False,
        hang_stop: bool = False,
    ) -> None:
        self.answer = answer if callable(answer) else lambda request: answer
        self.delay_s, self.step, self.load_s, self.load_error = delay_s, step, load_s, load_error
        self.fail_after, self.queue_full, self.hang_stop = fail_after, queue_full, hang_stop
        self.state: Any = "loading"
        self.progress = FakeProgress()
        self.error: BaseException | None = None
        self.plan = FakePlan()
        self.processor = FakeProcessor()
        self.running: dict[str, FakeStream] = {}
        self.submitted: list[Request] = []
        self.aborts: list[tuple[str, float]] = []
        self.stats_now = FakeStats()
        self.flushable = True
        self._stopped = threading.Event()

    def start(self) -> None:
        def load() -> None:
            if self._stopped.wait(self.load_s):
                return
            if self.load_error:
                self.error, self.state = self.load_error, "failed"
            else:
                self.state = "ready"

        if self.load_s or self.load_error:
            threading.Thread(target=load, daemon=True).start()
        else:
            self.state = "ready"

    def stop(self) -> None:
        if self.hang_stop:
            time.sleep(60)
        self.state = "stopped"
        self._stopped.set()

    def submit(self, request: Request) -> FakeStream:
        if self.queue_full:
            raise QueueFullError("32 requests wait already; try again later")
        if len(request.token_ids) >= self.plan.limits.context_length:
            raise RequestError(
                f"the prompt has {len(request.token_ids)} tokens; {self.plan.limits.context_length - 1} fit",
                param="prompt",
                code="context_length_exceeded",
            )
        self.submitted.append(request)
        stream = self.running[request.id] = FakeStream(self, request)
        return stream

    def abort(self, request_id: str) -> bool:
        stream = self.running.get(request_id)
        if stream is None:
            return False
        self.aborts.append((request_id, time.monotonic()))
        stream.aborted.set()
        return True

    def flush_cache(self) -> bool:
        return self.flushable

    def stats(self) -> FakeStats:
        return replace(self.stats_now, running=self.stats_now.running + len(self.running))
