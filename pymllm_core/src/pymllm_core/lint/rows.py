"""The report's table: like layers in one row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from pymllm_core.engine.model_graph import ModelGraph
from pymllm_core.lint.layers import ChosenKernels, LayerRow, LintBuilder
from pymllm_core.lint.names import collapse, ranges
from pymllm_core.nn import ops
from pymllm_core.protocols.lint import StoredTensor
from pymllm_core.protocols.quant import LinearLayer


@dataclass(frozen=True, slots=True)
class Row:
    """Like layers. names: as in `names.collapse`, fused parts in one. count: how many layers.

    rows, columns: N and K of one layer's weight; None for attention, and where no graph is known.
    kernel: with its distribution; None for look-ups and where nothing serves it.
    """

    names: tuple[str, ...]
    count: int
    rows: int | None
    columns: int | None
    format: str
    operation: str | None
    kernel: str | None
    num_bytes: int


def graph_rows(graph: ModelGraph) -> list[Row]:
    """One row for all layers of one shape, format and kernel that have one place in their block."""
    builder = graph.builder
    assert isinstance(builder, LintBuilder)
    alike: dict[tuple[object, ...], list[LayerRow]] = defaultdict(list)
    for row in builder.rows:
        kernel = row.kernel.spec.key if row.kernel else None
        layer = row.layer
        ends = tuple(_without_numbers(part.name) for part in layer.parts)
        alike[ends, layer.out_features, layer.in_features, row.format, row.operation, kernel].append(row)
    rows = []
    for same in alike.values():
        first = same[0]
        chosen = first.kernel
        rows.append(
            Row(
                tuple(collapse(fused_name(row.layer) for row in same)),
                len(same),
                first.layer.out_features,
                first.layer.in_features,
                first.format,
                first.operation,
                None if chosen is None else f"{chosen.spec.name} ({chosen.distribution})",
                sum(row.num_bytes for row in same),
            )
        )
    return rows + _attention(graph, builder)


def _attention(graph: ModelGraph, builder: LintBuilder) -> list[Row]:
    """What stands between the projections: one row, it has no weights of its own but norms."""
    rows = []
    for operation, shape in graph.kernels.asked if isinstance(graph.kernels, ChosenKernels) else ():
        if operation == ops.ATTENTION_PREP:
            choice = graph.kernels(operation, shape).choice
            kernel = None if choice is None else f"{choice.spec.name} ({choice.distribution})"
            names = (f"attention of layers {ranges(builder.attentions)}",)
            rows.append(Row(names, len(builder.attentions), None, None, "", operation, kernel, 0))
    return rows


def fused_name(layer: LinearLayer) -> str:
    """``model.layers.0.self_attn.q_proj+k_proj+v_proj``."""
    prefix = layer.parts[0].name.rpartition(".")[0]
    same = all(part.name.rpartition(".")[0] == prefix for part in layer.parts)
    if not same or not prefix:
        return "+".join(part.name for part in layer.parts)
    return f"{prefix}.{'+'.join(part.name.rpartition('.')[2] for part in layer.parts)}"


def stored_rows(tensors: Mapping[str, StoredTensor]) -> list[Row]:
    """Without a graph: modules by what is stored for them."""
    modules: dict[str, list[tuple[str, StoredTensor]]] = defaultdict(list)
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        modules[module or name].append((kind, tensor))
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, stored in modules.items():
        what = ", ".join(
            f"{kind} {tensor.dtype} {list(tensor.shape)}" for kind, tensor in sorted(stored, key=_kind)
        )
        alike[_without_numbers(module), what].append(module)
    return [
        Row(
            tuple(collapse(names)),
            len(names),
            None,
            None,
            what,
            None,
            None,
            sum(tensor.num_bytes for name in names for _, tensor in modules[name]),
        )
        for (_, what), names in alike.items()
    ]


def _kind(entry: tuple[str, StoredTensor]) -> str:
    return entry[0]


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
