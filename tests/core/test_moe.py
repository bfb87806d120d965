"""Routed experts: which experts a token gets, what their sum is, and how their weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from pymllm_core.builtin.torch_kernels import TorchLinear, torch_route
from pymllm_core.errors import CheckpointError
from pymllm_core.nn import ops
from pymllm_core.nn.builder import Builder
from pymllm_core.nn.moe import OneByOne
from pymllm_core.nn.moe_ops import moe_experts, route
from pymllm_core.protocols.quant import LinearLayer, LinearScheme, Stored, WeightSlot

E, K, H, WIDTH = 7, 3, 24, 10


class StackedTorch:
    """A grouped kernel: the definition over stacked weights. It also says when its weights came."""

    graph_safe = True
    packs = 0

    def pack(self, gate_up: dict[str, Tensor], down: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        self.packs += 1
        return gate_up["weight"], down["weight"]

    def apply(
        self, x: Tensor, weights: Tensor, ids: Tensor, packed: Any, *, residual: Tensor | None = None
    ) -> Tensor:
        y = moe_experts(x, weights, ids, *packed)
        return y if residual is None else y + residual


def builder_of(kernel: Any, asked: list[tuple[str, dict[str, int]]] | None = None, **fields: Any) -> Builder:
    def choose(operation: str, shape: Mapping[str, int]) -> Any:
        if asked is not None:
            asked.append((operation, dict(shape)))
        if operation == ops.MOE_ROUTE:
            return torch_route()
        return kernel if "experts" in operation else TorchLinear()

    return Builder(dtype=fields.pop("dtype", torch.float32), max_positions=8, kernel=choose, **fields)


def moe_of(builder: Builder, *, renormalise: bool = True) -> Any:
    return builder.moe("mlp", hidden_size=H, width=WIDTH, num_experts=E, top_k=K, renormalise=renormalise)


def stored_weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"mlp.gate.weight": (E, H)}
    for index in range(E):
        name = f"mlp.experts.{index}"
        shapes |= {f"{name}.{part}_proj.weight": (WIDTH, H) for part in ("gate", "up")}
        shapes[f"{name}.down_proj.weight"] = (H, WIDTH)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def load(builder: Builder, tensors: Mapping[str, Tensor]) -> None:
    def read(slot: WeightSlot) -> Tensor:
        assert tensors[slot.name].shape == slot.shape
        return tensors[slot.name]

    for node in builder.nodes:
        node.load(read, torch.device("cpu"))


def by_hand(x: Tensor, tensors: Mapping[str, Tensor], renormalise: bool) -> Tensor:
    """Token by token, expert by expert, in float64."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    rows = []
    for row in x.double():
        probabilities = (wide["mlp.gate.weight"] @ row).softmax(-1).tolist()
        best = sorted(range(E), key=lambda e: (-probabilities[e], e))[:K]
        total = sum(probabilities[e] for e in best) if renormalise else 1.0
        y = torch.zeros(H, dtype=torch.float64)
        for e in best:
            gate, up, down = (wide[f"mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down"))
            hidden = gate @ row
            y += probabilities[e] / total * (down @ (hidden * hidden.sigmoid() * (up @ row)))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", [OneByOne(), StackedTorch()], ids=["one-by-one", "stacked"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_the_sum_over_experts(kernel: Any, renormalise: bool, tokens: int) -> None:
    builder = builder_of(kernel)
    moe, tensors = moe_of(builder, renormalise=renormalise), stored_weights()
    load(builder, tensors)
    x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(1))
    expected = by_hand(x, tensors, renormalise)
    # Sums of 24 products of about 1 in float32.
    torch.testing.assert_close(moe(x), expected.float(), atol=1e-5, rtol=0)
    residual = torch.randn(tokens, H)
    torch.testing.assert_close(moe(x, residual=residual), expected.float() + residual, atol=1e-5, rtol=0)


def test_each_token_gets_the_same_in_any_batch() -> None:
    """In float64, where a product's blocks cannot show: what is left is the order of the experts' sum."""
    builder = builder_of(OneByOne(), dtype=torch.float64)
    moe = moe_of(builder)
    load(builder, stored_weights())
    x = torch.randn(40, H, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together = moe(x)
    alone = torch.cat([moe(row[None]) for row in x])
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(moe(x[shuffled]).float(), together[shuffled].float())
    assert torch.equal(alone.float(), together.float())


@pytest.mark.parametrize("renormalise", [True, False])
def test_of_equal_experts_the_first_is_taken(renormalise: bool) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [2.0] * 5, [0.0, -1.0, 0.0, -1.0, 5.0]])
    weights, ids = route(logits, 2, renormalise)
    assert ids.tolist() == [[1, 2], [0, 1], [4, 0]]
    probabilities = logits.softmax(-1)
    expected = probabilities.gather(1, ids)
    if renormalise:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected)


def test_route_of_large_logits_and_many_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randint(0, 9, (200, 128), generator=generator) * 50).float()  # full of ties, and large
    weights, ids = route(logits, 8, True)
    for row, found in zip(logits.tolist(), ids.tolist(), strict=True):
        assert found == sorted(range(128), key=lambda e: (-row[e], e))[:8]
    torch.testing.assert_close(weights.sum(-1), torch.ones(200))


def test_an_expert_that_overflows_concerns_only_those_who_chose_it() -> None:
    tensors = stored_weights()
    tensors["mlp.experts.2.up_proj.weight"].fill_(torch.inf)
    x = torch.randn(30, H, generator=torch.Generator().manual_seed(4))
    for kernel in (OneByOne(), StackedTorch()):
        builder = builder_of(kernel)
        moe = moe_of(builder)
        load(builder, tensors)
        chose = (route(x @ tensors["mlp.gate.weight"].T, K, True)[1] == 2).any(-1)
        assert 0 < int(chose.sum()) < 30
        assert torch.equal(moe(x).isfinite().all(-1), ~chose)


def test_weights_come_expert_by_expert_and_are_packed_once() -> None:
    kernel = StackedTorch()
    builder = builder_of(kernel)
    moe_of(builder)
    router, *experts = builder.nodes
    assert [slot.name for slot in router.slots()] == ["mlp.gate.weight"]
    assert len(experts) == E
    for index, node in enumerate(experts):
        assert {slot.name.rpartition(".experts.")[2].split(".")[0] for slot in node.slots()} == {str(index)}
    tensors = stored_weights()
    for count, node in enumerate(builder.nodes):
        assert kernel.packs == 0, f"after {count} of {E + 1} nodes"
        node.load(lambda slot: tensors[slot.name], torch.device("cpu"))
    assert kernel.packs == 1


@pytest.mark.parametrize(("kernel", "safe"), [(OneByOne(), False), (StackedTorch(), True)])
def test_what_the_builder_says_of_experts(kernel: Any, safe: bool) -> None:
    asked: list[tuple[str, dict[str, int]]] = []
    builder = builder_of(kernel, asked)
    builder.linear("o", {"proj": 8}, 4)
    assert builder.graph_safe
    assert builder.active_weight_bytes == builder.weight_bytes == 8 * 4 * 4
    moe_of(builder)
    assert builder.graph_safe == safe
    experts, rest = E * 3 * WIDTH * H * 4, (8 * 4 + E * H) * 4
    assert builder.weight_bytes == rest + experts
    assert builder.active_weight_bytes == round(rest + experts * K / E)
    assert ("moe_experts", {"experts": E, "top_k": K, "K": H, "N": 2 * WIDTH}) in asked
    assert ("moe_route", {"experts": E, "top_k": K}) in asked


class HalfQuantised:
    """Stores what `wanted` says as one byte a weight; how is not looked at."""

    class Scheme:
        name, operation = "fake", ops.W8A16_LINEAR

        def __init__(self, layer: LinearLayer, extra: bool) -> None:
            self.shape: Mapping[str, int] = {
                "K": layer.in_features,
                "N": layer.out_features,
                "group_size": layer.in_features,
            }
            self._layer, self._extra = layer, extra

        def slots(self) -> list[WeightSlot]:
            shape = (self._layer.out_features, self._layer.in_features)
            return [WeightSlot(f"{self._layer.parts[0].name}.codes", shape, torch.int8)]

        def load(self, read: Any, device: torch.device) -> dict[str, Tensor]:
            codes = torch.zeros(self._layer.out_features, self._layer.in_features, dtype=torch.int8)
            return {"weight": codes, "scale": codes[:, :1].float(), **({"odd": codes} if self._extra else {})}

    def __init__(self, wanted: Any, fused: Any = lambda _: True, extra: Any = lambda _: False) -> None:
        self.wanted, self.fused, self.extra = wanted, fused, extra

    def fuses(self, layer: LinearLayer, stored: Stored | None) -> bool:
        return bool(self.fused(layer.parts[0].name))

    def linear(self, layer: LinearLayer, dtype: torch.dtype, stored: Stored | None) -> LinearScheme | None:
        name = layer.parts[0].name
        return self.Scheme(layer, self.extra(name)) if self.wanted(name) else None


@pytest.mark.parametrize(
    ("quant", "operation"),
    [
        (HalfQuantised(lambda name: "experts" in name), "w8a16_moe_experts"),
        (HalfQuantised(lambda name: "gate_proj" in name), "mixed_moe_experts"),
        (HalfQuantised(lambda name: "experts.3" in name), "mixed_moe_experts"),
        (
            HalfQuantised(lambda name: "experts" in name, lambda name: "6.gate" not in name),
            "mixed_moe_experts",
        ),
    ],
    ids=["all", "gate and up", "one expert", "parts of one expert"],
)
def test_experts_that_are_stored_unlike_are_told_apart(quant: Any, operation: str) -> None:
    asked: list[tuple[str, dict[str, int]]] = []
    moe_of(builder_of(OneByOne(), asked, quant=quant))
    found = {name for name, _ in asked if "experts" in name}
    assert found == {operation}
    if operation == "w8a16_moe_experts":
        sizes = {"group_size": H, "down_group_size": WIDTH}
        assert ({"experts": E, "top_k": K, "K": H, "N": 2 * WIDTH} | sizes) in [s for _, s in asked]


def test_stacked_experts_of_unlike_tensors_are_refused() -> None:
    quant = HalfQuantised(lambda name: "experts" in name, extra=lambda name: "experts.4" in name)
    builder = builder_of(StackedTorch(), quant=quant)
    moe_of(builder)
    message = r"experts beside mlp\.experts\.4\.gate_proj are not stored alike: only some have odd"
    with pytest.raises(CheckpointError, match=message):
        load(builder, stored_weights())
