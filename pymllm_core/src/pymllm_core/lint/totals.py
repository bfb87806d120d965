"""What a checkpoint weighs, and what a token costs: the bytes that decoding one must read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pymllm_core.bench.cost import ModelCost
from pymllm_core.engine.choices import kv_bytes_per_token
from pymllm_core.engine.model_graph import ModelGraph
from pymllm_core.lint.layers import LintBuilder
from pymllm_core.protocols.lint import StoredTensor

CONTEXTS = (1, 4096, 32768)
"""Tokens of context for which the cost of a token is worked out, as far as the model reaches."""


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Decoding one token of one sequence behind `context` tokens: bytes read at least.

    floor_ms: what reading them takes at the bandwidth that was given, None where none was.
    """

    context: int
    num_bytes: int
    floor_ms: float | None


@dataclass(frozen=True, slots=True)
class Totals:
    """Bytes. stored: of the tensors in the files, by dtype. weights: of what is loaded, by format; a tied
    table is counted once. The rest is known with a graph only.

    weights_per_token: all weights, of the embedding one row. kv_per_token: keys and values of one token of
    context. Both are counted as `bench.cost` counts them.
    """

    stored: Mapping[str, int]
    weights: Mapping[str, int]
    weights_per_token: int | None = None
    kv_per_token: int | None = None
    tokens: tuple[TokenCost, ...] = ()


def totals(
    tensors: Iterable[StoredTensor], graph: ModelGraph | None, kv_dtype: str | None, bandwidth: float | None
) -> Totals:
    """bandwidth: of the device's memory, in GB/s (10^9 bytes)."""
    stored: Counter[str] = Counter()
    for tensor in tensors:
        stored[tensor.dtype] += tensor.num_bytes
    if graph is None:
        return Totals(dict(stored.most_common()), {})
    builder = graph.builder
    assert isinstance(builder, LintBuilder)
    weights: Counter[str] = Counter()
    # A tied table is read by two layers, and held twice only where they hold it in unlike formats.
    for row in {(row.tensors, row.format): row for row in builder.rows}.values():
        weights[row.format] += row.num_bytes
    named = {name for row in builder.rows for name in row.tensors}
    slots = [slot for node in builder.nodes for slot in node.slots()]
    weights["norms"] = sum(s.num_bytes for s in slots if s.name not in named and not s.optional)
    kv = 0 if kv_dtype is None else kv_bytes_per_token(graph.shape, kv_dtype)
    cost = ModelCost(builder, graph.shape, graph.dtype, kv)
    contexts = dict.fromkeys(min(context, builder.max_positions) for context in CONTEXTS)
    return Totals(
        dict(stored.most_common()),
        dict(weights.most_common()),
        int(cost.decode(1, 0).bytes),
        kv or None,
        tuple(_cost(context, int(cost.decode(1, context).bytes), bandwidth) for context in contexts if kv),
    )


def _cost(context: int, num_bytes: int, bandwidth: float | None) -> TokenCost:
    return TokenCost(context, num_bytes, None if bandwidth is None else num_bytes / (bandwidth * 1e9) * 1e3)
