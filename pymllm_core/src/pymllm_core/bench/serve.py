"""The load test: one row for each concurrency or request rate."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import aiohttp

from pymllm_core.bench.client import LoadClient, Outcome
from pymllm_core.bench.crowd import Crowd, Share
from pymllm_core.bench.load_report import report
from pymllm_core.bench.record import append_row, provenance
from pymllm_core.bench.workload import VOCAB_SIZE, Ask, Range, arrivals, file_asks, random_asks
from pymllm_core.errors import EngineError

ASKS_A_PROCESS = 8
"""Requests under way, or arriving a second, for which one client process is enough."""


@dataclass(frozen=True, slots=True)
class Load:
    """How many requests are under way, or how many arrive a second."""

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}" if self.rate is None else f"{self.rate:g} requests/s"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command's flags say; see `commands.bench_serve`."""

    url: str
    model: str | None
    api_key: str | None
    loads: tuple[Load, ...]
    num_requests: int
    inputs: Range
    outputs: Range
    vocab_size: int | None
    dataset: Path | None
    warmup: int
    temperature: float
    slo: Mapping[str, float]
    extra_body: Mapping[str, Any]
    timeout: float
    processes: int | None
    seed: int
    run_name: str
    result_filename: Path
    command: str

    def processes_of(self, load: Load) -> int:
        """How many client processes a load gets; each more than it has requests at once would have none."""
        if self.processes is not None:
            return min(self.processes, load.concurrency or self.processes)
        busy = ceil((load.concurrency or load.rate or 1) / ASKS_A_PROCESS)
        return max(1, min(busy, len(os.sched_getaffinity(0)) // 2))

    def asks(self, count: int, seed: int, server: Mapping[str, Any] | None) -> list[Ask]:
        """That many requests for a server that says this of itself."""
        if self.dataset is not None:
            return file_asks(self.dataset, count, self.outputs, seed)
        vocab_size = self.vocab_size or (server or {}).get("vocab_size") or VOCAB_SIZE
        return random_asks(count, self.inputs, self.outputs, vocab_size, seed)


async def measure(
    options: ServeOptions, begun: Callable[[Load], None], ended: Callable[[], None]
) -> AsyncIterator[tuple[dict[str, Any], list[Outcome]]]:
    """Test one load after another; each row is appended to the result file before it is yielded.

    begun is called before each load, ended after each of its requests. Raises EngineError where no server
    answers, or where it answers no warm-up request.
    """
    async with LoadClient(options.url, api_key=options.api_key, timeout=options.timeout, common={}) as client:
        model, server = await _identify(client, options)
    warm = options.asks(options.warmup, options.seed - 1, server)
    common = {"model": model, "temperature": options.temperature, **options.extra_body}
    origin = provenance(options.command)
    share = partial(Share, options.url, options.api_key, options.timeout, common)
    with Crowd(max(map(options.processes_of, options.loads))) as crowd:
        outcomes, _ = await crowd.send(share(tuple(warm), options.warmup), 1, lambda: None)
        failed = [o.error for o in outcomes if o.error is not None]
        if failed and len(failed) == len(warm):
            raise EngineError(f"no warm-up request was answered: {failed[0]}")
        for index, load in enumerate(options.loads):
            begun(load)
            # Other prompts for each load, or the later ones would hit the server's prefix cache.
            seed = options.seed + index
            asks = tuple(options.asks(options.num_requests, seed, server))
            after = () if load.rate is None else tuple(islice(arrivals(load.rate, seed), len(asks)))
            count = min(options.processes_of(load), len(asks))
            outcomes, seconds = await crowd.send(share(asks, load.concurrency, after), count, ended)
            measured = report(outcomes, options.slo)
            row = {
                "run_name": options.run_name,
                "url": options.url,
                "model": model,
                "concurrency": load.concurrency,
                "request_rate": load.rate,
                "input_len": None if options.dataset else str(options.inputs),
                "output_len": str(options.outputs),
                "dataset": None if options.dataset is None else str(options.dataset),
                "temperature": options.temperature,
                "seed": seed,
                **measured,
                "client_processes": count,
                "client_cpu_share": max(seconds) / measured["duration"],
                "server": server,
                **origin,
            }
            append_row(options.result_filename, row)
            yield row, outcomes


async def _identify(client: LoadClient, options: ServeOptions) -> tuple[str, Any]:
    """(the model's name, what the server says of itself or None)."""
    try:
        models = await client.get("/v1/models")
    except aiohttp.ClientResponseError as error:
        hint = {401: "; give --api-key", 503: "; is it still loading?"}.get(error.status, "")
        raise EngineError(f"{options.url}/v1/models answers HTTP {error.status}{hint}") from error
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
        raise EngineError(
            f"no server answers at {options.url} ({type(error).__name__}: {error}); start one with "
            "`pymllm serve MODEL`, or correct --url"
        ) from error
    names = [entry["id"] for entry in models.get("data", ())]
    if options.model is None and not names:
        raise EngineError(f"{options.url}/v1/models lists no model; name one with --model")
    try:
        server = await client.get("/server_info")
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError):
        server = None  # not one of ours
    return options.model or names[0], _digest(server)


def _digest(info: Any) -> dict[str, Any] | None:
    """What of a pymllm server's own description belongs to a result."""
    plan = info.get("plan") if isinstance(info, dict) else None
    if not isinstance(plan, dict):
        return None
    chosen = {name: choice["name"] for name, choice in plan["chosen"].items() if choice is not None}
    return {
        "version": info["version"],
        "device_name": plan["device"]["name"],
        "dtype": plan["dtype"],
        "vocab_size": plan.get("vocab_size"),
        **chosen,
        "kernels": {label: choice["name"] for label, choice in plan["kernels"].items()},
        "limits": plan["limits"],
        "settings": {name: info[name] for name in ("server", "quantization") if name in info},
    }
