"""What the routes share: the engine, the settings, the requests in flight, whether the server is closing."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from pymllm_core.config import Settings
from pymllm_core.output import Delta
from pymllm_server.errors import ApiError
from pymllm_server.interface import Engine
from pymllm_server.metrics import Metrics

if TYPE_CHECKING:
    from pymllm_server.generation import Generation

logger = logging.getLogger(__name__)

STOP_S = 5.0
"""How long the engine may take to stop."""
STOP_LOADING_S = 0.5
"""The same while it loads: nothing can be lost then, and an import of seconds cannot be interrupted."""
STALLED_S = 30.0
"""An engine that makes no step for so long, while work waits, is not healthy."""


class ServerState:
    """One per app."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.created = int(time.time())
        self.in_flight: dict[str, Generation] = {}
        self.metrics = Metrics(engine) if settings.server.enable_metrics else None
        self.closing = False
        self._stopping: threading.Thread | None = None

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        return self.settings.server.public_name

    def progress(self) -> dict[str, Any]:
        """The engine's state as /health reports it."""
        state = self.engine.state
        body: dict[str, Any] = {"state": "closing" if self.closing else state}
        if state == "loading":
            now = self.engine.progress
            body["progress"] = {
                "stage": now.stage,
                "done": now.done,
                "total": now.total,
                "fraction": round(now.fraction, 4),
            }
        if state == "failed" and self.engine.error is not None:
            body["reason"] = str(self.engine.error)
        if state == "ready":
            stats = self.engine.stats()
            age = stats.last_step_age_s
            work = stats.running + stats.waiting
            if work and age > STALLED_S:
                body["state"] = "stalled"
                body["reason"] = f"no step for {age:.0f} s while {work} requests wait"
        return body

    def require_ready(self) -> None:
        """Raise ApiError (503) with the progress where requests cannot be taken."""
        if self.engine.state == "ready" and not self.closing:
            return
        now = self.progress()
        match now["state"]:
            case "loading":
                progress = now["progress"]
                message = f"the model is loading: {progress['stage']}, {progress['fraction']:.0%}"
                raise ApiError(503, message, code="model_loading", headers={"Retry-After": "1"}, extra=now)
            case "failed":
                message = "the model could not be loaded, or its engine failed"
                raise ApiError(503, message, code="engine_failed")
            case _:
                raise ApiError(503, "the server is shutting down", code="shutting_down")

    def require_model(self, name: str) -> None:
        """Raise ApiError (404) unless `name` is the served model; ``default`` always is."""
        if name not in ("default", self.model_name):
            message = f"the model {name[:200]!r} does not exist here; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def finished(self, delta: Delta) -> None:
        """Account for a request that ended."""
        if self.metrics:
            self.metrics.observe(delta)
        timings = delta.timings
        if self.settings.server.show_time_cost and timings:
            usage = delta.usage
            rate = max(0, usage.completion_tokens - 1) / timings.decode_s if timings.decode_s > 0 else 0.0
            logger.info(
                "request %s: %d prompt tokens (%d cached), %d generated, queue %.1f ms, prefill %.1f ms, "
                "decode %.1f ms, %.1f tokens/s, %s",
                delta.request_id,
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens,
                1000 * timings.queue_s,
                1000 * timings.prefill_s,
                1000 * timings.decode_s,
                rate,
                delta.finish_reason,
            )

    async def drain(self, seconds: float) -> None:
        """Take no more requests, give those in flight `seconds` to end, then abort them."""
        self.closing = True
        deadline = time.monotonic() + seconds
        while self.in_flight and time.monotonic() < deadline:  # noqa: ASYNC110, as new ones may still start
            await asyncio.sleep(0.05)
        if self.in_flight:
            logger.warning("aborting %d requests in flight", len(self.in_flight))
        for generation in list(self.in_flight.values()):
            generation.abort()

    def stop_engine(self) -> bool:
        """Stop the engine; False where it did not stop in time, so that exiting does not depend on it.

        Called again, this tells whether it has stopped by then.
        """
        if self._stopping is None:
            seconds = STOP_LOADING_S if self.engine.state == "loading" else STOP_S
            self._stopping = threading.Thread(target=self.engine.stop, name="pymllm-stop", daemon=True)
            self._stopping.start()
            self._stopping.join(seconds)
        return not self._stopping.is_alive()


def server_state(http: Request) -> ServerState:
    """The state of the app that a request came to."""
    state: ServerState = http.app.state.server
    return state


async def state_of(http: Request) -> ServerState:
    """The same as a dependency. FastAPI would run a plain function on a thread, for every request."""
    return server_state(http)
