"""The child's side of `process`: obeys the commands that come by the pipe, and tells what comes of them."""

from __future__ import annotations

import contextlib
import gc
import logging
import logging.handlers
import os
import pickle
import select
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from pymllm_core.child import SIGNALS
from pymllm_core.engine.loop import EngineLoop, Listener, Load
from pymllm_core.engine.status import EngineStats, Progress
from pymllm_core.errors import PymllmError
from pymllm_core.output import Delta, Usage

if TYPE_CHECKING:
    from pymllm_core.config import Settings
    from pymllm_core.engine.engine import Engine
    from pymllm_core.engine.processor import Processor
    from pymllm_core.plan import Plan

STOP_S = 3.0
"""How long the engine may take to end in order."""

POLL_MS = 50
"""How often the main thread looks whether the engine's thread still lives."""


class _Teller:
    """The child's `Listener`: sends every call to the parent."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, name: str, *arguments: Any) -> None:
        """Without effect where the parent is gone: the end of the file ends this process."""
        message = pickle.dumps((name, arguments), pickle.HIGHEST_PROTOCOL)
        with self._lock, contextlib.suppress(OSError):
            self._connection.send_bytes(message)

    def loading(self, progress: Progress) -> None:
        self.send("loading", progress)

    def planned(self, plan: Plan) -> None:
        self.send("planned", plan)

    def ready(self, processor: Processor) -> None:
        # What the start has made stays, so that collections of garbage need never look at it.
        gc.freeze()
        gc.enable()
        self.send("ready")

    def news(self, deltas: list[Delta], stats: EngineStats) -> None:
        self.send("news", [packed(delta) for delta in deltas], stats)

    def flushed(self, done: bool) -> None:
        self.send("flushed", done)

    def ended(self, error: BaseException | None) -> None:
        # Our own errors explain themselves.
        ours = error is None or isinstance(error, PymllmError)
        where = None if ours else "".join(traceback.format_exception(error))
        error = None if error is None else portable(error)
        self.send("ended", error, where)


_EVERYWHERE = ("builtins", "pymllm_core.errors", "pymllm_core.engine.status")
"""Modules whose errors the parent can make without importing torch."""


def portable(error: BaseException) -> BaseException:
    """The error, or the most of it that the parent can have: the nearest class of ours, or a RuntimeError."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # arguments that are not its fields
        return RuntimeError(f"{type(error).__name__}: {error}")
    if type(error).__module__ in _EVERYWHERE:
        return error
    if isinstance(error, PymllmError):
        nearest = next(kind for kind in type(error).__mro__ if kind.__module__ == PymllmError.__module__)
        with contextlib.suppress(TypeError):
            made = nearest(str(error))
            assert isinstance(made, PymllmError)
            return made
    return RuntimeError(f"{type(error).__name__}: {error}")


def packed(delta: Delta) -> Delta | tuple[Any, ...]:
    """What most deltas have, as a plain tuple: a tenth of the time to pickle."""
    if delta.finish_reason is None and delta.logprobs is None:
        return (delta.request_id, delta.text, delta.token_ids, *delta.usage)
    return delta


def unpacked(packed: Delta | tuple[Any, ...]) -> Delta:
    if isinstance(packed, Delta):
        return packed
    request_id, text, token_ids, prompt, completion, cached = packed
    return Delta(request_id, text, token_ids, Usage(prompt, completion, cached))


class _LogSender(logging.handlers.QueueHandler):
    """Hands records to the parent, whose handlers, format and levels so hold for both."""

    def __init__(self, teller: _Teller) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # `enqueue` needs no queue
        self._teller = teller

    def enqueue(self, record: logging.LogRecord) -> None:
        self._teller.send("log", record)


def _watch(connection: Connection, events: int) -> select.poll:
    """What tells of these events at the connection, to one thread."""
    watch = select.poll()
    watch.register(connection.fileno(), events)
    return watch


class _PipeLoop(EngineLoop):
    """Reads its commands itself, between two steps.

    A thread that read them while a step is launched would take the interpreter's lock from it, request by request: the
    launches of a prompt took twice as long while others arrived.
    """

    def __init__(self, settings: Settings, listener: Listener, load: Load, connection: Connection) -> None:
        super().__init__(settings, listener, load)
        self._connection = connection
        self._news = _watch(connection, select.POLLIN)
        # While the engine is loaded, the main thread reads.
        self._reading = threading.Lock()
        self._serving = False

    def follow(self) -> None:
        """On the main thread: obey while the engine is loaded, and return when it has ended, or the parent is gone."""
        early = _watch(self._connection, select.POLLIN)
        while self._thread.is_alive() and not (self._serving or self._cancel.is_set()):
            if early.poll(POLL_MS):
                with self._reading:
                    if not self._serving:
                        self._obey()
        gone = _watch(self._connection, 0)  # nothing but the end
        while self._thread.is_alive() and not self._cancel.is_set():
            if gone.poll(POLL_MS):
                return

    def _obey(self) -> None:
        try:
            commands = [pickle.loads(command) for command in self._connection.recv()]
        except (EOFError, OSError):
            commands = [("stop", ())]
        for name, arguments in commands:
            if name == "stop":
                self._cancel.set()
            else:
                getattr(self, name)(*arguments)

    def _serve(self, engine: Engine) -> None:
        with self._reading:
            self._serving = True
        super()._serve(engine)

    def _await_commands(self, engine: Engine) -> None:
        idle = not (self._inbox or engine.has_work)
        while not self._cancel.is_set():
            if self._news.poll(None if idle and not self._warms_up else 0):
                self._obey()
                idle = False
            elif not idle:
                return
            else:
                self._warm_up(engine)


def main(connection: Connection) -> None:
    """Obey until told to stop, or until the parent is gone."""
    # Handlers that do nothing, rather than none: the compilers that this process starts shall hear the signals.
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.set_inheritable(connection.fileno(), False)
    gc.disable()  # until the engine is ready
    settings, load, level = connection.recv()
    teller = _Teller(connection)
    logging.getLogger().setLevel(level)
    logging.getLogger().addHandler(_LogSender(teller))
    loop = _PipeLoop(settings, teller, load, connection)
    loop.start()
    loop.follow()
    if not loop.stop(STOP_S):
        # The interpreter cannot end in order beside a thread that is still in torch.
        os._exit(1)
