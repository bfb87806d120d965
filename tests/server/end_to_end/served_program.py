"""The real program in a process of its own, and what its clients ask."""

from __future__ import annotations

import contextlib
import importlib.util
import os
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


def tiny_flags(folder):
    return (
        *("--server.model_path", str(folder), "--server.load_format", "dummy", "--server.device", "cpu"),
        *("--server.max_total_tokens", "8192", "--server.max_running_requests", "4"),
        *("--server.served_model_name", "tiny"),
    )


def openai_client(program):
    return openai.OpenAI(base_url=f"{program.url}/v1", api_key="none", max_retries=0)
