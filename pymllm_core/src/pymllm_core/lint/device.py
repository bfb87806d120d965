"""The device that a checkpoint is checked for: this machine's, or one of a compute capability that is imagined."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator

from pymllm_core.device import DeviceInfo
from pymllm_core.errors import ConfigError
from pymllm_core.plugins import Registry
from pymllm_core.protocols.lint import Finding
from pymllm_core.specs import AttentionBackendSpec, KernelSpec, Spec, Want


def imagined_device(arch: str) -> DeviceInfo:
    """A CUDA device of compute capability `arch`, e.g. ``8.7``, of which nothing else is known.

    Raises ConfigError for text that is no compute capability.
    """
    found = re.fullmatch(r"(\d{1,2})\.(\d)", arch)
    if found is None:
        raise ConfigError(
            f"--arch {arch} is no compute capability; give MAJOR.MINOR, e.g. 8.7 for Orin, 8.9 for an RTX 4090, "
            "9.0 for an H100"
        )
    capability = (int(found[1]), int(found[2]))
    return DeviceInfo("cuda", f"compute capability {arch}, imagined", 0, 0, capability=capability)


def machine_findings(registry: Registry, wants: Iterable[tuple[str, Want]]) -> Iterator[Finding]:
    """For an imagined device: whose packages and programs could only be looked for on this machine.

    wants: the operation, or ``attention backend``, with the situation it was chosen for.
    """
    here: dict[str, str] = {}
    lacking: dict[str, str] = {}
    specs: list[tuple[str, Spec]] = [
        ("attention backend", r.spec) for r in registry.all(AttentionBackendSpec)
    ]
    specs += [(r.spec.operation, r.spec) for r in registry.all(KernelSpec)]
    for operation, want in wants:
        for kind, spec in specs:
            needs = spec.needs
            if kind != operation or not (needs.modules or needs.programs):
                continue
            if dataclasses.replace(needs, modules={}, programs=()).reason(want) is not None:
                continue
            if reason := needs.reason(want):
                lacking[spec.key] = reason
            else:
                here[spec.key] = ", ".join([*needs.modules.values(), *("|".join(p) for p in needs.programs)])
    if here:
        listed = "; ".join(f"{key} needs {what}" for key, what in here.items())
        message = f"chosen among because this machine has what they need ({listed})"
        yield Finding(
            "note", "judged-here", tuple(here), message, "see that the device's machine has it, too"
        )
    for key, reason in lacking.items():
        message = f"could serve this device, but was left out, judged by this machine: {reason}"
        yield Finding("note", "judged-here", (key,), message, "install it here, too, to see it chosen")
