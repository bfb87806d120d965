"""Flags, addresses and entry points, without a server."""

from __future__ import annotations

import logging
import os
import runpy
import signal
import socket

import pytest
from click.testing import CliRunner
from server_fakes import FakeEngine

from pymllm_core.errors import ConfigError
from pymllm_server import launch, listen, plugin
from pymllm_server.app import base_url
from pymllm_server.body import MAX_DEPTH, parse_json
from pymllm_server.errors import ApiError


@pytest.fixture
def runs(monkeypatch):
    """The settings that `run` was called with."""
    seen = []
    monkeypatch.setattr(launch, "run", lambda settings: seen.append(settings) or 0)
    return seen


MANUAL = (
    "--server.model_path M --server.tokenizer_path M --server.load_format safetensors --server.dtype float16 "
    "--quantization.method compressed-tensors --server.host 0.0.0.0 --server.port 30000 "
    "--server.attention_backend auto --server.gdn_decode_backend pytorch --server.mem_fraction_static 0.05 "
    "--server.max_running_requests 1 --server.max_total_tokens 256 --server.max_prefill_tokens 128 "
    "--server.disable_radix_cache --server.disable_cuda_graph --server.log_level debug"
).split()


def test_the_manuals_command(runs, monkeypatch):
    pytest.importorskip("pymllm.server", reason="the umbrella package is not installed")
    monkeypatch.setattr("sys.argv", ["launch", *MANUAL])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("pymllm.server.launch", run_name="__main__")
    assert not ended.value.code
    (settings,) = runs
    assert settings.server.host == "0.0.0.0"
    assert settings.server.max_prefill_tokens == 128
    assert settings.quantization.method == "compressed-tensors"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo"], ("demo", "127.0.0.1", 30000)),
        (["demo", "--port", "81", "--host", "::1"], ("demo", "::1", 81)),
        (["--port=81", "demo", "--server.dtype", "bfloat16"], ("demo", "127.0.0.1", 81)),
        (["demo", "--server.port", "82", "--server.disable_radix_cache"], ("demo", "127.0.0.1", 82)),
        (["--server.model_path", "demo", "--server.port=82"], ("demo", "127.0.0.1", 82)),
    ],
)
def test_serve(runs, arguments, expected):
    result = CliRunner().invoke(launch.serve, arguments)
    assert result.exit_code == 0, result.output
    server = runs[0].server
    assert (server.model_path, server.host, server.port) == expected


@pytest.mark.parametrize(
    "arguments", [["demo", "--server.typo", "1"], ["demo", "--port", "0"], ["demo", "--port", "x"], []]
)
def test_serve_with_wrong_flags(runs, arguments):
    result = CliRunner().invoke(launch.serve, arguments)
    assert result.exit_code == 2
    assert "error: " in result.stderr
    assert not runs


def test_interrupt_before_the_engine_is_there(monkeypatch, capsys):
    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "make_engine", interrupted)
    monkeypatch.setattr(launch, "configure_logging", lambda level: None)
    assert launch.main(["--server.model_path", "m", "--server.port", str(free_port())]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_before_the_server_is_there(monkeypatch, capsys, number):
    """Between the engine's start and the server's: the engine ends in order all the same."""

    class Interrupted(FakeEngine):
        def start(self):
            super().start()
            signal.raise_signal(number)

    engine = Interrupted()
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(launch, "make_engine", lambda settings: engine)
    monkeypatch.setattr(launch, "configure_logging", lambda level: None)
    try:
        assert launch.main(["--server.model_path", "m", "--server.port", str(free_port())]) == 0
        assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
    assert engine.state == "stopped"
    assert capsys.readouterr().err == ""


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_serve_help_lists_the_flags(runs):
    result = CliRunner().invoke(launch.serve, ["--help"])
    assert result.exit_code == 0
    assert "--server.max_total_tokens" in result.output


def test_plugin_registers_serve():
    (spec,) = plugin.pymllm_commands()
    assert spec.name == "serve"
    assert spec.load() is launch.serve


def test_listen():
    sock = listen.listen("127.0.0.1", 0)
    with sock, socket.create_connection(sock.getsockname()):
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
            listen.listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="no address of this machine"):
        listen.listen("192.0.2.1", 30000)
    with pytest.raises(ConfigError, match=r"cannot be resolved.*--server.host"):
        listen.listen("no such host", 30000)
    if os.geteuid():
        with pytest.raises(ConfigError, match="privileges"):
            listen.listen("127.0.0.1", 1)


def test_urls():
    assert base_url("127.0.0.1", 1) == "http://127.0.0.1:1"
    assert base_url("::1", 1) == "http://[::1]:1"
    assert listen.is_loopback("127.9.9.9")
    assert listen.is_loopback("localhost")
    assert listen.is_loopback("::1")
    assert not listen.is_loopback("0.0.0.0")


@pytest.mark.parametrize(("server", "warns"), [({}, True), ({"api_key": "k"}, False)])
def test_open_host_without_key_warns(monkeypatch, capsys, server, warns):
    from pymllm_core.config import Settings

    monkeypatch.setattr(launch, "make_engine", lambda settings: FakeEngine())
    monkeypatch.setattr(launch, "listen", lambda host, port: socket.socket())
    monkeypatch.setattr("pymllm_server.serving.Server.run", lambda self, sockets: None)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        assert launch.run(Settings.of("m", host="0.0.0.0", **server)) == 0
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    assert ("without a key" in capsys.readouterr().err) == warns


def test_depth():
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    with pytest.raises(ApiError, match="nested deeper"):
        parse_json(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))
    assert len(parse_json(b"[" + b"[]," * 1000 + b"[]]")) == 1001
