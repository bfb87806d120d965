"""What the load client sends, and what it says of answers that are broken, late or cut anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Sequence

import pytest

from pymllm_core.bench.client import LoadClient, Outcome
from pymllm_core.bench.workload import Ask

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
DATA = b"""data: {"choices": [{"text": "a"}]}

data: {"choices": [{"text": "b"}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}

data: [DONE]

"""
EVENTS = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (DATA[:50], DATA[50:])) + b"0\r\n\r\n"
REFUSED = b'HTTP/1.1 429 Too Many\r\nContent-Length: 34\r\nConnection: close\r\n\r\n{"error": {"message": "too many"}}'


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


async def asked(client: LoadClient) -> Outcome:
    return await client.ask(Ask("/path", {"prompt": [1]}))


def test_answers_may_be_cut_anywhere() -> None:
    async def run() -> None:
        whole = CHUNKED + EVENTS
        places = [sorted(random.Random(seed).sample(range(1, len(whole)), 8)) for seed in range(15)]
        ways = [
            [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
            for cuts in places
        ]
        async with (
            Scripted(*ways, pause=0.001).running() as server,
            LoadClient(server.url, common={}) as client,
        ):
            for _ in ways:
                outcome = await asked(client)
                assert outcome.error is None
                assert (len(outcome.pieces), outcome.output_tokens) == (2, 2)
        assert server.accepted == 1, "the connection is kept"

    asyncio.run(run())


def test_requests_say_where_they_go() -> None:
    async def run() -> None:
        async with (
            Scripted([CHUNKED + EVENTS]).running() as server,
            LoadClient(server.url + "/prefix/", api_key="k", common={"model": "m"}) as client,
        ):
            await asked(client)
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        fields = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines}
        assert first == "POST /prefix/path HTTP/1.1"
        assert fields["authorization"] == "Bearer k"
        assert fields["content-type"] == "application/json"
        assert fields["accept-encoding"] == "identity"
        assert json.loads(body)["model"] == "m"
        assert json.loads(body)["stream"] is True

    asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "ServerDisconnectedError"),
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "ClientResponseError"),
        (CHUNKED + b"5\r\nda", "ClientPayloadError"),
        (REFUSED, "HTTP 429: too many"),
        (REFUSED[:-9], "ClientPayloadError"),
    ],
)
def test_broken_answers_are_errors_of_their_request(answer: bytes, error: str) -> None:
    """The next request of the same client finds a server that works."""

    async def run() -> None:
        async with (
            Scripted([answer], [CHUNKED + EVENTS]).running() as server,
            LoadClient(server.url, common={}) as client,
        ):
            assert (await asked(client)).error == error
            assert (await asked(client)).error is None

    asyncio.run(run())


@pytest.mark.parametrize("answer", [[b""], [CHUNKED, b"1\r\na\r\n"]], ids=["head", "body"])
def test_silence_ends_in_a_timeout(answer: list[bytes]) -> None:
    """Counted from the last byte, which comes later in the second case."""

    async def run() -> None:
        server = Scripted([*answer, *[b""] * 20], pause=0.25)
        async with server.running(), LoadClient(server.url, timeout=0.4, common={}) as client:
            began = asyncio.get_running_loop().time()
            outcome = await asked(client)
            took = asyncio.get_running_loop().time() - began
        assert outcome.error == "SocketTimeoutError"
        assert 0.4 + 0.25 * (len(answer) - 1) - 0.01 <= took < 3

    asyncio.run(run())
