"""Discovery: entry points of the group ``pymllm`` become a registry of specs and of named failures.

Hooks are called one plugin at a time, so that a plugin that raises is isolated, named and remembered.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Generic, cast

import pluggy

from pymllm_core import hookspecs
from pymllm_core.errors import PluginError
from pymllm_core.hookspecs import HOOKS, PROJECT
from pymllm_core.specs import CONTRACT, Spec, SpecT

ENTRY_POINT_GROUP = "pymllm"
RESTRICT_VARIABLE = "PYMLLM_PLUGINS"


@dataclass(frozen=True, slots=True)
class Registered(Generic[SpecT]):
    """A spec and the distribution it came from."""

    spec: SpecT
    distribution: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Something a plugin did wrong. hook is None where the plugin could not be loaded at all."""

    plugin: str
    distribution: str
    hook: str | None
    message: str


@dataclass(frozen=True, slots=True)
class Distribution:
    """One loaded plugin: its entry point's name, distribution, version and the hooks it implements."""

    plugin: str
    name: str
    version: str
    hooks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plugin to be loaded: an entry point, or a module handed over by a test."""

    plugin: str
    distribution: str
    version: str
    target: str | object


@dataclass(frozen=True)
class Registry:
    """All that discovery found. `conflicts` maps (hook, key) to the distributions that claim it."""

    distributions: tuple[Distribution, ...]
    specs: dict[str, tuple[Registered[Spec], ...]]
    failures: tuple[Failure, ...]
    conflicts: dict[tuple[str, str], tuple[str, ...]]

    def all(self, kind: type[SpecT]) -> tuple[Registered[SpecT], ...]:
        """Every usable spec of one type, in order of registration."""
        hook = next(name for name, spec_type in HOOKS.items() if spec_type is kind)
        return cast("tuple[Registered[SpecT], ...]", self.specs.get(hook, ()))

    def conflict(self, kind: type[Spec], key: str) -> tuple[str, ...] | None:
        """The distributions that claim `key` twice, if any."""
        hook = next(name for name, spec_type in HOOKS.items() if spec_type is kind)
        return self.conflicts.get((hook, key))


def _installed() -> list[Candidate]:
    from importlib.metadata import entry_points

    found = [
        Candidate(
            plugin=point.name,
            distribution=point.dist.name if point.dist else point.value,
            version=point.dist.version if point.dist else "unknown",
            target=point.value,
        )
        for point in entry_points(group=ENTRY_POINT_GROUP)
    ]
    # The core's built-ins take the same way, also where the core runs from a bare source tree.
    if not any(candidate.plugin == "core" for candidate in found):
        try:
            version = importlib.metadata.version("pymllm-core")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        found.append(Candidate("core", "pymllm-core", version, "pymllm_core.builtin.plugin"))
    return sorted(found, key=lambda c: (c.plugin != "core", c.distribution, c.plugin))


def _restrict(candidates: list[Candidate], wanted: str | None) -> tuple[list[Candidate], list[Failure]]:
    """Keep the plugins that PYMLLM_PLUGINS names (entry point or distribution), and always the core."""
    if wanted is None:
        return candidates, []
    names = {name.strip() for name in wanted.split(",") if name.strip()}
    kept = [c for c in candidates if c.plugin == "core" or names & {c.plugin, c.distribution}]
    unknown = names - {c.plugin for c in candidates} - {c.distribution for c in candidates}
    failures = [
        Failure(name, name, None, f"{RESTRICT_VARIABLE} names {name!r}, but no such plugin is installed")
        for name in sorted(unknown)
    ]
    return kept, failures


def _load(candidate: Candidate) -> object:
    target = candidate.target
    if not isinstance(target, str):
        return target
    module_name, _, attribute = target.partition(":")
    module: object = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module


def _check_contract(plugin: object) -> None:
    built_for = getattr(plugin, "CONTRACT", None)
    if not isinstance(built_for, str):
        raise PluginError(
            f'it declares no contract version; add CONTRACT = "{CONTRACT}" to the plugin module'
        )
    if built_for.partition(".")[0] != CONTRACT.partition(".")[0]:
        raise PluginError(
            f"it was built for hook contract {built_for}, but this core speaks {CONTRACT}; "
            "install a matching version of one of them"
        )


def _hook_names(plugin: object, manager: pluggy.PluginManager) -> list[str]:
    """The names of the plugin's marked hooks, whether or not such a hook exists."""
    return [name for name in dir(plugin) if manager.parse_hookimpl_opts(plugin, name) is not None]


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _collect(hook: str, result: object) -> list[Spec]:
    if not isinstance(result, Iterable):
        raise PluginError(f"returned {type(result).__name__}, expected an iterable of {HOOKS[hook].__name__}")
    specs = list(result)
    for spec in specs:
        if not isinstance(spec, HOOKS[hook]):
            raise PluginError(f"returned a {type(spec).__name__}, expected {HOOKS[hook].__name__}")
    return specs


def build_registry(candidates: Sequence[Candidate]) -> Registry:
    """Load the candidates one by one; what any of them does wrong becomes a `Failure` of its own."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    distributions: list[Distribution] = []
    failures: list[Failure] = []
    claims: dict[tuple[str, str], list[Registered[Spec]]] = defaultdict(list)

    for candidate in candidates:

        def fail(hook: str | None, message: str, candidate: Candidate = candidate) -> None:
            failures.append(Failure(candidate.plugin, candidate.distribution, hook, message))

        try:
            plugin = _load(candidate)
            _check_contract(plugin)
        except PluginError as error:
            fail(None, str(error))
            continue
        except ModuleNotFoundError as error:
            fail(None, f"it imports {error.name!r}, which is not installed")
            continue
        except Exception as error:
            fail(None, f"importing it raised {_reason(error)}")
            continue
        names = _hook_names(plugin, manager)
        for name in names:
            if name not in HOOKS:
                fail(name, f"there is no hook of this name; hooks are: {', '.join(HOOKS)}")
        known = [name for name in names if name in HOOKS]
        distributions.append(
            Distribution(candidate.plugin, candidate.distribution, candidate.version, tuple(known))
        )
        for hook in known:
            try:
                specs = _collect(hook, getattr(plugin, hook)())
            except PluginError as error:
                fail(hook, str(error))
            except Exception as error:
                fail(hook, f"it raised {_reason(error)}")
            else:
                for spec in specs:
                    claims[hook, spec.key].append(Registered(spec, candidate.distribution))

    specs_by_hook: dict[str, list[Registered[Spec]]] = defaultdict(list)
    conflicts: dict[tuple[str, str], tuple[str, ...]] = {}
    for (hook, key), claimants in claims.items():
        if len(claimants) == 1:
            specs_by_hook[hook].append(claimants[0])
            continue
        owners = tuple(claimant.distribution for claimant in claimants)
        conflicts[hook, key] = owners
        message = f"the name {key!r} is claimed by {' and '.join(owners)}; uninstall one of them"
        failures.append(Failure(key, owners[-1], hook, message))
    return Registry(
        distributions=tuple(distributions),
        specs={hook: tuple(found) for hook, found in specs_by_hook.items()},
        failures=tuple(failures),
        conflicts=conflicts,
    )


def discover() -> Registry:
    """The registry of what is installed, restricted by the environment variable PYMLLM_PLUGINS."""
    candidates, failures = _restrict(_installed(), os.environ.get(RESTRICT_VARIABLE))
    registry = build_registry(candidates)
    return Registry(
        registry.distributions, registry.specs, (*failures, *registry.failures), registry.conflicts
    )


@functools.cache
def registry() -> Registry:
    """The process's registry, discovered once."""
    return discover()


def module_candidate(module: ModuleType | object, name: str, distribution: str | None = None) -> Candidate:
    """A plugin that is not installed, for tests and notebooks."""
    return Candidate(name, distribution or name, "0", module)
