"""Choosing among plugins: an explicit name, then capability, then priority; every refusal has its reason."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pymllm_core.device import DeviceInfo
from pymllm_core.errors import PluginError, SelectionError
from pymllm_core.hookspecs import hookimpl
from pymllm_core.plugins import Registry, build_registry, module_candidate
from pymllm_core.select import choose
from pymllm_core.specs import AttentionBackendSpec, Needs, ShapeRule, Want, load_attribute

CPU = DeviceInfo("cpu", "a CPU", 2**34, 2**33, cpu_flags=frozenset({"avx2"}))
GPU = DeviceInfo("cuda", "a GPU", 2**34, 2**33, capability=(8, 9))
WANT = Want(CPU, "float32", {"head_dim": 64, "group": 4})


def registry(*plugins: tuple[str, list[AttentionBackendSpec]]) -> Registry:
    candidates = []
    for name, specs in plugins:
        hook = hookimpl(lambda specs=specs: specs)
        candidates.append(
            module_candidate(
                SimpleNamespace(CONTRACT="1.0", pymllm_attention_backends=hook), name, f"dist-{name}"
            )
        )
    return build_registry(candidates)


def backend(name: str, priority: int = 0, **needs: Any) -> AttentionBackendSpec:
    return AttentionBackendSpec(name=name, implementation="math:pi", priority=priority, needs=Needs(**needs))


def pick(found: Registry, explicit: str | None = None, want: Want = WANT) -> tuple[str, str, dict[str, str]]:
    choice = choose(found, AttentionBackendSpec, want, what="attention backend", explicit=explicit)
    return choice.spec.name, choice.distribution, {r.name: r.reason for r in choice.refused}


def test_priority_decides_among_those_that_fit() -> None:
    found = registry(
        ("a", [backend("slow"), backend("gpu", 99, devices=("cuda",))]), ("b", [backend("fast", 10)])
    )
    assert pick(found) == (
        "fast",
        "dist-b",
        {"gpu": "runs on cuda, not on cpu", "slow": "lower priority (0 < 10)"},
    )
    assert pick(found, "auto")[0] == "fast"
    assert pick(found, want=replace(WANT, device=GPU))[0] == "gpu"


def test_a_name_is_used_or_refused_never_replaced() -> None:
    found = registry(
        ("a", [backend("slow"), backend("gpu", 99, devices=("cuda",))]), ("b", [backend("fast", 10)])
    )
    assert pick(found, "slow")[0] == "slow"
    with pytest.raises(SelectionError) as caught:
        pick(found, "gpu")
    message = str(caught.value)
    assert "no attention backend 'gpu' can serve float32 on cpu (a CPU)" in message
    assert "gpu (dist-a): runs on cuda, not on cpu" in message
    with pytest.raises(SelectionError, match="available: fast, gpu, slow"):
        pick(found, "fats")


def test_nothing_fits() -> None:
    with pytest.raises(SelectionError, match="no plugin provides one"):
        pick(registry())
    found = registry(("a", [backend("x", dtypes=("bfloat16",))]), ("broken", 3))  # type: ignore[arg-type]
    with pytest.raises(SelectionError) as caught:
        pick(found)
    assert "x (dist-a): computes in bfloat16, not in float32" in str(caught.value)
    assert "Plugins that failed, which may matter here" in str(caught.value)
    assert "broken (dist-broken)" in str(caught.value)


def test_a_name_that_two_distributions_claim() -> None:
    found = registry(("a", [backend("same")]), ("b", [backend("same"), backend("other")]))
    assert pick(found)[0] == "other"
    with pytest.raises(SelectionError, match="dist-a and dist-b both claim the name; uninstall one of them"):
        pick(found, "same")


@pytest.mark.parametrize(
    ("needs", "want", "reason"),
    [
        ({"devices": ("cpu",)}, WANT, None),
        ({"devices": ("cuda",)}, WANT, "runs on cuda, not on cpu"),
        ({"dtypes": ("bfloat16", "float16")}, WANT, "computes in bfloat16 or float16, not in float32"),
        ({"cpu_flags": ("avx2",)}, WANT, None),
        ({"cpu_flags": ("avx2", "amx_bf16")}, WANT, "needs the CPU features amx_bf16, which this CPU lacks"),
        ({"capability_min": (8, 9)}, replace(WANT, device=GPU), None),
        ({"capability_min": (9, 0)}, replace(WANT, device=GPU), "needs compute capability 9.0, found 8.9"),
        (
            {"capability_max": (8, 6)},
            replace(WANT, device=GPU),
            "supports compute capability up to 8.6, found 8.9",
        ),
        ({"capability_min": (9, 0)}, WANT, None),
        ({"shape": {"head_dim": ShapeRule(multiple_of=32)}}, WANT, None),
        ({"shape": {"head_dim": ShapeRule(multiple_of=48)}}, WANT, "head_dim=64 is no multiple of 48"),
        ({"shape": {"head_dim": ShapeRule(one_of=(96, 128))}}, WANT, "head_dim=64 is none of 96, 128"),
        ({"shape": {"group": ShapeRule(minimum=5)}}, WANT, "group=4 is under 5"),
        ({"shape": {"group": ShapeRule(maximum=3)}}, WANT, "group=4 is over 3"),
        ({"shape": {"unheard_of": ShapeRule(minimum=5)}}, WANT, None),
        ({"modules": {"json": "json"}}, WANT, None),
        (
            {"modules": {"no_such_module.x": "nsm>=2"}},
            WANT,
            "needs the package nsm>=2, which is not installed",
        ),
    ],
)
def test_needs(needs: dict[str, Any], want: Want, reason: str | None) -> None:
    assert backend("x", **needs).needs.reason(want) == reason


def test_a_check_is_asked_last_and_its_reason_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Want] = []

    def check(want: Want) -> str | None:
        asked.append(want)
        return None if want.dtype == "float32" else "it rains"

    monkeypatch.setitem(sys.modules, "select_test_check", SimpleNamespace(check=check))
    needs = Needs(devices=("cpu",), check="select_test_check:check")
    assert needs.reason(replace(WANT, device=GPU)) == "runs on cpu, not on cuda"
    assert asked == []
    assert needs.reason(replace(WANT, dtype="float32")) is None
    assert needs.reason(replace(WANT, dtype="bfloat16")) == "it rains"
    with pytest.raises(PluginError, match="no_such_module"):
        Needs(check="no_such_module:check").reason(WANT)


@pytest.mark.parametrize("target", ["nowhere", "nowhere:x", "math:nothing", ":x", "math:"])
def test_implementations_that_cannot_be_imported(target: str) -> None:
    with pytest.raises(PluginError, match=f"implementation '{target}'"):
        load_attribute(target)
