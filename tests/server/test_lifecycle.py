"""Clients that leave, and a server that is told to stop: nothing goes on working for nobody."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from server_fakes import FakeEngine

from pymllm_core.errors import CheckpointError
from pymllm_server import serving

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def raw_post(server, path, body):
    """A request over a bare socket, which the test may close whenever it likes."""
    request = httpx.Request("POST", server.url + path, json=body)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    sock.sendall(f"{head}Content-Length: {len(request.content)}\r\n\r\n".encode() + request.content)
    return sock


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HI}),
        (CHAT, {"messages": HI, "stream": True}),
        (CHAT, {"messages": HI, "stream": True, "n": 3}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1000}),
        ("/generate", {"text": "a"}),
        ("/generate", {"text": "a", "stream": True}),
        ("/health_generate", None),
    ],
)
@pytest.mark.parametrize("delay_s", [0.01, 30.0])
def test_leaving_aborts_within_a_second(serve, path, body, delay_s):
    """Between tokens, and while the first one (a long prefill) is still awaited."""
    server = serve(FakeEngine("x" * 100_000, delay_s=delay_s))
    if body is None:
        if delay_s < 1:
            pytest.skip("one token is over before anybody leaves")
        sock = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        sock.sendall(b"GET /health_generate HTTP/1.1\r\nHost: x\r\n\r\n")
    else:
        sock = raw_post(server, path, body)
    server.wait(lambda: server.engine.submitted)
    time.sleep(0.1)
    assert server.engine.running
    left = time.monotonic()
    sock.close()
    server.wait(lambda: not server.engine.running and not server.state.in_flight, seconds=1.0)
    assert {rid for rid, _ in server.engine.aborts} == {request.id for request in server.engine.submitted}
    assert max(when for _, when in server.engine.aborts) - left < 1.0


@pytest.mark.parametrize("path", [CHAT, "/abort_request"])
def test_leaving_amid_the_body(serve, caplog, path):
    caplog.set_level("INFO")
    server = serve()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        sock.sendall(head.encode() + b'{"messages"')
        time.sleep(0.1)
    server.wait(lambda: f"POST {path}" in caplog.text)
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert not server.engine.submitted


def test_leaving_with_a_reset(serve):
    server = serve(FakeEngine("x" * 100_000, delay_s=0.001))
    sock = raw_post(server, CHAT, {"messages": HI, "stream": True})
    sock.recv(10)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    server.wait(lambda: not server.engine.running, seconds=1.0)


def test_a_client_that_does_not_read_and_leaves(serve):
    """The socket's buffers are full, so the server waits to send when the client goes."""
    server = serve(FakeEngine("x" * 10_000_000, step=10_000))
    sock = raw_post(server, CHAT, {"messages": HI, "stream": True})
    server.wait(lambda: server.engine.submitted)
    time.sleep(0.5)
    assert server.engine.running
    sock.close()
    server.wait(lambda: not server.engine.running, seconds=1.0)


def test_many_clients_that_leave(serve):
    server = serve(FakeEngine("x" * 100_000, delay_s=0.01))
    socks = [raw_post(server, CHAT, {"messages": HI, "stream": True}) for _ in range(40)]
    server.wait(lambda: len(server.engine.submitted) == 40)
    for sock in socks:
        sock.close()
    server.wait(lambda: not server.engine.running and not server.state.in_flight, seconds=2.0)
    assert len(server.engine.aborts) == 40


@pytest.mark.parametrize("stream", [False, True])
def test_stopping_ends_requests_with_an_error(serve, stream):
    server = serve(FakeEngine("x" * 100_000, delay_s=0.05))
    body = {"messages": HI, "stream": stream}
    with server.client.stream("POST", CHAT, json=body) if stream else httpx.Client() as response:
        if stream:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            server.server.should_exit = True
            rest = list(lines)
            assert rest[-1] == "data: [DONE]"
            assert '"code": "shutting_down"' in rest[-2].replace('":"', '": "')
    if not stream:
        sock = raw_post(server, CHAT, body)
        server.wait(lambda: server.engine.running)
        server.server.should_exit = True
        assert sock.recv(100).startswith(b"HTTP/1.1 503")
        sock.close()
    server.thread.join(serving.DRAIN_S + 2)
    assert not server.thread.is_alive()
    assert server.engine.state == "stopped"


def test_stopping_lets_short_requests_finish(serve):
    server = serve(FakeEngine("0123456789", delay_s=0.05))
    with server.client.stream("POST", CHAT, json={"messages": HI, "stream": True}) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        server.server.should_exit = True
        assert '"finish_reason":"stop"' in list(lines)[-2]


# ---- whole processes ----

PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
from pymllm_core.config import Settings
from pymllm_core.errors import CheckpointError
from pymllm_server import launch
from server_fakes import FakeEngine
launch.make_engine = lambda settings: FakeEngine({engine})
raise SystemExit(launch.run(Settings.of("models/fake", served_model_name="fake", port={port})))
"""


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def process():
    started = []

    def start(engine, port=None):
        port = port or free_port()
        program = PROGRAM.format(folder=str(Path(__file__).parent), engine=engine, port=port)
        child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
        started.append(child)
        child.port = port
        return child

    yield start
    for child in started:
        if child.poll() is None:
            child.kill()
        child.communicate()


def wait_health(child, status):
    deadline = time.monotonic() + 15
    while True:
        try:
            response = httpx.get(f"http://127.0.0.1:{child.port}/health", trust_env=False)
            if response.status_code == status:
                return
        except httpx.TransportError:
            pass
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_loading(process, number):
    child = process("load_s=60")
    wait_health(child, 503)
    started = time.monotonic()
    child.send_signal(number)
    _, log = child.communicate(timeout=5)
    assert time.monotonic() - started < 2
    assert child.returncode == 0
    assert "Traceback" not in log
    assert "loading weights: 40%" in log


def test_interrupt_during_a_stream(process):
    child = process("'x' * 100000, delay_s=0.05")
    wait_health(child, 200)
    url = f"http://127.0.0.1:{child.port}{CHAT}"
    with httpx.stream("POST", url, json={"messages": HI, "stream": True}, trust_env=False) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        started = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert list(lines)[-1] == "data: [DONE]"
    _, log = child.communicate(timeout=10)
    assert time.monotonic() - started < serving.DRAIN_S + 2
    assert child.returncode == 0
    assert "Traceback" not in log
    assert "aborting 1 requests in flight" in log
    assert f"ready: http://127.0.0.1:{child.port} model fake" in log


def test_a_second_interrupt_does_not_wait(process):
    child = process("'x' * 100000, delay_s=0.05")
    wait_health(child, 200)
    url = f"http://127.0.0.1:{child.port}{CHAT}"
    with httpx.stream("POST", url, json={"messages": HI, "stream": True}, trust_env=False) as response:
        next(response.iter_lines())
        started = time.monotonic()
        child.send_signal(signal.SIGINT)
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=5)
    assert time.monotonic() - started < serving.DRAIN_S


def test_an_engine_that_does_not_stop_is_left_behind(process):
    child = process("'x', hang_stop=True")
    wait_health(child, 200)
    started = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, log = child.communicate(timeout=20)
    assert time.monotonic() - started < 12
    assert child.returncode == 1
    assert "does not stop" in log


def test_interrupt_while_loading_cannot_be_interrupted(process):
    """As during an import: the thread is left behind, and the process ends at once."""
    child = process("load_s=60, hang_stop=True")
    wait_health(child, 503)
    started = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, log = child.communicate(timeout=5)
    assert time.monotonic() - started < 2
    assert child.returncode == 0
    assert "stopped while loading" in log


def test_port_in_use(process):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        child = process("'x'", port)
        _, log = child.communicate(timeout=10)
    assert child.returncode == 1
    assert f"port {port} on 127.0.0.1 is in use; choose another with --server.port" in log
    assert "Traceback" not in log


def test_failed_load_ends_the_process(process):
    child = process("load_error=CheckpointError('no config.json in models/fake')")
    _, log = child.communicate(timeout=10)
    assert child.returncode == 1
    assert "loading failed: no config.json in models/fake" in log
    assert "Traceback" not in log


def test_port_opens_before_loading_ends(serve):
    engine = FakeEngine(load_s=5, load_error=CheckpointError("x"))
    started = time.monotonic()
    assert serve(engine).client.get("/health").status_code == 503
    assert time.monotonic() - started < 2
