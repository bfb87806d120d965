"""What plugins register: frozen descriptions, free of torch, whose heavy part is named, not imported.

`implementation` is always a ``"module:attribute"`` string, imported only once the spec was chosen.
A spec states what it needs as data, so that the core can evaluate it, and can say why it refused.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pymllm_core.device import DeviceInfo
from pymllm_core.errors import PluginError

CONTRACT = "1.0"
"""Version of the hook contract, MAJOR.MINOR. A plugin built for another MAJOR is refused."""


@dataclass(frozen=True, slots=True)
class ShapeRule:
    """Which values of one dimension an implementation accepts; `one_of` alone decides where it is given."""

    multiple_of: int = 1
    minimum: int = 1
    maximum: int | None = None
    one_of: tuple[int, ...] | None = None

    def reason(self, name: str, value: int) -> str | None:
        """Why `value` is not accepted, or None where it is."""
        if self.one_of is not None:
            if value in self.one_of:
                return None
            return f"{name}={value} is none of {', '.join(map(str, self.one_of))}"
        if value % self.multiple_of:
            return f"{name}={value} is no multiple of {self.multiple_of}"
        if value < self.minimum:
            return f"{name}={value} is under {self.minimum}"
        if self.maximum is not None and value > self.maximum:
            return f"{name}={value} is over {self.maximum}"
        return None


@dataclass(frozen=True, slots=True)
class Want:
    """The situation that an implementation is chosen for.

    dtype: the computation's, e.g. ``"bfloat16"``; shape: named sizes, e.g. ``{"K": 1024, "N": 4096}``.
    """

    device: DeviceInfo
    dtype: str
    shape: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Needs:
    """What an implementation requires; an empty field requires nothing.

    devices: ``cpu``, ``cuda``. capability_min/max: CUDA compute capability, both inclusive.
    cpu_flags: names as in /proc/cpuinfo. dtypes: computation dtypes. modules: importable optional
    dependencies, each with the pip requirement that provides it. programs: groups of commands, one of each
    group must be on the PATH ($CXX counts as a C++ compiler). shape: rules by dimension name;
    a dimension that the situation does not name is not checked. check: ``"module:function"`` for what cannot be
    said as data; asked last, when all else fits, with the `Want`: it returns the reason against it or None.
    """

    devices: tuple[str, ...] = ()
    capability_min: tuple[int, int] | None = None
    capability_max: tuple[int, int] | None = None
    cpu_flags: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict)
    programs: tuple[tuple[str, ...], ...] = ()
    shape: Mapping[str, ShapeRule] = field(default_factory=dict)
    check: str | None = None

    def reason(self, want: Want) -> str | None:
        """Why this cannot serve `want`, or None where it can."""
        device = want.device
        if self.devices and device.type not in self.devices:
            return f"runs on {' or '.join(self.devices)}, not on {device.type}"
        if device.type == "cuda":
            have = device.capability
            assert have is not None
            if self.capability_min and have < self.capability_min:
                return f"needs compute capability {_cc(self.capability_min)}, found {_cc(have)}"
            if self.capability_max and have > self.capability_max:
                return f"supports compute capability up to {_cc(self.capability_max)}, found {_cc(have)}"
        if device.type == "cpu":
            missing = [flag for flag in self.cpu_flags if flag not in device.cpu_flags]
            if missing:
                return f"needs the CPU features {', '.join(missing)}, which this CPU lacks"
        if self.dtypes and want.dtype not in self.dtypes:
            return f"computes in {' or '.join(self.dtypes)}, not in {want.dtype}"
        for name, rule in self.shape.items():
            if name in want.shape and (why := rule.reason(name, want.shape[name])):
                return why
        for module, requirement in self.modules.items():
            if not _importable(module):
                return f"needs the package {requirement}, which is not installed"
        for group in self.programs:
            named = os.environ.get("CXX") if "c++" in group else None
            if not any(shutil.which(program) for program in (named, *group) if program):
                return f"needs one of the programs {', '.join(group)}, and none is on the PATH"
        if self.check is not None:
            against: str | None = load_attribute(self.check)(want)
            return against
        return None


def _cc(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Common part of all specs. Of several that fit, the highest `priority` is chosen."""

    name: str
    implementation: str
    needs: Needs = Needs()
    priority: int = 0

    @property
    def key(self) -> str:
        """What must be unique among the specs of one kind."""
        return self.name

    def load(self) -> Any:
        """Import the implementation. Raises PluginError naming what could not be imported."""
        return load_attribute(self.implementation)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(Spec):
    """A model class; `name` is the architecture of config.json, e.g. ``Qwen3ForCausalLM``.

    Implementation: a class as in `protocols.model.Model`. reasoning_parser and tool_call_parser name
    the output parsers which fit this family, used where the settings name none. tokenizer is the class of
    transformers that reads this family's tokenizers: where tokenizer_config.json names it, too, it is imported
    alone, which saves the seconds that ``AutoTokenizer`` can take.
    """

    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantMethodSpec(Spec):
    """A quantisation format; `name` is ``quant_method`` of a config's ``quantization_config``.

    Implementation: a factory as in `protocols.quant.QuantMethodFactory`. lint: ``"module:attribute"`` of a
    `protocols.lint.QuantLint`, which ``pymllm lint-checkpoint`` asks for what is known to be trouble, also of
    checkpoints whose config the method refuses or whose architecture nobody implements.
    """

    lint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBackendSpec(Spec):
    """An attention backend. Implementation: a class as in `protocols.attention.AttentionBackend`.

    Its situation names the dimensions ``head_dim``, ``group`` (query heads per KV head), ``page_size``.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePolicySpec(Spec):
    """A policy over KV pages. Implementation: a class as in `protocols.cache.CachePolicy`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec(Spec):
    """One implementation of a named operation; the operations are listed in `nn.ops`.

    Its situation names the dimensions of that operation, e.g. ``K`` and ``N`` of ``linear``.
    """

    operation: str

    @property
    def key(self) -> str:
        return f"{self.operation}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputParserSpec(Spec):
    """Splits generated text. kind: ``reasoning`` or ``tool_calls``; see `protocols.parser`."""

    kind: str

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSourceSpec(Spec):
    """Turns a model's name into a local folder.

    Implementation: ``resolve(name: str, options: SourceOptions) -> Path | None``; None means that this
    source does not know the name. Sources are asked from the highest priority down.
    """

    describes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSpec(Spec):
    """A sub-command of ``pymllm``; the implementation is a `click.Command`."""

    help: str = ""


SpecT = TypeVar("SpecT", bound=Spec)


def load_attribute(target: str) -> Any:
    """Import ``"module:attribute"``. Raises PluginError where the text or the import fails."""
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise PluginError(f'implementation {target!r} is not of the form "module:attribute"')
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise PluginError(f"implementation {target!r} cannot be imported: {error}") from error
