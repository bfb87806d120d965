"""The client of ``pymllm bench serve`` on the clock.

A busy machine makes things later, never earlier: lower bounds are sharp.
"""

from __future__ import annotations

import asyncio

import pytest
from load_server import FIRST, GAP, PIECES, Server

from pymllm_core.bench import workload
from pymllm_core.bench.client import LoadClient, Outcome
from pymllm_core.bench.workload import Ask


def ask(server: Server, *asks: Ask) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with LoadClient(server.url, common={"model": "m"}) as client:
            return [await client.ask(one) for one in asks]

    return asyncio.run(run())


def test_times_are_those_of_the_server(server: Server) -> None:
    chat = Ask(workload.CHAT, {"messages": []})
    for found in ask(server, Ask(workload.COMPLETIONS, {"prompt": [1, 2, 3]}), chat):
        assert found.error is None
        assert len(found.pieces) == PIECES  # the chat's empty first delta is none
        assert FIRST - 0.002 <= found.ttft < FIRST + 5
        assert (PIECES - 1) * GAP - 0.005 <= sum(found.gaps) < (PIECES - 1) * GAP + 5
        assert found.tpot == pytest.approx(sum(found.gaps) / (PIECES - 1))
        assert found.e2e >= found.ttft + sum(found.gaps)
        assert found.output_tokens == PIECES
    assert server.bodies[0]["stream_options"] == {"include_usage": True}
    assert server.bodies[0]["model"] == "m"


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("busy", "HTTP 429: the queue is full"),
        ("fails", "in the stream: out of pages"),
        ("cut", "the stream ended before [DONE]"),
        ("uncounted", "the stream reported no usage"),
    ],
)
def test_what_goes_wrong_is_named(server: Server, prompt: str, error: str) -> None:
    (found,) = ask(server, Ask(workload.COMPLETIONS, {"prompt": prompt}))
    assert found.error == error
    assert found.ended > found.sent


def test_nonsense_is_an_error_and_silence_is_none(server: Server) -> None:
    nonsense, silent = ask(
        server,
        Ask(workload.COMPLETIONS, {"prompt": "nonsense"}),
        Ask(workload.COMPLETIONS, {"prompt": "silent"}),
    )
    assert nonsense.error is not None
    assert nonsense.error.startswith("an event is malformed: JSONDecodeError")
    # A token without text: it came with the end of the answer at the latest.
    assert silent.error is None
    assert len(silent.pieces) == 1
    assert silent.tpot is None


def test_nobody_there_is_an_error() -> None:
    async def run() -> Outcome:
        async with LoadClient("http://127.0.0.1:9", common={}) as client:
            return await client.ask(Ask(workload.COMPLETIONS, {}))

    assert asyncio.run(run()).error == "ConnectionRefusedError"
