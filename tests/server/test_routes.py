"""How routes are called, and in how many pieces a stream leaves."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends
from server_fakes import FakeEngine
from starlette.requests import Request
from starlette.responses import Response

from pymllm_core.config import Settings
from pymllm_server.app import create_app
from pymllm_server.body import BodyRoute
from pymllm_server.schemas import AbortBody

CHAT = "/v1/chat/completions"


async def forbid() -> None:
    raise PermissionError


async def endpoint(body: AbortBody, http: Request) -> Response:
    return Response(body.rid)


async def wants_more(body: AbortBody, http: Request, more: Annotated[None, Depends(forbid)]) -> Response:
    return Response(body.rid)


@pytest.mark.parametrize("where", ["router", "route", "parameter"])
def test_a_dependency_that_would_not_be_called_is_refused(where: str) -> None:
    """It may be what keeps strangers out."""
    given = {"dependencies": [Depends(forbid)]}
    router = APIRouter(route_class=BodyRoute, **(given if where == "router" else {}))
    with pytest.raises(TypeError, match="dependencies of a BodyRoute would not be called"):
        router.post("/x", **(given if where == "route" else {}))(
            wants_more if where == "parameter" else endpoint
        )


def test_the_description_has_the_bodies(serve) -> None:
    document = serve().client.get("/openapi.json").json()
    for path, name in (
        (CHAT, "ChatBody"),
        ("/v1/completions", "CompletionBody"),
        ("/generate", "GenerateBody"),
    ):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert content["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}
        assert document["components"]["schemas"][name]["properties"]


def sent(engine: FakeEngine, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The ASGI messages of an answer."""
    messages: list[dict[str, Any]] = []
    data = [json.dumps(body).encode()]

    async def run() -> None:
        app = create_app(engine, Settings.of("m", served_model_name="m"))
        engine.start()
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not data:
                await gone.wait()
            return {"type": "http.request", "body": data.pop(), "more_body": False}

        async def send(message: Any) -> None:
            messages.append(dict(message))

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        await app(scope, receive, send)

    asyncio.run(run())
    return messages


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "hi"}], "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/generate", {"text": "a"}),
        ("/generate", {"text": ["a", "b"]}),
    ],
)
def test_a_stream_is_one_message_a_piece(path: str, body: dict[str, Any]) -> None:
    """Each is a system call. The head waits for the first piece, and nothing follows the last."""
    engine = FakeEngine("xyz")
    start, *pieces = sent(engine, path, {**body, "stream": True})
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    assert len(pieces) == 3 * len(engine.submitted)
    assert [piece["more_body"] for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    events = b"".join(piece["body"] for piece in pieces).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert events.count(b"data: [DONE]") == 1
    for event in events[:-2]:
        json.loads(event.removeprefix(b"data: "))


def test_text_that_looks_like_the_end_is_text() -> None:
    body = {"prompt": "a", "stream": True}
    _, *pieces = sent(FakeEngine("data: [DONE]\n\n", step=7), "/v1/completions", body)
    assert [piece["more_body"] for piece in pieces] == [True, False]
