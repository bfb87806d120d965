"""The plan: what will serve a model, why, who was refused and why, and how memory is divided.

Frozen data, made before any weight is read; the engine is built from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymllm_core.config import Settings
from pymllm_core.device import DeviceInfo
from pymllm_core.errors import MemoryPlanError, RequestError
from pymllm_core.request import Request
from pymllm_core.select import Choice
from pymllm_core.specs import (
    AttentionBackendSpec,
    CachePolicySpec,
    KernelSpec,
    ModelSpec,
    OutputParserSpec,
    QuantMethodSpec,
    Spec,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests may ask for; tokens and sequences."""

    context_length: int
    max_running_requests: int
    max_queued_requests: int | None
    max_prefill_tokens: int
    chunked_prefill_size: int
    max_total_tokens: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes. budget is the share of `available` that all together may take.

    graphs: captured decode steps, with the logits that they write; 0 where there are none.
    """

    available: int
    budget: int
    weights: int
    workspace: int
    graphs: int
    kv_bytes_per_token: int
    page_size: int
    num_pages: int

    @property
    def kv(self) -> int:
        return self.num_pages * self.page_size * self.kv_bytes_per_token

    @property
    def left(self) -> int:
        """What is left of the budget."""
        return self.budget - self.weights - self.workspace - self.graphs - self.kv


@dataclass(frozen=True)
class Plan:
    """See the module. kernels: by operation and dimensions, e.g. ``linear K=1024 N=4096``."""

    settings: Settings
    model_path: Path
    architecture: str
    dtype: str
    kv_dtype: str
    vocab_size: int
    device: DeviceInfo
    model: Choice[ModelSpec]
    quant: Choice[QuantMethodSpec] | None
    attention: Choice[AttentionBackendSpec]
    cache: Choice[CachePolicySpec]
    kernels: Mapping[str, Choice[KernelSpec]]
    parsers: Mapping[str, Choice[OutputParserSpec] | None]
    memory: MemoryPlan
    limits: Limits
    notes: tuple[str, ...]

    def check(self, request: Request) -> int:
        """How many tokens the request may generate. Raises RequestError where its prompt cannot fit."""
        limits, length = self.limits, len(request.token_ids)
        for limit, flag in (
            (limits.context_length, "context_length"),
            (limits.max_total_tokens, "max_total_tokens"),
        ):
            if length >= limit:
                raise RequestError(
                    f"the prompt has {length} tokens, but {flag} is {limit} and at least one token must be "
                    f"left for the answer; shorten the prompt or raise --server.{flag}",
                    param="prompt",
                    code="context_length_exceeded",
                )
        params, vocab = request.params, self.vocab_size
        if params.max_tokens is not None and params.max_tokens > limits.context_length:
            raise RequestError(
                f"max_tokens is {params.max_tokens}, but context_length is {limits.context_length}; lower it",
                param="max_tokens",
            )
        for name, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token in tokens:
                if not 0 <= token < vocab:
                    raise RequestError(
                        f"{name} names token {token}, outside the vocabulary of {vocab}", param=name
                    )
        room = min(limits.context_length, limits.max_total_tokens) - length
        return min(params.max_tokens or room, room)

    def to_json(self) -> dict[str, Any]:
        """For ``pymllm plan --json`` and ``/server_info``; holds no secrets."""
        return {
            "model": self.settings.server.model_path,
            "model_path": str(self.model_path),
            "architecture": self.architecture,
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype,
            "vocab_size": self.vocab_size,
            "device": {**dataclasses.asdict(self.device), "cpu_flags": sorted(self.device.cpu_flags)},
            "chosen": {
                "model": _choice(self.model),
                "quantisation": _choice(self.quant),
                "attention": _choice(self.attention),
                "cache": _choice(self.cache),
                **{f"{kind}_parser": _choice(choice) for kind, choice in self.parsers.items()},
            },
            "kernels": {name: _choice(choice) for name, choice in self.kernels.items()},
            "memory": {**dataclasses.asdict(self.memory), "kv": self.memory.kv},
            "limits": dataclasses.asdict(self.limits),
            "notes": list(self.notes),
        }


def _choice(choice: Choice[Any] | None) -> dict[str, Any] | None:
    if choice is None:
        return None
    spec: Spec = choice.spec
    return {
        "name": spec.name,
        "distribution": choice.distribution,
        "implementation": spec.implementation,
        "why": choice.why,
        "refused": [dataclasses.asdict(refusal) for refusal in choice.refused],
    }


def divide_memory(
    *,
    available: int,
    fraction: float,
    weights: int,
    workspace: int,
    graphs: int,
    kv_bytes_per_token: int,
    page_size: int,
    wanted_tokens: int | None,
    useful_tokens: int,
) -> MemoryPlan:
    """Give KV what weights, workspace and graphs leave of ``available · fraction``, as far as it is useful.

    wanted_tokens: the pool's size if the user set it. useful_tokens: more could never be occupied.
    Raises MemoryPlanError with the numbers and the flag to change.
    """
    budget = int(available * fraction)
    left = budget - weights - workspace - graphs
    per_page = kv_bytes_per_token * page_size
    numbers = (
        f"{_gib(available)} are free, mem_fraction_static={fraction:g} of it is {_gib(budget)}; weights need "
        f"{_gib(weights)}, workspace {_gib(workspace)}" + (f", CUDA graphs {_gib(graphs)}" if graphs else "")
    )
    if wanted_tokens is not None:
        pages = -(-wanted_tokens // page_size)
        if pages * per_page > left:
            raise MemoryPlanError(
                f"max_total_tokens={wanted_tokens} needs {_gib(pages * per_page)} of KV, which does not fit: "
                f"{numbers}. Lower --server.max_total_tokens to at most {max(left // per_page, 0) * page_size} "
                "or raise --server.mem_fraction_static"
            )
    else:
        pages = min(left // per_page, -(-useful_tokens // page_size))
        if pages < 1:
            raise MemoryPlanError(
                f"the model does not fit: {numbers}, and nothing is left for KV. Raise "
                "--server.mem_fraction_static, free memory, or take a smaller or quantised model"
            )
    return MemoryPlan(available, budget, weights, workspace, graphs, kv_bytes_per_token, page_size, pages)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
