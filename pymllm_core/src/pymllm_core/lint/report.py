"""``pymllm lint-checkpoint``: from a model's folder to a report. Reads config.json, the index and headers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pymllm_core.config import Settings
from pymllm_core.device import DeviceInfo
from pymllm_core.engine.choices import (
    architecture_of,
    attention_want,
    choose_attention,
    choose_kv_dtype,
    choose_quantisation,
    compute_dtype,
)
from pymllm_core.engine.headers import Scan, read_json, scan
from pymllm_core.engine.model_graph import ModelGraph, choose_model, make_graph
from pymllm_core.errors import PluginError, PymllmError
from pymllm_core.lint.device import ATTENTION, machine_findings
from pymllm_core.lint.files import file_findings
from pymllm_core.lint.kernels import kernel_findings, refusal_findings
from pymllm_core.lint.layers import ChosenKernels, LintBuilder
from pymllm_core.lint.rows import Row, graph_rows, stored_rows
from pymllm_core.lint.tensors import tensor_findings
from pymllm_core.lint.totals import Totals, totals
from pymllm_core.plugins import Registry
from pymllm_core.protocols.lint import Finding, LintInput, QuantLint
from pymllm_core.protocols.quant import Stored
from pymllm_core.specs import QuantMethodSpec, Want, load_attribute

_T = TypeVar("_T")
_ORDER = ("error", "warning", "note")


@dataclass(frozen=True)
class Report:
    """What serves a checkpoint, what is wrong with it, and what a token costs.

    architecture, dtype, kv_dtype, attention: None where that could not be decided; a finding says why.
    rows: the layers of the model's graph, or, without one, the stored modules.
    """

    model: str
    folder: Path
    device: DeviceInfo
    architecture: str | None
    dtype: str | None
    kv_dtype: str | None
    attention: str | None
    rows: tuple[Row, ...]
    totals: Totals
    findings: tuple[Finding, ...]

    def count(self, severity: str) -> int:
        """How many findings of this severity there are."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        device = self.device
        return {
            "model": self.model,
            "model_path": str(self.folder),
            "architecture": self.architecture,
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype,
            "device": {"type": device.type, "name": device.name, "capability": device.capability},
            "attention": self.attention,
            "layers": [dataclasses.asdict(row) for row in self.rows],
            "totals": dataclasses.asdict(self.totals),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "counts": {f"{severity}s": self.count(severity) for severity in _ORDER},
        }


def lint(
    settings: Settings,
    folder: Path,
    device: DeviceInfo,
    registry: Registry,
    *,
    imagined: bool = False,
    bandwidth: float | None = None,
    weights: bool = True,
) -> Report:
    """Check the checkpoint in `folder` for `device`. What is wrong with it becomes a finding, never an error.

    imagined: the device is not there, so kernels are not imported, and packages are judged by this machine.
    bandwidth: of the device's memory in GB/s, for the least time of a token. weights False: that no weights
    are there is no error.
    """
    found = scan(folder)
    findings = list(file_findings(folder, found, weights=weights))
    chosen = _Chosen(findings)
    try:
        config = read_json(folder / "config.json")
    except PymllmError as error:
        findings.append(Finding("error", "bad-config", ("config.json",), str(error)))
    else:
        stored = {name: tensor.shape for name, tensor in found.tensors.items()} or None
        chosen.choose(settings, registry, device, folder, config, stored)
        known = list(_quantisation(registry, config, found, chosen.graph))
        said = {finding.message for finding in known}
        findings = [*(finding for finding in findings if finding.message not in said), *known]
    graph = chosen.graph
    if graph is not None:
        findings += _of_graph(graph, found, findings, imagined=imagined)
        if imagined:
            findings += machine_findings(registry, _wants(chosen, device))
    return Report(
        settings.server.model_path,
        folder,
        device,
        chosen.architecture,
        chosen.dtype,
        chosen.kv_dtype,
        chosen.attention,
        tuple(graph_rows(graph) if graph is not None else stored_rows(found.tensors)),
        totals(found.tensors.values(), graph, chosen.kv_dtype, bandwidth),
        tuple(merged(findings)),
    )


class _Chosen:
    """The engine's choices, as far as they can be made; each refusal becomes a finding, and the next is tried."""

    def __init__(self, findings: list[Finding]) -> None:
        self._findings = findings
        self.architecture: str | None = None
        self.dtype: str | None = None
        self.kv_dtype: str | None = None
        self.attention: str | None = None
        self.attention_want: Want | None = None
        self.graph: ModelGraph | None = None

    def choose(
        self,
        settings: Settings,
        registry: Registry,
        device: DeviceInfo,
        folder: Path,
        config: Mapping[str, Any],
        stored: Stored | None,
    ) -> None:
        attempt = self._attempt
        before = len(self._findings)
        self.dtype = attempt("dtype", "dtype", lambda: compute_dtype(settings, config, device))
        want = Want(device, self.dtype or "float32")
        self.architecture = attempt("architecture", "architectures", lambda: architecture_of(config, folder))
        model = self.architecture and attempt(
            "architecture", "architectures", lambda: choose_model(registry, want, config, folder)
        )
        if model:
            attempt("config", "config.json", lambda: model.spec.load().shape(config))
        attempt(
            "quantisation",
            "quantization_config",
            lambda: choose_quantisation(registry, want, settings, config),
        )
        if len(self._findings) > before:
            return
        self.graph = attempt(
            "graph",
            "config.json",
            lambda: make_graph(
                settings, registry, device, folder, config, stored, kernels=ChosenKernels, builder=LintBuilder
            ),
        )
        if self.graph is None:
            return
        dtype, shape = self.graph.dtype, self.graph.shape
        kv_dtype = attempt("kv-dtype", "kv_cache_dtype", lambda: choose_kv_dtype(settings, dtype))
        if kv_dtype is not None:
            attention = attention_want(device, settings, shape, dtype, kv_dtype)
            self.kv_dtype, self.attention_want = kv_dtype, attention
            self.attention = attempt(
                "no-attention", "attention", lambda: choose_attention(registry, attention, settings).spec.name
            )

    def _attempt(self, code: str, where: str, choice: Callable[[], _T]) -> _T | None:
        try:
            return choice()
        except PymllmError as error:
            message = str(error)
        except Exception as error:  # a model plugin may raise anything
            message = f"{type(error).__name__}: {error}"
        self._findings.append(Finding("error", code, (where,), message))
        return None


def _quantisation(
    registry: Registry, config: Mapping[str, Any], found: Scan, graph: ModelGraph | None
) -> Iterator[Finding]:
    """What the installed quantisation methods know of trouble."""
    stored = config.get("quantization_config") or config.get("compression_config")
    method = str(stored.get("quant_method") or "compressed-tensors") if isinstance(stored, Mapping) else None
    modules = graph.builder.modules if graph and isinstance(graph.builder, LintBuilder) else {}
    for registered in registry.all(QuantMethodSpec):
        spec = registered.spec
        if spec.lint is None or method not in (None, spec.name):
            continue
        own = stored if isinstance(stored, Mapping) else None
        try:
            check: QuantLint = load_attribute(spec.lint)
        except PluginError as error:
            yield Finding("warning", "plugin", (spec.name,), str(error), "see `pymllm plugins`")
            continue
        yield from check(LintInput(config, own, found.tensors, modules))


def _of_graph(
    graph: ModelGraph, found: Scan, before: Iterable[Finding], *, imagined: bool
) -> Iterator[Finding]:
    """What only a graph can tell: layers, kernels and tensors."""
    builder, kernels = graph.builder, graph.kernels
    assert isinstance(builder, LintBuilder)
    assert isinstance(kernels, ChosenKernels)
    yield from refusal_findings(builder)
    yield from kernel_findings(builder, kernels, load=not imagined)
    if found.tensors:
        refused = [part.name for layer in builder.refused for part in layer.parts]
        named = [name for finding in before if finding.severity == "error" for name in finding.where]
        whole = not found.problems
        yield from tensor_findings(builder, found.tensors, [*refused, *named], whole=whole)


def _wants(chosen: _Chosen, device: DeviceInfo) -> Iterator[tuple[str, Want]]:
    """Everything that was chosen by situation, named as in `machine_findings`."""
    assert chosen.graph is not None
    assert isinstance(chosen.graph.kernels, ChosenKernels)
    for operation, shape in chosen.graph.kernels.asked:
        yield operation, Want(device, chosen.graph.dtype, shape)
    if chosen.attention_want is not None:
        yield ATTENTION, chosen.attention_want


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first; findings that differ only in their place are put together, repeated ones said once."""
    places: dict[Finding, dict[str, None]] = {}
    for finding in findings:
        place = places.setdefault(dataclasses.replace(finding, where=()), {})
        place.update(dict.fromkeys(finding.where))
    whole = [dataclasses.replace(finding, where=tuple(where)) for finding, where in places.items()]
    return sorted(whole, key=lambda finding: _ORDER.index(finding.severity))
