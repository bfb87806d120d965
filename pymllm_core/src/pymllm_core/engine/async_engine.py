"""The seam between asyncio and the engine: requests in, streams of deltas out, wherever the engine runs."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # a class of its own before Python 3.11
from typing import TYPE_CHECKING, Literal

from pymllm_core.config import Settings
from pymllm_core.device import cuda_is_likely
from pymllm_core.engine.loop import EngineHost, EngineLoop, Listener, Load, load_engine
from pymllm_core.engine.process import EngineProcess
from pymllm_core.engine.status import Cancelled, EngineStats, Progress, StageTimes
from pymllm_core.engine.stream import Stream
from pymllm_core.errors import EngineError, QueueFullError, RequestError
from pymllm_core.output import Delta, Usage
from pymllm_core.request import Request

if TYPE_CHECKING:
    from pymllm_core.engine.processor import Processor
    from pymllm_core.plan import Plan

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "failed", "stopped"]
_FLUSH_S = 10.0


def has_own_process(settings: Settings) -> bool:
    """Whether the engine gets a process of its own: as the settings say, else where there is a CUDA device.

    On a CPU the interpreter's lock costs little beside a step, and a second process a hundred megabytes.
    """
    server = settings.server
    if server.engine_process == "auto":
        return server.device == "cuda" or (server.device == "auto" and cuda_is_likely())
    return server.engine_process == "on"


class AsyncEngine:
    """Runs an `Engine` elsewhere, on a thread or in a process. Public methods may be called from any thread.

    load: makes the engine. began: since when the start is timed (`time.monotonic`), None: since now.
    """

    def __init__(self, settings: Settings, load: Load = load_engine, *, began: float | None = None) -> None:
        # Both have the same commands, and both tell this object what comes of them (`loop.Listener`).
        host: Callable[[Settings, Listener, Load], EngineHost]
        host = EngineProcess if has_own_process(settings) else EngineLoop
        self._host = host(settings, self, load)
        self._lock = threading.Lock()
        self._begun = False
        self._streams: dict[str, Stream] = {}
        self._flushes: deque[Future[bool]] = deque()
        self._loaded = threading.Event()
        self._times = StageTimes(began)
        self._plan: Plan | None = None
        self._processor: Processor | None = None
        self._stats = EngineStats()
        self._last_news = time.monotonic()
        self.state: State = "loading"
        self.progress = Progress("starting")
        self.error: BaseException | None = None

    # -- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin loading; returns at once. Without effect where it has begun."""
        with self._lock:
            begun, self._begun = self._begun, True
        if not begun:
            self._host.start()

    async def wait_ready(self) -> None:
        """Until the engine serves; raises what loading raised."""
        await asyncio.get_running_loop().run_in_executor(None, self._loaded.wait)
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Abort everything, also loading, and wait for the engine's end."""
        self._host.stop()

    # -- requests ---------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Known as soon as it is made, before the weights are loaded."""
        if self._plan is None:
            raise self._unavailable()
        return self._plan

    @property
    def processor(self) -> Processor:
        if self._processor is None or self.state != "ready":
            raise self._unavailable()
        return self._processor

    def submit(self, request: Request) -> Stream:
        """Queue a request. Raises RequestError, QueueFullError or EngineError at once."""
        processor, plan = self.processor, self.plan
        plan.check(request)
        # Only stop strings need the text where the tokens are made.
        detokenizer = processor.detokenizer(request)
        if request.params.stop:
            detokenizer = None
        else:
            request = dataclasses.replace(request, detokenize=False)
        stream = Stream(request.id, self.abort, detokenizer)
        limits = plan.limits
        with self._lock:
            # Under the lock that `ended` takes: a stream is either ended by it or refused here.
            if self.state != "ready":
                raise self._unavailable()
            waiting = len(self._streams) - limits.max_running_requests
            if limits.max_queued_requests is not None and waiting >= limits.max_queued_requests:
                raise QueueFullError(
                    f"{waiting} requests are waiting, and max_queued_requests is "
                    f"{limits.max_queued_requests}; retry later",
                    code="queue_full",
                )
            if request.id in self._streams:
                raise RequestError(f"a request with id {request.id!r} is running already", param="rid")
            if not self._streams:
                # An idle engine has not stalled: its next step is due from now on.
                self._last_news = time.monotonic()
            self._streams[request.id] = stream
            try:
                self._host.add(request)
            except BaseException:  # an argument that cannot be sent
                del self._streams[request.id]
                raise
        return stream

    def abort(self, request_id: str) -> bool:
        """End a request; its stream gets a last delta. False where there is none of this id."""
        if request_id not in self._streams:
            return False
        self._host.abort(request_id)
        return True

    def flush_cache(self) -> bool:
        """Forget cached prefixes; False while requests run."""
        with self._lock:
            if self.state != "ready":
                raise self._unavailable()
            if self._streams:
                return False
            answer: Future[bool] = Future()
            self._flushes.append(answer)
            self._host.flush_cache()
        try:
            return answer.result(_FLUSH_S)
        except FutureTimeoutError:
            return False

    def stats(self) -> EngineStats:
        """As of the last news; what was submitted since then is waiting."""
        stats = self._stats
        waiting = max(len(self._streams) - stats.running, 0)
        age = time.monotonic() - self._last_news
        return dataclasses.replace(stats, waiting=waiting, last_step_age_s=age)

    # -- told by the host, on a thread of its own -------------------------------------------------

    def loading(self, progress: Progress) -> None:
        self.progress = progress
        self._times(progress)

    def planned(self, plan: Plan) -> None:
        self._plan = plan

    def ready(self, processor: Processor) -> None:
        self._processor = processor
        logger.info("ready in %s", self._times.finish())
        self.state = "ready"
        self._loaded.set()

    def news(self, deltas: list[Delta], stats: EngineStats) -> None:
        self._stats = stats
        self._last_news = time.monotonic()
        received = []
        for delta in deltas:
            finished = delta.finish_reason is not None
            stream = (
                self._streams.pop(delta.request_id, None) if finished else self._streams.get(delta.request_id)
            )
            if stream is not None:
                received.append((stream, delta))
        Stream.put(received)

    def flushed(self, done: bool) -> None:
        self._flushes.popleft().set_result(done)

    def ended(self, error: BaseException | None) -> None:
        stopped = error is None or isinstance(error, Cancelled)
        if error is None and not self._loaded.is_set():
            error = Cancelled("the engine was stopped")
        message = str(error) if error is not None else "the engine was stopped"
        if not stopped and self._loaded.is_set():  # how loading ended is said by whoever waits for it
            logger.error("the engine failed: %s", message)
        with self._lock:
            self.error = error
            self.state = "stopped" if stopped else "failed"
            left = [*self._streams]
            flushes = [*self._flushes]
        self._loaded.set()
        for answer in flushes:
            answer.set_result(False)
        reason: Literal["abort", "error"] = "abort" if stopped else "error"
        usage = Usage(0, 0)
        self.news(
            [Delta(name, "", (), usage, finish_reason=reason, error=message) for name in left],
            dataclasses.replace(self._stats, running=0, waiting=0),
        )

    def _unavailable(self) -> EngineError:
        if self.state == "failed":
            return EngineError(f"the engine failed: {self.error}")
        return EngineError(f"the engine is {self.state} ({self.progress.stage})")
