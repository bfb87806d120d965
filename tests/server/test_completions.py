"""/v1/completions and /generate."""

from __future__ import annotations

import json

import openai
import pytest
from server_fakes import FakeEngine


def reverse(request):
    return "".join(map(chr, reversed(request.token_ids)))


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["cba"]),
        (["ab", "cd"], ["ba", "dc"]),
        ([97, 98], ["ba"]),
        ([[97, 98], [99]], ["ba", "c"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_prompt_forms(serve, prompt, texts, stream):
    server = serve(FakeEngine(reverse))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        found = [""] * len(texts)
        if stream:
            for chunk in client.completions.create(model="default", prompt=prompt, stream=True):
                found[chunk.choices[0].index] += chunk.choices[0].text
        else:
            answer = client.completions.create(model="default", prompt=prompt)
            assert answer.id.startswith("cmpl-")
            for choice in answer.choices:
                found[choice.index] = choice.text
            assert answer.usage.completion_tokens == sum(map(len, texts))
            assert answer.usage.prompt_tokens == sum(map(len, texts))
    assert found == texts


def test_echo_n_and_default_length(serve):
    server = serve(FakeEngine("x" * 30))
    body = {"prompt": ["a", "b"], "n": 2, "echo": True}
    choices = server.client.post("/v1/completions", json=body).json()["choices"]
    assert [choice["text"] for choice in choices] == [
        start + "x" * 16 for start in ("a", "a", "b", "b")
    ]  # 16 tokens are OpenAI's default
    assert {choice["finish_reason"] for choice in choices} == {"length"}
    body["stream"] = True
    text = server.client.post("/v1/completions", json=body).text
    found = ["", "", "", ""]
    for line in text.split("\n\n")[:-2]:
        choice = json.loads(line[6:])["choices"][0]
        found[choice["index"]] += choice["text"]
    assert found == [choice["text"] for choice in choices]


def test_logprobs(serve):
    server = serve(FakeEngine("hey"))
    body = {"prompt": "a", "logprobs": 2}
    logprobs = server.client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["h", "e", "y"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["top_logprobs"][0] == {"a": 0.0, "b": -1.0, "h": -0.5}


def test_generate_single(serve):
    server = serve(FakeEngine("abc"), enable_debug_timing=True)
    body = {"text": "hi", "sampling_params": {"max_new_tokens": 2}, "rid": "mine"}
    for method in ("POST", "PUT"):
        answer = server.client.request(method, "/generate", json=body).json()
        assert answer == {
            "rid": "mine",
            "text": "ab",
            "delta": "ab",
            "output_token_ids": [97, 98],
            "finished": True,
            "finished_reason": "length",
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "vit_prefill_ms": None,
            "vit_prefill_tokens": None,
            "llm_prefill_ms": 20.0,
            "llm_decode_ms": 500.0,
        }


def test_generate_batch(serve):
    server = serve(FakeEngine(reverse, delay_s=0.02))
    body = {"input_ids": [[97, 98, 99], [100]], "rid": ["x", "y"]}
    answers = server.client.post("/generate", json=body).json()
    assert [answer["rid"] for answer in answers] == ["y", "x"]  # in order of completion
    assert {answer["rid"]: answer["text"] for answer in answers} == {"x": "cba", "y": "d"}
    assert answers[0]["finished_reason"] == "eos"
    assert len(server.client.post("/generate", json={"text": ["a"]}).json()) == 1
    assert server.client.post("/generate", json={"input_ids": [97]}).json()["text"] == "a"


@pytest.mark.parametrize(("stream_output", "texts"), [(True, ["a", "b", "c"]), (False, ["a", "ab", "abc"])])
def test_generate_stream(serve, stream_output, texts):
    server = serve(FakeEngine("abc"), stream_output=stream_output)
    lines = server.client.post("/generate", json={"text": "hi", "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line[6:]) for line in lines[:-2]]
    assert [event["text"] for event in events] == texts
    assert [event["delta"] for event in events] == ["a", "b", "c"]
    assert [event["finished"] for event in events] == [False, False, True]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": []}, "text"),
        ({"text": ""}, "text"),
        ({"input_ids": ["a"]}, "input_ids"),
        ({"input_ids": [-1]}, "input_ids"),
        ({"input_ids": [10**20]}, "input_ids"),
        ({"text": "a", "rid": ["x"]}, "rid"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
        ({"text": "a", "image_data": "x.png"}, "image_data"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 0}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"max_tokens": 3}}, "sampling_params.max_tokens"),
    ],
)
def test_generate_refusals(serve, body, param):
    response = serve().client.post("/generate", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
