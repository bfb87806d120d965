"""Server-sent events, and the watch over the connection: a client that leaves takes its request with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pymllm_server.errors import CLIENT_LEFT, to_api_error
from pymllm_server.generation import Generation

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
# ASCII only: some clients split lines at U+2028 or U+0085 too, which would tear an event apart.
dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def event(body: Mapping[str, Any]) -> bytes:
    """One event."""
    return b"data: " + dumps(body).encode() + b"\n\n"


class ChunkWriter:
    """Writes the chunks of one answer. What they all share is encoded once: this runs for every token."""

    def __init__(self, kind: str, answer_id: str, created: int, model: str, *, usage_null: bool) -> None:
        shared = {"id": answer_id, "object": kind, "created": created, "model": model}
        self._head = f'data: {dumps(shared)[:-1]},"choices":['
        self._tail = '],"usage":null}\n\n' if usage_null else "]}\n\n"
        self._text_tail = f',"logprobs":null,"finish_reason":null}}{self._tail}'

    def chunk(self, choice: Mapping[str, Any] | None, usage: Mapping[str, int | Any] | None = None) -> bytes:
        """A chunk with one choice, or with none."""
        text = dumps(choice) if choice is not None else ""
        tail = f'],"usage":{dumps(usage)}}}\n\n' if usage is not None else self._tail
        return f"{self._head}{text}{tail}".encode()

    def text(self, index: int, text: str) -> bytes:
        """The chunk of most tokens of a completion: a choice with nothing but text."""
        return f'{self._head}{{"index":{index},"text":{dumps(text)}{self._text_tail}'.encode()

    def content(self, index: int, text: str) -> bytes:
        """The same for a chat: a ``delta`` with nothing but content."""
        return f'{self._head}{{"index":{index},"delta":{{"content":{dumps(text)}}}{self._text_tail}'.encode()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel and await; unlike suppressing CancelledError, this still lets the caller itself be cancelled."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # retrieved, or asyncio would report it as lost


class EventStream(Response):
    """Sends events until they end or the client leaves, then closes the generation, come what may.

    events: the last one ends with `DONE`. The head goes with the first, so that the requests of a crowd reach the
    engine before time is spent on answers, and an error before it has its status.

    Starlette's own StreamingResponse notices a client's leaving only on some ASGI versions, and does not
    close a generator that it never began.
    """

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]
    ) -> None:
        self.generation = generation
        self.events = events
        self.status_code = 200
        self.background = None
        # The third switches off buffering in nginx.
        self.init_headers({**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        producer = asyncio.create_task(self._produce(scope, receive, send))
        watcher = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({producer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if producer.done():
                producer.result()
        finally:
            await _cancel(producer, watcher)
            await self.events.aclose()
            await self.generation.aclose()

    async def _produce(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async for data in self.events:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": data, "more_body": not data.endswith(DONE)})
        except Exception as error:
            refusal = to_api_error(error)
            if not started:
                await refusal.response()(scope, receive, send)
                return
            # The status is sent already, so the error travels in the stream.
            await send(
                {"type": "http.response.body", "body": event(refusal.body()) + DONE, "more_body": False}
            )


async def collect(http: Request, generation: Generation, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None where the client left first. The generation is closed in every case."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(http.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await _cancel(task, watcher)
        await generation.aclose()


def json_response(body: Any, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in one piece."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    content = text.encode("utf-8", "replace")  # a stray surrogate shall not cost the answer
    return Response(content, headers=dict(headers or {}), media_type="application/json")


def answer(body: Any | None, headers: Mapping[str, str]) -> Response:
    """`json_response`, or the empty answer to a client that left."""
    return json_response(body, headers) if body is not None else Response(status_code=CLIENT_LEFT)
