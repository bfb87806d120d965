"""The real program in a process of its own, through real clients.

Against a tiny model with random weights (its tokenizer is Qwen3's), and against the demo model, whose answers
have a meaning. Each is skipped, by name, where what it needs is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

HI = [{"role": "user", "content": "你好,只回复:ok"}]
TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "float32",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def require(*modules):
    for module in modules:
        # A namespace package has no origin: a folder of that name may lie in the working directory.
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            pytest.skip(f"{module} is not installed")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Program:
    """``python -m pymllm.server.launch`` with flags."""

    def __init__(self, log: Path, *flags: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", "pymllm.server.launch", "--server.port", str(self.port), *flags]
        with log.open("w") as stderr:
            # A group of its own, which can be interrupted as a terminal does it: all of its processes at once.
            self.process = subprocess.Popen(command, stderr=stderr, cwd=log.parent, start_new_session=True)
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def wait(self, status: int, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if self.client.get("/health").status_code == status:
                    return
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def interrupt(self, seconds: float = 5.0) -> int:
        """Send Ctrl-C; the exit code. Nothing may be left behind."""
        os.killpg(self.process.pid, signal.SIGINT)
        code = self.process.wait(seconds)
        assert not self.members()
        return code

    def members(self):
        """The living processes of the program's group."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    found.append(int(path.parent.name))
        return found

    def engine(self):
        """The process id of an engine that has its own process."""
        (pid,) = set(self.members()) - {self.process.pid}
        return pid

    def stats(self):
        return self.client.get("/server_info").json()["stats"]

    def wait_idle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.stats()["running"] + self.stats()["waiting"]:
            assert time.monotonic() < deadline, self.stats()
            time.sleep(0.02)

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory, shared_qwen):
    require("pymllm", "pymllm_qwen3")
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    for file in (shared_qwen / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


def tiny_flags(folder):
    return (
        *("--server.model_path", str(folder), "--server.load_format", "dummy", "--server.device", "cpu"),
        *("--server.max_total_tokens", "8192", "--server.max_running_requests", "4"),
        *("--server.served_model_name", "tiny"),
    )


@pytest.fixture(scope="module")
def tiny(tiny_folder, tmp_path_factory):
    program = Program(tmp_path_factory.mktemp("log") / "log", *tiny_flags(tiny_folder))
    program.wait(200)
    yield program
    program.close()


@pytest.fixture(scope="module")
def apart(tiny_folder, tmp_path_factory):
    """The same with the engine in a process of its own."""
    flags = (*tiny_flags(tiny_folder), "--server.engine_process", "on", "--server.enable_metrics")
    program = Program(tmp_path_factory.mktemp("log") / "log", *flags)
    program.wait(200)
    yield program
    program.close()


@pytest.fixture(params=["tiny", "apart"])
def either(request):
    """The tiny model's server, the engine on a thread or in a process."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["off", "on"])
def own_process(request):
    """Flags that decide where the engine runs."""
    return ("--server.engine_process", request.param)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    require("pymllm", "pymllm_qwen3", "pymllm_demo")
    folder = Path(importlib.util.find_spec("pymllm_demo").origin).parent / "model"
    if not list(folder.glob("*.safetensors")):
        pytest.skip(f"the demo model has no weights in {folder}")
    program = Program(tmp_path_factory.mktemp("log") / "log", "--server.model_path", "demo")
    program.wait(200)
    yield program
    program.close()


def openai_client(program):
    return openai.OpenAI(base_url=f"{program.url}/v1", api_key="none", max_retries=0)


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


def test_interrupt_during_load(tiny_folder, tmp_path, own_process):
    program = Program(tmp_path / "log", *tiny_flags(tiny_folder), *own_process)
    try:
        program.wait(503)
        assert program.interrupt() == 0, program.log.read_text()
        assert "Traceback" not in program.log.read_text()
    finally:
        program.close()


def test_interrupt_during_a_stream(tiny_folder, tmp_path, own_process):
    program = Program(tmp_path / "log", *tiny_flags(tiny_folder), *own_process)
    try:
        program.wait(200)
        body = {"messages": HI, "max_tokens": 7000, "ignore_eos": True, "stream": True}
        with program.client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            os.killpg(program.process.pid, signal.SIGINT)
            assert list(lines)[-1] == "data: [DONE]"
        assert program.process.wait(6) == 0
        assert not program.members()
        assert "Traceback" not in program.log.read_text()
    finally:
        program.close()


def test_metrics_come_from_the_engines_process(apart):
    before = apart.stats()
    apart.client.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 3, "ignore_eos": True})
    text = apart.client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["pymllm:generation_tokens_total"]) == before["generated_tokens"] + 3
    assert float(values["pymllm:num_requests_running"]) == 0
    assert float(values["pymllm:engine_steps_total"]) > before["steps"]


def test_an_engine_that_dies_is_told_to_all(tiny_folder, tmp_path):
    program = Program(tmp_path / "log", *tiny_flags(tiny_folder), "--server.engine_process", "on")
    try:
        program.wait(200)
        body = {"messages": HI, "max_tokens": 7000, "ignore_eos": True, "stream": True}
        with program.client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            os.kill(program.engine(), signal.SIGKILL)
            *_, error, done = lines
        assert done == "data: [DONE]"
        assert "killed by SIGKILL" in json.loads(error.removeprefix("data: "))["error"]["message"]
        health = program.client.get("/health")
        assert (health.status_code, health.json()["state"]) == (503, "failed")
        assert "killed by SIGKILL" in health.json()["reason"]
        assert program.client.post("/v1/completions", json={"prompt": "a"}).status_code == 503
        assert program.interrupt() == 0
        log = program.log.read_text()
        assert (
            "ERROR pymllm_core.engine.async_engine: the engine failed: the engine's process was killed" in log
        )
        assert "Traceback" not in log
    finally:
        program.close()


def test_a_server_that_is_killed_takes_its_engine_along(tiny_folder, tmp_path):
    program = Program(tmp_path / "log", *tiny_flags(tiny_folder), "--server.engine_process", "on")
    try:
        program.wait(200)
        program.process.kill()
        program.process.wait()
        deadline = time.monotonic() + 8
        while program.members():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        program.close()


def test_port_in_use(tiny, tmp_path):
    program = Program(tmp_path / "log", "--server.model_path", "nothing", port=tiny.port)
    try:
        assert program.process.wait(30) == 1
        message = f"port {tiny.port} on 127.0.0.1 is in use; choose another with --server.port"
        assert message in program.log.read_text()
    finally:
        program.close()


def test_unknown_model_ends_with_a_message(tmp_path, own_process):
    require("pymllm", "pymllm_qwen3")
    program = Program(tmp_path / "log", "--server.model_path", str(tmp_path / "nothing"), *own_process)
    try:
        assert program.process.wait(30) == 1
        log = program.log.read_text()
        assert "Traceback" not in log
        assert f"loading failed: there is no model '{tmp_path / 'nothing'}'" in log
    finally:
        program.close()


# ---- the demo model, whose answers mean something ----


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
