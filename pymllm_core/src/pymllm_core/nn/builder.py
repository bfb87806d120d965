"""What a model's graph is built with: it makes the nodes and remembers them for loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from pymllm_core.errors import ConfigError
from pymllm_core.nn import ops
from pymllm_core.nn.attention import Attention
from pymllm_core.nn.embedding import Embedding, EmbeddingNode, QuantisedEmbedding
from pymllm_core.nn.int8_head import Int8HeadScheme
from pymllm_core.nn.linear import DenseScheme, Linear
from pymllm_core.nn.moe import (
    Expert,
    Experts,
    Formats,
    MoE,
    OneByOne,
    Pair,
    SingleExperts,
    StackedExpert,
    StackedExperts,
    common_format,
)
from pymllm_core.nn.norm import RMSNorm
from pymllm_core.nn.rope import RopeConfig, Rotary
from pymllm_core.nn.split_linear import SplitLinear
from pymllm_core.protocols.kernel import ExpertsKernel
from pymllm_core.protocols.quant import (
    LinearLayer,
    LinearPart,
    LinearScheme,
    QuantMethod,
    Reader,
    Stored,
    WeightSlot,
)

KernelFactory = Callable[[str, Mapping[str, int]], Any]
"""From an operation and its dimensions to the kernel that the plan chose."""


class Node(Protocol):
    """A part of the graph that has weights.

    One that not every token needs has an attribute `active_share`, the share of those that do (`nn.moe`).
    """

    def slots(self) -> list[WeightSlot]: ...

    def load(self, read: Reader, device: torch.device) -> None: ...


NodeT = TypeVar("NodeT", bound=Node)


class Builder:
    """Makes nodes. Names are those of the checkpoint; nothing is allocated until `Node.load`.

    dtype: the computation's. max_positions: the longest sequence of this engine. kernel: see
    `KernelFactory`. quant: the checkpoint's quantisation method, None for none. stored: names and shapes of
    the checkpoint's tensors, None where they are not known. int8_head: quantise the output head at loading.
    graph_safe: whether all nodes made so far may be captured in a CUDA graph.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        max_positions: int,
        kernel: KernelFactory,
        quant: QuantMethod | None = None,
        stored: Stored | None = None,
        int8_head: bool = False,
    ) -> None:
        self.dtype = dtype
        self.max_positions = max_positions
        self.nodes: list[Node] = []
        self.ignored: set[str] = set()
        self.graph_safe = True
        self.head: Linear | None = None
        self._kernel = kernel
        self._quant = quant
        self._stored = stored
        self._int8_head = int8_head

    def linear(
        self,
        prefix: str,
        parts: Mapping[str, int],
        in_features: int,
        *,
        bias: bool = False,
        act: str | None = None,
    ) -> Linear | SplitLinear:
        """A fused linear of the projections `parts` (name below `prefix`: rows), in this order.

        act ``silu_mul`` makes the result silu(first half) · second half.
        """
        layer = LinearLayer(
            tuple(LinearPart(f"{prefix}.{name}", rows) for name, rows in parts.items()),
            in_features,
            bias=bias,
            act=act,
        )
        return self._add(self._linear(layer, self._formats(layer)))

    def moe(
        self,
        prefix: str,
        *,
        hidden_size: int,
        width: int,
        num_experts: int,
        top_k: int,
        renormalise: bool,
    ) -> MoE:
        """The node of ``{prefix}.gate``, a router, and ``{prefix}.experts.N``, SwiGLUs of `width`.

        renormalise: the weights of a token's experts sum to 1 (``norm_topk_prob``).
        """
        part = LinearPart(f"{prefix}.gate", num_experts)
        router = self._add(self._make(LinearLayer((part,), hidden_size, module="Router")))
        route = self._kernel(ops.MOE_ROUTE, {"experts": num_experts, "top_k": top_k})
        layers: list[Pair[LinearLayer]] = []
        for index in range(num_experts):
            name = f"{prefix}.experts.{index}"
            gate_up = (LinearPart(f"{name}.gate_proj", width), LinearPart(f"{name}.up_proj", width))
            down = (LinearPart(f"{name}.down_proj", hidden_size),)
            layers.append((LinearLayer(gate_up, hidden_size, act="silu_mul"), LinearLayer(down, width)))
        formats = [(self._formats(gate_up), self._formats(down)) for gate_up, down in layers]
        experts = self._experts(*common_format(formats, top_k), layers, formats, top_k / num_experts)
        self.graph_safe = self.graph_safe and experts.graph_safe
        return MoE(router, route, experts, top_k=top_k, renormalise=renormalise)

    def lm_head(self, name: str, embedding: EmbeddingNode, *, tied: bool) -> Linear:
        """The output head. A tied head reads the embedding's tensors; a stored copy of them is ignored.

        tied is what config.json says. In a quantised checkpoint what is stored decides instead: a quantised
        head is read whatever was tied before, and a head that is not stored is tied.
        """
        if self._quant is not None and self._stored is not None:
            quantised = any(
                f"{name}.{suffix}" in self._stored for suffix in ("weight_packed", "weight_scale")
            )
            tied = not quantised and (tied or f"{name}.weight" not in self._stored)
        module = "Linear"
        if tied:
            self.ignored.add(f"{name}.weight")
            name, module = embedding.name, "Embedding"
        part = LinearPart(name, embedding.vocab_size)
        layer = LinearLayer((part,), embedding.hidden_size, module=module)
        scheme = None
        if self._int8_head:
            if self._scheme(layer) is not None:
                raise ConfigError(
                    f"--quantization.lm_head int8 was asked for, but the checkpoint's {name} is quantised already; "
                    "leave the flag out"
                )
            scheme = Int8HeadScheme(layer, self.dtype)
        self.head = self._add(self._make(layer, scheme))
        return self.head

    def _experts(
        self,
        operation: str,
        shape: Mapping[str, int],
        layers: list[Pair[LinearLayer]],
        formats: list[Pair[Formats]],
        share: float,
    ) -> Experts:
        """By the kernel of `operation`, or by linears where that is `OneByOne`. Pairs: gate and up, and down."""
        kernel = self._kernel(operation, shape)
        if isinstance(kernel, OneByOne):
            return self._single_experts(layers, formats, share)
        return self._stacked_experts(kernel, formats, share)

    def _single_experts(
        self, layers: list[Pair[LinearLayer]], formats: list[Pair[Formats]], share: float
    ) -> SingleExperts:
        experts = []
        for (gate_up, down), (first, second) in zip(layers, formats, strict=True):
            expert = Expert(self._linear(gate_up, first), self._linear(down, second), share)
            experts.append(self._add(expert))
        return SingleExperts(experts)

    def _stacked_experts(
        self, kernel: ExpertsKernel, formats: list[Pair[Formats]], share: float
    ) -> StackedExperts:
        experts = StackedExperts(kernel, len(formats))
        for index, (gate_up, down) in enumerate(formats):
            self._add(StackedExpert(experts, index, [*gate_up, *down], share))
        return experts

    def _formats(self, layer: LinearLayer) -> Formats:
        """How a fused linear is stored: as one, or each part by itself."""
        layers = [layer]
        if self._quant is not None and not self._quant.fuses(layer, self._stored):
            layers = [dataclasses.replace(layer, parts=(part,), act=None) for part in layer.parts]
        return [(one, self._scheme(one) or DenseScheme(one, self.dtype)) for one in layers]

    def _linear(self, layer: LinearLayer, formats: Formats) -> Linear | SplitLinear:
        linears = [self._make(*one) for one in formats]
        return linears[0] if len(linears) == 1 else SplitLinear(layer, linears)

    def _make(self, layer: LinearLayer, scheme: LinearScheme | None = None) -> Linear:
        scheme = scheme or self._scheme(layer) or DenseScheme(layer, self.dtype)
        return Linear(layer, scheme, self._kernel(scheme.operation, scheme.shape))

    def _scheme(self, layer: LinearLayer) -> LinearScheme | None:
        return self._quant.linear(layer, self.dtype, self._stored) if self._quant is not None else None

    def embedding(self, name: str, vocab_size: int, hidden_size: int) -> Embedding | QuantisedEmbedding:
        layer = LinearLayer((LinearPart(name, vocab_size),), hidden_size, module="Embedding")
        scheme = self._scheme(layer)
        if scheme is not None:
            return self._add(QuantisedEmbedding(name, vocab_size, hidden_size, scheme))
        look_up = self._kernel(ops.EMBEDDING, {"hidden_size": hidden_size})
        return self._add(Embedding(name, vocab_size, hidden_size, self.dtype, look_up))

    def norm(self, name: str, size: int, eps: float) -> RMSNorm:
        return self._add(RMSNorm(name, size, eps, self.dtype))

    def rotary(self, rope: RopeConfig, head_dim: int, trained_positions: int) -> Rotary:
        return self._add(Rotary(rope, head_dim, self.max_positions, trained_positions))

    def attention(
        self,
        layer: int,
        *,
        head_dim: int,
        rotary: Rotary,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> Attention:
        """The attention node of decoder layer `layer`."""
        prep = self._kernel(ops.ATTENTION_PREP, {"head_dim": head_dim})
        return Attention(layer, prep, rotary, q_norm, k_norm)

    def _add(self, node: NodeT) -> NodeT:
        self.nodes.append(node)
        return node

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; a tensor that two nodes read is counted twice where both keep a copy."""
        return sum(map(_resident_bytes, self.nodes))

    @property
    def active_weight_bytes(self) -> int:
        """Bytes of the weights that one token needs: of routed experts those of `top_k`, of all else all."""
        return round(sum(_resident_bytes(node) * getattr(node, "active_share", 1.0) for node in self.nodes))


def _resident_bytes(node: Node) -> int:
    return node.resident_bytes if isinstance(node, Linear) else sum(slot.num_bytes for slot in node.slots())
