"""Findings about what serves each layer: layers that are refused, operations without a fast kernel."""

from __future__ import annotations

from collections.abc import Iterator

from pymllm_core.errors import PluginError
from pymllm_core.lint.layers import ChosenKernels, LayerRow, LintBuilder
from pymllm_core.nn import ops
from pymllm_core.protocols.lint import Finding
from pymllm_core.specs import Needs

_QUANTISED = (ops.W4A16_LINEAR, ops.W8A16_LINEAR, ops.W8A8_LINEAR)


def refusal_findings(builder: LintBuilder) -> Iterator[Finding]:
    """An error for each refused layer; those of which the same is said come together."""
    for layer, message in builder.refused.items():
        first, names = layer.parts[0].name, tuple(part.name for part in layer.parts)
        yield Finding("error", "layer-refused", names, message.replace(first, first.rpartition(".")[2]))


def kernel_findings(builder: LintBuilder, kernels: ChosenKernels, *, load: bool) -> Iterator[Finding]:
    """load: import the chosen kernels, which only their own device can be expected to allow."""
    for operation, message in dict.fromkeys(kernels.refused):
        yield Finding("error", "no-kernel", (operation,), message)
    if load:
        for choice in {choice.spec.key: choice for choice in kernels.choices.values()}.values():
            try:
                choice.spec.load()
            except PluginError as error:
                advice = "see `pymllm doctor`"
                yield Finding("error", "broken-kernel", (choice.spec.key,), str(error), advice)
    for row in builder.rows:
        if row.operation in _QUANTISED and row.kernel is not None and row.kernel.spec.needs == Needs():
            yield _reference(row)


def _reference(row: LayerRow) -> Finding:
    """What has no needs serves everything: it is the definition in plain torch, and slow."""
    assert row.kernel is not None
    why = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in row.kernel.refused)
    names = tuple(part.name for part in row.layer.parts)
    message = f"{row.format}: only the reference kernel {row.kernel.spec.name} serves it, which is slow"
    advice = f"faster ones refused it ({why})" if why else f"no other kernel for {row.operation} is installed"
    return Finding("note", "reference-kernel", names, message, advice)
