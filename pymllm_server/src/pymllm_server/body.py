"""Request bodies: JSON in UTF-8, of bounded size and depth. Everything else is refused here, by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pymllm_server.errors import CLIENT_LEFT, ApiError, from_validation

MAX_DEPTH = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(body: bytes) -> Any:
    """Strict JSON. Raises ApiError (400) that says what is wrong, without repeating the body."""
    if not body:
        raise ApiError(400, "the body is empty; send a JSON object")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}", code="invalid_utf8") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        message = f"the body is not valid JSON: {error.msg} ({where})"
        raise ApiError(400, message, code="invalid_json") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        # An integer of thousands of digits, which Python refuses to convert.
        raise ApiError(400, f"the body is not usable: {error}", code="invalid_json") from None
    # The number of openers bounds the depth, and is counted at memory speed.
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    if _SURROGATE.search(body):
        _check_surrogates(value)
    return value


def _refuse_constant(name: str) -> Any:
    raise ApiError(400, f"the body is not valid JSON: {name} is no JSON number", code="invalid_json")


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")


def _check_depth(value: Any) -> None:
    """Walk level by level, so that the check itself needs no recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _check_surrogates(value: Any) -> None:
    """Half a surrogate pair can be escaped in JSON, yet is no character and no tokenizer takes it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        message = "the body has an unpaired surrogate (\\ud800 to \\udfff), which is no character"
        raise ApiError(400, message, code="invalid_utf8") from None


class _JsonRequest(Request):
    async def json(self) -> Any:
        return parse_json(await self.body())


class JsonRoute(APIRoute):
    """A route whose body goes through `parse_json`.

    Other content types are refused: a browser sends those across origins without asking the server first,
    so that any web page could drive a server on the visitor's loopback.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def json_handler(request: Request) -> Response:
            if self.body_field is not None:
                _require_json(request)
            return await handler(_JsonRequest(request.scope, request.receive))

        return json_handler


class BodyRoute(JsonRoute):
    """A route of a function (body, request), which is called with the validated body and nothing between.

    What FastAPI would do for dependencies, forms and responses of other kinds took a tenth of a request's time. So
    dependencies are refused; those of `include_router` and of the app cannot be seen here, and must not be given.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        if self.dependant.dependencies:
            raise TypeError(f"{self.path}: the dependencies of a BodyRoute would not be called")
        endpoint = self.endpoint
        # As FastAPI validates, for the same messages.
        validate = TypeAdapter(get_type_hints(endpoint)["body"]).validate_python

        async def handler(request: Request) -> Response:
            _require_json(request)
            try:
                value = parse_json(await request.body())
                body = validate(value, from_attributes=True)
            except ClientDisconnect:
                return Response(status_code=CLIENT_LEFT)
            except ValidationError as error:
                raise from_validation(error.errors(include_url=False, include_input=False)) from None
            answer: Response = await endpoint(body, request)
            return answer

        return handler


def _require_json(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        found = f"found {kind[:80]!r}" if kind else "found none"
        raise ApiError(415, f"send the header Content-Type: application/json ({found})")
