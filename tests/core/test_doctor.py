"""``pymllm doctor``: each check stands alone, and only what is broken makes it fail."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pymllm_core import cli, device
from pymllm_core.commands import checks, doctor
from pymllm_core.commands.checks import Check
from pymllm_core.hookspecs import hookimpl
from pymllm_core.plugins import Registry, build_registry, module_candidate
from pymllm_core.specs import CONTRACT, AttentionBackendSpec, CommandSpec, KernelSpec, Needs


def registry_with(*specs: Any, contract: str = CONTRACT) -> Registry:
    commands = [CommandSpec(name="doctor", implementation="pymllm_core.commands.doctor:command")]

    @hookimpl
    def pymllm_attention_backends() -> list[AttentionBackendSpec]:
        return [spec for spec in specs if isinstance(spec, AttentionBackendSpec)]

    @hookimpl
    def pymllm_kernels() -> list[KernelSpec]:
        return [spec for spec in specs if isinstance(spec, KernelSpec)]

    @hookimpl
    def pymllm_commands() -> list[CommandSpec]:
        return commands

    core = SimpleNamespace(CONTRACT=CONTRACT, pymllm_commands=pymllm_commands)
    test = SimpleNamespace(
        CONTRACT=contract, pymllm_attention_backends=pymllm_attention_backends, pymllm_kernels=pymllm_kernels
    )
    return build_registry([module_candidate(core, "core"), module_candidate(test, "test")])


@pytest.fixture
def backend_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("doctor_test_backend")
    module.Backend = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def backend(name: str = "b", **needs: Any) -> AttentionBackendSpec:
    return AttentionBackendSpec(name=name, implementation="doctor_test_backend:Backend", needs=Needs(**needs))


def the_check(found: Registry) -> Check:
    (check,) = checks.backend_checks(found)
    return check


def test_the_machine_is_described() -> None:
    found = {check.name: check for check in checks.system_checks()}
    assert found["python"].status == "ok"
    assert "usable cores" in found["cpu"].detail
    assert "available of" in found["memory"].detail
    assert found["huge pages"].status in ("ok", "info", "warn")


@pytest.mark.parametrize("fails", [None, "cuInit", "cuDeviceGet"])
def test_the_context_is_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch, fails: str | None) -> None:
    calls = []

    class Driver:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> int:
                calls.append((name, arguments))
                return 100 if name == fails else 0

            return call

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    device.open_cuda(3)
    names = [name for name, _ in calls]
    assert (
        names
        == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"][
            : 3 if fails is None else names.index(fails) + 1
        ]
    )
    assert fails == "cuInit" or calls[1][1][1] == 3
    assert os.environ["CUDA_MODULE_LOADING"] == "EAGER"  # what the user says


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.delenv("CUDA_MODULE_LOADING", raising=False)
    device.open_cuda(0)
    assert os.environ["CUDA_MODULE_LOADING"] == "LAZY"
    monkeypatch.delenv("CUDA_MODULE_LOADING")


def test_torch_really_multiplies() -> None:
    found = {check.name: check for check in checks.torch_checks()}
    assert found["torch"].status == "ok"
    assert found["product on cpu"] == Check("torch", "product on cpu", "ok", "right in float32 and bfloat16")


def test_a_torch_that_cannot_be_imported_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (check,) = checks.torch_checks()
    assert (check.status, check.hint) == ("fail", "pip install torch")
    assert "cannot be imported" in check.detail


def test_missing_compilers_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    found = {check.name: check for check in checks.toolchain_checks()}
    assert found["C++"].status == "warn"
    assert "apt-get install g++" in found["C++"].hint
    assert found["nvcc"].status == "info"


def test_a_backends_self_check_is_run(backend_module: ModuleType) -> None:
    backend_module.self_check = lambda: "attended over 3 tokens"  # type: ignore[attr-defined]
    assert the_check(registry_with(backend())) == Check("backends", "b", "ok", "attended over 3 tokens")


def test_a_backend_without_self_check_is_imported(backend_module: ModuleType) -> None:
    assert "can be imported" in the_check(registry_with(backend())).detail


def test_a_raising_self_check_is_a_failure_and_stops_nobody(backend_module: ModuleType) -> None:
    def self_check() -> str:
        raise RuntimeError("illegal instruction")

    backend_module.self_check = self_check  # type: ignore[attr-defined]
    fine = KernelSpec(operation="linear", name="torch", implementation="math:sqrt")
    found = list(checks.backend_checks(registry_with(backend(), fine)))
    assert [check.status for check in found] == ["fail", "ok"]
    assert found[0].detail == "RuntimeError: illegal instruction"


def test_a_backend_that_cannot_be_imported_is_a_failure() -> None:
    spec = AttentionBackendSpec(name="gone", implementation="no_such_module:x")
    check = the_check(registry_with(spec))
    assert check.status == "fail"
    assert "no_such_module" in check.detail


def test_a_backend_for_other_machines_is_not_imported() -> None:
    spec = AttentionBackendSpec(
        name="far",
        implementation="no_such_module:x",
        needs=Needs(cpu_flags=("no_such_flag",), devices=("cpu",)),
    )
    check = the_check(registry_with(spec))
    assert check.status == "info"
    assert "not for this machine: " in check.detail


def test_optional_packages_of_plugins_are_listed_with_what_to_install(backend_module: ModuleType) -> None:
    found = registry_with(backend(modules={"no_such_module": "no-such-package>=2"}))
    by_name = {check.name: check for check in checks.dependency_checks(found)}
    assert by_name["no_such_module"].status == "info"
    assert by_name["no_such_module"].hint == "pip install 'no-such-package>=2'"
    assert "b (test)" in by_name["no_such_module"].detail
    assert by_name["transformers"].status == "ok"


def test_a_missing_required_package_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "REQUIRED", ("no_such_module",))
    check = next(iter(checks.dependency_checks(registry_with())))
    assert (check.status, check.hint) == ("fail", "pip install no-such-module")


def run_doctor(found: Registry, monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(doctor, "registry", lambda: found)
    return cli.run(["doctor", *argv], found)


def test_healthy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor(registry_with(), monkeypatch) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    for group in ("system", "compilers", "torch", "packages", "plugins"):
        assert f"\n{group}\n" in f"\n{text}"


def test_json_and_a_failing_plugin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_doctor(registry_with(contract="9.0"), monkeypatch, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is False
    (failed,) = [check for check in found["checks"] if check["status"] == "fail"]
    assert "built for hook contract 9.0" in failed["detail"]


def test_a_failure_is_told_to_a_person(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_doctor(registry_with(contract="9.0"), monkeypatch) == 1
    assert "1 broken" in capsys.readouterr().out
