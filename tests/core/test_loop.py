"""What the engine's loop does while it has nothing to do."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pymllm_core.config import ServerSettings, Settings
from pymllm_core.engine import loop as loop_module
from pymllm_core.engine.engine import Engine
from pymllm_core.engine.loop import EngineLoop
from pymllm_core.engine.status import EngineStats
from pymllm_core.output import Delta
from pymllm_core.request import Request
from pymllm_core.testing.checkpoints import write_toy
from pymllm_core.testing.engines import greedy, make_engine


class Listener:
    """Remembers answers, and that the loop is ready or has ended."""

    def __init__(self) -> None:
        self.is_ready, self.has_ended, self.answered = threading.Event(), threading.Event(), threading.Event()

    def loading(self, progress: object) -> None: ...

    def planned(self, plan: object) -> None: ...

    def ready(self, processor: object) -> None:
        self.is_ready.set()

    def news(self, deltas: list[Delta], stats: EngineStats) -> None:
        if any(delta.finish_reason for delta in deltas):
            self.answered.set()

    def flushed(self, done: bool) -> None: ...

    def ended(self, error: BaseException | None) -> None:
        self.has_ended.set()


def test_it_does_not_warm_up_between_two_crowds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose requests would wait for it; and they do not wait for the quiet to end either."""
    write_toy(tmp_path)
    monkeypatch.setattr(loop_module, "QUIET_S", 60.0)
    monkeypatch.setattr(Engine, "warm_up", lambda engine: pytest.fail("it was not quiet"))
    listener = Listener()
    settings = Settings(server=ServerSettings(model_path=str(tmp_path)))
    loop = EngineLoop(settings, listener, lambda *_: make_engine(tmp_path))
    loop.start()
    assert listener.is_ready.wait(60)
    for name in "ab":
        listener.answered.clear()
        loop.add(Request(name, (1, 2, 3), greedy(2)))
        assert listener.answered.wait(10)
    assert loop.stop(10)


@pytest.mark.parametrize("fails", [False, True], ids=["warm", "fails"])
def test_it_warms_up_until_a_request_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Between two bits of it requests are taken; an error in it is no reason to end."""
    write_toy(tmp_path)
    warmed = threading.Semaphore(0)

    def warm_up(engine: Engine) -> bool:
        assert not engine.has_work
        warmed.release()
        if fails:
            raise MemoryError("no room for it")
        return True

    monkeypatch.setattr(Engine, "warm_up", warm_up)
    listener = Listener()
    settings = Settings(server=ServerSettings(model_path=str(tmp_path)))
    loop = EngineLoop(settings, listener, lambda *_: make_engine(tmp_path))
    loop.start()
    assert listener.is_ready.wait(60)
    for _ in range(1 if fails else 3):
        assert warmed.acquire(timeout=10)
    loop.add(Request("a", (1, 2, 3), greedy(2)))
    assert listener.answered.wait(10)
    assert ("could not be prepared beforehand" in caplog.text) == fails
    assert loop.stop(10)
    assert listener.has_ended.is_set()
