"""The demo model, whose answers mean something."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from served_program import HI, openai_client


def test_demo_answers_the_manuals_request(demo):
    body = {"model": "default", "messages": HI, "max_tokens": 8, "temperature": 0.0, "stream": False}
    answer = demo.client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"].strip().lower() == "ok"
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_demo_with_curl(demo):
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    body = {"model": "default", "messages": HI, "max_tokens": 8, "temperature": 0.0, "stream": False}
    url = f"{demo.url}/v1/chat/completions"
    command = [
        "curl",
        "-s",
        "--noproxy",
        "*",
        url,
        "-H",
        "Content-Type: application/json",
        "-d",
        json.dumps(body),
    ]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert answer["choices"][0]["message"]["content"].strip().lower() == "ok"


def test_demo_streams_the_same(demo):
    with openai_client(demo) as client:
        stream = client.chat.completions.create(
            model="demo", messages=HI, temperature=0, max_tokens=8, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text.strip().lower() == "ok"


def test_demo_thinks_when_asked(demo):
    kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
    with openai_client(demo) as client:
        messages = [{"role": "user", "content": "What is 2 + 3?"}]
        answer = client.chat.completions.create(
            model="demo", messages=messages, temperature=0, max_tokens=200, extra_body=kwargs
        )
    message = answer.choices[0].message
    assert message.reasoning_content
    assert "<think>" not in message.content
    assert "</think>" not in message.content
