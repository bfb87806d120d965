"""Several client processes: one alone would be what a fast server waits for.

Each sends its share of the requests; their clocks agree, since `time.perf_counter` counts for the whole system.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from typing_extensions import Self

from pymllm_core.bench.client import LoadClient, Outcome
from pymllm_core.bench.workload import Ask
from pymllm_core.child import start_child
from pymllm_core.errors import EngineError

_AHEAD_S = 0.05
"""So long before the start it is told to all."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one process sends: so many at once (`concurrency`), or each `after` so many seconds."""

    url: str
    api_key: str | None
    timeout: float
    common: Mapping[str, Any]
    asks: tuple[Ask, ...]
    concurrency: int | None = None
    after: tuple[float, ...] = ()

    def split(self, count: int) -> list[Share]:
        """This as that many shares, as equal as can be."""
        shares = []
        for index in range(count):
            concurrency = None
            if self.concurrency is not None:
                concurrency = self.concurrency // count + (index < self.concurrency % count)
            shares.append(
                Share(
                    self.url,
                    self.api_key,
                    self.timeout,
                    self.common,
                    self.asks[index::count],
                    concurrency,
                    self.after[index::count],
                )
            )
        return shares

    async def send(self, client: LoadClient, start: float, ended: Callable[[], None]) -> list[Outcome]:
        """The requests' outcomes."""
        await asyncio.sleep(max(start - time.perf_counter(), 0))
        if self.concurrency is None:
            return await client.opened(self.asks, self.after, start, ended)
        return await client.closed(self.asks, self.concurrency, ended)

    def client(self) -> LoadClient:
        """A client for these requests, to be closed by the caller."""
        return LoadClient(self.url, api_key=self.api_key, timeout=self.timeout, common=self.common)


class Crowd:
    """Client processes, started once for all loads; with one there is none but this process itself."""

    def __init__(self, count: int) -> None:
        self._members: list[tuple[subprocess.Popen[bytes], Connection]] = []
        if count > 1:
            for _ in range(count):
                self._members.append(start_child(main))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.kill()
            process.wait()

    async def send(
        self, share: Share, count: int, ended: Callable[[], None]
    ) -> tuple[list[Outcome], list[float]]:
        """The outcomes of all, and the processor seconds of each of `count` processes that sent them.

        Raises EngineError where one of them died.
        """
        if count == 1:
            before = time.process_time()
            async with share.client() as client:
                outcomes = await share.send(client, time.perf_counter(), ended)
            return outcomes, [time.process_time() - before]
        return await asyncio.to_thread(self._gather, share.split(count), ended)

    def _gather(
        self, shares: Sequence[Share], ended: Callable[[], None]
    ) -> tuple[list[Outcome], list[float]]:
        pipes = [pipe for _, pipe in self._members[: len(shares)]]
        outcomes: list[Outcome] = []
        seconds: list[float] = []
        try:
            for pipe, share in zip(pipes, shares, strict=True):
                pipe.send(share)
            for pipe in pipes:
                pipe.recv()  # it is there
            start = time.perf_counter() + _AHEAD_S
            for pipe in pipes:
                pipe.send(start)
            left = set(pipes)
            while left:
                for ready in wait(left):
                    assert isinstance(ready, Connection)
                    message = ready.recv()
                    if message is None:
                        ended()
                        continue
                    left.remove(ready)
                    outcomes += message[0]
                    seconds.append(message[1])
        except (EOFError, OSError) as error:
            raise EngineError("a client process died; its own messages are on stderr") from error
        return outcomes, seconds


def main(pipe: Connection) -> None:
    """A client process: share after share, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    while True:
        try:
            share: Share = pipe.recv()
        except EOFError:
            return
        before = time.process_time()
        outcomes = asyncio.run(_send(share, pipe))
        pipe.send((outcomes, time.process_time() - before))


async def _send(share: Share, pipe: Connection) -> list[Outcome]:
    async with share.client() as client:
        pipe.send(None)  # there, and nothing slow is left to do
        start: float = pipe.recv()
        return await share.send(client, start, lambda: pipe.send(None))
