"""Discovery: whatever one plugin does wrong is named and remembered, and disturbs no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pymllm_core import plugins
from pymllm_core.device import DeviceInfo
from pymllm_core.errors import SelectionError
from pymllm_core.hookspecs import HOOKS, hookimpl
from pymllm_core.plugins import Candidate, Registry, build_registry, discover, module_candidate
from pymllm_core.select import choose
from pymllm_core.specs import CONTRACT, AttentionBackendSpec, ModelSpec, Needs, Want

WANT = Want(DeviceInfo("cpu", "a CPU", 1, 1), "float32")


def plugin(contract: str | None = CONTRACT, **hooks: Any) -> SimpleNamespace:
    """A plugin module of the given hooks."""
    marked = {name: hookimpl(function) for name, function in hooks.items()}
    return SimpleNamespace(**marked, **({} if contract is None else {"CONTRACT": contract}))


def model(name: str, **fields: Any) -> ModelSpec:
    return ModelSpec(name=name, implementation="nowhere:Nothing", **fields)


def good(name: str = "Good") -> Candidate:
    return module_candidate(plugin(pymllm_models=lambda: [model(name)]), f"plugin-{name.lower()}")


def names(registry: Registry) -> list[str]:
    return [found.spec.name for found in registry.all(ModelSpec)]


def only_failure(registry: Registry) -> plugins.Failure:
    (failure,) = registry.failures
    return failure


def test_specs_are_collected_with_their_distributions() -> None:
    registry = build_registry([good("A"), good("B")])
    assert names(registry) == ["A", "B"]
    assert registry.all(ModelSpec)[1].distribution == "plugin-b"
    assert registry.distributions[0].hooks == ("pymllm_models",)
    assert registry.failures == ()


def raises() -> list[ModelSpec]:
    raise RuntimeError("the disk is on fire")


def nothing() -> list[ModelSpec]:
    return []


@pytest.mark.parametrize(
    ("bad", "hook", "message"),
    [
        (plugin(pymllm_models=raises), "pymllm_models", "it raised RuntimeError: the disk is on fire"),
        (
            plugin(pymllm_model=nothing),
            "pymllm_model",
            "there is no hook of this name; hooks are: pymllm_models,",
        ),
        (plugin(pymllm_models=lambda: 3), "pymllm_models", "returned int, expected an iterable of ModelSpec"),
        (plugin(pymllm_models=lambda: ["x"]), "pymllm_models", "returned a str, expected ModelSpec"),
        (
            plugin("2.0"),
            None,
            f"built for hook contract 2.0, but this core speaks {CONTRACT}; install a matching",
        ),
        (plugin("0.9"), None, "built for hook contract 0.9"),
        (plugin(None), None, f'declares no contract version; add CONTRACT = "{CONTRACT}"'),
    ],
)
def test_a_bad_plugin_is_named_and_disturbs_no_other(bad: object, hook: str | None, message: str) -> None:
    registry = build_registry([good("A"), module_candidate(bad, "bad", "bad-dist"), good("B")])
    assert names(registry) == ["A", "B"]
    failure = only_failure(registry)
    assert (failure.plugin, failure.distribution, failure.hook) == ("bad", "bad-dist", hook)
    assert message in failure.message


def test_a_newer_minor_contract_is_accepted() -> None:
    major = CONTRACT.partition(".")[0]
    newer = module_candidate(plugin(f"{major}.99", pymllm_models=lambda: [model("A")]), "newer")
    assert names(build_registry([newer])) == ["A"]


def test_one_bad_hook_leaves_the_plugins_others() -> None:
    half = plugin(pymllm_attention_backends=raises, pymllm_models=lambda: [model("A")])
    registry = build_registry([module_candidate(half, "half")])
    assert names(registry) == ["A"]
    assert only_failure(registry).hook == "pymllm_attention_backends"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module_at_all", "it imports 'no_such_module_at_all', which is not installed"),
        ("def broken(:", "importing it raised SyntaxError"),
        ("1 / 0", "importing it raised ZeroDivisionError: division by zero"),
        ("raise SystemError('odd')", "importing it raised SystemError: odd"),
    ],
)
def test_a_plugin_that_cannot_be_imported(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_plugin_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    bad = Candidate("bad", "bad-dist", "1.0", "bad_plugin_module")
    registry = build_registry([bad, good("A")])
    sys.modules.pop("bad_plugin_module", None)
    assert names(registry) == ["A"]
    assert message in only_failure(registry).message


def test_a_plugin_whose_module_is_missing() -> None:
    registry = build_registry([Candidate("gone", "gone-dist", "1", "no_such_plugin.plugin"), good("A")])
    assert names(registry) == ["A"]
    assert "it imports 'no_such_plugin', which is not installed" in only_failure(registry).message


def test_a_name_claimed_twice_is_nobodys_and_names_both() -> None:
    one = module_candidate(plugin(pymllm_models=lambda: [model("Same"), model("Own")]), "one")
    two = module_candidate(plugin(pymllm_models=lambda: [model("Same")]), "two")
    registry = build_registry([one, two, good("A")])
    assert names(registry) == ["Own", "A"]
    assert registry.conflict(ModelSpec, "Same") == ("one", "two")
    assert "'Same' is claimed by one and two; uninstall one of them" in only_failure(registry).message
    with pytest.raises(SelectionError, match="but one and two both claim the name"):
        choose(registry, ModelSpec, WANT, what="model architecture", explicit="Same")


def test_the_same_name_under_two_hooks_is_no_conflict() -> None:
    backend = AttentionBackendSpec(name="A", implementation="nowhere:Nothing")
    both = plugin(pymllm_models=lambda: [model("A")], pymllm_attention_backends=lambda: [backend])
    assert build_registry([module_candidate(both, "both")]).failures == ()


def test_a_missing_optional_dependency_refuses_the_spec_and_says_what_to_install() -> None:
    needs = Needs(modules={"no_such_module": "no-such-package>=2"})
    lacking = plugin(pymllm_models=lambda: [model("Lacking", needs=needs), model("Fine")])
    registry = build_registry([module_candidate(lacking, "p")])
    assert registry.failures == ()
    assert choose(registry, ModelSpec, WANT, what="model").spec.name == "Fine"
    with pytest.raises(SelectionError, match=r"needs the package no-such-package>=2, which is not installed"):
        choose(registry, ModelSpec, WANT, what="model", explicit="Lacking")


def test_a_failure_is_shown_where_something_is_missing() -> None:
    registry = build_registry([module_candidate(plugin("9.0"), "bad"), good("A")])
    with pytest.raises(SelectionError, match=r"plugin bad \(bad\): it was built for hook contract 9\.0"):
        choose(registry, ModelSpec, WANT, what="model", explicit="Missing")


def fake_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Candidate("core", "pymllm-core", "1", plugin(pymllm_models=lambda: [model("Core")]))
    others = [good("A"), good("B")]
    monkeypatch.setattr(plugins, "_installed", lambda: [core, *others])


@pytest.mark.parametrize(
    ("wanted", "expected", "unknown"),
    [
        (None, ["Core", "A", "B"], []),
        ("plugin-a", ["Core", "A"], []),
        (" plugin-b , plugin-a,", ["Core", "A", "B"], []),
        ("", ["Core"], []),
        ("plugin-a,plugin-x", ["Core", "A"], ["plugin-x"]),
    ],
)
def test_the_environment_restricts_which_plugins_load(
    wanted: str | None, expected: list[str], unknown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_installed(monkeypatch)
    if wanted is None:
        monkeypatch.delenv("PYMLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("PYMLLM_PLUGINS", wanted)
    registry = discover()
    assert names(registry) == expected
    assert [failure.plugin for failure in registry.failures] == unknown
    for failure in registry.failures:
        assert "PYMLLM_PLUGINS names 'plugin-x', but no such plugin is installed" in failure.message


def test_every_hook_has_a_spec_type() -> None:
    from pymllm_core import hookspecs

    declared = {name for name in vars(hookspecs) if name.startswith("pymllm_")}
    assert declared == set(HOOKS)


def test_discovering_everything_installed_imports_nothing_heavy() -> None:
    code = """
import sys
from pymllm_core.plugins import registry
found = registry()
heavy = ("torch", "transformers", "numpy", "safetensors", "triton", "flashinfer", "fastapi", "rich")
print([name for name in heavy if name in sys.modules], [f.message for f in found.failures])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"
