"""The load client's HTTP: what httpx reads, however the bytes are cut; and what it says of broken answers."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence

import httpx
import pytest

from pymllm_core.bench.client import LoadClient
from pymllm_core.bench.http import Connections, ProtocolError
from pymllm_core.bench.workload import Ask

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = b"5\r\ndata:\r\n1B;name=value\r\n0\r\n\r\n and a long line of it\r\n3\r\n\xff\r\n\r\n0\r\n\r\n"
WHOLE = b"HTTP/1.1 429 Too Many\r\ncontent-length: 11\r\nConnection: close\r\n\r\nhello\r\nworl"
UNTIL_CLOSED = b"HTTP/1.0 200 OK\r\n\r\nwhatever comes\r\n\r\n"


class Scripted:
    """Answers each request with the next list of writes, between which it pauses; closes where these are over."""

    def __init__(self, *answers: Sequence[bytes], pause: float = 0.0) -> None:
        self.answers = list(answers)
        self.pause = pause
        self.accepted = 0
        self.requests: list[bytes] = []
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Scripted]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports close

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                (length,) = [
                    line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
                ]
                self.requests.append(head + await reader.readexactly(int(length.partition(b":")[2])))
                writes = self.answers.pop(0)
                for data in writes:
                    writer.write(data)
                    await writer.drain()
                    await asyncio.sleep(self.pause)
                if not b"".join(writes).endswith(b"0\r\n\r\n"):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


async def body_of(connections: Connections) -> tuple[int, bytes]:
    async with connections.post("/path", b"{}") as answer:
        return answer.status, b"".join([piece async for piece in answer.pieces()])


def cut(data: bytes, seed: int) -> list[bytes]:
    places = sorted(random.Random(seed).sample(range(1, len(data)), 8))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


@pytest.mark.parametrize(
    "answer", [CHUNKED + EVENTS, WHOLE, UNTIL_CLOSED], ids=["chunked", "length", "closed"]
)
def test_bodies_are_those_that_httpx_reads(answer: bytes) -> None:
    async def run() -> None:
        ways = [[answer], *(cut(answer, seed) for seed in range(15))]
        async with Scripted(*ways, [answer], pause=0.001).running() as server:
            connections = Connections(server.url, {}, 5.0)
            found = [await body_of(connections) for _ in ways]
            await connections.aclose()
            async with httpx.AsyncClient(trust_env=False) as client:
                reference = await client.post(server.url + "/path", content=b"{}")
        assert set(found) == {(reference.status_code, reference.content)}
        assert len(reference.content) > 10

    asyncio.run(run())


def test_every_place_to_cut_a_chunked_answer() -> None:
    """Two writes for each place; what a single read may bring is decided by the system, so this is not all there is."""

    async def run() -> None:
        answer = CHUNKED + EVENTS
        ways = [[answer[:at], answer[at:]] for at in range(len(CHUNKED), len(answer))]
        async with Scripted(*ways, pause=0.001).running() as server:
            connections = Connections(server.url, {}, 5.0)
            found = {await body_of(connections) for _ in ways}
            await connections.aclose()
        assert found == {(200, b"data:0\r\n\r\n and a long line of it\xff\r\n")}
        assert server.accepted == 1

    asyncio.run(run())


def test_requests_say_where_they_go_and_connections_are_kept() -> None:
    async def run() -> None:
        async with Scripted(*[[CHUNKED + EVENTS]] * 3).running() as server:
            connections = Connections(server.url + "/prefix/", {"Authorization": "Bearer k"}, 5.0)
            for _ in range(3):
                await body_of(connections)
            assert server.accepted == 1
            await connections.aclose()
        host = server.url.removeprefix("http://")
        expected = [
            "POST /prefix/path HTTP/1.1",
            f"Host: {host}",
            "Content-Type: application/json",
            "Authorization: Bearer k",
            "Content-Length: 2",
            "",
            "{}",
        ]
        assert server.requests == ["\r\n".join(expected).encode()] * 3

    asyncio.run(run())


def test_a_connection_that_the_server_closed_is_not_used_again() -> None:
    async def run() -> None:
        # The answer is whole; then the server closes, as it does after some time without requests.
        trailer = CHUNKED + EVENTS[:-2] + b"X: y\r\n\r\n"
        async with Scripted([trailer], [WHOLE]).running() as server:
            connections = Connections(server.url, {}, 5.0)
            assert (await body_of(connections))[0] == 200
            await asyncio.sleep(0.1)
            assert (await body_of(connections))[0] == 429
            assert server.accepted == 2
            assert not connections._idle  # it said "Connection: close"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "the connection ended before an answer"),
        (b"HTTP/1.1 200 OK\r\n", "the connection ended before an answer"),
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "the answer begins with 'SSH-2.0-OpenSSH_9', which is no status line"),
        (b"HTTP/1.1 200 OK\r\n" + b"x" * 600_000, "the answer's head is longer than 262144 bytes"),
        (CHUNKED + b"5\r\nda", "the answer ended before its last chunk"),
        (CHUNKED + b"zz\r\nda\r\n0\r\n", "a chunk begins with b'zz', which is no length"),
        (CHUNKED + b"-1\r\nda\r\n0\r\n", "a chunk begins with b'-1', which is no length"),
        (WHOLE[:-2], "the answer ended before its declared length"),
    ],
)
def test_broken_answers_are_named(answer: bytes, message: str) -> None:
    async def run() -> None:
        async with Scripted([answer]).running() as server:
            connections = Connections(server.url, {}, 5.0)
            with pytest.raises(ProtocolError) as caught:
                await body_of(connections)
            await connections.aclose()
            assert str(caught.value) == message

    asyncio.run(run())


@pytest.mark.parametrize("answer", [[b""], [CHUNKED, b"1\r\na\r\n"]], ids=["head", "body"])
def test_silence_ends_in_a_timeout(answer: list[bytes]) -> None:
    """Counted from the last byte, which comes later in the second case."""

    async def run() -> None:
        server = Scripted([*answer, *[b""] * 20], pause=0.25)
        async with server.running(), LoadClient(server.url, timeout=0.4, common={}) as client:
            began = asyncio.get_running_loop().time()
            outcome = await client.ask(Ask("/path", {}))
            took = asyncio.get_running_loop().time() - began
        assert outcome.error == "TimeoutError"
        assert 0.4 + 0.25 * (len(answer) - 1) - 0.01 <= took < 3

    asyncio.run(run())
