"""Processor time that the server spends on a request and on a piece of its answer; one JSON line a round.

usage: python benchmarks/server_cost.py [MODEL] [--rounds 5] [--at-once 64]

The server is the real one, with the engine's process on the other side of its pipe, but there nothing is computed:
each step sleeps, long enough for all pieces to be sent one by one, and gives each request a token. MODEL (`demo`)
gives tokenizer and limits. Waves of requests come as `pymllm bench serve` sends them. `arrive_ms` is the time from
the submission of a wave's first request to that of its last, for each of them (with what was left of the wave
before); `request_ms` that of a request with one token, whole; `piece_us` what each further token adds. Compare the
smallest of several rounds: whatever else runs on the machine makes all of them larger.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx

from pymllm_core.bench.client import LoadClient
from pymllm_core.bench.workload import Range, random_asks
from pymllm_core.engine.status import EngineStats
from pymllm_core.output import Delta, Timings, Usage
from pymllm_core.request import Request

PAUSE_S, STEP_S = 0.25, 0.02
"""How long a wave may take to arrive, and a step."""
PROMPT = 128


class Idle:
    """As much of an `Engine` as its loop calls."""

    processor = None

    def __init__(self) -> None:
        self.made: dict[str, int] = {}
        self.requests: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add(self, request: Request) -> None:
        self.requests[request.id], self.made[request.id] = request, 0

    def abort(self, request_id: str) -> None:
        self.requests.pop(request_id, None)

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.requests))

    def step(self) -> list[Delta]:
        time.sleep(STEP_S if all(self.made[name] for name in self.requests) else PAUSE_S)
        return [self._next(request) for request in [*self.requests.values()]]

    def _next(self, request: Request) -> Delta:
        self.made[request.id] = made = self.made[request.id] + 1
        usage = Usage(len(request.token_ids), made)
        token = (request.token_ids[made % PROMPT],)
        if made < (request.params.max_tokens or 1):
            return Delta(request.id, "", token, usage)
        del self.requests[request.id]
        return Delta(request.id, "", token, usage, "length", timings=Timings(0.0, 0.0, 1.0))


def load(settings: Any, progress: Any, planned: Callable[[Any], None], cancel: threading.Event) -> Any:
    """A `loop.Load`."""
    from pymllm_core.engine.build import assemble

    planned(assemble(settings, progress=lambda *_: None, weights=True).plan)
    return Idle()


def serve(model: str, port: int) -> None:
    """The server; for each line on stdin it tells its processor time, and that at its submissions since then."""
    from pymllm_core.config import Settings
    from pymllm_core.engine.async_engine import AsyncEngine
    from pymllm_server import launch

    class Watched(AsyncEngine):
        def submit(self, request: Request) -> Any:
            stream = super().submit(request)
            # A system call: at the ends of a wave only.
            submitted.append(time.process_time() if len(submitted) % at_once in (0, at_once - 1) else None)
            return stream

    submitted: list[float | None] = []
    at_once = int(sys.argv[3])
    fields = {"port": port, "device": "cpu", "engine_process": "on", "max_running_requests": at_once}
    settings = Settings.of(model, **fields)
    launch.make_engine = lambda settings: Watched(settings, load)

    def tell() -> None:
        for _ in sys.stdin:
            print(json.dumps([time.process_time(), submitted]), flush=True)
            submitted.clear()

    threading.Thread(target=tell, daemon=True).start()
    sys.exit(launch.run(settings))


class Server:
    """The server's process."""

    def __init__(self, model: str, at_once: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.at_once = f"http://127.0.0.1:{port}", at_once
        # Not this file itself: the engine's process finds `load` in a module of this name.
        command = [
            sys.executable,
            "-c",
            "import sys, server_cost; server_cost.serve(sys.argv[1], int(sys.argv[2]))",
        ]
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
        }
        self.process = subprocess.Popen(
            [*command, model, str(port), str(at_once)], cwd=sys.path[0], text=True, **pipes
        )
        while True:
            if self.process.poll() is not None:
                raise SystemExit("the server did not start; does `pymllm serve` with this model?")
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).json()["state"] == "ready":
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)

    def spent(self) -> SimpleNamespace:
        asking, answers = self.process.stdin, self.process.stdout
        assert asking is not None
        assert answers is not None
        asking.write("\n")
        asking.flush()
        seconds, submitted = json.loads(answers.readline())
        return SimpleNamespace(seconds=seconds, submitted=submitted)

    def send(self, waves: int, tokens: int, seed: int) -> tuple[float, list[float]]:
        """Processor seconds of all, and from a wave's first submission to its last."""

        async def run() -> None:
            asks = random_asks(waves * self.at_once, Range(PROMPT, PROMPT), Range(tokens, tokens), 1000, seed)
            async with LoadClient(self.url, common={"model": "default", "temperature": 0.0}) as client:
                failed = {one.error for one in await client.closed(asks, self.at_once)} - {None}
            if failed:
                raise SystemExit(f"requests failed: {failed}")

        before = self.spent().seconds
        asyncio.run(run())
        after = self.spent()
        ends = [each for each in after.submitted if each is not None]
        spans = [last - first for first, last in zip(ends[::2], ends[1::2], strict=True)]
        return after.seconds - before, spans[1:]  # the first wave opens connections


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=64)
    args = parser.parse_args()
    if args.at_once < 2:
        parser.error("--at-once: allowed: 2 or more")
    server = Server(args.model, args.at_once)
    try:
        server.send(1, 4, 0)
        for number in range(args.rounds):
            short, spans = server.send(5, 1, 2 * number + 1)
            long, _ = server.send(5, 65, 2 * number + 2)
            count = 5 * args.at_once
            row = {
                "arrive_ms": 1e3 * statistics.median(spans) / (args.at_once - 1),
                "request_ms": 1e3 * short / count,
                "piece_us": 1e6 * (long - short) / (count * 64),
            }
            print(json.dumps({name: round(value, 3) for name, value in row.items()}), flush=True)
    finally:
        server.process.send_signal(signal.SIGINT)
        server.process.wait()


if __name__ == "__main__":
    main()
