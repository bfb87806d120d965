"""The engine's loop in a process of its own, so that the server's Python does not hold its steps up.

A pipe (`child`) carries pickled (method, arguments): the commands of `EngineHost` one way, as lists, the calls of
`Listener` the other. Whichever side ends, however that comes about, the other one reads the end of the file and ends
too. This side needs neither torch nor a device.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.handlers
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from pymllm_core.child import start_child
from pymllm_core.config import Settings
from pymllm_core.engine.loop import Listener, Load
from pymllm_core.engine.process_main import STOP_S, main, unpacked
from pymllm_core.engine.status import Cancelled, EngineStats, Progress
from pymllm_core.errors import EngineError
from pymllm_core.output import Delta
from pymllm_core.request import Request

if TYPE_CHECKING:
    from pymllm_core.engine.processor import Processor
    from pymllm_core.plan import Plan

logger = logging.getLogger(__name__)

STOP_LOADING_S = 0.3
"""How long a process that loads may take to end: nothing can be lost then, and imports and compilers do not listen."""

TOGETHER = 8
"""Commands that wait for each other at most: the engine begins with the first of a crowd while others are read."""


class EngineProcess:
    """An `EngineHost`: a child process with an `EngineLoop`, and a thread here that reads its news."""

    def __init__(self, settings: Settings, listener: Listener, load: Load) -> None:
        self._settings = settings
        self._listener = listener
        self._load = load
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._sending = threading.Lock()
        self._outbox: list[bytes] = []
        self._flusher: asyncio.AbstractEventLoop | None = None
        self._reader = threading.Thread(target=self._read, name="pymllm-engine-news", daemon=True)
        self._processor: _ProcessorThread | None = None
        self._stopping = False
        self._loading = True

    @property
    def pid(self) -> int | None:
        """The child's process id once it is started."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        self._process, self._connection = start_child(main)
        with contextlib.suppress(OSError):  # a child that died at once is told of by the reader
            self._connection.send((self._settings, self._load, logging.getLogger().level))
        self._reader.start()

    def add(self, request: Request) -> None:
        self._send("add", request)

    def abort(self, request_id: str) -> None:
        self._send("abort", request_id)

    def flush_cache(self) -> None:
        self._send("flush_cache")
        self._flush()  # an event loop that waits for the answer will not

    def stop(self) -> bool:
        if self._process is None:
            return True
        self._stopping = True
        # On a thread: a child that hangs reads nothing, and is killed below all the same.
        threading.Thread(target=self._send, args=("stop",), daemon=True).start()
        limit = STOP_LOADING_S if self._loading else STOP_S + 1  # for the interpreter
        try:
            self._process.wait(limit)
        except subprocess.TimeoutExpired:
            if not self._loading:
                logger.warning("the engine's process did not end within %.0f s, and is killed", limit)
            self._process.kill()
        if self._reader is not threading.current_thread():
            self._reader.join()
        return True

    def _send(self, command: str, *arguments: Any) -> None:
        """Send now, or from an event loop's thread when the loop has done what it is at: `TOGETHER` in one go.

        Raises what pickling the arguments raises.
        """
        message = pickle.dumps((command, arguments), pickle.HIGHEST_PROTOCOL)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        with self._sending:
            self._outbox.append(message)
            full = len(self._outbox) >= TOGETHER
            if loop is not None and self._flusher is loop and not full:
                return
            self._flusher = loop
        if loop is None or full:
            self._flush()
        else:
            loop.call_soon(self._flush)

    def _flush(self) -> None:
        assert self._connection is not None
        with self._sending:
            self._flusher = None
            if not self._outbox:
                return
            message = pickle.dumps(self._outbox, pickle.HIGHEST_PROTOCOL)
            self._outbox.clear()
            # Where the child is gone, the reader tells everybody.
            with contextlib.suppress(OSError):
                self._connection.send_bytes(message)

    # -- the reader's thread ----------------------------------------------------------------------

    def _read(self) -> None:
        assert self._connection is not None
        assert self._process is not None
        try:
            failure = self._follow(self._connection)
        except Exception as error:  # the tokenizer's, or a message that cannot be read
            failure = error
            self._process.kill()
        with self._sending:
            self._connection.close()  # the end of the file for the child, if it lives
        code = self._wait(self._process)
        if isinstance(failure, _Gone):
            failure = Cancelled("the engine was stopped") if self._stopping else EngineError(_died(code))
        self._listener.ended(failure)

    def _follow(self, connection: Connection) -> BaseException | None:
        """Tell the listener what comes, until the end; why it ended, `_Gone` where the child did not say."""
        while True:
            try:
                name, arguments = connection.recv()
            except (EOFError, OSError):
                return _Gone()
            if name == "ended":
                return _rebuilt(*arguments)
            getattr(self, f"_on_{name}")(*arguments)

    @staticmethod
    def _wait(process: subprocess.Popen[bytes]) -> int:
        try:
            return process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _on_loading(self, progress: Progress) -> None:
        self._listener.loading(progress)

    def _on_planned(self, plan: Plan) -> None:
        self._processor = _ProcessorThread(plan)  # while the child loads the weights
        self._listener.planned(plan)

    def _on_ready(self) -> None:
        assert self._processor is not None
        processor = self._processor.result()
        self._loading = False
        self._listener.ready(processor)

    def _on_news(self, packed: list[Delta | tuple[Any, ...]], stats: EngineStats) -> None:
        self._listener.news([unpacked(one) for one in packed], stats)

    def _on_flushed(self, done: bool) -> None:
        self._listener.flushed(done)

    @staticmethod
    def _on_log(record: logging.LogRecord) -> None:
        target = logging.getLogger(record.name)
        if target.isEnabledFor(record.levelno):
            target.handle(record)


class _ProcessorThread(threading.Thread):
    """Loads this side's tokenizer, without torch."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(name="pymllm-tokenizer", daemon=True)
        self._plan = plan
        self._processor: Processor | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with _transformers_without_torch(self._plan.settings):
                from pymllm_core.engine.processor import load_processor

                self._processor = load_processor(self._plan)
        except BaseException as error:
            self._error = error

    def result(self) -> Processor:
        """Waits. Raises what loading raised."""
        self.join()
        if self._error is not None:
            raise self._error
        assert self._processor is not None
        return self._processor


@contextlib.contextmanager
def _transformers_without_torch(settings: Settings) -> Iterator[None]:
    """Have transformers take torch for absent, as it then serves tokenizers only: 200 MB and seconds less.

    Not where torch is imported already, nor for tokenizers with code of their own, which may use it.
    """
    if "torch" in sys.modules or "transformers" in sys.modules or settings.server.trust_remote_code:
        yield
        return
    # "If the value is None, a ModuleNotFoundError is raised" (Python's reference, 5.3.1 The module cache).
    sys.modules["torch"] = None  # type: ignore[assignment]
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # it would advise to install torch
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    try:
        yield
    finally:
        del sys.modules["torch"]
        if before is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = before


def _died(code: int) -> str:
    if code >= 0:
        return f"the engine's process ended with exit code {code}; its own messages are on stderr"
    hint = "; the system may be out of memory" if -code == signal.SIGKILL else ""
    names = {number.value: number.name for number in signal.Signals}
    return (
        f"the engine's process was killed by {names.get(-code, f'signal {-code}')} (exit code {code}){hint}"
    )


class _Gone(Exception):
    """The pipe ended before the child said that it ends."""


class RemoteTraceback(Exception):
    """Where an error came from in the engine's process, as the cause of the error here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"in the engine's process:\n{self.text}"


def _rebuilt(error: BaseException | None, where: str | None) -> BaseException | None:
    if error is not None and where is not None:
        error.__cause__ = RemoteTraceback(where)
    return error
