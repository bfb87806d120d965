"""A server that does what it is told, and ``pymllm bench serve`` against it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pymllm_core import cli

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves siblings unimportable

from load_server import Server


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    started = Server()
    yield started
    started.stop()


@pytest.fixture
def server(shared_server: Server) -> Server:
    shared_server.bodies.clear()
    shared_server.heads.clear()
    shared_server.most = 0
    return shared_server


@pytest.fixture
def bench(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[dict[str, Any]], str, str]]:
    """Runs the command; (exit code, all rows so far, what it printed, what it complained of)."""
    rows = tmp_path / "rows.jsonl"

    def run(*argv: str) -> tuple[int, list[dict[str, Any]], str, str]:
        common = ["--url", server.url, "--result-filename", str(rows)]
        code = cli.run(["bench", "serve", *common, *argv])
        lines = rows.read_text().splitlines() if rows.exists() else []
        captured = capsys.readouterr()
        return code, [json.loads(line) for line in lines], captured.out, captured.err

    return run
