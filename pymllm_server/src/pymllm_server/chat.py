"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pymllm_core.output import Delta, TokenLogprob
from pymllm_server.accounting import Tally, debug_timing
from pymllm_server.assemble import ChatAssembler, MessageBuilder
from pymllm_server.body import BodyRoute
from pymllm_server.errors import ApiError
from pymllm_server.fields import ignored_header
from pymllm_server.generation import Generation, new_id
from pymllm_server.interface import Processor
from pymllm_server.logprobs import chat_logprobs
from pymllm_server.messages import template_messages, template_tools
from pymllm_server.sampling import choices, off_loop, sampling_params
from pymllm_server.schemas import ChatBody
from pymllm_server.state import ServerState, server_state
from pymllm_server.stream import DONE, ChunkWriter, EventStream, answer, collect

router = APIRouter(route_class=BodyRoute)


@dataclass(slots=True)
class _Chat:
    """One answer under way."""

    body: ChatBody
    state: ServerState
    processor: Processor
    generation: Generation
    assemblers: list[ChatAssembler]
    tally: Tally
    created: int

    def usage(self) -> dict[str, Any]:
        return self.tally.usage(sum(assembler.reasoning_tokens for assembler in self.assemblers))


@router.post("/v1/chat/completions", summary="Answer a chat")
async def chat_completions(body: ChatBody, http: Request) -> Response:
    """OpenAI's chat completions, streamed or not."""
    state = server_state(http)
    ignored = body.ignored_fields()
    tools, more = template_tools(body.tools, body.tool_choice)
    messages = template_messages(body.messages)
    logprobs = _logprobs(body)
    state.require_ready()
    state.require_model(body.model)

    processor = state.engine.processor
    given = body.max_completion_tokens
    params = sampling_params(
        processor, body, max_tokens=given if given is not None else body.max_tokens, logprobs=logprobs
    )
    kwargs = body.chat_template_kwargs or {}
    answer_id = new_id("chatcmpl-")
    size = sum(len(message["content"]) for message in messages) + (len(str(tools)) if tools else 0)
    chat = await off_loop(
        size,
        lambda: processor.from_chat(
            messages, params, request_id=answer_id, tools=tools, template_kwargs=kwargs or None
        ),
    )
    thinking = kwargs.get("enable_thinking")
    n = body.n or 1
    assemblers = [
        ChatAssembler(
            processor.reasoning_parser(
                prompt_tail=chat.prompt_tail, thinking=thinking if isinstance(thinking, bool) else None
            )
            if body.separate_reasoning
            else None,
            processor.tool_call_parser() if tools else None,
            stream_reasoning=body.stream_reasoning,
        )
        for _ in range(n)
    ]
    generation = Generation(state, answer_id, choices(chat.request, n), stream=bool(body.stream))
    run = _Chat(body, state, processor, generation, assemblers, Tally(n), int(time.time()))
    headers = ignored_header(ignored + more)
    if body.stream:
        return EventStream(generation, _events(run), headers)
    return answer(await collect(http, generation, _whole(run)), headers)


def _logprobs(body: ChatBody) -> int | None:
    """How many alternatives to report, None for no logprobs at all."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


async def _events(run: _Chat) -> AsyncGenerator[bytes, None]:
    """Role first, then parts as they are decided, an empty delta with the reason, and the usage."""
    options = run.body.stream_options
    continuous = bool(options and options.continuous_usage_stats)
    include_usage = bool(options and options.include_usage)
    writer = ChunkWriter(
        "chat.completion.chunk", run.generation.id, run.created, run.body.model, usage_null=include_usage
    )
    pending: list[list[TokenLogprob]] = [[] for _ in run.assemblers]

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
        if delta.keys() == {"content"} and not (finish or continuous or pending[index]):
            return writer.content(index, delta["content"])
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        if pending[index]:
            # Logprobs of text that a parser held back travel with the next chunk.
            choice["logprobs"] = {"content": chat_logprobs(run.processor, pending[index]), "refusal": None}
            pending[index] = []
        return writer.chunk(choice, run.usage() if continuous else None)

    unfinished = len(run.assemblers)
    events = b"".join(chunk(index, {"role": "assistant", "content": ""}) for index in range(unfinished))
    async for index, delta in run.generation.deltas():
        assembler = run.assemblers[index]
        run.tally.note(index, delta.usage)
        pending[index] += delta.logprobs or ()
        events += b"".join([chunk(index, part) for part in assembler.feed(delta)])
        if delta.finish_reason is not None:
            events += chunk(index, {}, assembler.finish_reason(delta))
            unfinished -= 1
        if events and unfinished:
            yield events
            events = b""
    if include_usage:
        events += writer.chunk(None, run.usage())
    yield events + DONE  # one write


async def _whole(run: _Chat) -> dict[str, Any]:
    builders = [MessageBuilder() for _ in run.assemblers]
    logprobs: list[list[TokenLogprob]] = [[] for _ in run.assemblers]
    last: dict[int, Delta] = {}
    async for index, delta in run.generation.deltas():
        run.tally.note(index, delta.usage)
        logprobs[index] += delta.logprobs or ()
        for part in run.assemblers[index].feed(delta):
            builders[index].add(part)
        if delta.finish_reason is not None:
            last[index] = delta
    result: dict[str, Any] = {
        "id": run.generation.id,
        "object": "chat.completion",
        "created": run.created,
        "model": run.body.model,
        "choices": [
            {
                "index": index,
                "message": builder.message(),
                "logprobs": {"content": chat_logprobs(run.processor, logprobs[index]), "refusal": None}
                if run.body.logprobs
                else None,
                "finish_reason": run.assemblers[index].finish_reason(last[index]),
            }
            for index, builder in enumerate(builders)
        ],
        "usage": run.usage(),
    }
    if run.state.settings.server.enable_debug_timing:
        result["debug_timing"] = debug_timing(last.get(0))
    return result
