"""Real servers on real sockets, before a fake engine."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pymllm_core.config import Settings
from pymllm_server.app import create_app
from pymllm_server.listen import listen
from pymllm_server.serving import Server

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves siblings unimportable

from server_fakes import FakeEngine


class Running:
    """A server in a thread."""

    def __init__(self, engine: FakeEngine, **server: Any) -> None:
        self.engine = engine
        self.settings = Settings.of("models/fake", served_model_name="fake", **server)
        self.app = create_app(engine, self.settings)
        self.state = self.app.state.server
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(self.app)
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.socket]))
        self.thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=20, trust_env=False)
        if not engine.load_s:
            self.wait(lambda: engine.state != "loading")

    def wait(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.005)

    def chat(self, content: str = "hi", **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(15)
        assert not self.thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Start servers: ``serve(FakeEngine(...), api_key="k")``; all are stopped at the end."""
    started: list[Running] = []

    def start(engine: FakeEngine | None = None, **server: Any) -> Running:
        running = Running(engine or FakeEngine(), **server)
        started.append(running)
        return running

    yield start
    for running in started:
        running.stop()
