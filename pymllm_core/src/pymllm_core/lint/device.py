"""The device that a checkpoint is checked for: this machine's, or one of a compute capability that is imagined."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from pymllm_core.device import DeviceInfo
from pymllm_core.errors import ConfigError
from pymllm_core.plugins import Registry
from pymllm_core.protocols.lint import Finding
from pymllm_core.specs import AttentionBackendSpec, KernelSpec, Spec, Want

ATTENTION = "attention backend"
"""What backends are chosen for, beside the operations of kernels."""


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

    wants: each operation, or `ATTENTION`, with a situation that something was chosen for.
    """
    here: dict[str, list[str]] = defaultdict(list)
    lacking: dict[str, list[str]] = defaultdict(list)
    specs: list[tuple[str, str, Spec]] = [
        (ATTENTION, f"attention/{r.spec.name}", r.spec) for r in registry.all(AttentionBackendSpec)
    ]
    specs += [(r.spec.operation, r.spec.key, r.spec) for r in registry.all(KernelSpec)]
    for operation, want in wants:
        for kind, key, spec in specs:
            needs = spec.needs
            if kind != operation or not (needs.modules or needs.programs or needs.check):
                continue
            if dataclasses.replace(needs, modules={}, programs=(), check=None).reason(want) is not None:
                continue
            reason = needs.reason(want)
            listed = [*needs.modules.values(), *(" or ".join(group) for group in needs.programs)]
            listed += ["what their own check asks for"] if needs.check else []
            found = lacking[reason] if reason else here[", ".join(listed)]
            if key not in found:
                found.append(key)
    for what, keys in here.items():
        message = f"they need {what}, which this machine has; the device's own was not looked at"
        yield Finding("note", "judged-here", tuple(keys), message, "see that it is there, too")
    for reason, keys in lacking.items():
        message = (
            f"left out, though they could serve this device, because this machine lacks something: {reason}"
        )
        yield Finding("note", "judged-here", tuple(keys), message, "install it here, too, to see them chosen")
