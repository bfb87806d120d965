"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pymllm_core.output import Delta, TokenLogprob
from pymllm_core.request import Request as EngineRequest
from pymllm_core.request import SamplingParams
from pymllm_server.accounting import Tally, debug_timing
from pymllm_server.body import BodyRoute
from pymllm_server.errors import ApiError
from pymllm_server.fields import ignored_header
from pymllm_server.generation import Generation, new_id
from pymllm_server.interface import Processor
from pymllm_server.logprobs import CompletionLogprobs
from pymllm_server.sampling import choices, off_loop, sampling_params
from pymllm_server.schemas import COMPLETION_MAX_TOKENS, MAX_CHOICES, CompletionBody
from pymllm_server.state import ServerState, server_state
from pymllm_server.stream import DONE, ChunkWriter, EventStream, answer, collect

router = APIRouter(route_class=BodyRoute)
Prompt = str | list[int]


@dataclass(slots=True)
class _Completion:
    """One answer under way. echoes: the text to put before each choice."""

    body: CompletionBody
    state: ServerState
    generation: Generation
    echoes: list[str]
    logprobs: list[CompletionLogprobs]
    tally: Tally
    created: int


@router.post("/v1/completions", summary="Continue a text")
async def completions(body: CompletionBody, http: Request) -> Response:
    """OpenAI's completions, streamed or not; several prompts run together."""
    state = server_state(http)
    ignored = body.ignored_fields()
    prompts: list[Prompt] = body.prompt
    n = body.n or 1
    if len(prompts) * n > MAX_CHOICES:
        raise ApiError(400, f"at most {MAX_CHOICES} choices (prompts times n) are allowed", param="prompt")
    if body.echo and body.logprobs is not None:
        message = "echo with logprobs is not supported: prompts have no logprobs here"
        raise ApiError(400, message, param="echo", code="unsupported_parameter")
    state.require_ready()
    state.require_model(body.model)

    processor = state.engine.processor
    max_tokens = body.max_tokens if body.max_tokens is not None else COMPLETION_MAX_TOKENS
    params = sampling_params(processor, body, max_tokens=max_tokens, logprobs=body.logprobs)
    answer_id = new_id("cmpl-")
    requests = await off_loop(
        sum(map(len, prompts)), lambda: [*requests_of(processor, prompts, params, answer_id)]
    )
    echoes = [_echo(processor, prompt) if body.echo else "" for prompt in prompts for _ in range(n)]
    every = [choice for request in requests for choice in choices(request, n)]
    generation = Generation(state, answer_id, every, stream=bool(body.stream))
    run = _Completion(
        body,
        state,
        generation,
        echoes,
        [CompletionLogprobs(processor) for _ in echoes],
        Tally(n),
        int(time.time()),
    )
    headers = ignored_header(ignored)
    if body.stream:
        return EventStream(generation, _events(run), headers)
    return answer(await collect(http, generation, _whole(run)), headers)


def requests_of(
    processor: Processor, prompts: list[Prompt], params: SamplingParams, answer_id: str
) -> list[EngineRequest]:
    """One engine request for each prompt. Blocks while it tokenises."""
    result = []
    for index, prompt in enumerate(prompts):
        request_id = answer_id if len(prompts) == 1 else f"{answer_id}-{index}"
        make = processor.from_text if isinstance(prompt, str) else processor.from_ids
        result.append(make(prompt, params, request_id=request_id))  # type: ignore[arg-type]
    return result


def _echo(processor: Processor, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if processor.tokenizer is None:
        raise ApiError(400, "echo of token ids needs a tokenizer, and this model has none", param="echo")
    return str(processor.tokenizer.decode(prompt))


async def _events(run: _Completion) -> AsyncGenerator[bytes, None]:
    options = run.body.stream_options
    continuous = bool(options and options.continuous_usage_stats)
    include_usage = bool(options and options.include_usage)
    writer = ChunkWriter(
        "text_completion", run.generation.id, run.created, run.body.model, usage_null=include_usage
    )
    echoes = list(run.echoes)
    unfinished, end = len(echoes), b""
    async for index, delta in run.generation.deltas():
        run.tally.note(index, delta.usage)
        text, echoes[index] = echoes[index] + delta.text, ""
        if not (delta.logprobs or delta.finish_reason or continuous):
            if text:
                yield writer.text(index, text)
            continue
        if not (text or delta.logprobs or delta.finish_reason):
            continue
        choice = {
            "index": index,
            "text": text,
            "logprobs": run.logprobs[index].items(delta.logprobs) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        event = writer.chunk(choice, run.tally.usage() if continuous else None)
        unfinished -= delta.finish_reason is not None
        if unfinished:
            yield event
        else:
            end = event  # what comes after it comes at once
    if include_usage:
        end += writer.chunk(None, run.tally.usage())
    yield end + DONE


async def _whole(run: _Completion) -> dict[str, Any]:
    texts = [[echo] for echo in run.echoes]
    tokens: list[list[TokenLogprob]] = [[] for _ in run.echoes]
    last: dict[int, Delta] = {}
    async for index, delta in run.generation.deltas():
        run.tally.note(index, delta.usage)
        texts[index].append(delta.text)
        tokens[index] += delta.logprobs or ()
        if delta.finish_reason is not None:
            last[index] = delta
    with_logprobs = run.body.logprobs is not None
    result: dict[str, Any] = {
        "id": run.generation.id,
        "object": "text_completion",
        "created": run.created,
        "model": run.body.model,
        "choices": [
            {
                "index": index,
                "text": "".join(text),
                "logprobs": run.logprobs[index].items(tokens[index]) if with_logprobs else None,
                "finish_reason": last[index].finish_reason,
            }
            for index, text in enumerate(texts)
        ],
        "usage": run.tally.usage(),
    }
    if run.state.settings.server.enable_debug_timing:
        result["debug_timing"] = debug_timing(last.get(0))
    return result
