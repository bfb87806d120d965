"""Choice: an explicit name, then capability, then priority; every refusal keeps its reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic

from pymllm_core.errors import SelectionError
from pymllm_core.plugins import Registered, Registry
from pymllm_core.specs import SpecT, Want

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a candidate was not chosen."""

    name: str
    distribution: str
    reason: str


@dataclass(frozen=True, slots=True)
class Choice(Generic[SpecT]):
    """The chosen spec, the distribution it came from, why it was chosen and who was not."""

    spec: SpecT
    distribution: str
    why: str
    refused: tuple[Refusal, ...] = ()


def choose(
    registry: Registry,
    kind: type[SpecT],
    want: Want,
    *,
    what: str,
    explicit: str | None = None,
    asked_by: str = "the settings",
    among: Iterable[Registered[SpecT]] | None = None,
) -> Choice[SpecT]:
    """Choose the spec of type `kind` that serves `want`.

    what: how messages name the thing, e.g. ``attention backend``. explicit: a name given by
    `asked_by`; it is used or refused, never replaced. among: the candidates, by default all of the kind.
    Raises SelectionError listing every candidate with its reason.
    """
    candidates = list(registry.all(kind) if among is None else among)
    refused: list[Refusal] = []
    fitting: list[Registered[SpecT]] = []
    if explicit in (None, AUTO):
        explicit = None
    elif not any(candidate.spec.name == explicit for candidate in candidates):
        raise SelectionError(_unknown(registry, kind, what, explicit or "", candidates))
    for candidate in candidates:
        reason = None
        if explicit is not None and candidate.spec.name != explicit:
            reason = f"{explicit!r} was asked for"
        reason = reason or candidate.spec.needs.reason(want)
        if reason is None:
            fitting.append(candidate)
        else:
            refused.append(Refusal(candidate.spec.name, candidate.distribution, reason))
    if not fitting:
        raise SelectionError(_nothing_fits(registry, what, explicit, want, refused))
    best = max(fitting, key=lambda candidate: candidate.spec.priority)
    for other in fitting:
        if other is not best:
            reason = f"lower priority ({other.spec.priority} < {best.spec.priority})"
            refused.append(Refusal(other.spec.name, other.distribution, reason))
    why = (
        f"asked for by {asked_by}"
        if explicit is not None
        else f"highest priority ({best.spec.priority}) of {len(fitting)} that fit"
    )
    return Choice(best.spec, best.distribution, why, tuple(refused))


def _failures(registry: Registry) -> str:
    if not registry.failures:
        return ""
    lines = [f"  plugin {f.plugin} ({f.distribution}): {f.message}" for f in registry.failures]
    return "\nPlugins that failed, which may matter here:\n" + "\n".join(lines)


def _unknown(
    registry: Registry, kind: type[SpecT], what: str, name: str, candidates: list[Registered[SpecT]]
) -> str:
    if owners := registry.conflict(kind, name):
        return (
            f"{what} {name!r} was asked for, but {' and '.join(owners)} both claim the name; "
            "uninstall one of them"
        )
    known = ", ".join(sorted(candidate.spec.name for candidate in candidates)) or "none"
    return (
        f"{what} {name!r} was asked for, but no installed plugin provides it; available: {known}"
        + _failures(registry)
    )


def _nothing_fits(
    registry: Registry, what: str, explicit: str | None, want: Want, refused: list[Refusal]
) -> str:
    asked = f" {explicit!r}" if explicit else ""
    lines = [f"  {r.name} ({r.distribution}): {r.reason}" for r in refused] or ["  no plugin provides one"]
    return (
        f"no {what}{asked} can serve {want.dtype} on {want.device.type} ({want.device.name}):\n"
        + "\n".join(lines)
        + _failures(registry)
    )
