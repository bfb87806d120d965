"""The child's side of `process`: obeys the commands that come by the pipe, and tells what comes of them."""

from __future__ import annotations

import contextlib
import gc
import logging
import logging.handlers
import os
import pickle
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from pymllm_core.child import SIGNALS
from pymllm_core.engine.loop import EngineLoop
from pymllm_core.engine.status import EngineStats, Progress
from pymllm_core.errors import PymllmError
from pymllm_core.output import Delta, Usage

if TYPE_CHECKING:
    from pymllm_core.engine.processor import Processor
    from pymllm_core.plan import Plan

STOP_S = 3.0
"""How long the engine may take to end in order."""


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
    loop = EngineLoop(settings, teller, load)
    loop.start()
    try:
        stopping = False
        while not stopping:
            for name, arguments in map(pickle.loads, connection.recv()):
                stopping |= name == "stop"
                if name != "stop":
                    getattr(loop, name)(*arguments)
    except (EOFError, OSError):
        pass
    if not loop.stop(STOP_S):
        # The interpreter cannot end in order beside a thread that is still in torch.
        os._exit(1)
