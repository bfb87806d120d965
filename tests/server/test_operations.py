"""Keys, health, loading, administration, metrics, logs and headers."""

from __future__ import annotations

import dataclasses
import json
import logging
import time

import httpx
from server_fakes import FakeEngine, FakeStats

from pymllm_core.errors import CheckpointError

ADMIN = ["/server_info", "/flush_cache"]


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_no_key_needed_by_default(serve):
    server = serve()
    for path in ["/v1/models", "/health", "/model_info", *ADMIN]:
        assert server.client.get(path).status_code == 200


def test_api_key(serve):
    server = serve(api_key="sesame")
    for headers in (
        {},
        bearer("wrong"),
        {"authorization": "Bearer"},
        {"authorization": "Basic sesame"},
        bearer("sesam\xe9"),
    ):
        response = server.client.get("/v1/models", headers=httpx.Headers(headers, encoding="latin-1"))
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
    assert server.client.get("/health").status_code == 200
    for path in ["/v1/models", *ADMIN]:
        assert server.client.get(path, headers=bearer("sesame")).status_code == 200
    assert server.client.get("/docs").status_code == 401


def test_admin_key(serve):
    server = serve(api_key="user", admin_api_key="boss")
    for path in ADMIN:
        assert server.client.get(path, headers=bearer("user")).status_code == 403
        assert server.client.get(path, headers=bearer("boss")).status_code == 200
    body = {"rid": "x"}
    assert server.client.post("/abort_request", json=body, headers=bearer("user")).status_code == 403
    assert server.client.post("/abort_request", json=body, headers=bearer("boss")).status_code == 200
    assert server.client.get("/v1/models", headers=bearer("boss")).status_code == 200
    assert server.client.get("/v1/models", headers=bearer("user")).status_code == 200


def test_admin_key_alone_guards_all(serve):
    server = serve(admin_api_key="boss")
    assert server.client.get("/v1/models").status_code == 401
    assert server.client.get("/v1/models", headers=bearer("boss")).status_code == 200


def test_root_path_does_not_open_admin_routes(serve):
    server = serve(api_key="user", admin_api_key="boss", fastapi_root_path="/llm")
    for prefix in ("", "/llm"):
        assert server.client.get(f"{prefix}/health").status_code == 200
        for path in (f"{prefix}/server_info", f"{prefix}/server_info/"):
            response = server.client.get(path, headers=bearer("user"), follow_redirects=True)
            assert response.status_code == 403, path
        assert server.client.get(f"{prefix}/v1/models").status_code == 401


def test_server_info_has_no_secrets(serve):
    server = serve(api_key="sesame", admin_api_key="boss")
    response = server.client.get("/server_info", headers=bearer("boss"))
    assert "sesame" not in response.text
    assert "boss" not in response.text
    body = response.json()
    assert body["plan"] == {"model": "fake"}
    assert body["server"]["served_model_name"] == "fake"
    assert body["stats"]["pages_total"] == 12


def test_models(serve):
    server = serve()
    (model,) = server.client.get("/v1/models").json()["data"]
    assert model["id"] == "fake"
    assert model["object"] == "model"
    assert model["owned_by"] == "pymllm"
    assert isinstance(model["created"], int)
    assert server.client.get("/v1/models/fake").json() == model
    assert server.client.get("/v1/models/default").status_code == 200
    info = server.client.get("/model_info").json()
    assert info["model_path"] == info["tokenizer_path"] == "models/fake"
    assert info["architectures"] == ["FakeForCausalLM"]


def test_loading_answers_503_with_progress(serve):
    server = serve(FakeEngine("ok", load_s=1.0))
    for path in ("/health", "/v1/models", "/health_generate"):
        response = server.client.get(path)
        assert response.status_code == 503
        assert response.json()["state"] == "loading"
        assert response.json()["progress"] == {
            "stage": "loading weights",
            "done": 40,
            "total": 100,
            "fraction": 0.4,
        }
    response = server.chat()
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_loading"
    assert "40%" in response.json()["error"]["message"]
    assert response.headers["retry-after"] == "1"
    server.wait(lambda: server.engine.state == "ready")
    assert server.client.get("/health").json() == {"state": "ready"}
    assert server.chat().status_code == 200


def test_failed_load(serve):
    server = serve(FakeEngine(load_error=CheckpointError("no config.json in models/fake")))
    response = server.client.get("/health")
    assert response.status_code == 503
    assert response.json() == {"state": "failed", "reason": "no config.json in models/fake"}
    assert server.chat().json()["error"]["code"] == "engine_failed"


def test_stalled(serve):
    engine = FakeEngine()
    server = serve(engine)
    engine.stats_now = FakeStats(waiting=2, last_step_age_s=31.0)
    response = server.client.get("/health")
    assert response.status_code == 503
    assert response.json()["state"] == "stalled"
    engine.stats_now = FakeStats(waiting=0, last_step_age_s=3100.0)
    assert server.client.get("/health").status_code == 200  # idle is healthy


def test_health_generate(serve):
    server = serve()
    assert server.client.get("/health_generate").status_code == 200
    (request,) = server.engine.submitted
    assert request.params.max_tokens == 1
    assert serve(FakeEngine(fail_after=0)).client.get("/health_generate").status_code == 500


def test_flush_cache(serve):
    server = serve()
    assert server.client.post("/flush_cache").json() == {"flushed": True}
    server.engine.flushable = False
    assert server.client.get("/flush_cache").status_code == 409


def test_abort_request(serve):
    server = serve(FakeEngine("x" * 1000, delay_s=0.02))
    assert server.client.post("/abort_request", json={}).status_code == 400
    assert server.client.post("/abort_request", json={"rid": "nobody"}).status_code == 200
    with server.client.stream(
        "POST", "/generate", json={"text": "a", "stream": True, "rid": "r1"}
    ) as response:
        lines = response.iter_lines()
        next(lines)
        twice = httpx.post(f"{server.url}/generate", json={"text": "a", "rid": "r1"}, trust_env=False)
        assert twice.json()["error"]["code"] == "rid_in_use"
        aborted = httpx.post(f"{server.url}/abort_request", json={"rid": "r1"}, trust_env=False)
        assert (aborted.status_code, aborted.content) == (200, b"")
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2][6:])["finished_reason"] == "abort"
    assert server.client.post(
        "/generate", json={"text": "a", "rid": "r1", "sampling_params": {"max_new_tokens": 1}}
    )


def test_abort_by_the_id_of_an_openai_answer(serve):
    server = serve(FakeEngine("x" * 1000, delay_s=0.02))
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 2}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        rid = json.loads(next(lines)[6:])["id"]
        httpx.post(f"{server.url}/abort_request", json={"rid": rid}, trust_env=False)
        events = list(lines)
    reasons = [json.loads(event[6:])["choices"][0]["finish_reason"] for event in events[:-1]]
    assert reasons.count("abort") == 2


def test_metrics(serve):
    response = serve().client.get("/metrics")
    assert response.status_code == 404
    assert "--server.enable_metrics" in response.json()["error"]["message"]
    server = serve(FakeEngine("abc"), enable_metrics=True)
    server.chat()
    text = server.client.get("/metrics").text
    for line in (
        "pymllm:num_requests_running 0.0",
        "pymllm:kv_cache_usage_perc 0.25",
        "pymllm:prompt_tokens_total 50.0",
        "pymllm:generation_tokens_total 70.0",
        'pymllm:request_success_total{finished_reason="stop"} 1.0',
        "pymllm:time_to_first_token_seconds_count 1.0",
    ):
        assert line in text.splitlines()


def test_request_ids_and_access_log(serve, caplog):
    caplog.set_level(logging.DEBUG)
    server = serve(FakeEngine("secret answer"), show_time_cost=True)
    response = server.client.get("/health", headers={"x-request-id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 200, "", "a;b"):
        assert server.client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"] != bad
    server.chat("my secret prompt")
    server.wait(lambda: "/v1/chat/completions" in caplog.text)
    assert "secret" not in caplog.text
    assert "GET /health 200" in caplog.text
    assert "abc-1" in caplog.text
    assert "prefill 20.0 ms" in caplog.text
    assert f"ready: http://127.0.0.1:{server.settings.server.port} model fake" in caplog.text
    server.client.get("/%0aforged")
    server.wait(lambda: "forged" in caplog.text)
    assert "\nforged" not in caplog.text


def test_cors_is_off_unless_asked(serve):
    headers = {"origin": "http://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in serve().client.get("/health", headers=headers).headers
    server = serve(cors_allow_origins=("http://page.example",), api_key="k")
    preflight = server.client.options("/v1/models", headers=headers)
    assert preflight.headers["access-control-allow-origin"] == "http://page.example"
    refusal = server.client.get("/v1/models", headers=headers)
    assert refusal.status_code == 401
    assert refusal.headers["access-control-allow-origin"] == "http://page.example"


def test_openapi_names_the_fields(serve):
    schema = serve().client.get("/openapi.json").json()
    body = schema["components"]["schemas"]["ChatBody"]["properties"]
    assert {"messages", "temperature", "tools", "stream_options"} <= set(body)
    assert "/generate" in schema["paths"]


def test_tokens_are_cheap_to_stream(serve):
    """20,000 tokens through parsers, JSON and a socket; the bound is ten times the usual."""
    server = serve(FakeEngine("x" * 20_000))
    started = time.monotonic()
    text = server.chat(stream=True).text
    assert text.count("data: ") == 20_000 + 3
    assert time.monotonic() - started < 20


def test_the_fake_is_complete():
    """The fake's statistics are a dataclass, as the engine's are."""
    assert dataclasses.is_dataclass(FakeStats())
