"""The tiny model's server through real clients: answers, aborts, bad input, metrics."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import openai
import pytest
from served_program import HI, openai_client


def greedy(n=12):
    return {
        "model": "default",
        "messages": HI,
        "temperature": 0,
        "max_tokens": n,
        "extra_body": {"ignore_eos": True},
    }


def test_stream_and_whole_agree(either):
    with openai_client(either) as client:
        whole = client.chat.completions.create(**greedy())
        chunks = list(
            client.chat.completions.create(**greedy(), stream=True, stream_options={"include_usage": True})
        )
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert content == (whole.choices[0].message.content or "")
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens == 12
    assert whole.usage.prompt_tokens == chunks[-1].usage.prompt_tokens
    assert either.client.get("/v1/models").json()["data"][0]["id"] == "tiny"


def test_async_client_concurrently(either):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{either.url}/v1", api_key="x", max_retries=0) as client:
            calls = [client.chat.completions.create(**greedy(4 + index)) for index in range(8)]
            return await asyncio.gather(*calls)

    counts = [answer.usage.completion_tokens for answer in asyncio.run(main())]
    assert counts == [4, 5, 6, 7, 8, 9, 10, 11]


def test_completions_logprobs_n_and_generate(either):
    with openai_client(either) as client:
        answer = client.completions.create(
            model="tiny", prompt=["one two", "three"], n=2, seed=3, max_tokens=5, logprobs=2
        )
    assert len(answer.choices) == 4
    for choice in answer.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) <= 5
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)
    body = {
        "input_ids": [1, 2, 3],
        "sampling_params": {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True},
    }
    generated = either.client.post("/generate", json=body).json()
    assert len(generated["output_token_ids"]) == 3
    assert generated["finished_reason"] == "length"
    assert either.client.get("/health_generate").status_code == 200
    assert either.client.get("/server_info").json()["plan"]["architecture"] == "Qwen3ForCausalLM"
    assert either.client.get("/model_info").json()["model_type"] == "qwen3"


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_aborts_within_a_second(either, stream):
    either.wait_idle(10)
    body = json.dumps(
        {"messages": HI, "max_tokens": 7000, "ignore_eos": True, "temperature": 0, "stream": stream}
    ).encode()
    sock = socket.create_connection(("127.0.0.1", either.port))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    deadline = time.monotonic() + 5
    while not either.stats()["running"]:
        assert time.monotonic() < deadline
    sock.close()
    either.wait_idle(1.0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x " * 50_000}, "prompt"),
        ({"prompt": [151_936]}, "prompt"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "stop_token_ids": [10**12]}, None),
        ({"prompt": "a", "logit_bias": {"151936": 1}}, None),
    ],
)
def test_bad_input_never_breaks_the_engine(either, body, param):
    response = either.client.post("/v1/completions", json=body, timeout=60)
    assert response.status_code in ((400,) if param else (200, 400)), response.text
    if param:
        assert response.json()["error"]["param"] == param
    assert either.client.get("/health_generate").status_code == 200


def test_absurd_length_is_bounded_by_the_context(tiny):
    body = {"prompt": "a", "max_tokens": 10**9, "stream": True}
    with tiny.client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 200:
            assert next(response.iter_lines()).startswith("data: {")
        else:
            assert response.status_code == 400
    tiny.wait_idle(1.0)


def test_metrics_come_from_the_engines_process(apart):
    before = apart.stats()
    apart.client.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 3, "ignore_eos": True})
    text = apart.client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["pymllm:generation_tokens_total"]) == before["generated_tokens"] + 3
    assert float(values["pymllm:num_requests_running"]) == 0
    assert float(values["pymllm:engine_steps_total"]) > before["steps"]
