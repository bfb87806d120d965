"""A chat's messages and tools, from the wire to what chat templates read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pymllm_server.errors import ApiError
from pymllm_server.schemas import Message

_MEDIA = {"image_url": "images", "input_audio": "audio", "video_url": "video", "file": "files"}


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates know them: texts joined, ``developer`` as ``system``, arguments as objects."""
    return [_message(message, f"messages.{index}") for index, message in enumerate(messages)]


def _message(message: Message, where: str) -> dict[str, Any]:
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise ApiError(400, f"{where}.content is missing", param=f"{where}.content")
    role = "system" if message.role == "developer" else message.role
    result: dict[str, Any] = {"role": role, "content": _text(message.content, f"{where}.content")}
    if message.name is not None:
        result["name"] = message.name
    reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    if message.role == "assistant":
        if reasoning is not None:
            result["reasoning_content"] = reasoning
        if message.tool_calls:
            calls = enumerate(message.tool_calls)
            result["tool_calls"] = [_call(call, f"{where}.tool_calls.{index}") for index, call in calls]
    elif message.tool_calls:
        raise ApiError(
            400, f"{where}: only an assistant's message has tool_calls", param=f"{where}.tool_calls"
        )
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    return result


def _text(content: str | list[dict[str, Any]] | None, where: str) -> str:
    if not isinstance(content, list):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type")
        path = f"{where}.{index}"
        if kind in ("text", "refusal"):
            text = part.get(kind)
            if not isinstance(text, str):
                raise ApiError(400, f"{path}.{kind} must be a string", param=f"{path}.{kind}")
            texts.append(text)
        elif kind in _MEDIA:
            message = f"{path}: this model takes no {_MEDIA[kind]}, only text"
            raise ApiError(400, message, param=path, code="unsupported_content")
        else:
            message = f'{path}.type must be "text", got {str(kind)[:40]!r}'
            raise ApiError(400, message, param=f"{path}.type")
    return "".join(texts)


def _function(item: dict[str, Any], where: str) -> dict[str, Any]:
    if item.get("type", "function") != "function":
        raise ApiError(400, f'{where}.type must be "function"', param=f"{where}.type")
    function = item.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ApiError(400, f"{where}.function needs a name", param=f"{where}.function.name")
    return function


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = _function(call, where)
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        # Some templates iterate over the arguments. What the model wrote as no valid object stays text:
        # refusing it would end the conversation for the model's mistake.
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    elif not isinstance(arguments, dict):
        raise ApiError(
            400, f"{where}.function.arguments must be a string", param=f"{where}.function.arguments"
        )
    result = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        result["id"] = call["id"]
    return result


def template_tools(
    tools: Sequence[dict[str, Any]] | None, tool_choice: str | dict[str, Any] | None
) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """The tools for the template, None for no tools, and the fields of theirs that are ignored."""
    if isinstance(tool_choice, dict) or tool_choice == "required":
        message = 'tool_choice: a call cannot be enforced until answers can be bound to a grammar; use "auto"'
        raise ApiError(400, message, param="tool_choice", code="unsupported_parameter")
    if tool_choice not in (None, "auto", "none"):
        raise ApiError(400, 'tool_choice must be "auto" or "none"', param="tool_choice")
    ignored = []
    result = []
    for index, tool in enumerate(tools or ()):
        function = _function(tool, f"tools.{index}")
        if function.get("strict"):
            ignored.append(f"tools.{index}.function.strict")
        if not isinstance(function.get("parameters", {}), dict):
            where = f"tools.{index}.function.parameters"
            raise ApiError(400, f"{where} must be a JSON schema", param=where)
        kept = {name: value for name, value in function.items() if name != "strict"}
        result.append({"type": "function", "function": kept})
    # With "none" the model does not even see the tools, so it cannot call one.
    return (result or None) if tool_choice != "none" else None, ignored
