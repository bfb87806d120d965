"""Around every request: its id and access line, the bearer key, the body's limit. Plain ASGI, for speed."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pymllm_server.errors import ApiError, to_api_error

MAX_BODY_BYTES = 8 * 1024 * 1024
"""The largest body. Text fits many times over; images will come with a limit of their own."""
DISCARD_BYTES = 64 * 1024 * 1024
DISCARD_S = 10.0

OPEN_PATHS = frozenset({"/health"})
PROBE_PATHS = frozenset({"/health", "/health_generate", "/metrics"})

access = logging.getLogger("pymllm_server.access")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestContext:
    """Each request's id (the client's ``x-request-id`` or a new one), access line, and last resort."""

    def __init__(self, app: ASGIApp, *, root_path: str = "") -> None:
        self.app = app
        self.root_path = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Here rather than in uvicorn, which would expect proxies to have removed the prefix already.
        scope["root_path"] = self.root_path
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if status:  # too late for another answer
                raise
            await to_api_error(error).response()(scope, receive, send_with_id)
        finally:
            # The path without its query, and never the body: logs hold no prompts.
            milliseconds = 1000 * (time.monotonic() - started)
            client = scope.get("client")
            # Probes come every few seconds, and would bury everything else; the state itself is logged as it changes.
            quiet = _route_path(scope) in PROBE_PATHS and status in (200, 503)
            level = logging.DEBUG if quiet else logging.INFO
            access.log(
                level,
                "%s %s %s %s %.0f ms %s",
                client[0] if client else "-",
                scope["method"],
                _printable(scope["path"]),
                status or "closed",
                milliseconds,
                request_id,
            )


def _printable(path: str) -> str:
    """A path that cannot forge a line of the log."""
    return path if path.isprintable() else ascii(path)


class BearerAuth:
    """Asks for a key where one is set, and notes in ``state.is_admin`` whether it allows administration.

    Either key opens the API; where an administrator's key is set, it alone allows administration.
    /health stays open, because load balancers and container probes carry no keys.
    """

    def __init__(self, app: ASGIApp, *, api_key: SecretStr | None, admin_api_key: SecretStr | None) -> None:
        self.app = app
        self.admin = admin_api_key.get_secret_value().encode() if admin_api_key else None
        user = api_key.get_secret_value().encode() if api_key else None
        self.keys = [key for key in (user, self.admin) if key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
            given = token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
            scope.setdefault("state", {})["is_admin"] = not self.admin or _matches(given, [self.admin])
            if self.keys and _route_path(scope) not in OPEN_PATHS and not _matches(given, self.keys):
                message = "send a valid key as the header Authorization: Bearer KEY"
                headers = {"WWW-Authenticate": "Bearer"}
                refusal = ApiError(401, message, code="invalid_api_key", headers=headers)
                await refusal.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _route_path(scope: Scope) -> str:
    """The path as routes know it, without the prefix of a reverse proxy."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _matches(given: bytes, keys: Iterable[bytes]) -> bool:
    """Compare with every key in constant time, so that timing tells neither a key nor which one it was."""
    results = [hmac.compare_digest(given, key) for key in keys]
    return any(results)


class BodyLimit:
    """Answers 413 to a body over the limit, by its declared length or by counting."""

    def __init__(self, app: ASGIApp, *, limit: int = MAX_BODY_BYTES) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > self.limit:
            if "expect" not in headers:  # else the client waits for leave to send, and gets none
                await _discard(receive)
            await self._too_large().response()(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                await _discard(receive)
                raise self._too_large()
            return message

        await self.app(scope, counted, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.limit} bytes", code="body_too_large")


async def _discard(receive: Callable[[], Awaitable[Any]]) -> None:
    """Read some more: a client that is still sending when the connection closes never sees the answer."""
    with contextlib.suppress(TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
        await asyncio.wait_for(_read(receive, DISCARD_BYTES), DISCARD_S)


async def _read(receive: Callable[[], Awaitable[Any]], most: int) -> None:
    while most > 0:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            return
        most -= len(message.get("body", b""))
