"""The deltas of one request, for an event loop: merged where its reader is slow, turned into text as they are read."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable

from pymllm_core.engine.detokenizer import Detokenizer
from pymllm_core.output import Delta

logger = logging.getLogger(__name__)


class Stream:
    """An asynchronous iterator over one request's deltas; ends after the one with a finish reason.

    Closing it early aborts the request. Belongs to the event loop that submitted the request. A reader that is
    slower than the engine gets what has come meanwhile as one delta. detokenizer: makes the text where the engine
    does not; so it costs the engine no time, and is made once for what was merged.
    """

    def __init__(
        self, request_id: str, abort: Callable[[str], object], detokenizer: Detokenizer | None = None
    ) -> None:
        self.request_id = request_id
        self._abort = abort
        self._detokenizer = detokenizer
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Delta] = deque()
        self._ready = asyncio.Event()
        self._finished = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        if self._finished:
            raise StopAsyncIteration
        while not self._queue:
            self._ready.clear()
            await self._ready.wait()
        delta = Delta.merge(self._queue)
        self._queue.clear()
        self._finished = delta.finish_reason is not None
        return delta if self._detokenizer is None else self._with_text(self._detokenizer, delta)

    async def aclose(self) -> None:
        """Abort the request if it has not finished."""
        if not self._finished:
            self._finished = True
            self._queue.clear()
            self._abort(self.request_id)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _with_text(self, detokenizer: Detokenizer, delta: Delta) -> Delta:
        tokens = delta.token_ids
        if delta.finish_reason == "stop":
            tokens = tokens[:-1]  # a token that ends the answer is no part of it
        try:
            text = detokenizer.extend(tokens)
            if delta.finish_reason is not None:
                text += detokenizer.flush()
        except Exception as error:  # a tokenizer may be the checkpoint's own code
            logger.exception("request %s ends with an error", self.request_id)
            if not self._finished:
                self._finished = True
                self._abort(self.request_id)
            return delta._replace(finish_reason="error", error=f"{type(error).__name__}: {error}")
        return delta._replace(text=text)

    @staticmethod
    def put(news: Iterable[tuple[Stream, Delta]]) -> None:
        """Hand each stream its delta; from any thread. Each event loop is woken once."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Delta]]] = {}
        for entry in news:
            loops.setdefault(entry[0]._loop, []).append(entry)
        for loop, entries in loops.items():
            # A loop that was closed has nobody left who waits.
            if not loop.is_closed():
                loop.call_soon_threadsafe(Stream._receive, entries)

    @staticmethod
    def _receive(entries: list[tuple[Stream, Delta]]) -> None:
        for stream, delta in entries:
            stream._queue.append(delta)
            stream._ready.set()
