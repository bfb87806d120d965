"""The FastAPI app: routes, middleware, and the engine's life around them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from pymllm_core.config import Settings
from pymllm_core.errors import EngineError, PymllmError
from pymllm_server import __version__, admin, chat, completions, errors, generate, health, models
from pymllm_server.fields import IGNORED_HEADER
from pymllm_server.interface import Engine
from pymllm_server.middleware import BearerAuth, BodyLimit, RequestContext
from pymllm_server.state import ServerState

logger = logging.getLogger(__name__)

REPORT_S = 5.0
"""How often the log reports progress within one stage of loading."""


def create_app(
    engine: Engine,
    settings: Settings,
    *,
    on_ready: Callable[[], None] | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """An app that starts `engine` when it starts, and stops it when it stops.

    It answers at once, with 503 and the progress while the model loads. on_ready is called once it is loaded,
    on_failure where loading failed; without it the app stays, and answers 503.
    """
    state = ServerState(engine, settings)
    server = settings.server

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        loading = asyncio.create_task(_watch_loading(state, on_ready, on_failure))
        try:
            yield
        finally:
            state.closing = True
            loading.cancel()
            await asyncio.to_thread(state.stop_engine)

    app = FastAPI(title="pymllm", version=__version__, lifespan=lifespan)
    app.state.server = state
    errors.install(app)
    for module in (chat, completions, generate, models, health, admin):
        app.include_router(module.router)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit)
    app.add_middleware(BearerAuth, api_key=server.api_key, admin_api_key=server.admin_api_key)
    app.add_middleware(RequestContext, root_path=server.fastapi_root_path)
    if server.cors_allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(server.cors_allow_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", IGNORED_HEADER],
        )
    return app


def base_url(host: str, port: int) -> str:
    """The URL of a listening address, with IPv6 in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _watch_loading(
    state: ServerState,
    on_ready: Callable[[], None] | None,
    on_failure: Callable[[BaseException], None] | None,
) -> None:
    """Log progress (each stage, and every few seconds within a long one) and how loading ended.

    Polls rather than waits: a wait would occupy a thread, for which the event loop waits when it closes,
    so that a hanging load could keep an interrupted server alive.
    """
    engine = state.engine
    stage, logged = "", 0.0
    while engine.state == "loading":
        now = engine.progress
        if now.stage and (now.stage != stage or time.monotonic() - logged > REPORT_S):
            stage, logged = now.stage, time.monotonic()
            logger.info("%s%s", now.stage, f": {now.fraction:.0%}" if now.total else "")
        await asyncio.sleep(0.05)
    server = state.settings.server
    if engine.state == "ready":
        if on_ready:
            on_ready()
        logger.info("ready: %s model %s", base_url(server.host, server.port), state.model_name)
    elif engine.state == "failed" and not state.closing:
        error = engine.error or EngineError("the engine gave no reason")
        # Our own errors explain themselves; a traceback would hide their message.
        detail = None if isinstance(error, PymllmError) else error
        logger.log(logging.ERROR, "loading failed: %s", error, exc_info=detail)
        if on_failure:
            on_failure(error)
