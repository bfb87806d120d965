"""The engine's loop: loads, takes commands, steps, and tells one listener what comes of it.

The same in a thread of the server's process and in a process of its own (`process`): commands are method calls,
and so is the news.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from pymllm_core.config import Settings
from pymllm_core.device import cuda_is_likely, open_cuda
from pymllm_core.engine.status import Cancelled, EngineStats, Progress, ProgressCallback
from pymllm_core.errors import RequestError
from pymllm_core.output import Delta, Usage
from pymllm_core.request import Request

if TYPE_CHECKING:
    from pymllm_core.engine.engine import Engine
    from pymllm_core.engine.processor import Processor
    from pymllm_core.plan import Plan

logger = logging.getLogger(__name__)

QUIET_S = 0.2
"""An engine without work for so long has the time to prepare steps; less lies between two crowds of requests."""


class Listener(Protocol):
    """Who is told; on the engine's thread, or the one that reads from its process."""

    def loading(self, progress: Progress) -> None:
        """Loading goes on."""

    def planned(self, plan: Plan) -> None:
        """The plan is made; the weights come next."""

    def ready(self, processor: Processor) -> None:
        """Requests are taken from now on."""

    def news(self, deltas: list[Delta], stats: EngineStats) -> None:
        """A step, or a command, is done; deltas may be empty."""

    def flushed(self, done: bool) -> None:
        """The answer to one `flush_cache`, in order."""

    def ended(self, error: BaseException | None) -> None:
        """The last of all. error: why loading or running failed, `Cancelled` where loading was stopped."""


class EngineHost(Protocol):
    """Where the engine runs. Any thread may call; all but `stop` return at once."""

    def start(self) -> None:
        """Begin loading."""

    def add(self, request: Request) -> None:
        """Queue a request."""

    def abort(self, request_id: str) -> None:
        """End a request if it runs."""

    def flush_cache(self) -> None:
        """Forget cached prefixes."""

    def stop(self) -> bool:
        """End everything, also loading, and wait for it; whether it ended."""


Load = Callable[[Settings, ProgressCallback, "Callable[[Plan], None]", threading.Event], "Engine"]
"""Makes an engine: (settings, progress, planned, cancel). Raises what `progress` raises, and `Cancelled`."""


def load_engine(
    settings: Settings, progress: ProgressCallback, planned: Callable[[Plan], None], cancel: threading.Event
) -> Engine:
    """The engine that the settings and the installed plugins give."""
    # Importing torch takes seconds, during which a server answers already, and the driver can make its context.
    if settings.server.device != "cpu" and cuda_is_likely():
        threading.Thread(target=open_cuda, args=(settings.server.base_gpu_id,), daemon=True).start()
    progress(Progress("importing torch"))
    from pymllm_core.engine.build import assemble, build_engine

    progress(Progress("choosing plugins"))
    assembly = assemble(settings, progress=lambda *step: progress(Progress(*step)), weights=True)
    planned(assembly.plan)
    for note in assembly.plan.notes:
        logger.warning("%s", note)
    return build_engine(assembly, progress=progress, cancel=cancel)


class EngineLoop:
    """An `EngineHost` on a thread of this process."""

    def __init__(self, settings: Settings, listener: Listener, load: Load = load_engine) -> None:
        self._settings = settings
        self._listener = listener
        self._load = load
        self._thread = threading.Thread(target=self._main, name="pymllm-engine", daemon=True)
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[Engine], list[Delta]]] = deque()
        self._cancel = threading.Event()
        self._warms_up = True
        self.engine: Engine | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """End everything, also loading, and wait; whether the thread has ended (by then)."""
        self._cancel.set()
        with self._wake:
            self._wake.notify()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def add(self, request: Request) -> None:
        self._post(lambda engine: _add(engine, request))

    def abort(self, request_id: str) -> None:
        def abort(engine: Engine) -> list[Delta]:
            last = engine.abort(request_id)
            return [] if last is None else [last]

        self._post(abort)

    def flush_cache(self) -> None:
        def flush(engine: Engine) -> list[Delta]:
            self._listener.flushed(engine.flush_cache())
            return []

        self._post(flush)

    def _post(self, command: Callable[[Engine], list[Delta]]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    # -- the thread -------------------------------------------------------------------------------

    def _main(self) -> None:
        failure: BaseException | None = None
        try:
            self.engine = self._load(self._settings, self._report, self._listener.planned, self._cancel)
            self._listener.ready(self.engine.processor)
            self._serve(self.engine)
        except BaseException as error:
            failure = error
            if not isinstance(error, Cancelled):
                logger.debug("the engine failed", exc_info=error)
        finally:
            self.engine = None
            self._listener.ended(failure)

    def _report(self, progress: Progress) -> None:
        self._listener.loading(progress)
        if self._cancel.is_set():
            raise Cancelled("loading was interrupted")

    def _await_commands(self, engine: Engine) -> None:
        """Until there is something to do."""
        quiet = False
        while not self._cancel.is_set():
            with self._wake:
                if self._inbox or engine.has_work or self._cancel.is_set():
                    return
                if not (self._warms_up and quiet):
                    quiet = not self._wake.wait(QUIET_S if self._warms_up else None)
                    continue
            self._warm_up(engine)

    def _warm_up(self, engine: Engine) -> None:
        try:
            self._warms_up = engine.warm_up()
        except Exception:
            self._warms_up = False
            logger.exception("a step could not be prepared beforehand; it is prepared when it comes")

    def _serve(self, engine: Engine) -> None:
        while not self._cancel.is_set():
            self._await_commands(engine)
            deltas: list[Delta] = []
            while self._inbox:
                deltas += self._inbox.popleft()(engine)
            if engine.has_work:
                try:
                    deltas += engine.step()
                except Exception as error:
                    logger.exception("a step failed; its requests end with an error")
                    deltas += engine.fail(error)
            self._listener.news(deltas, engine.stats())


def _add(engine: Engine, request: Request) -> list[Delta]:
    try:
        engine.add(request)
    except RequestError as error:
        usage = Usage(len(request.token_ids), 0)
        return [Delta(request.id, "", (), usage, finish_reason="error", error=str(error))]
    return []
