"""What a checkpoint weighs, and what a token costs: the bytes that decoding one must read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pymllm_core.engine.choices import kv_bytes_per_token
from pymllm_core.engine.graph import Graph
from pymllm_core.lint.layers import LOOKUP, LintBuilder
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

    weights_per_token: all weights but the embedding, of which one row is read. kv_per_token: keys and
    values of one token of context.
    """

    stored: Mapping[str, int]
    weights: Mapping[str, int]
    weights_per_token: int | None = None
    kv_per_token: int | None = None
    tokens: tuple[TokenCost, ...] = ()


def totals(
    tensors: Iterable[StoredTensor], graph: Graph | None, kv_dtype: str | None, bandwidth: float | None
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
    counted: set[str] = set()
    rows = 0
    for row in builder.rows:
        fresh = [slot for slot in row.slots if slot.name not in counted]
        weights[row.format] += sum(slot.num_bytes for slot in fresh)
        counted.update(slot.name for slot in fresh)
        size = sum(slot.num_bytes for slot in row.slots)
        rows += size // row.layer.out_features if row.operation == LOOKUP else size
    # What is in no row: norms.
    rest = {slot.name: slot.num_bytes for node in builder.nodes for slot in node.slots()}
    others = sum(size for name, size in rest.items() if name not in counted)
    weights["norms"] += others
    if kv_dtype is None:
        return Totals(dict(stored.most_common()), dict(weights.most_common()), rows + others)
    kv = kv_bytes_per_token(graph.shape, kv_dtype)
    contexts = dict.fromkeys(min(context, builder.max_positions) for context in CONTEXTS)
    return Totals(
        dict(stored.most_common()),
        dict(weights.most_common()),
        rows + others,
        kv,
        tuple(_cost(context, rows + others + kv * context, bandwidth) for context in contexts),
    )


def _cost(context: int, num_bytes: int, bandwidth: float | None) -> TokenCost:
    return TokenCost(context, num_bytes, None if bandwidth is None else num_bytes / (bandwidth * 1e9) * 1e3)
