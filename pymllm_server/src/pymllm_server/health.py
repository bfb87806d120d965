"""Health and metrics: /health, /health_generate and /metrics."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from pymllm_server.errors import ApiError
from pymllm_server.generation import Generation, new_id
from pymllm_server.metrics import CONTENT_TYPE
from pymllm_server.state import ServerState, state_of
from pymllm_server.stream import answer, collect, json_response

router = APIRouter()
State = Annotated[ServerState, Depends(state_of)]
GENERATE_S = 30.0


@router.get("/health", summary="Whether requests are served")
async def health(state: State) -> Response:
    """200 while ready and progressing; else 503 with the state and, while loading, the progress."""
    body = state.progress()
    response = json_response(body)
    if body["state"] != "ready":
        response.status_code = 503
    return response


@router.get("/health_generate", summary="Generate one token")
async def health_generate(http: Request, state: State) -> Response:
    """200 once a token came out; 503 where none did in time. Goes through the queue like any request."""
    state.require_ready()
    processor = state.engine.processor
    params = processor.sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
    # Token 0 exists in each vocabulary, and a model without tokenizer can be probed too.
    request = processor.from_ids([0], params, request_id=new_id("health-"))
    generation = Generation(state, request.id, [request], stream=False)
    try:
        work = collect(http, generation, _one_token(generation))
        return answer(await asyncio.wait_for(work, GENERATE_S), {})
    except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
        raise ApiError(503, f"no token within {GENERATE_S:.0f} s", code="stalled") from None


async def _one_token(generation: Generation) -> dict[str, str]:
    async for _ in generation.deltas():
        pass
    return {"state": "ready"}


@router.get("/metrics", summary="Prometheus metrics")
def metrics(state: State) -> Response:
    """Prometheus' text format. A plain function: rendering runs on a thread, off the streams' loop."""
    if state.metrics is None:
        message = "metrics are off; start the server with --server.enable_metrics"
        raise ApiError(404, message, code="metrics_off")
    return Response(state.metrics.text(), headers={"content-type": CONTENT_TYPE})
