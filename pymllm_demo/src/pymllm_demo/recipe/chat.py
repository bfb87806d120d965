"""Rendering through the model's own chat template, which stays the only statement of the format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from pymllm_demo.recipe.dialogue import Dialogue, Message, Tool

MODEL = Path(__file__).parents[1] / "model"
TEMPLATE = MODEL / "chat_template.jinja"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _tojson
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _tojson(value: Any) -> str:
    """What transformers puts in the place of Jinja's filter, which would escape HTML."""
    return json.dumps(value, ensure_ascii=False)


def render(messages: Sequence[Message], tools: Sequence[Tool] = (), enable_thinking: bool = False) -> str:
    """The prompt up to where the assistant is to write."""
    return _template().render(
        messages=messages,
        tools=list(tools) or None,
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
    )


def prompt(dialogue: Dialogue) -> str:
    return render(dialogue.messages, dialogue.tools, dialogue.enable_thinking)
