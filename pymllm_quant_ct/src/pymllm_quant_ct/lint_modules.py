"""Findings about modules: what the config says of each against what is stored for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pymllm_core.protocols.lint import Finding, Severity, StoredTensor
from pymllm_quant_ct.config import ROOT, Group
from pymllm_quant_ct.match import REGEX, Entry, Matcher, aliases
from pymllm_quant_ct.packing import words

_VISUAL = re.compile(r"(model\.)?visual\..*")
_FUSED = ("qkv_proj", "gate_up_proj")
_MEND = f"mend {ROOT}, or quantise again"


@dataclass(frozen=True, slots=True)
class Module:
    """A module and the tensors stored for it, by the last part of their names. kind: its class."""

    name: str
    kind: str
    stored: Mapping[str, StoredTensor]

    @property
    def quantised(self) -> bool:
        """Whether codes or scales are stored for it."""
        return "weight_packed" in self.stored or "weight_scale" in self.stored

    @property
    def plain(self) -> bool:
        """Whether it is a matrix that is stored as it was trained."""
        weight = self.stored.get("weight")
        return not self.quantised and weight is not None and len(weight.shape) == 2


def config_findings(
    matcher: Matcher, modules: Mapping[str, Module], known: Mapping[str, str]
) -> Iterator[Finding]:
    """known: the modules of the model's graph, whose shapes loading compares by itself."""
    for module in modules.values():
        if not (module.quantised or module.plain):
            continue
        entry = matcher.ignored_by(module.name, module.kind)
        group = None if entry is not None else matcher.group(module.name, module.kind)
        yield from _against_config(module, entry, group)
        if module.quantised and group is not None and group.weights is not None:
            yield from _extras(module, group)
            if module.name not in known:
                yield from _shapes(module, group)
    yield from _unmatched(matcher, modules, known)


def _against_config(module: Module, entry: Entry | None, group: Group | None) -> Iterator[Finding]:
    """Whether the config says of the module that it is quantised, and whether it is."""
    where = (module.name,)
    visual = _VISUAL.fullmatch(module.name) is not None
    # llm-compressor#1766 and #2641 (answers of "!!!!"): names moved from `visual.` to `model.visual.`, and
    # `ignore` missed them.
    other = entry is not None and entry.rank([module.name], module.kind) is None
    if module.quantised and entry is not None:
        if other:
            message = (
                f"quantised, because {entry.field} {entry.text!r} uses the other name of these modules, "
                "which the quantiser did not match"
            )
            advice = "quantise again with an `ignore` that matches both (re:.*visual.*)"
            yield Finding("error", "ignored-by-other-name", where, message, advice)
        else:
            message = f"stored quantised, but {entry.field} {entry.text!r} says that it is not"
            yield Finding("error", "quantised-but-ignored", where, message, _MEND)
    elif module.quantised and (group is None or group.weights is None):
        message = "stored quantised, but no group of the config targets it with weights"
        yield Finding("error", "quantised-without-group", where, message, _MEND)
    elif module.quantised and visual:
        message = (
            "the vision tower is quantised; where that was not meant, answers about images turned out garbage"
        )
        yield Finding("warning", "visual-quantised", where, message, "put re:.*visual.* into `ignore`")
    elif module.plain and other and entry is not None:
        message = (
            f"{entry.field} {entry.text!r} uses the other name of these modules; here both are understood"
        )
        advice = "other engines may take these modules for quantised"
        yield Finding("note", "ignored-by-other-name", where, message, advice)
    elif module.plain and group is not None and group.weights is not None:
        message = f"stored unquantised, although {group.field} targets it; it is served unquantised"
        advice = "put it into `ignore`: other engines may take it for quantised"
        yield Finding("note", "targeted-but-plain", where, message, advice)


def _extras(module: Module, group: Group) -> Iterator[Finding]:
    """Order of columns and zero points against the config."""
    assert group.weights is not None
    stored, weights, field = module.stored, group.weights, f"{ROOT}.{group.field}.weights"
    if "weight_g_idx" in stored:
        where = (f"{module.name}.weight_g_idx",)
        if weights.g_idx:
            message = "columns are reordered (actorder group), which few kernels serve"
            advice = 'quantise again with actorder "static", which costs nothing at run time'
            yield Finding("note", "g-idx", where, message, advice)
        else:
            message = f'an order of columns is stored, but {field}.actorder is not "group"'
            yield Finding("error", "g-idx", where, message, _MEND)
    zero_point, scale = stored.get("weight_zero_point"), stored.get("weight_scale")
    if zero_point is None or not weights.symmetric:
        return
    where = (f"{module.name}.weight_zero_point",)
    message = f"zero points are stored, but {field}.symmetric is true"
    if scale is not None and zero_point.shape == scale.shape:
        advice = "old versions store zeros; loading reads them, and refuses others"
        yield Finding("note", "zero-point", where, message, advice)
    else:
        advice = f"set {field}.symmetric to false if the weights are asymmetric, else remove them"
        yield Finding("error", "zero-point", where, message, advice)


def _shapes(module: Module, group: Group) -> Iterator[Finding]:
    """Codes, scales and zero points among themselves, for modules that no graph describes."""
    assert group.weights is not None
    weights, stored = group.weights, module.stored
    codes = stored.get("weight_packed" if group.packed else "weight")
    scale = stored.get("weight_scale")
    if codes is None or scale is None or len(codes.shape) != 2:
        return
    rows, width = codes.shape
    bits, wanted = weights.num_bits, "I32" if group.packed else "I8"
    name = "weight_packed" if group.packed else "weight"
    if codes.dtype != wanted:
        message = f"stored as {codes.dtype}, expected {wanted}"
        yield Finding("error", "wrong-dtype", (f"{module.name}.{name}",), message, _MEND)
    columns = width * 32 // bits if group.packed else width
    where = (f"{module.name}.weight_scale",)
    size = weights.group_size
    if size is not None:
        groups = scale.shape[-1] if scale.shape else 0
        covered = words(groups * size, bits) if group.packed else groups * size
        if scale.shape == (rows, groups) and covered == width:
            pass
        elif columns % size:
            message = f"{columns} columns are no multiple of group_size {size} ({ROOT}.{group.field}.weights)"
            advice = "quantise again with a group_size that divides them, or with this module in `ignore`"
            yield Finding("error", "group-does-not-divide", (module.name,), message, advice)
        else:
            message = f"stored as {list(scale.shape)}, expected {[rows, columns // size]}"
            yield Finding("error", "wrong-shape", where, message, _MEND)
    elif weights.strategy == "channel" and scale.shape not in ((rows, 1), (rows,)):
        message = f"stored as {list(scale.shape)}, expected {[rows, 1]}"
        yield Finding("error", "wrong-shape", where, message, _MEND)
    if not weights.symmetric and "weight_zero_point" not in stored:
        message = f"not stored, but {ROOT}.{group.field}.weights.symmetric is false"
        yield Finding("error", "missing-tensor", (f"{module.name}.weight_zero_point",), message, _MEND)


def _unmatched(
    matcher: Matcher, modules: Mapping[str, Module], known: Mapping[str, str]
) -> Iterator[Finding]:
    """Names of the config that no module has. A head may be named though it is tied, and so not stored."""
    kinds = {module.name: module.kind for module in modules.values()} | dict(known) | {"lm_head": "Linear"}
    names = {alias for name in kinds for alias in aliases(name)}
    classes = set(kinds.values())

    def matches(entry: Entry) -> bool:
        if entry.pattern is not None:
            return any(entry.pattern.match(name) for name in names)
        return entry.text in names or any(entry.rank([], kind) is not None for kind in classes)

    for entry in (entry for entry in matcher.targets if not matches(entry)):
        message = f"{entry.text!r} is the name of no module and of no class, so it targets nothing"
        yield Finding("warning", "target-matches-nothing", (f"{ROOT}.{entry.field}",), message, _hint(entry))
    for entry in (entry for entry in matcher.ignore if not matches(entry)):
        message = f"{entry.text!r} is the name of no module, so it leaves nothing out"
        # Recipes carry expressions for modules that only other models have.
        severity: Severity = "note" if entry.text.startswith(REGEX) else "warning"
        where = (f"{ROOT}.{entry.field}",)
        yield Finding(severity, "ignore-matches-nothing", where, message, _hint(entry))


def _hint(entry: Entry) -> str:
    if entry.text.endswith(_FUSED):
        return "name the parts (q_proj, k_proj, v_proj, gate_proj, up_proj) as the checkpoint does"
    return "names are the checkpoint's, and expressions match from their start"
