"""The seam between asyncio and the engine: the engine's own thread, and streams of deltas out of it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pymllm_core.config import Settings
from pymllm_core.engine.status import Cancelled, EngineStats, Progress, StageTimes
from pymllm_core.errors import EngineError, QueueFullError, RequestError
from pymllm_core.output import Delta, Usage
from pymllm_core.request import Request

if TYPE_CHECKING:
    from pymllm_core.engine.engine import Engine
    from pymllm_core.engine.processor import Processor
    from pymllm_core.plan import Plan

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "failed", "stopped"]


class Stream:
    """An asynchronous iterator over one request's deltas; ends after the one with a finish reason.

    Closing it early aborts the request. Belongs to the event loop that submitted the request. A reader that is
    slower than the engine gets what has come meanwhile as one delta.
    """

    def __init__(self, request_id: str, abort: Callable[[str], object]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Delta] = deque()
        self._ready = asyncio.Event()
        self._finished = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        while not self._queue:
            if self._finished:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        delta = Delta.merge(self._queue)
        self._queue.clear()
        self._finished = delta.finish_reason is not None
        return delta

    async def aclose(self) -> None:
        """Abort the request if it has not finished."""
        if not self._finished:
            self._finished = True
            self._queue.clear()
            self._abort(self.request_id)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @staticmethod
    def put(news: list[tuple[Stream, Delta]]) -> None:
        """Hand each stream its delta; from any thread. Each event loop is woken once."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Delta]]] = {}
        for entry in news:
            loops.setdefault(entry[0]._loop, []).append(entry)
        for loop, entries in loops.items():
            # A loop that was closed has nobody left who waits.
            if not loop.is_closed():
                loop.call_soon_threadsafe(Stream._receive, entries)

    @staticmethod
    def _receive(entries: list[tuple[Stream, Delta]]) -> None:
        for stream, delta in entries:
            stream._queue.append(delta)
            stream._ready.set()


class AsyncEngine:
    """Loads and runs an `Engine` on a thread of its own. Public methods may be called from any thread.

    began: since when the start is timed (`time.monotonic`), None: since `start`.
    """

    def __init__(self, settings: Settings, *, began: float | None = None) -> None:
        self._settings = settings
        self._began = began
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[Engine], None]] = deque()
        self._arriving = 0
        self._streams: dict[str, Stream] = {}
        self._cancel = threading.Event()
        self._loaded = threading.Event()
        self._plan: Plan | None = None
        self.state: State = "loading"
        self.progress = Progress("starting")
        self.error: BaseException | None = None

    # -- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin loading; returns at once."""
        self._thread = threading.Thread(target=self._main, name="pymllm-engine", daemon=True)
        self._thread.start()

    async def wait_ready(self) -> None:
        """Until the engine serves; raises what loading raised."""
        await asyncio.get_running_loop().run_in_executor(None, self._loaded.wait)
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Abort everything, also loading, and wait for the thread."""
        self._cancel.set()
        with self._wake:
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # -- requests ---------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Known as soon as it is made, before the weights are loaded."""
        if self._plan is None:
            raise self._unavailable()
        return self._plan

    @property
    def processor(self) -> Processor:
        return self._require().processor

    def submit(self, request: Request) -> Stream:
        """Queue a request. Raises RequestError, QueueFullError or EngineError at once."""
        engine = self._require()
        engine.check(request)
        limits = engine.plan.limits
        stats = engine.stats()
        places = limits.max_running_requests - stats.running
        if (
            limits.max_queued_requests is not None
            and stats.waiting + self._arriving >= limits.max_queued_requests + places
        ):
            raise QueueFullError(
                f"{stats.waiting + self._arriving} requests are waiting, and max_queued_requests is "
                f"{limits.max_queued_requests}; retry later",
                code="queue_full",
            )
        if request.id in self._streams:
            raise RequestError(f"a request with id {request.id!r} is running already", param="rid")
        stream = Stream(request.id, self.abort)
        with self._wake:
            # Under the lock that `_end_streams` takes: a stream is either ended by it or refused here.
            if self.state != "ready":
                raise self._unavailable()
            self._streams[request.id] = stream
            self._arriving += 1
            self._inbox.append(lambda engine: self._add(engine, request))
            self._wake.notify()
        return stream

    def abort(self, request_id: str) -> bool:
        """End a request; its stream gets a last delta. False where there is none of this id."""
        if request_id not in self._streams:
            return False
        self._post(lambda engine: self._deliver_one(engine.abort(request_id)))
        return True

    def flush_cache(self) -> bool:
        """Forget cached prefixes; False while requests run."""
        engine = self._require()
        done: list[bool] = []
        answered = threading.Event()

        def flush(engine: Engine) -> None:
            done.append(engine.flush_cache())
            answered.set()

        if engine.has_work:
            return False
        self._post(flush)
        return answered.wait(timeout=10) and done[0]

    def stats(self) -> EngineStats:
        return EngineStats() if self._engine is None else self._engine.stats()

    # -- the thread -------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._engine = self._load()
            self.state = "ready"
            self._loaded.set()
            self._serve(self._engine)
            self.state = "stopped"
        except BaseException as error:
            self.error = error
            self.state = "stopped" if isinstance(error, Cancelled) else "failed"
            if self.state == "failed":
                logger.debug("the engine failed", exc_info=error)
        finally:
            if self.error is None and self._cancel.is_set() and not self._loaded.is_set():
                self.error = Cancelled("the engine was stopped")
            self._loaded.set()
            self._end_streams()
            self._engine = None

    def _load(self) -> Engine:
        times = StageTimes(self._began)

        def report(progress: Progress) -> None:
            self.progress = progress
            times(progress)
            if self._cancel.is_set():
                raise Cancelled("loading was interrupted")

        # Importing torch takes seconds, during which a server answers already.
        report(Progress("importing torch"))
        from pymllm_core.engine.build import assemble, build_engine

        report(Progress("choosing plugins"))
        assembly = assemble(self._settings, progress=lambda *step: report(Progress(*step)), weights=True)
        self._plan = assembly.plan
        for note in assembly.plan.notes:
            logger.warning("%s", note)
        engine = build_engine(assembly, progress=report, cancel=self._cancel)
        logger.info("ready in %s", times.finish())
        return engine

    def _serve(self, engine: Engine) -> None:
        while not self._cancel.is_set():
            with self._wake:
                while not (self._inbox or engine.has_work or self._cancel.is_set()):
                    self._wake.wait()
            while self._inbox:
                self._inbox.popleft()(engine)
            if not engine.has_work:
                continue
            try:
                deltas = engine.step()
            except Exception as error:
                logger.exception("a step failed; its requests end with an error")
                deltas = engine.fail(error)
            self._deliver(deltas)

    def _add(self, engine: Engine, request: Request) -> None:
        with self._wake:
            self._arriving -= 1
        try:
            engine.add(request)
        except RequestError as error:
            usage = Usage(len(request.token_ids), 0)
            self._deliver_one(Delta(request.id, "", (), usage, finish_reason="error", error=str(error)))

    def _deliver_one(self, delta: Delta | None) -> None:
        if delta is not None:
            self._deliver([delta])

    def _deliver(self, deltas: list[Delta]) -> None:
        news = []
        for delta in deltas:
            finished = delta.finish_reason is not None
            stream = (
                self._streams.pop(delta.request_id, None) if finished else self._streams.get(delta.request_id)
            )
            if stream is not None:
                news.append((stream, delta))
        Stream.put(news)

    def _end_streams(self) -> None:
        reason: Literal["abort", "error"] = "error" if self.state == "failed" else "abort"
        message = str(self.error) if self.error is not None else "the engine was stopped"
        with self._wake:
            for request_id in list(self._streams):
                self._deliver_one(Delta(request_id, "", (), Usage(0, 0), finish_reason=reason, error=message))

    def _post(self, command: Callable[[Engine], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _require(self) -> Engine:
        engine = self._engine
        if engine is None or self.state != "ready":
            raise self._unavailable()
        return engine

    def _unavailable(self) -> EngineError:
        if self.state == "failed":
            return EngineError(f"the engine failed: {self.error}")
        return EngineError(f"the engine is {self.state} ({self.progress.stage})")
