"""Every bad input gets OpenAI's error shape, the right status and the field to blame; never a 5xx."""

from __future__ import annotations

import json

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_fakes import FakeEngine

from pymllm_server.middleware import MAX_BODY_BYTES

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server(serve):
    return serve(FakeEngine("ok"))


def refused(response, status=400):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": [0]}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -7}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop.0"),
        ({"stop_token_ids": "1"}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1_0": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1000}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream_options": {"typo": 1}}, "stream_options.typo"),
        ({"typo": None}, "typo"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_json": {}}, "guided_json"),
        ({"functions": [{}]}, "functions"),
        ({"best_of": 3}, "best_of"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"tools": 3}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [*HI, {"role": "user", "content": "x", "typo": 1}]}, "messages.1.typo"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ],
)
def test_bad_fields(server, fields, param):
    error = refused(server.client.post(CHAT, json={"messages": HI, **fields}))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert server.engine.submitted == []


def test_images_are_refused_plainly(server):
    content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "/tmp/x.png"}}]
    error = refused(server.chat(content))
    assert "takes no images" in error["message"]
    assert error["param"] == "messages.0.content.1"


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [""], [1, "a"], [True], {"a": 1}, None, [-1], [2**40], [[1], 2]]
)
def test_bad_prompts(server, prompt):
    refused(server.client.post("/v1/completions", json={"prompt": prompt}))


@pytest.mark.parametrize(
    "fields",
    [{"suffix": "x"}, {"echo": True, "logprobs": 1}, {"n": 128, "prompt": ["a", "b"]}, {"logprobs": -1}],
)
def test_bad_completion_fields(server, fields):
    refused(server.client.post("/v1/completions", json={"prompt": "a", **fields}))


def test_neutral_values_and_metadata_pass(server):
    fields = {
        "user": "u",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": None,
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "best_of": None,
        "modalities": ["text"],
    }
    response = server.chat(**fields)
    assert response.status_code == 200
    assert response.headers["x-pymllm-ignored-fields"] == "user, store, metadata"
    assert "x-pymllm-ignored-fields" not in server.chat().headers


def test_official_client_raises_its_classes(serve):
    server = serve(FakeEngine("ok"), api_key="right")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="right", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="default", messages=HI, temperature=-1)
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="gpt-9", messages=HI)
        assert caught.value.code == "model_not_found"
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_prompt_too_long(server):
    error = refused(server.chat("x" * 5000))
    assert error["code"] == "context_length_exceeded"
    # Longer than what is tokenised inline, so on a thread.
    assert refused(server.chat("x" * 50_000))["code"] == "context_length_exceeded"
    ids = {"prompt": [1] * 1_000_000}
    assert refused(server.client.post("/v1/completions", json=ids))["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", None),
        (b"{", "invalid_json"),
        (b"null", None),
        (b"[]", None),
        (b'"x"', None),
        (b'{"messages": [}', "invalid_json"),
        (b'{"messages": "\xff\xfe"}', "invalid_utf8"),
        (b"\x1f\x8b\x00", "invalid_utf8"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b'{"temperature": -Infinity}', "invalid_json"),
        (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}', None),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_utf8"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"\\udfff": 1}]}', "invalid_utf8"),
        (b'{"max_tokens": ' + b"9" * 10_000 + b"}", "invalid_json"),
        (b'{"temperature": ' + b"9" * 400 + b', "messages": [{"role": "user", "content": "x"}]}', None),
        (b"[" * 100_000, "invalid_json"),
        (b'{"tools": ' + b"[" * 500 + b"]" * 500 + b"}", "invalid_json"),
    ],
)
def test_bad_bodies(server, body, code):
    assert refused(server.client.post(CHAT, content=body, headers=JSON))["code"] == code


def test_emoji_escaped_as_a_pair_is_fine(server):
    body = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}'
    assert server.client.post(CHAT, content=body, headers=JSON).status_code == 200
    assert server.engine.processor.seen[-1]["messages"][0]["content"] == "\U0001f600"


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_other_content_types(server, kind):
    headers = {"content-type": kind} if kind else {}
    error = refused(server.client.post(CHAT, content=b"{}", headers=headers), 415)
    assert "application/json" in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_ten_megabytes(server, chunked):
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    content = (body[start : start + 65536] for start in range(0, len(body), 65536)) if chunked else body
    error = refused(server.client.post(CHAT, content=content, headers=JSON), 413)
    assert error["code"] == "body_too_large"
    assert server.chat().status_code == 200


def test_a_large_list_of_wrong_items_is_refused_quickly(server):
    body = b'{"messages": [' + b"1," * (MAX_BODY_BYTES // 2 - 100) + b"1]}"
    response = server.client.post(CHAT, content=body, headers=JSON)
    refused(response)
    assert len(response.content) < 1000
    assert response.elapsed.total_seconds() < 3


def test_wrong_routes_and_methods(server):
    refused(server.client.get("/v1/nothing"), 404)
    refused(server.client.get(CHAT), 405)
    refused(server.client.get("/v1/models/other"), 404)


def test_queue_full(serve):
    response = serve(FakeEngine(queue_full=True)).chat()
    assert refused(response, 429)["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "1"


def test_refused_later_choice_aborts_the_earlier(serve):
    engine = FakeEngine("x" * 100, delay_s=0.05)
    submit = engine.submit

    def once(request):
        if engine.submitted:
            engine.queue_full = True
        return submit(request)

    engine.submit = once
    refused(serve(engine).chat(n=2), 429)
    assert len(engine.aborts) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_engine_failure(serve, stream, n):
    server = serve(FakeEngine("abcdef", fail_after=3))
    response = server.chat(stream=stream, n=n)
    if not stream:
        assert "caught fire" in refused(response, 500)["message"]
        return
    assert response.status_code == 200
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    error = json.loads(lines[-3][6:])["error"]
    assert error["code"] == "engine_error"
    assert "caught fire" in error["message"]
    server.wait(lambda: not server.state.in_flight)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, {"messages": HI}), ("/v1/completions", {"prompt": "a"}), ("/generate", {"text": "a"})],
)
def test_a_failure_before_the_first_token_has_its_status(serve, path, body, n):
    """Also in a stream, whose head waits for the first event."""
    if n > 1:
        body = {**body, "text": ["a", "b"]} if path == "/generate" else {**body, "n": n}
    server = serve(FakeEngine("abcdef", fail_after=0))
    response = server.client.post(path, json={**body, "stream": True})
    assert "caught fire" in refused(response, 500)["message"]
    server.wait(lambda: not server.state.in_flight)


def test_a_bug_is_a_500_without_its_details(serve, caplog):
    engine = FakeEngine("ok")
    engine.processor.from_chat = lambda *args, **kwargs: 1 / 0
    response = serve(engine).chat()
    assert refused(response, 500)["message"] == "internal error; the server's log has the details"
    assert "ZeroDivisionError" in caplog.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "model messages temperature top_p top_k min_p n seed stop stop_token_ids logit_bias logprobs "
    "top_logprobs max_tokens stream stream_options tools tool_choice chat_template_kwargs "
    "separate_reasoning user prompt echo text input_ids sampling_params rid"
).split()


def test_fuzzed_fields_never_break_the_server(serve):
    server = serve(FakeEngine("ok"))

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from([CHAT, "/v1/completions", "/generate", "/abort_request"]),
        st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3),
        st.booleans(),
    )
    def fuzz(path, fields, complete):
        base = {CHAT: {"messages": HI}, "/v1/completions": {"prompt": "a"}, "/generate": {"text": "a"}}
        body = {**(base.get(path, {"rid": "x"}) if complete else {}), **fields}
        response = server.client.post(path, content=json.dumps(body).encode(), headers=JSON)
        assert response.status_code < 500, response.text
        if response.status_code != 200:
            refused(response, response.status_code)

    fuzz()
    assert not server.state.in_flight
