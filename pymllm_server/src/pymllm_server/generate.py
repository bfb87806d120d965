"""POST /generate: the historic route, in its own names."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pymllm_core.errors import RequestError
from pymllm_core.output import Delta
from pymllm_core.request import Request as EngineRequest
from pymllm_core.request import SamplingParams
from pymllm_server.body import BodyRoute
from pymllm_server.errors import ApiError
from pymllm_server.fields import ignored_header
from pymllm_server.generation import Generation, new_id, rid_in_use
from pymllm_server.interface import Processor
from pymllm_server.sampling import off_loop, sampling_params
from pymllm_server.schemas import MAX_CHOICES, GenerateBody
from pymllm_server.state import ServerState, server_state
from pymllm_server.stream import DONE, EventStream, answer, collect, event

router = APIRouter(route_class=BodyRoute)
_REASONS = {"stop": "eos", "length": "length", "abort": "abort"}
_MAX_RID = 200


@router.post("/generate", summary="Continue texts or token ids")
@router.put("/generate", operation_id="generate_put", summary="The same as POST")
async def generate(body: GenerateBody, http: Request) -> Response:
    """One answer for one prompt; for a list of prompts a list of answers, in order of completion."""
    state = server_state(http)
    ignored = body.ignored_fields()
    prompts, single = _prompts(body)
    rids = _rids(body.rid, len(prompts), single)
    state.require_ready()

    processor = state.engine.processor
    wire = body.sampling_params
    try:
        params = sampling_params(processor, wire, max_tokens=wire.max_new_tokens)
        size = sum(map(len, prompts))
        requests = await off_loop(size, lambda: _requests(processor, prompts, params, rids))
    except RequestError as error:
        raise _renamed(error, body) from None
    if not single:
        for rid in rids:
            if rid in state.in_flight:
                raise rid_in_use(rid)
    generation = Generation(state, rids[0] if single else new_id(), requests, stream=bool(body.stream))
    answers = [_Answer(rid, state) for rid in rids]
    headers = ignored_header(ignored)
    if body.stream:
        return EventStream(generation, _events(generation, answers), headers)
    return answer(await collect(http, generation, _whole(generation, answers, single)), headers)


def _prompts(body: GenerateBody) -> tuple[list[Any], bool]:
    """The prompts, and whether there is one that was not sent as a list of prompts."""
    if (body.text is None) == (body.input_ids is None):
        raise ApiError(400, "send exactly one of text and input_ids", param="text")
    prompts: list[Any]
    if body.text is not None:
        single = isinstance(body.text, str)
        prompts = [body.text] if isinstance(body.text, str) else [*body.text]
    else:
        ids: list[Any] = body.input_ids
        single = isinstance(ids[0], int)
        prompts = [ids] if single else ids
    if not 1 <= len(prompts) <= MAX_CHOICES:
        raise ApiError(400, f"send between 1 and {MAX_CHOICES} prompts, got {len(prompts)}", param="text")
    return prompts, single


def _rids(given: str | list[str] | None, count: int, single: bool) -> list[str]:
    if given is None:
        return [new_id() for _ in range(count)]
    rids = [given] if isinstance(given, str) else given
    if isinstance(given, str) != single or len(rids) != count or len(set(rids)) != count:
        raise ApiError(400, "rid must be one string for one prompt, or as many different ones", param="rid")
    if not all(0 < len(rid) <= _MAX_RID for rid in rids):
        raise ApiError(400, f"rid must have between 1 and {_MAX_RID} characters", param="rid")
    return rids


def _requests(
    processor: Processor, prompts: list[str | list[int]], params: SamplingParams, rids: list[str]
) -> list[EngineRequest]:
    return [
        processor.from_text(prompt, params, request_id=rid)
        if isinstance(prompt, str)
        else processor.from_ids(prompt, params, request_id=rid)
        for prompt, rid in zip(prompts, rids, strict=True)
    ]


def _renamed(error: RequestError, body: GenerateBody) -> ApiError:
    """The core knows the parameters under OpenAI's names; blame the field that this client sent."""
    param = error.param
    if param == "prompt":
        param = "text" if body.text is not None else "input_ids"
    elif param is not None:
        param = "sampling_params." + ("max_new_tokens" if param == "max_tokens" else param)
    return ApiError(error.status, str(error), param=param, code=error.code)


class _Answer:
    """One prompt's answer as it grows."""

    def __init__(self, rid: str, state: ServerState) -> None:
        self.rid = rid
        self._timing = state.settings.server.enable_debug_timing
        self._new_only = state.settings.server.stream_output
        self._text: list[str] = []
        self._ids: list[int] = []

    def add(self, delta: Delta, *, stream: bool) -> dict[str, Any] | None:
        """The next event of a stream, or the whole at the end; None where nothing is to be sent.

        `delta` is always what is new. `text` and the ids are new too in a stream, unless
        ``stream_output`` is off: then they are the text so far, which costs quadratic traffic.
        """
        new_only = stream and self._new_only
        if not new_only:
            self._text.append(delta.text)
            self._ids += delta.token_ids
        if not (stream or delta.finish_reason):
            return None
        text = delta.text if new_only else "".join(self._text)
        body: dict[str, Any] = {
            "rid": self.rid,
            "text": text,
            "delta": delta.text if stream else text,
            "output_token_ids": list(delta.token_ids) if new_only else list(self._ids),
            "finished": delta.finish_reason is not None,
            "finished_reason": _REASONS.get(delta.finish_reason) if delta.finish_reason else None,
            "prompt_tokens": delta.usage.prompt_tokens,
            "completion_tokens": delta.usage.completion_tokens,
        }
        if self._timing and delta.timings:
            body["vit_prefill_ms"] = None
            body["vit_prefill_tokens"] = None
            body["llm_prefill_ms"] = round(1000 * delta.timings.prefill_s, 3)
            body["llm_decode_ms"] = round(1000 * delta.timings.decode_s, 3)
        return body


async def _events(generation: Generation, answers: list[_Answer]) -> AsyncGenerator[bytes, None]:
    unfinished = len(answers)
    async for index, delta in generation.deltas():
        body = answers[index].add(delta, stream=True)
        unfinished -= delta.finish_reason is not None
        if body is not None:
            yield event(body) if unfinished else event(body) + DONE


async def _whole(generation: Generation, answers: list[_Answer], single: bool) -> Any:
    bodies = []
    async for index, delta in generation.deltas():
        body = answers[index].add(delta, stream=False)
        if body is not None:
            bodies.append(body)
    return bodies[0] if single else bodies
