"""The kernels of a device that need not be here. This module is a plugin that has some."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pymllm_core.errors import ConfigError
from pymllm_core.hookspecs import hookimpl
from pymllm_core.lint.device import imagined_device
from pymllm_core.specs import KernelSpec, Needs
from pymllm_core.testing.engines import TOY
from pymllm_core.testing.linting import check, only

CONTRACT = "1.0"


@hookimpl
def pymllm_kernels() -> list[KernelSpec]:
    """Kernels for devices that are not here: a plugin by which choices for them can be seen."""
    absent, present = {"no_such_module_at_all": "no-such>=1"}, {"json": "json>=0"}
    return [
        KernelSpec(
            operation="linear",
            name=name,
            implementation="no_module:Kernel",
            needs=Needs(devices=("cuda",), capability_min=capability, modules=modules),
            priority=priority,
        )
        for name, capability, modules, priority in (
            ("ampere", (8, 0), present, 10),
            ("hopper", (9, 0), present, 20),
            ("uninstalled", (8, 0), absent, 30),
        )
    ]


@pytest.mark.parametrize(
    ("arch", "dtype", "kernel"),
    [("7.5", "float16", "torch"), ("8.7", "bfloat16", "ampere"), ("9.0", "bfloat16", "hopper")],
)
def test_a_device_that_is_not_here(folder: Path, arch: str, dtype: str, kernel: str) -> None:
    """Its kernels are chosen and not imported; what this machine lacks is said."""
    report = check(folder, TOY, __name__, arch=arch)
    assert report.dtype == dtype
    assert {(row.kernel or "").partition(" ")[0] for row in report.rows if row.operation == "linear"} == {
        kernel
    }
    notes = {finding.where: finding.message for finding in report.findings}
    if arch == "7.5":
        assert not notes
    else:
        expected = [name for name in ("linear/ampere", "linear/hopper") if arch == "9.0" or "ampere" in name]
        assert notes[tuple(expected)].startswith("they need json>=0, which this machine has")
        assert "needs the package no-such>=1, which is not installed" in notes["linear/uninstalled",]
    assert not report.count("error")


def test_a_kernel_that_cannot_be_imported_is_an_error_where_it_would_run(folder: Path) -> None:
    module = sys.modules[__name__]
    specs = pymllm_kernels()
    try:
        broken = KernelSpec(operation="linear", name="b", implementation="no_module:K", priority=1000)
        module.pymllm_kernels = hookimpl(lambda: [broken])  # type: ignore[attr-defined]
        finding = only(check(folder, TOY, __name__))
    finally:
        module.pymllm_kernels = hookimpl(lambda: specs)  # type: ignore[attr-defined]
    assert (finding.code, finding.where) == ("broken-kernel", ("linear/b",))


@pytest.mark.parametrize("arch", ["87", "sm_87", "8.", "", "8.7.1", "x"])
def test_an_arch_that_is_none(arch: str) -> None:
    with pytest.raises(ConfigError, match=r"give MAJOR\.MINOR, e\.g\. 8\.7 for Orin"):
        imagined_device(arch)
