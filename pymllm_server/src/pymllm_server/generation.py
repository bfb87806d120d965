"""The streams of one HTTP request: submitted together, read as one, and always closed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from pymllm_core.errors import EngineError
from pymllm_core.output import Delta
from pymllm_core.request import Request
from pymllm_server.errors import ApiError
from pymllm_server.interface import Stream
from pymllm_server.state import ServerState


def new_id(prefix: str = "") -> str:
    """An id as OpenAI's: a prefix and 24 hexadecimal digits, which nobody else can guess: it aborts a request."""
    return prefix + secrets.token_hex(12)


def rid_in_use(rid: str) -> ApiError:
    """Two running requests under one id could not be told apart when one is aborted."""
    return ApiError(400, f"a request with the id {rid!r} is running", param="rid", code="rid_in_use")


class Generation:
    """One engine request for each choice, in order of their index. `id` is what /abort_request takes."""

    def __init__(
        self, state: ServerState, generation_id: str, requests: Sequence[Request], *, stream: bool
    ) -> None:
        """Submit all, or none: where one is refused, those before it are aborted and the refusal raised.

        stream: whether deltas are wanted as they come; where not, each request has one.
        """
        state.require_ready()
        if generation_id in state.in_flight:
            raise rid_in_use(generation_id)
        self.id = generation_id
        self._state = state
        self._ids = [request.id for request in requests]
        self._streams: list[Stream] = []
        self._pumps: list[asyncio.Task[None]] = []
        try:
            for request in requests:
                self._streams.append(state.engine.submit(replace(request, stream=stream)))
        except BaseException:
            for request_id in self._ids[: len(self._streams)]:
                state.engine.abort(request_id)
            raise
        state.in_flight[self.id] = self

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Every delta with its choice's index, as they come. Raises where the engine failed a request."""
        if len(self._streams) == 1:
            async for delta in self._streams[0]:
                self._check(delta)
                yield 0, delta
            return
        async for index, delta in self._merged():
            self._check(delta)
            yield index, delta

    def _check(self, delta: Delta) -> None:
        if delta.finish_reason is None:
            return
        self._state.finished(delta)
        if delta.finish_reason == "error":
            raise EngineError(delta.error or "the engine failed this request")
        if delta.finish_reason == "abort" and self._state.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down")

    async def _merged(self) -> AsyncIterator[tuple[int, Delta]]:
        # Bounded, so that a client that reads slowly does not fill memory from here.
        queue: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue(len(self._streams))

        async def pump(index: int, stream: Stream) -> None:
            try:
                async for delta in stream:
                    await queue.put((index, delta))
                await queue.put((index, None))
            except Exception as error:
                await queue.put((index, error))

        self._pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(self._streams)]
        open_streams = len(self._pumps)
        while open_streams:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield index, item

    def abort(self) -> None:
        """Ask the engine to end all; their last deltas then come with the reason ``abort``."""
        for request_id in self._ids:
            self._state.engine.abort(request_id)

    async def aclose(self) -> None:
        """Abort what is unfinished, and forget all. May be called again."""
        self._state.in_flight.pop(self.id, None)
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()
