"""The seam between asyncio and the engine, on a thread and in a process of its own, with the toy model."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pymllm_core.config import Settings
from pymllm_core.engine import build, status
from pymllm_core.engine.async_engine import AsyncEngine
from pymllm_core.engine.detokenizer import Detokenizer
from pymllm_core.engine.engine import Engine
from pymllm_core.engine.status import Progress, StageTimes
from pymllm_core.engine.stream import Stream
from pymllm_core.errors import EngineError, QueueFullError, RequestError
from pymllm_core.output import Completion, Delta, TokenLogprob, Usage
from pymllm_core.request import Request, SamplingParams
from pymllm_core.testing.accidents import BURNS, load_toy
from pymllm_core.testing.checkpoints import write_toy
from pymllm_core.testing.engines import TOY, complete, greedy, make_engine, registry_of


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    return folder


@pytest.fixture(scope="module", params=["off", "on"])
def shared(request: pytest.FixtureRequest, toy: Path) -> Iterator[AsyncEngine]:
    """An engine in this process and in its own, for tests that leave it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pymllm_core.plugins.registry", None)  # `load_toy` sets it
        with started(toy, request.param) as found:
            yield found


@contextmanager
def started(toy: Path, own_process: str, **server: Any) -> Iterator[AsyncEngine]:
    fields = {"device": "cpu", "dtype": "float32", "max_running_requests": 4, **server}
    found = AsyncEngine(Settings.of(str(toy), engine_process=own_process, **fields), load_toy)
    found.start()
    try:
        asyncio.run(found.wait_ready())
        yield found
    finally:
        found.stop()


@pytest.fixture
def engine(shared: AsyncEngine) -> Iterator[AsyncEngine]:
    yield shared
    wait_until_idle(shared)
    assert shared.flush_cache()
    assert shared.stats().waiting == 0


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


def test_a_step_that_fails_ends_its_requests_only(engine: AsyncEngine) -> None:
    async def ask(first: int) -> list[Delta]:
        return await read(engine.submit(Request("a", (first, 6), greedy(5))))

    failed = asyncio.run(ask(BURNS))[-1]
    assert failed.finish_reason == "error"
    assert "on fire" in (failed.error or "")
    assert Completion.join(asyncio.run(ask(5))).finish_reason == "length"


def test_requests_are_refused_at_once(engine: AsyncEngine) -> None:
    async def ask(request: Request) -> None:
        engine.submit(request)

    for request, message in (
        (
            Request("a", tuple(range(3, 259)), greedy(5)),
            "the prompt has 256 tokens, but context_length is 256",
        ),
        (Request("a", (5,), greedy(5, stop=("x",))), "stop strings need a tokenizer"),
        (Request("a", (5,), greedy(5, stop_token_ids=(300,))), "outside the vocabulary of 300"),
    ):
        with pytest.raises(RequestError, match=message):
            asyncio.run(ask(request))
    assert engine.stats().waiting == 0


def test_logprobs_and_timings_come_through(engine: AsyncEngine) -> None:
    async def ask() -> Completion:
        request = Request("a", (5, 6, 7), greedy(6, logprobs=2))
        return Completion.join(await read(engine.submit(request)))

    answer = asyncio.run(ask())
    assert answer.logprobs is not None
    assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
    assert all(len(entry.top) == 2 for entry in answer.logprobs)
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in answer.logprobs)
    assert answer.usage == Usage(3, 6, 0)
    assert answer.timings is not None
    assert 0 <= answer.timings.queue_s < 10
    assert 0 < answer.timings.prefill_s < 10


def test_stats_count(engine: AsyncEngine) -> None:
    before = engine.stats()
    engine._last_news -= 1000  # idle for long

    async def ask() -> None:
        streams = [engine.submit(Request(str(n), (5, 6, 7), greedy(200))) for n in range(6)]
        now = engine.stats()  # whether or not the engine has heard of them
        assert now.running + now.waiting == 6
        assert now.last_step_age_s < 500
        engine._last_news -= 1000
        await anext(streams[0])
        assert engine.stats().last_step_age_s < 500
        assert not engine.flush_cache()
        while engine.stats().running < 4:  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0.001)
        await asyncio.gather(*map(read, streams))

    asyncio.run(ask())
    after = engine.stats()
    assert after.generated_tokens - before.generated_tokens == 1200
    assert after.prompt_tokens - before.prompt_tokens == 18
    assert after.running == after.waiting == 0
    assert after.steps > before.steps


@pytest.fixture(params=["off", "on"])
def limited(
    request: pytest.FixtureRequest, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AsyncEngine]:
    """An engine that takes one request and lets one wait, to be stopped by the test."""
    monkeypatch.setattr("pymllm_core.plugins.registry", None)
    with started(toy, request.param, max_running_requests=1, max_queued_requests=1) as found:
        yield found


def test_a_full_queue_refuses_and_stopping_ends_streams(limited: AsyncEngine) -> None:
    async def ask() -> list[Delta]:
        streams = [limited.submit(Request(str(n), (5, 6), greedy(200))) for n in range(2)]
        with pytest.raises(QueueFullError, match="1 requests are waiting, and max_queued_requests is 1"):
            limited.submit(Request("2", (5, 6), greedy(5)))
        await anext(streams[0])
        await asyncio.get_running_loop().run_in_executor(None, limited.stop)
        return [(await read(stream))[-1] for stream in streams]

    assert [delta.finish_reason for delta in asyncio.run(ask())] == ["abort", "abort"]
    assert limited.state == "stopped"
    with pytest.raises(EngineError, match="stopped"):
        limited.submit(Request("b", (5, 6), greedy(5)))
    with pytest.raises(EngineError, match="stopped"):
        limited.flush_cache()


@pytest.fixture
def speaking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[AsyncEngine, Engine]]:
    """An engine with a tokenizer, whose streams make the text, and one that makes it itself."""
    write_toy(tmp_path, tokenizer=True)
    reference = make_engine(tmp_path)
    monkeypatch.setattr("pymllm_core.plugins.registry", None)
    with started(tmp_path, "off") as found:
        yield found, reference


def test_streams_make_the_text_that_the_engine_would(speaking: tuple[AsyncEngine, Engine]) -> None:
    engine, reference = speaking
    prompt = (5, 6, 7)
    whole = complete(reference, [prompt], greedy(40))[0]
    stops = whole.text[10:13]
    cases = [
        greedy(40),
        greedy(40, skip_special_tokens=False),
        greedy(40, stop_token_ids=(whole.token_ids[20],), skip_special_tokens=False),
        greedy(40, stop=(stops,)),
        SamplingParams(max_tokens=60, temperature=1.5, seed=7, skip_special_tokens=False),
    ]

    async def ask(params: SamplingParams, *, stream: bool, pause: float) -> Completion:
        deltas = []
        async for delta in engine.submit(Request("a", prompt, params, stream=stream)):
            deltas.append(delta)
            await asyncio.sleep(pause)
        return Completion.join(deltas)

    for params in cases:
        expected = complete(reference, [prompt], params)[0]
        for stream, pause in ((True, 0.0), (True, 0.02), (False, 0.0)):
            found = asyncio.run(ask(params, stream=stream, pause=pause))
            assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
            assert (found.finish_reason, found.matched_stop) == (
                expected.finish_reason,
                expected.matched_stop,
            )
    assert complete(reference, [prompt], cases[2])[0].finish_reason == "stop"
    assert complete(reference, [prompt], cases[3])[0].text == whole.text[: whole.text.index(stops)]


def test_a_tokenizer_that_raises_ends_its_request_only(
    speaking: tuple[AsyncEngine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = speaking

    def raises(*_: object) -> str:
        raise ValueError("no such piece")

    async def ask() -> tuple[list[Delta], list[Delta]]:
        other = engine.submit(Request("b", (5, 6), greedy(20)))
        monkeypatch.setattr(Detokenizer, "extend", raises)
        broken = await read(engine.submit(Request("a", (5, 6), greedy(200))))
        monkeypatch.undo()
        return broken, await read(other)

    broken, other = asyncio.run(ask())
    # One, though the engine had more to say.
    assert [delta.finish_reason for delta in broken] == ["error"]
    assert broken[0].error == "ValueError: no such piece"
    assert other[-1].finish_reason == "length"
    wait_until_idle(engine)


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


def test_the_start_is_timed_by_stages(
    toy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line at the end says where the seconds went."""
    monkeypatch.setattr("pymllm_core.plugins.registry", lambda: registry_of(TOY))
    original = build.load_weights

    def slow(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        time.sleep(0.3)

    monkeypatch.setattr(build, "load_weights", slow)
    engine = AsyncEngine(Settings.of(str(toy), device="cpu", dtype="float32"), began=time.monotonic() - 100)
    with caplog.at_level("INFO"):
        engine.start()
        asyncio.run(engine.wait_ready())
    engine.stop()
    (line,) = [record.getMessage() for record in caplog.records if "ready in" in record.getMessage()]
    found = re.fullmatch(r"ready in (\S+) s: starting (\S+), .*loading weights (\S+)(, .*)?", line)
    assert found is not None, line
    total, starting, weights = (float(number) for number in found.groups()[:3])
    assert 100 <= starting < 101
    assert 0.3 <= weights < 2
    assert starting + weights <= total + 0.1
    parts = [float(part.rpartition(" ")[2]) for part in line.partition(": ")[2].split(", ")]
    # Each is rounded to a tenth, and what takes less than half of that is left out.
    assert sum(parts) == pytest.approx(total, abs=0.05 * len(parts) + 0.2)


def test_stages_that_come_again_go_on_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 15.0, 16.5])
    monkeypatch.setattr(status, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    times = StageTimes(began=9.0)  # the clock is asked at a change of the stage alone
    for stage in ("a", "a", "b", "a"):
        times(Progress(stage))
    assert times.finish() == "7.5 s: starting 1.0, a 3.5, b 3.0"


def test_a_process_knows_when_it_began() -> None:
    code = (
        "import time; time.sleep(0.5)\n"
        "from pymllm_core.engine.status import process_began\n"
        "print(time.monotonic() - process_began())"
    )
    before = time.monotonic()
    age = float(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )
    assert 0.4 < age < time.monotonic() - before + 0.1
