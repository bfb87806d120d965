"""What a step must move and compute, counted from the graph: the floor that a device's limits set.

Counted are weights in the checkpoint's format, one row of the embedding a token, and keys and values. Not
counted are activations, which stay in caches, and what a kernel reads beside the format (repacked copies).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymllm_core.nn import ops
from pymllm_core.nn.builder import Builder, Node
from pymllm_core.nn.embedding import Embedding, QuantisedEmbedding
from pymllm_core.nn.linear import Linear
from pymllm_core.nn.moe import Expert, StackedExpert
from pymllm_core.nn.split_linear import SplitLinear
from pymllm_core.protocols.model import ModelShape
from pymllm_core.protocols.quant import LinearLayer, LinearScheme

if TYPE_CHECKING:
    from pymllm_core.engine.build import Assembly

INT8 = "int8"


@dataclass(frozen=True, slots=True)
class Work:
    """bytes: read or written once at least. flops: by kind of arithmetic, a dtype's name or ``int8``.

    A multiplication and an addition are two operations.
    """

    bytes: float
    flops: Mapping[str, float]

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


class ModelCost:
    """The counts of one model as its builder made it; its weights need not be loaded.

    dtype: the computation's. kv_bytes: keys and values of one token.
    """

    def __init__(self, builder: Builder, shape: ModelShape, dtype: str, kv_bytes: int) -> None:
        self._shape = shape
        self._dtype = dtype
        self._kv_bytes = kv_bytes
        # Bytes of what every step reads, and of routed experts by the share of the tokens that need them.
        self._fixed = 0
        self._routed: Counter[float] = Counter()
        self._embedding_row = 0.0
        self._products: defaultdict[str, float] = defaultdict(float)
        self._head: Counter[str] = Counter()
        for node in builder.nodes:
            size = (
                node.resident_bytes
                if isinstance(node, Linear)
                else sum(slot.num_bytes for slot in node.slots() if not slot.optional)
            )
            if isinstance(node, Embedding | QuantisedEmbedding):
                self._embedding_row += size / node.vocab_size
                continue
            share = 1.0
            if isinstance(node, Expert | StackedExpert):
                share = node.active_share
                self._routed[share] += size
            else:
                self._fixed += size
            for layer, scheme in _formats(node):
                kind = INT8 if scheme.operation == ops.W8A8_LINEAR else self._dtype
                count = 2 * layer.in_features * layer.out_features
                if node is builder.head:
                    self._head[kind] += count
                else:
                    self._products[kind] += count * share

    @property
    def weight_bytes(self) -> int:
        """Of the weights that a step of one token reads: everything but the embedding's rows and idle experts."""
        return round(self._fixed + sum(size * share for share, size in self._routed.items()))

    @classmethod
    def of(cls, assembly: Assembly) -> ModelCost:
        """The counts of an engine's model."""
        plan = assembly.plan
        return cls(assembly.builder, assembly.shape, plan.dtype, plan.memory.kv_bytes_per_token)

    def prefill(self, batch: int, length: int) -> Work:
        """`batch` prompts of `length` tokens in one step; the head computes the last row of each."""
        pairs = length * (length + 1) / 2  # causal
        return self._work(batch * length, batch, batch * pairs, batch * length)

    def decode(self, batch: int, context: float) -> Work:
        """One token of `batch` sequences of `context` tokens, this one included (a mean is good)."""
        return self._work(batch, batch, batch * context, batch * context)

    def _work(self, tokens: float, heads: float, pairs: float, cached: float) -> Work:
        """pairs: of query and key. cached: tokens whose keys and values are read or written."""
        shape = self._shape
        flops = {kind: count * tokens for kind, count in self._products.items()}
        for kind, count in self._head.items():
            flops[kind] = flops.get(kind, 0) + count * heads
        # Scores, and the weighted sum of values: 2 · head_dim operations a pair each.
        attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs
        flops[self._dtype] = flops.get(self._dtype, 0) + attention
        # A step reads those experts that at least one of its tokens needs, as if tokens chose independently.
        routed = sum(size * (1 - (1 - share) ** tokens) for share, size in self._routed.items())
        return Work(self._fixed + routed + tokens * self._embedding_row + cached * self._kv_bytes, flops)


def _formats(node: Node) -> list[tuple[LinearLayer, LinearScheme]]:
    """The products of a node, and how their weights are stored."""
    if isinstance(node, Expert | StackedExpert):
        return node.formats
    linears = node.parts if isinstance(node, SplitLinear) else [node]
    return [(linear.layer, linear.scheme) for linear in linears if isinstance(linear, Linear)]


def mean_context(input_len: int, output_len: int) -> float:
    """The mean length of a sequence over its ``output_len - 1`` decode steps, the new token included."""
    return input_len + output_len / 2
