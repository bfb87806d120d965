"""The demo model behind the real server, asked by the official client; and the commands of the README."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from pymllm_core import LLM, SamplingParams

QUESTION = [{"role": "user", "content": "你好,只回复:ok"}]


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[OpenAI]:
    with (
        httpx.Client(trust_env=False) as http,
        OpenAI(base_url=f"{served.url}/v1", api_key="none", http_client=http, max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def answer(client: OpenAI) -> str:
    """The greedy answer to the question."""
    chat = client.chat.completions.create(
        model="default", messages=QUESTION, max_tokens=8, temperature=0.0, stream=False
    )  # type: ignore[call-overload]
    assert chat.choices[0].finish_reason in ("stop", "length")
    assert 1 <= chat.usage.completion_tokens <= 8
    return str(chat.choices[0].message.content)


def test_request_of_the_manual(served: Any, answer: str) -> None:
    body = {"model": "default", "messages": QUESTION, "max_tokens": 8, "temperature": 0.0, "stream": False}
    request = urllib.request.Request(
        f"{served.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        chat = json.load(response)
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"]["content"] == answer == "ok"


def test_stream_gives_the_same_text(client: OpenAI, answer: str) -> None:
    stream = client.chat.completions.create(
        model="default", messages=QUESTION, max_tokens=8, temperature=0.0, stream=True
    )  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == answer


def test_the_model_is_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


def test_in_process_gives_the_same_text(answer: str) -> None:
    with LLM("demo") as llm:
        params = SamplingParams(max_tokens=8, temperature=0.0)
        assert llm.chat(QUESTION, params).text == answer


@pytest.mark.parametrize("arguments", [["plugins", "--strict"], ["plan", "demo"], ["version"]])
def test_command(arguments: list[str], tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("pymllm")), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
