"""Models from ModelScope: what is fetched, resumed, checked and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import FILES, WANTED, Hub, names

from pymllm_core.builtin import modelscope, sources
from pymllm_core.errors import CheckpointError, ModelNotFoundError
from pymllm_core.protocols.source import SourceOptions


def test_modelscope_fetches_what_is_needed(hub: Hub, options: SourceOptions) -> None:
    seen: list[tuple[str, int, int]] = []
    told = SourceOptions(options.download_dir, lambda *news: seen.append(news))
    folder = sources.resolve_modelscope("modelscope:ORG/Tiny.1", told)
    assert options.download_dir is not None
    assert folder == options.download_dir / "models" / "ORG" / "Tiny___1"
    assert names(folder) == WANTED == hub.served()
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    size = sum(len(FILES[name]) for name in WANTED)
    assert seen[-1] == ("ORG/Tiny.1", size, size)
    assert [so_far for _, so_far, _ in seen] == sorted(so_far for _, so_far, _ in seen)


def test_modelscope_fetches_only_what_changed(hub: Hub, options: SourceOptions) -> None:
    sources.resolve_modelscope("modelscope:ORG/Tiny.1", options)
    hub.asked.clear()
    hub.files["config.json"] = hub.files["config.json"].replace(b"Tiny", b"Tony")
    folder = sources.resolve_modelscope("modelscope:ORG/Tiny.1", options)
    assert hub.served() == {"config.json"}
    assert folder is not None
    assert b"Tony" in (folder / "config.json").read_bytes()


@pytest.mark.parametrize("no_ranges", [False, True])
def test_modelscope_goes_on_where_the_connection_broke(
    hub: Hub, options: SourceOptions, no_ranges: bool
) -> None:
    hub.break_after, hub.no_ranges = 100_000, no_ranges
    folder = sources.resolve_modelscope("modelscope:ORG/Tiny.1", options)
    assert folder is not None
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    ranges = [headers["Range"] for _, _, headers in hub.asked if "Range" in headers]
    assert ranges == ["bytes=100000-"]


def test_modelscope_refuses_a_wrong_checksum(hub: Hub, options: SourceOptions) -> None:
    hub.wrong_sha256 = True
    with pytest.raises(CheckpointError, match=r"arrived with sha256 .* it was deleted"):
        sources.resolve_modelscope("modelscope:ORG/Tiny.1", options)
    assert options.download_dir is not None
    assert not [p for p in options.download_dir.rglob("*") if p.is_file() and p.name != ".pymllm.lock"]


def test_modelscope_sends_the_token(
    hub: Hub, options: SourceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    sources.resolve_modelscope("modelscope:ORG/Tiny.1", options)
    assert all(headers["Authorization"] == "Bearer secret" for _, _, headers in hub.asked)


def test_modelscope_offline_uses_the_cache_alone(
    hub: Hub, options: SourceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYMLLM_USE_MODELSCOPE", "1")
    small = SourceOptions(options.download_dir, weights=False)
    folder = sources.resolve_modelscope("ORG/Tiny.1", small)
    assert sources.resolve_huggingface("ORG/Tiny.1", options) is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.asked.clear()
    assert sources.resolve_modelscope("ORG/Tiny.1", small) == folder
    with pytest.raises(ModelNotFoundError, match="not in the local cache"):  # the weights are missing
        sources.resolve_modelscope("ORG/Tiny.1", options)
    assert hub.asked == []


def test_modelscope_incomplete_shards_are_not_taken_for_a_model(
    hub: Hub, options: SourceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sources.resolve_modelscope("modelscope:ORG/Tiny.1", options)
    assert folder is not None
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    assert sources.resolve_modelscope("modelscope:ORG/Tiny.1", options) == folder
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFoundError, match="Connection refused"):
        sources.resolve_modelscope("modelscope:ORG/Tiny.1", options)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "has no model ORG/Tiny.1 with revision 'master'"),
        (403, "if private, set MODELSCOPE_API_TOKEN"),
        (502, "answered 502"),
    ],
)
def test_modelscope_errors_say_what_to_do(
    hub: Hub, options: SourceOptions, status: int, message: str
) -> None:
    hub.status = status
    with pytest.raises(ModelNotFoundError, match=message):
        sources.resolve_modelscope("modelscope:ORG/Tiny.1", options)


def test_modelscope_names_cannot_leave_the_folder(hub: Hub, options: SourceOptions, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "../../../../evil.json": b"evil"}
    with pytest.raises(CheckpointError, match="unsafe"):
        sources.resolve_modelscope("modelscope:ORG/Tiny.1", options)
    assert not list(tmp_path.rglob("evil.json"))
    assert hub.served() == set()


def test_modelscope_endpoint_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELSCOPE_ENDPOINT", raising=False)
    monkeypatch.delenv("MODELSCOPE_DOMAIN", raising=False)
    assert modelscope.endpoint() == "https://www.modelscope.cn"
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "mirror.example/")
    assert modelscope.endpoint() == "https://mirror.example"
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://hub.example")
    assert modelscope.endpoint() == "http://hub.example"
