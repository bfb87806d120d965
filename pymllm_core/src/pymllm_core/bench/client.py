"""A client that measures: one streamed request, many at once by concurrency or by rate."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp

from pymllm_core.bench.workload import Ask


@dataclass(slots=True)
class Outcome:
    """One request on the clock of `time.perf_counter`, in seconds.

    late: how long after its time it was sent. pieces: when each piece of the answer came. error: its name.
    """

    sent: float
    late: float = 0.0
    pieces: list[float] = field(default_factory=list)
    ended: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Time to the first piece."""
        return self.pieces[0] - self.sent

    @property
    def e2e(self) -> float:
        """Time to the end of the answer."""
        return self.ended - self.sent

    @property
    def gaps(self) -> list[float]:
        """Times between successive pieces."""
        return [later - earlier for earlier, later in pairwise(self.pieces)]

    @property
    def tpot(self) -> float | None:
        """Time for each token after the first; None where there is one only."""
        if self.output_tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.output_tokens - 1)


class LoadClient:
    """Sends requests to one server and times them, inside ``async with``.

    common: goes into every body. timeout: seconds without a byte after which an answer has failed.
    """

    _http: aiohttp.ClientSession

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout: float = 600.0, common: Mapping[str, Any]
    ) -> None:
        self._url = url.rstrip("/")
        # Compressed, pieces would come when the compressor has enough of them.
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        self._common = {"stream": True, "stream_options": {"include_usage": True}, **common}

    async def __aenter__(self) -> LoadClient:
        # No limit here, or requests would wait in the client and seem quick.
        connector = aiohttp.TCPConnector(limit=0)
        self._http = aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=self._timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def get(self, route: str) -> Any:
        """A JSON document of the server. Raises aiohttp.ClientError, ValueError and asyncio.TimeoutError."""
        async with self._http.get(self._url + route, allow_redirects=False) as answer:
            answer.raise_for_status()
            return await answer.json(content_type=None)

    async def ask(self, ask: Ask, due: float | None = None) -> Outcome:
        """One request to its end; whatever goes wrong is the outcome's error."""
        body = json.dumps({**self._common, **ask.body}).encode()
        outcome = Outcome(sent=time.perf_counter())
        outcome.late = 0.0 if due is None else outcome.sent - due
        try:
            async with self._http.post(self._url + ask.route, data=body, allow_redirects=False) as answer:
                if answer.status == 200:
                    await self._follow(answer, outcome)
                else:
                    outcome.error = f"HTTP {answer.status}: {_message(await answer.read())}"
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            outcome.error = type(getattr(error, "os_error", error)).__name__
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            outcome.error = f"an event is malformed: {type(error).__name__}: {error}"
        outcome.ended = time.perf_counter()
        if outcome.error is None and not outcome.pieces:
            outcome.error = "the answer was empty"
        return outcome

    async def _follow(self, answer: aiohttp.ClientResponse, outcome: Outcome) -> None:
        done = False
        async for data in _events(answer):
            now = time.perf_counter()
            if data == b"[DONE]":
                done = True
                continue
            chunk = json.loads(data)
            if error := chunk.get("error"):
                outcome.error = f"in the stream: {error.get('message', error)}"
                return
            if usage := chunk.get("usage"):
                outcome.input_tokens = usage["prompt_tokens"]
                outcome.output_tokens = usage["completion_tokens"]
            choices = chunk.get("choices", ())
            # Tokens without text (special ones, parts of a character) may come with nothing but the end.
            ends = not outcome.pieces and any(choice.get("finish_reason") for choice in choices)
            if ends or any(_says(choice) for choice in choices):
                outcome.pieces.append(now)
        if not done:
            outcome.error = "the stream ended before [DONE]"
        elif outcome.pieces and not outcome.output_tokens:
            outcome.error = "the stream reported no usage"

    async def closed(
        self, asks: Sequence[Ask], concurrency: int, ended: Callable[[], None] = lambda: None
    ) -> list[Outcome]:
        """Keep `concurrency` requests under way until all are answered."""
        rest = iter(asks)
        outcomes: list[Outcome] = []

        async def worker() -> None:
            for ask in rest:
                outcomes.append(await self.ask(ask))
                ended()

        await asyncio.gather(*(worker() for _ in range(min(concurrency, len(asks)))))
        return outcomes

    async def opened(
        self,
        asks: Sequence[Ask],
        after: Sequence[float],
        start: float,
        ended: Callable[[], None] = lambda: None,
    ) -> list[Outcome]:
        """Send each request `after` so many seconds from `start`, however many are under way."""

        async def one(ask: Ask, due: float) -> Outcome:
            outcome = await self.ask(ask, due)
            ended()
            return outcome

        tasks = []
        for ask, due in zip(asks, after, strict=True):
            await asyncio.sleep(max(start + due - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(one(ask, start + due)))
        return list(await asyncio.gather(*tasks))


def _says(choice: Mapping[str, Any]) -> bool:
    """Whether a choice brings text: of a completion, or of a chat, thought or called."""
    delta = choice.get("delta") or {}
    texts = (
        choice.get("text"),
        delta.get("content"),
        delta.get("reasoning_content"),
        delta.get("tool_calls"),
    )
    return any(texts)


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of server-sent events. By bytes: a text's lines may hold separators that are no line ends here."""
    rest = b""
    async for data in answer.content.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
