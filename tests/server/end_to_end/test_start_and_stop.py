"""How the program starts and ends: Ctrl-C, a process that is killed, a start that fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time

from served_program import HI, Program, require, tiny_flags


@contextlib.contextmanager
def streaming(program):
    """The lines of an answer that goes on for long, after the first."""
    body = {"messages": HI, "max_tokens": 7000, "ignore_eos": True, "stream": True}
    with program.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        yield lines


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
        with streaming(program) as lines:
            os.killpg(program.process.pid, signal.SIGINT)
            assert list(lines)[-1] == "data: [DONE]"
        assert program.process.wait(6) == 0
        assert not program.members()
        assert "Traceback" not in program.log.read_text()
    finally:
        program.close()


def test_an_engine_that_dies_is_told_to_all(tiny_folder, tmp_path):
    program = Program(tmp_path / "log", *tiny_flags(tiny_folder), "--server.engine_process", "on")
    try:
        program.wait(200)
        with streaming(program) as lines:
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
