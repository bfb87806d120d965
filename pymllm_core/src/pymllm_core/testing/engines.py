"""Engines on the CPU from chosen plugins only, driven by hand, with every position's logits recorded."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymllm_core.config import Settings
from pymllm_core.engine.batch import Batch
from pymllm_core.engine.build import assemble, build_engine
from pymllm_core.engine.engine import Engine
from pymllm_core.engine.runner import Launched
from pymllm_core.output import Completion, Delta
from pymllm_core.plugins import Candidate, Registry, build_registry
from pymllm_core.protocols.attention import ForwardContext
from pymllm_core.request import Request, SamplingParams

CORE = "pymllm_core.builtin.plugin"
TOY = "pymllm_core.testing.toy"


def registry_of(*modules: str) -> Registry:
    """A registry of the core and these plugin modules, whatever else is installed."""
    registry = build_registry([Candidate(module, module, "0", module) for module in (CORE, *modules)])
    assert not registry.failures, registry.failures
    return registry


def make_engine(folder: Path, *plugins: str, overlap: bool = False, **settings: Any) -> Engine:
    """An engine for the checkpoint in `folder`; float32 with the toy model's plugin, if nothing else is said."""
    # Several threads for products of such sizes take ten times as long as one.
    torch.set_num_threads(1)
    fields: dict[str, Any] = {"device": "cpu", "dtype": "float32", **settings}
    assembly = assemble(Settings.of(str(folder), **fields), registry_of(*(plugins or (TOY,))))
    return build_engine(assembly, overlap=overlap)


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths: random tokens of the toy model, none of its tokenizer's special ones."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 300) for _ in range(n)] for n in lengths]


def greedy(max_tokens: int | None = None, **fields: Any) -> SamplingParams:
    """Greedy sampling that runs to `max_tokens`."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **{"ignore_eos": True, **fields})


def run(engine: Engine, requests: Iterable[Request]) -> dict[str, Completion]:
    """Add all requests, step until nothing is left to do; the answers by request id."""
    deltas: dict[str, list[Delta]] = {}
    for request in requests:
        engine.add(request)
        deltas[request.id] = []
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    return {request_id: join(parts) for request_id, parts in deltas.items()}


def complete(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Completion]:
    """Answers to prompts of token ids, run together."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    requests = [
        Request(str(index), tuple(prompt), p)
        for index, (prompt, p) in enumerate(zip(prompts, each, strict=True))
    ]
    found = run(engine, requests)
    return [found[request.id] for request in requests]


def join(deltas: list[Delta]) -> Completion:
    """The deltas of one request as one answer; checks the rules of a stream of deltas."""
    assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    return Completion.join(deltas)


def check_idle(engine: Engine) -> None:
    """Nothing runs, and every page is free or kept by the cache, none of them locked."""
    scheduler = engine.scheduler
    pool, cache = scheduler.pool, scheduler.cache
    assert not scheduler.running
    assert not scheduler.waiting
    assert pool.free_pages + cache.kept_pages == pool.num_pages
    assert cache.evictable_pages == cache.kept_pages


class LogitsRecorder:
    """Records the logits of every position that an engine computes, through its real cache.

    computed: by request id, a list of (first position, rows [count, vocab]) in the order they were computed.
    """

    def __init__(self, engine: Engine) -> None:
        runner = engine._runner
        self._launch = runner.launch
        self._model = runner._model
        self._rows = torch.empty(0)
        self.computed: defaultdict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        runner.launch = self.launch  # type: ignore[method-assign]
        runner._model = self  # type: ignore[assignment]

    def forward(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
        wanted, ctx.output_rows = ctx.output_rows, None
        hidden = self._model.forward(input_ids, ctx)
        self._rows = self._model.logits(hidden).clone()
        return hidden if wanted is None else hidden[wanted]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)

    def launch(self, batch: Batch) -> Launched:
        launched = self._launch(batch)
        rows = self._rows.split([chunk.count for chunk in batch.chunks])
        for chunk, computed in zip(batch.chunks, rows, strict=True):
            self.computed[chunk.sequence.request.id].append((chunk.start, computed))
        return launched

    def compare(self, request_id: str, expected: Tensor) -> float:
        """The largest difference from `expected` [positions, vocab]; fails where a position is missing.

        Positions that came from the prefix cache are missing by right: those before the first chunk.
        """
        worst, reached = 0.0, self.computed[request_id][0][0]
        for start, rows in self.computed[request_id]:
            assert start <= reached
            worst = max(worst, float((rows - expected[start : start + len(rows)]).abs().max()))
            reached = max(reached, start + len(rows))
        assert reached == len(expected), f"only {reached} of {len(expected)} positions were computed"
        return worst
