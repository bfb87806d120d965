"""Which names are folders or repositories, and which files of one are wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import FILES, WANTED

from pymllm_core.builtin import sources
from pymllm_core.builtin.hub_files import check_safe, is_wanted
from pymllm_core.errors import CheckpointError, ModelNotFoundError
from pymllm_core.protocols.source import SourceOptions


def test_a_folder_is_found_as_given_and_below_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: SourceOptions
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in (str(folder), "~/model", "model", "./model"):
        assert sources.resolve_path(name, options) == folder


def test_a_folder_without_config_names_what_is_there(tmp_path: Path, options: SourceOptions) -> None:
    (tmp_path / "weights.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"holds no config\.json.*found there: weights\.txt"):
        sources.resolve_path(str(tmp_path), options)


def test_a_file_is_refused_with_the_reason(tmp_path: Path, options: SourceOptions) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("")
    with pytest.raises(CheckpointError, match="is a file; GGUF files are not supported"):
        sources.resolve_path(str(file), options)


def test_a_missing_path_names_its_neighbours(tmp_path: Path, options: SourceOptions) -> None:
    (tmp_path / "qwen3-0.6b").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"near it are qwen3-0\.6b"):
        sources.resolve_path(str(tmp_path / "qwen3-06b"), options)


@pytest.mark.parametrize("name", ["ORG/NAME", "demo", "hf:ORG/NAME"])
def test_names_of_other_sources_are_left_to_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: SourceOptions
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sources.resolve_path(name, options) is None


def test_prefixes_and_the_default_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYMLLM_USE_MODELSCOPE", raising=False)
    assert sources.repository("ORG/N.1", "hf", bare=True) == ("ORG/N.1", "main")
    assert sources.repository("hf:ORG/N@v2", "hf", bare=False) == ("ORG/N", "v2")
    assert sources.repository("modelscope:ORG/N", "modelscope", bare=False) == ("ORG/N", "master")
    assert sources.repository("modelscope:ORG/N", "hf", bare=True) is None
    assert sources.repository("ORG/N", "modelscope", bare=False) is None
    assert sources.repository("demo", "hf", bare=True) is None
    assert sources.repository("../x", "hf", bare=True) is None
    with pytest.raises(ModelNotFoundError, match="not of the form hf:ORG/NAME"):
        sources.repository("hf:NAME", "hf", bare=False)


@pytest.mark.parametrize(
    "path", ["../x.json", "a/../../x.json", "/etc/x.json", "a\\..\\x.json", "c:x.json", "", "x\0.json"]
)
def test_unsafe_names_are_refused(path: str) -> None:
    with pytest.raises(CheckpointError, match="unsafe"):
        check_safe(path, "ORG/N")


def test_pickles_are_never_wanted() -> None:
    assert {name for name in FILES if is_wanted(name, weights=True)} == WANTED
    assert {name for name in FILES if is_wanted(name, weights=False)} == WANTED - {"model.safetensors"}
