"""Administration: /server_info, /abort_request and /flush_cache."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from pymllm_server import __version__
from pymllm_server.body import JsonRoute
from pymllm_server.errors import ApiError
from pymllm_server.fields import ignored_header
from pymllm_server.schemas import AbortBody
from pymllm_server.state import ServerState, state_of
from pymllm_server.stream import json_response


async def require_admin(http: Request) -> None:
    """Raise ApiError (403) where an administrator's key is set and the request came with another."""
    if not http.state.is_admin:
        raise ApiError(403, "this route needs the administrator's key", code="admin_key_required")


router = APIRouter(route_class=JsonRoute, dependencies=[Depends(require_admin)])
State = Annotated[ServerState, Depends(state_of)]
_SECRETS = {"server": {"api_key", "admin_api_key"}}


@router.get("/server_info", summary="Settings, plan and statistics")
async def server_info(state: State) -> dict[str, Any]:
    """All settings but the keys, and once ready the plan and the engine's counts."""
    body: dict[str, Any] = {
        "version": __version__,
        **state.progress(),
        **state.settings.model_dump(mode="json", exclude=_SECRETS),
    }
    if state.engine.state == "ready":
        body["plan"] = state.engine.plan.to_json()
        body["stats"] = dataclasses.asdict(cast("Any", state.engine.stats()))
    return body


@router.post("/abort_request", summary="Abort a request")
async def abort_request(body: AbortBody, state: State) -> Response:
    """Abort by ``rid``, or by the id of an OpenAI answer. One that is not running is already aborted: 200."""
    ignored = body.ignored_fields()
    generation = state.in_flight.get(body.rid)
    if generation is not None:
        generation.abort()
    elif state.engine.state == "ready":
        state.engine.abort(body.rid)  # one prompt of a list
    return Response(headers=ignored_header(ignored))


@router.post("/flush_cache", summary="Forget all cached prefixes")
@router.get("/flush_cache", operation_id="flush_cache_get", summary="The same as POST")
async def flush_cache(state: State) -> Response:
    """200 once the prefix cache is empty; 409 where the engine could not, as requests still use it."""
    state.require_ready()
    if not await asyncio.to_thread(state.engine.flush_cache):
        raise ApiError(409, "the cache is in use; try again when no request runs", code="cache_in_use")
    return json_response({"flushed": True})
