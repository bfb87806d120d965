"""The server under uvicorn: how it is set up, and how it ends."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from fastapi import FastAPI

from pymllm_server.protocol import HttpProtocol
from pymllm_server.state import ServerState

DRAIN_S = 2.0
"""How long requests in flight may go on once the server was told to stop."""
CLOSE_S = 3
"""How long the connections may take to close after `DRAIN_S`; then they are cut."""


class Server(uvicorn.Server):
    """Uvicorn, which on the first signal lets requests end, then aborts them; a second ends at once."""

    def __init__(self, app: FastAPI) -> None:
        config = uvicorn.Config(
            app,
            http=HttpProtocol,
            loop="uvloop",
            log_config=None,
            access_log=False,
            ws="none",
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=int(DRAIN_S) + CLOSE_S,
        )
        super().__init__(config)
        self._state: ServerState = app.state.server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn waits for the connections here; the drain, beside it, makes them end."""
        drain = asyncio.create_task(self._state.drain(DRAIN_S))
        try:
            await super().shutdown(sockets)
        finally:
            drain.cancel()
