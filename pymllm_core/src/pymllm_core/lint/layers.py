"""What serves each layer: the graph built by the engine's own choices, with refusals noted instead of raised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pymllm_core.device import DeviceInfo
from pymllm_core.engine.choices import Kernels
from pymllm_core.errors import PymllmError
from pymllm_core.nn.attention import Attention
from pymllm_core.nn.builder import Builder
from pymllm_core.nn.embedding import Embedding, QuantisedEmbedding
from pymllm_core.nn.linear import Linear
from pymllm_core.nn.moe import ONE_BY_ONE, Experts, Formats, Pair
from pymllm_core.nn.split_linear import SplitLinear
from pymllm_core.plugins import Registry
from pymllm_core.protocols.quant import LinearLayer, LinearPart, LinearScheme
from pymllm_core.select import Choice
from pymllm_core.specs import KernelSpec

LOOKUP = "embedding"
"""How the table names the look-up of rows, which is no named operation."""


class ChosenKernel:
    """Stands for a kernel that was chosen and not loaded; choice None: none fits."""

    fuses: frozenset[str] = frozenset()
    graph_safe = True

    def __init__(self, choice: Choice[KernelSpec] | None) -> None:
        self.choice = choice

    def pack(self, tensors: Any, *, act: str | None) -> Any:
        raise AssertionError("a graph that was made for its description holds no weights")

    apply: Any = pack


class ChosenKernels(Kernels):
    """The engine's choices without the kernels, which may need a device that is not here.

    asked: the operations and dimensions that the graph asked for. refused: why none serves one of them.
    """

    def __init__(self, registry: Registry, device: DeviceInfo, dtype: str) -> None:
        super().__init__(registry, device, dtype)
        self.asked: list[tuple[str, dict[str, int]]] = []
        self.refused: list[tuple[str, str]] = []

    def __call__(self, operation: str, shape: Mapping[str, int]) -> ChosenKernel:
        if (operation, dict(shape)) not in self.asked:
            self.asked.append((operation, dict(shape)))
        try:
            return ChosenKernel(self.choose(operation, shape))
        except PymllmError as error:
            self.refused.append((operation, str(error)))
            return ChosenKernel(None)


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One linear or embedding. format: the scheme in words; kernel None for look-ups and where none fits.

    tensors: names of what is read for it. num_bytes: once it is loaded.
    """

    layer: LinearLayer
    format: str
    operation: str
    kernel: Choice[KernelSpec] | None
    tensors: tuple[str, ...]
    num_bytes: int


class LintBuilder(Builder):
    """Notes what it builds. A layer that is refused is built unquantised, and counts for nothing."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.rows: list[LayerRow] = []
        self.split: list[LinearLayer] = []
        self.refused: dict[LinearLayer, str] = {}
        self.attentions: list[int] = []

    def _linear(self, layer: LinearLayer, formats: Formats) -> Linear | SplitLinear:
        made = super()._linear(layer, formats)
        if isinstance(made, SplitLinear):
            self.split.append(layer)
        return made

    def _experts(
        self,
        operation: str,
        shape: Mapping[str, int],
        layers: list[Pair[LinearLayer]],
        formats: list[Pair[Formats]],
        share: float,
    ) -> Experts:
        kernel: Any = self._kernel(operation, shape)  # a ChosenKernel, in the place of any
        if kernel.choice is None or kernel.choice.spec.implementation == ONE_BY_ONE:
            return self._single_experts(layers, formats, share)
        for gate_up, down in formats:
            for layer, scheme in (*gate_up, *down):
                self._note(layer, scheme, operation, kernel.choice, Linear(layer, scheme, kernel))
        return self._stacked_experts(kernel, formats, share)

    def _make(self, layer: LinearLayer, scheme: LinearScheme | None = None) -> Linear:
        made = super()._make(layer, scheme)
        assert isinstance(made.kernel, ChosenKernel)
        self._note(layer, made.scheme, made.scheme.operation, made.kernel.choice, made)
        return made

    def embedding(self, name: str, vocab_size: int, hidden_size: int) -> Embedding | QuantisedEmbedding:
        made = super().embedding(name, vocab_size, hidden_size)
        layer = LinearLayer((LinearPart(name, vocab_size),), hidden_size, module="Embedding")
        scheme = made.scheme if isinstance(made, QuantisedEmbedding) else None
        self._note(layer, scheme, LOOKUP, None, made)
        return made

    def attention(self, layer: int, **fields: Any) -> Attention:
        self.attentions.append(layer)
        return super().attention(layer, **fields)

    def _scheme(self, layer: LinearLayer) -> LinearScheme | None:
        try:
            return super()._scheme(layer)
        except PymllmError as error:
            self.refused[layer] = str(error)
            return None

    def _note(
        self,
        layer: LinearLayer,
        scheme: LinearScheme | None,
        operation: str,
        kernel: Choice[KernelSpec] | None,
        made: Linear | Embedding | QuantisedEmbedding,
    ) -> None:
        if layer in self.refused:
            return
        slots = [slot for slot in made.slots() if not slot.optional]
        size = made.resident_bytes if isinstance(made, Linear) else sum(slot.num_bytes for slot in slots)
        form = describe(scheme, self.dtype)
        self.rows.append(LayerRow(layer, form, operation, kernel, tuple(slot.name for slot in slots), size))

    @property
    def modules(self) -> dict[str, str]:
        """Every linear and embedding of the graph with its class, refused ones too, and a head that is tied."""
        layers = [*(row.layer for row in self.rows), *self.refused]
        heads = {name.removesuffix(".weight"): "Linear" for name in self.ignored}
        return {**heads, **{part.name: layer.module for layer in layers for part in layer.parts}}


def describe(scheme: LinearScheme | None, dtype: torch.dtype) -> str:
    """A scheme in a few words, e.g. ``W4A16 g128 sym``; the dimensions are those of `nn.ops`."""
    if scheme is None or scheme.name == "dense":
        return str(dtype).removeprefix("torch.")
    words, shape = [scheme.name], scheme.shape
    if "groups" in shape:
        words.append("channel" if shape["groups"] == 1 else f"g{shape['group_size']}")
    if "static" in shape:
        words.append("static" if shape["static"] else "dynamic")
    if "symmetric" in shape:
        words.append("sym" if shape["symmetric"] else "asym")
    if shape.get("g_idx"):
        words.append("g_idx")
    return " ".join(words)
