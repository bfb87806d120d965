"""A running server with the demo model, started as its manual says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves siblings unimportable

START_LIMIT_S = 240.0


@dataclass(frozen=True)
class Served:
    """The address of a server, and its output so far."""

    url: str
    log: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def status_of(url: str) -> int | None:
    """The status of a GET past any proxy; None where nobody listens."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`python -m pymllm.server.launch` with the flags of the original's manual, the demo model and a free port."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    flags = (
        "--server.model_path demo --server.tokenizer_path demo --server.load_format safetensors "
        f"--server.host 127.0.0.1 --server.port {port} --server.attention_backend auto "
        "--server.gdn_decode_backend pytorch --server.mem_fraction_static 0.3 --server.max_running_requests 4 "
        "--server.max_total_tokens 2048 --server.max_prefill_tokens 128 --server.disable_cuda_graph "
        "--server.log_level info"
    )
    command = [sys.executable, "-m", "pymllm.server.launch", *flags.split()]
    log = folder / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, cwd=folder, env=dict(os.environ), stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while status_of(f"{url}/health") != 200:
            assert server.poll() is None, f"exit code {server.returncode}:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"not healthy in {START_LIMIT_S} s:\n{log.read_text()}"
            time.sleep(0.1)
        yield Served(url, log)
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
    assert server.returncode == 0, log.read_text()
