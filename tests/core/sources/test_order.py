"""All sources together: which is asked first, and what is said where none has the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import COMMIT, Hub

from pymllm_core.builtin import sources
from pymllm_core.errors import ModelNotFoundError
from pymllm_core.hookspecs import hookimpl
from pymllm_core.plugins import Registry, build_registry, module_candidate
from pymllm_core.protocols.source import SourceOptions
from pymllm_core.specs import CONTRACT, ModelSourceSpec


def registry_of(*specs: ModelSourceSpec) -> Registry:
    @hookimpl
    def pymllm_model_sources() -> list[ModelSourceSpec]:
        return list(specs)

    plugin = SimpleNamespace(CONTRACT=CONTRACT, pymllm_model_sources=pymllm_model_sources)
    return build_registry([module_candidate(plugin, "test")])


def source(name: str, priority: int, describes: str = "") -> ModelSourceSpec:
    target = f"pymllm_core.builtin.sources:resolve_{name}"
    return ModelSourceSpec(name=name, implementation=target, priority=priority, describes=describes)


def all_sources() -> Registry:
    return registry_of(
        source("modelscope", 10, "modelscope:ORG/NAME"),
        source("path", 100, "a folder"),
        source("huggingface", 50, "ORG/NAME and hf:ORG/NAME"),
    )


def test_sources_are_asked_by_priority(
    hub: Hub, options: SourceOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = SourceOptions(options.download_dir, weights=False)
    fetched = sources.resolve_model("ORG/Tiny.1", all_sources(), small)
    assert fetched.name == COMMIT
    local = tmp_path / "ORG" / "Tiny.1"
    local.mkdir(parents=True)
    (local / "config.json").write_text("{}")
    assert sources.resolve_model("ORG/Tiny.1", all_sources(), small) == local
    scope = sources.resolve_model("modelscope:ORG/Tiny.1", all_sources(), small)
    assert scope.name == "Tiny___1"


def test_an_unknown_model_says_what_each_source_answered(
    hub: Hub, options: SourceOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources.resolve_model("ORG/Tiny.1", all_sources(), options)
    with pytest.raises(ModelNotFoundError) as caught:
        sources.resolve_model("ORG/Tinny.1", all_sources(), options)
    message = str(caught.value)
    assert "there is no model 'ORG/Tinny.1'" in message
    assert "path: not a name of this source (it knows a folder)" in message
    assert f"huggingface: {hub.url} has no model ORG/Tinny.1" in message
    assert "modelscope: not a name of this source" in message
    assert message.endswith("Did you mean ORG/Tiny.1?")


def test_a_broken_or_unequipped_source_does_not_hide_the_others(
    tmp_path: Path, options: SourceOptions
) -> None:
    from pymllm_core.specs import Needs

    broken = ModelSourceSpec(name="broken", implementation="no_such_module:x", priority=900)
    needs = Needs(modules={"no_such_module": "nowhere>=1"})
    unequipped = ModelSourceSpec(name="unequipped", implementation="a:b", priority=800, needs=needs)
    registry = registry_of(broken, unequipped, source("path", 1))
    (tmp_path / "config.json").write_text("{}")
    assert sources.resolve_model(str(tmp_path), registry, options) == tmp_path
    with pytest.raises(ModelNotFoundError, match="unequipped: needs nowhere>=1, which is not installed"):
        sources.resolve_model("x", registry, options)
    with pytest.raises(ModelNotFoundError, match="name is empty"):
        sources.resolve_model(" ", registry, options)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-of-this-name/x"])
def test_impossible_paths_are_no_crash(name: str, options: SourceOptions) -> None:
    with pytest.raises(ModelNotFoundError):
        sources.resolve_model(name, registry_of(source("path", 1)), options)
