"""The seam between asyncio and the engine's thread, with the toy model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pymllm_core.config import Settings
from pymllm_core.engine.async_engine import AsyncEngine
from pymllm_core.engine.stream import Stream
from pymllm_core.errors import EngineError, RequestError
from pymllm_core.output import Completion, Delta, TokenLogprob, Usage
from pymllm_core.request import Request
from pymllm_core.testing.checkpoints import write_toy
from pymllm_core.testing.engines import TOY, complete, greedy, make_engine, registry_of


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    return folder


@pytest.fixture
def engine(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AsyncEngine]:
    monkeypatch.setattr("pymllm_core.plugins.registry", lambda: registry_of(TOY))
    found = AsyncEngine(Settings.of(str(toy), device="cpu", dtype="float32", max_running_requests=4))
    found.start()
    asyncio.run(found.wait_ready())
    yield found
    found.stop()


async def read(stream: Stream) -> list[Delta]:
    return [delta async for delta in stream]


def wait_until_idle(engine: AsyncEngine) -> None:
    while engine.stats().running:
        time.sleep(0.01)
    time.sleep(0.05)  # the last delta is on its way


def test_streams_give_the_answers_of_the_engine(engine: AsyncEngine, toy: Path) -> None:
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [3], [4, 4, 4], [20, 30]]
    expected = complete(make_engine(toy), prompts, greedy(12))

    async def ask() -> list[list[Delta]]:
        streams = [
            engine.submit(Request(str(index), tuple(prompt), greedy(12)))
            for index, prompt in enumerate(prompts)
        ]
        return await asyncio.gather(*map(read, streams))

    for deltas, answer in zip(asyncio.run(ask()), expected, strict=True):
        assert Completion.join(deltas).token_ids == answer.token_ids
        assert deltas[-1].usage.completion_tokens == 12


def test_a_slow_reader_gets_what_came_meanwhile_at_once(engine: AsyncEngine) -> None:
    async def ask() -> list[Delta]:
        stream = engine.submit(Request("slow", (5, 6, 7), greedy(20)))
        first = await anext(stream)
        await asyncio.get_running_loop().run_in_executor(None, wait_until_idle, engine)
        return [first, *await read(stream)]

    deltas = asyncio.run(ask())
    assert len(deltas) == 2
    assert len(Completion.join(deltas).token_ids) == 20


def test_what_nobody_streams_is_one_delta(engine: AsyncEngine) -> None:
    async def ask() -> list[Delta]:
        return await read(engine.submit(Request("whole", (5, 6, 7), greedy(9), stream=False)))

    (delta,) = asyncio.run(ask())
    assert len(delta.token_ids) == 9
    assert delta.finish_reason == "length"


def test_leaving_and_aborting_end_a_request(engine: AsyncEngine) -> None:
    async def ask() -> Delta:
        async with engine.submit(Request("left", (5, 6), greedy(200))) as left:
            await anext(left)
        stream = engine.submit(Request("aborted", (5, 6), greedy(200)))
        await anext(stream)
        with pytest.raises(RequestError, match="running already"):
            engine.submit(Request("aborted", (5, 6), greedy(5)))
        assert engine.abort("aborted")
        last = (await read(stream))[-1]
        assert not engine.abort("aborted")
        return last

    assert asyncio.run(ask()).finish_reason == "abort"
    assert engine.stats().running == 0


def test_a_step_that_fails_ends_its_requests_only(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> list[Delta]:
        return await read(engine.submit(Request("a", (5, 6), greedy(5))))

    inner: Any = engine._host.engine  # type: ignore[attr-defined]
    launch = inner.runner.launch

    def fail(batch: Any) -> Any:
        monkeypatch.setattr(inner.runner, "launch", launch)
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(inner.runner, "launch", fail)
    failed = asyncio.run(ask())[-1]
    assert failed.finish_reason == "error"
    assert "on fire" in (failed.error or "")
    assert Completion.join(asyncio.run(ask())).finish_reason == "length"


def test_stopping_ends_streams_and_refuses_new_ones(engine: AsyncEngine) -> None:
    async def ask() -> Delta:
        stream = engine.submit(Request("a", (5, 6), greedy(200)))
        await anext(stream)
        await asyncio.get_running_loop().run_in_executor(None, engine.stop)
        return (await read(stream))[-1]

    assert asyncio.run(ask()).finish_reason == "abort"
    with pytest.raises(EngineError, match="stopped"):
        engine.submit(Request("b", (5, 6), greedy(5)))


def test_merged_deltas_lose_nothing() -> None:
    entries = [TokenLogprob(token, -0.5) for token in (1, 2, 3)]
    parts = [
        Delta("a", "x", (1,), Usage(4, 1), logprobs=(entries[0],)),
        Delta("a", "", (), Usage(4, 1), logprobs=()),
        Delta("a", "yz", (2, 3), Usage(4, 3), "stop", 7, tuple(entries[1:])),
    ]
    merged = Delta.merge(parts)
    assert merged == Delta("a", "xyz", (1, 2, 3), Usage(4, 3), "stop", 7, tuple(entries))
    assert Delta.merge(parts[:1]) is parts[0]
