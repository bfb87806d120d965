"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` with the right status."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from pymllm_core.errors import EngineError, QueueFullError, RequestError

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""nginx's status for a client that closed the connection; only the log sees it."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}


class ApiError(HTTPException):
    """An error for the client. extra: members of the answer beside ``error``.

    A subclass of HTTPException, because FastAPI lets only those pass while it reads a body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message = message
        self.param = param
        self.code = code
        self.extra = dict(extra or {})

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        default = "server_error" if self.status_code >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status_code, default),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error, **self.extra}

    def response(self) -> Response:
        """The whole answer."""
        body = json.dumps(self.body()).encode()
        return Response(body, self.status_code, self.headers, media_type="application/json")


def to_api_error(error: BaseException) -> ApiError:
    """The one mapping from exceptions to answers. What nobody foresaw is logged here, and told as a 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        code = error.code or "queue_full"
        return ApiError(429, str(error), code=code, headers={"Retry-After": "1"})
    if isinstance(error, RequestError):
        return ApiError(error.status, str(error), param=error.param, code=error.code)
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, RequestValidationError):
        return from_validation(error.errors())
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, _plain(error), headers=error.headers)
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")


def _plain(error: HTTPException) -> str:
    if error.status_code == 404:
        return "no such route; see /docs for those that exist"
    if error.status_code == 405:
        return "this route does not take this method; see /docs"
    return str(error.detail)


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The deepest complaint, because a union reports each of its branches. Never repeats the input."""
    chosen = max(errors, key=lambda item: len(item["loc"]))
    where = [str(part) for part in chosen["loc"] if not _is_branch(str(part))]
    if where[:1] == ["body"]:
        where = where[1:]
    param = ".".join(where) or None
    message = str(chosen["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param or 'the body'}: {message}", param=param)


def _is_branch(part: str) -> bool:
    """Whether pydantic names a union's branch rather than a field."""
    return "[" in part or part in {"str", "int", "float", "bool", "dict", "list"}


async def _handle(request: Request, error: Exception) -> Response:
    return to_api_error(error).response()


def install(app: FastAPI) -> None:
    """Give every error of `app` the same shape, FastAPI's 422 as a 400."""
    for kind in (HTTPException, RequestValidationError, RequestError, EngineError):
        app.add_exception_handler(kind, _handle)
