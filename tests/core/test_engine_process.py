"""The engine's own process: how it lives and dies, and what this side sees of it."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from pymllm_core.config import Settings
from pymllm_core.engine import async_engine, process, process_main
from pymllm_core.engine.async_engine import AsyncEngine, has_own_process
from pymllm_core.engine.loop import Load
from pymllm_core.engine.status import Cancelled
from pymllm_core.errors import EngineError, ModelNotFoundError
from pymllm_core.output import Delta, Timings, TokenLogprob, Usage
from pymllm_core.request import Request, SamplingParams
from pymllm_core.testing.accidents import EXITS, HANGS, KILLED, load_and_fail, load_never, load_toy
from pymllm_core.testing.checkpoints import write_toy
from pymllm_core.testing.engines import greedy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder, tokenizer=True)
    return folder


@pytest.fixture
def start() -> Iterator[Any]:
    """Starts engines in processes of their own; all are stopped at the end."""
    engines: list[AsyncEngine] = []

    def begin(model: Any, load: Load = load_toy, **server: Any) -> AsyncEngine:
        fields = {"device": "cpu", "dtype": "float32", "engine_process": "on", **server}
        engine = AsyncEngine(Settings.of(str(model), **fields), load)
        engines.append(engine)
        engine.start()
        return engine

    yield begin
    for engine in engines:
        pid = pid_of(engine)
        engine.stop()
        assert gone(pid)


def pid_of(engine: AsyncEngine) -> int:
    pid = engine._host.pid  # type: ignore[attr-defined]
    assert isinstance(pid, int)
    return pid


def gone(pid: int) -> bool:
    """Whether there is no such process; one that ended and that nobody waited for counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def last_of(engine: AsyncEngine, prompt: tuple[int, ...], tokens: int = 5) -> Delta:
    return [delta async for delta in engine.submit(Request("a", prompt, greedy(tokens)))][-1]


def test_where_the_engine_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**server: Any) -> bool:
        return has_own_process(Settings.of("m", **server))

    assert chosen(engine_process="on", device="cpu")
    assert not chosen(engine_process="off", device="cuda")
    assert chosen(device="cuda")
    assert not chosen(device="cpu")
    for likely in (True, False):
        monkeypatch.setattr(async_engine, "cuda_is_likely", lambda likely=likely: likely)
        assert chosen() is likely


def test_it_needs_no_torch_here_and_tells_what_it_does(
    start: Any, toy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = start(toy, max_total_tokens=64)
    asyncio.run(engine.wait_ready())
    (record,) = [record for record in caplog.records if record.name == "toy"]
    assert record.getMessage() == f"the toy is loaded in process {pid_of(engine)}"
    assert record.levelno == logging.INFO
    assert engine.progress.stage == "preparing the engine"
    assert engine.plan.limits.max_total_tokens == 64
    assert engine.processor.tokenizer is not None
    # Refused there, told here: the pool's size is known to both, but only the engine counts what is in it.
    with pytest.raises(Exception, match="max_total_tokens is 64"):
        asyncio.run(last_of(engine, tuple(range(5, 75))))


@pytest.mark.parametrize(
    ("first", "message"),
    [(KILLED, "killed by SIGKILL"), (EXITS, "ended with exit code 3")],
)
def test_a_process_that_dies_fails_its_streams(
    start: Any, toy: Path, first: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(toy)

    async def ask() -> tuple[Delta, Delta]:
        await engine.wait_ready()
        victim = engine.submit(Request("b", (5, 6), greedy(200)))
        await anext(victim)
        return await last_of(engine, (first, 5)), [delta async for delta in victim][-1]

    for delta in asyncio.run(ask()):
        assert delta.finish_reason == "error"
        assert message in (delta.error or "")
    assert engine.state == "failed"
    assert isinstance(engine.error, EngineError)
    with pytest.raises(EngineError, match=f"the engine failed: the engine's process.*{message}"):
        asyncio.run(last_of(engine, (5, 6)))
    assert engine.stats().running == engine.stats().waiting == 0
    assert not engine.abort("b")
    assert message in caplog.text


def test_errors_of_loading_keep_type_and_message(start: Any, tmp_path: Path) -> None:
    def error_of(model: Any, load: Load) -> BaseException:
        engine = start(model, load)
        with pytest.raises(BaseException) as found:  # noqa: PT011  # which one is what is tested
            asyncio.run(engine.wait_ready())
        assert engine.state == "failed"
        assert engine.error is found.value
        return found.value

    missing = error_of(tmp_path / "nothing", load_toy)
    assert isinstance(missing, ModelNotFoundError)
    assert f"there is no folder {tmp_path / 'nothing'}" in str(missing)
    assert missing.__cause__ is None  # it explains itself

    plain = error_of("plain", load_and_fail)
    assert (type(plain), str(plain)) == (ValueError, "no luck")
    assert "in load_and_fail" in str(plain.__cause__)

    unknown = error_of("unknown", load_and_fail)
    assert (type(unknown), str(unknown)) == (RuntimeError, "Unknown: no luck")
    assert "in load_and_fail" in str(unknown.__cause__)


def test_a_broken_tokenizer_is_told_as_it_is(start: Any, tmp_path: Path) -> None:
    write_toy(tmp_path, tokenizer=True)
    (tmp_path / "tokenizer.json").write_text("{")
    engine = start(tmp_path)
    with pytest.raises(Exception, match=f"the tokenizer in {tmp_path} cannot be loaded"):
        asyncio.run(engine.wait_ready())


def test_loading_can_be_stopped_at_any_time(start: Any) -> None:
    engine = start("m", load_never)
    wait_for(lambda: engine.progress.stage == "waiting")
    assert engine.progress.fraction == 0.25
    pid = pid_of(engine)
    begin = time.monotonic()
    engine.stop()
    assert time.monotonic() - begin < process.STOP_LOADING_S + 1
    assert gone(pid)
    assert engine.state == "stopped"
    with pytest.raises(Cancelled, match="stopped"):
        asyncio.run(engine.wait_ready())


def test_a_step_that_hangs_does_not_keep_it_from_ending(
    start: Any, toy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(toy)

    async def ask() -> Delta:
        await engine.wait_ready()
        asyncio.get_running_loop().call_later(0.3, lambda: stopping.append(loop_stop()))
        return await last_of(engine, (HANGS, 5))

    stopping: list[Any] = []

    def loop_stop() -> Any:
        assert engine.stats().waiting == 1
        assert engine.stats().last_step_age_s >= 0.25
        return asyncio.get_running_loop().run_in_executor(None, engine.stop)

    monkeypatch.setattr(process, "STOP_S", 0.3)
    begin = time.monotonic()
    assert asyncio.run(ask()).finish_reason == "abort"
    assert time.monotonic() - begin < 20
    assert "did not end within" in caplog.text


PARENT = """
import asyncio, sys, time
from pymllm_core.config import Settings
from pymllm_core.engine.async_engine import AsyncEngine
from pymllm_core.request import Request, SamplingParams
from pymllm_core.testing.accidents import load_toy
engine = AsyncEngine(Settings.of(sys.argv[1], device="cpu", dtype="float32", engine_process="on"), load_toy)
engine.start()

async def ask():
    await engine.wait_ready()
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    return "".join([d.text async for d in engine.submit(engine.processor.from_text("the quick", params))])

text = asyncio.run(ask())
here = any(name.partition(".")[0] == "torch" and found for name, found in sys.modules.items())
print(engine._host.pid, here, repr(text), flush=True)
time.sleep(60)
"""


def test_a_parent_that_dies_takes_it_along(toy: Path) -> None:
    from pymllm_core.testing.engines import complete, make_engine

    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(toy)], stdout=subprocess.PIPE, text=True, cwd=toy.parent
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        pid, torch_here, text = parent.stdout.readline().split(maxsplit=2)
        assert not gone(int(pid))
        assert torch_here == "False"
        parent.kill()
        parent.wait()
        wait_for(lambda: gone(int(pid)), seconds=process.STOP_S + 5)
    engine = make_engine(toy)
    prompt = engine.processor.from_text("the quick").token_ids
    assert text.strip() == repr(complete(engine, [prompt], greedy(20))[0].text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_is_the_parents_business(start: Any, toy: Path, number: int) -> None:
    """What a terminal or a service manager sends reaches the child, too, also while it imports."""
    engine = start(toy)
    for _ in range(20):
        os.kill(pid_of(engine), number)
        time.sleep(0.05)
    asyncio.run(engine.wait_ready())
    os.kill(pid_of(engine), number)
    assert asyncio.run(last_of(engine, (5, 6))).finish_reason == "length"


def test_deltas_survive_the_pipe() -> None:
    logprobs = (TokenLogprob(7, -0.5, ((7, -0.5), (8, -1.5))),)
    for delta in (
        Delta("a", "text", (7,), Usage(3, 1, 2)),
        Delta("a", "", (7,), Usage(3, 1), logprobs=logprobs),
        Delta("a", "", (7,), Usage(3, 1), logprobs=()),
        Delta("a", "x", (), Usage(3, 1), "stop", "end", None, None, Timings(0.1, 0.2, 0.3)),
        Delta("a", "x", (), Usage(3, 1), "error", error="no"),
    ):
        packed = process_main.packed(delta)
        assert process_main.unpacked(packed) == delta
        assert type(process_main.unpacked(packed)) is Delta


def test_nothing_is_imported_from_the_working_folder(
    start: Any, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A downloaded model's folder may hold a module of any name."""
    for name in ("socket", "tempfile", "pickle", "struct", "selectors", "torch"):
        (tmp_path / f"{name}.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.chdir(tmp_path)
    engine = start(toy)
    asyncio.run(engine.wait_ready())


def test_the_cache_can_be_flushed_from_an_event_loop(start: Any, toy: Path) -> None:
    engine = start(toy)
    asyncio.run(engine.wait_ready())

    async def flush() -> bool:
        return bool(engine.flush_cache())

    assert asyncio.run(flush())


def test_starting_twice_is_starting_once(start: Any, toy: Path) -> None:
    engine = start(toy)
    pid = pid_of(engine)
    engine.start()
    assert pid_of(engine) == pid
    asyncio.run(engine.wait_ready())


def test_a_crowd_comes_in_messages_of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the engine begins with the first while others are still being read, which one turn of the loop may do."""
    host = process.EngineProcess(Settings.of("m"), AsyncEngine(Settings.of("m")), load_toy)
    sent: list[list[str]] = []

    class Pipe:
        def send_bytes(self, data: bytes) -> None:
            commands = [pickle.loads(one) for one in pickle.loads(data)]
            sent.append([arguments[0] for _, arguments in commands])

    monkeypatch.setattr(host, "_connection", Pipe())

    async def crowd(count: int) -> int:
        for number in range(count):
            host.abort(str(number))
        return len(sent)

    async def main() -> int:
        at_once = await crowd(20)
        await asyncio.sleep(0)
        return at_once

    at_once = asyncio.run(main())
    assert [len(message) for message in sent] == [8, 8, 4]
    assert at_once == 2
    assert [name for message in sent for name in message] == [str(number) for number in range(20)]
    host.abort("from a thread")  # which has no event loop
    assert sent[-1] == ["from a thread"]


def test_a_request_that_cannot_be_sent_is_refused_alone(start: Any, toy: Path) -> None:
    engine = start(toy)
    asyncio.run(engine.wait_ready())

    async def both() -> Delta:
        odd = SamplingParams(max_tokens=2, logit_bias=MappingProxyType({3: 1.0}))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="pickle"):
            engine.submit(Request("odd", (5, 6, 7), odd))
        return await last_of(engine, (5, 6, 7))

    assert asyncio.run(both()).finish_reason == "length"


class Elsewhere(EngineError):
    """One of ours by a package that the parent need not have."""


def test_errors_of_other_packages_need_nothing_of_theirs() -> None:
    """The parent has no torch, which making such an error may import."""
    for error, kind, text in (
        (MemoryError("8 GB"), MemoryError, "8 GB"),
        (Elsewhere("no kernels"), EngineError, "no kernels"),
        (torch.OutOfMemoryError("full"), RuntimeError, "OutOfMemoryError: full"),
    ):
        found = process_main.portable(error)
        assert type(found) is kind
        assert str(found) == text
