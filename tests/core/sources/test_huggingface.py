"""Models from Hugging Face: what is fetched, cached and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import FILES, WANTED, Hub, names

from pymllm_core.builtin import sources
from pymllm_core.errors import CheckpointError, ModelNotFoundError
from pymllm_core.protocols.source import SourceOptions


def test_huggingface_fetches_what_is_needed(hub: Hub, options: SourceOptions) -> None:
    seen: list[tuple[str, int, int]] = []
    told = SourceOptions(options.download_dir, lambda *news: seen.append(news))
    folder = sources.resolve_huggingface("ORG/Tiny.1", told)
    assert folder is not None
    assert names(folder) == WANTED == hub.served()
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    size = sum(len(FILES[name]) for name in WANTED)
    assert seen[-1] == ("ORG/Tiny.1", size, size)


def test_huggingface_without_weights(hub: Hub, options: SourceOptions) -> None:
    folder = sources.resolve_huggingface("hf:ORG/Tiny.1", SourceOptions(options.download_dir, weights=False))
    assert folder is not None
    assert names(folder) == WANTED - {"model.safetensors"}


def test_huggingface_sends_the_token(
    hub: Hub, options: SourceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sources.resolve_huggingface("ORG/Tiny.1", options)
    headers = {key.lower(): value for key, value in hub.asked[0][2].items()}
    assert headers["authorization"] == "Bearer hf_secret"


def test_huggingface_offline_uses_the_cache_alone(
    hub: Hub, options: SourceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sources.resolve_huggingface("ORG/Tiny.1", options)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.asked.clear()
    assert sources.resolve_huggingface("ORG/Tiny.1", options) == first
    assert hub.asked == []
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE=1 forbids"):
        sources.resolve_huggingface("ORG/Other", options)


def test_huggingface_serves_from_the_cache_when_the_hub_is_down(
    hub: Hub, options: SourceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sources.resolve_huggingface("ORG/Tiny.1", options)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert sources.resolve_huggingface("ORG/Tiny.1", options) == first
    with pytest.raises(ModelNotFoundError, match="not in the local cache and could not be fetched"):
        sources.resolve_huggingface("ORG/Other", options)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "has no model ORG/Tiny.1"),
        (401, "RepoNotFound", "if private, set HF_TOKEN"),
        (403, "GatedRepo", "is gated: accept its licence at .*/ORG/Tiny.1, then set HF_TOKEN"),
        (404, "RevisionNotFound", "has no revision 'main'"),
        (418, "", "answered 418"),
    ],
)
def test_huggingface_errors_say_what_to_do(
    hub: Hub, options: SourceOptions, status: int, code: str, message: str
) -> None:
    hub.status, hub.error_code = status, code
    with pytest.raises(ModelNotFoundError, match=message):
        sources.resolve_huggingface("ORG/Tiny.1", options)


def test_huggingface_names_cannot_leave_the_folder(hub: Hub, options: SourceOptions, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "../../../../evil.json": b"evil"}
    with pytest.raises(CheckpointError, match="unsafe"):
        sources.resolve_huggingface("ORG/Tiny.1", options)
    assert not list(tmp_path.rglob("evil.json"))
    assert hub.served() == set()


def test_huggingface_names_that_only_the_listing_has_cannot_either(
    hub: Hub, options: SourceOptions, tmp_path: Path
) -> None:
    hub.files = {"config.json": b"{}", "../../../../evil.json": b"evil"}
    hub.hidden_names = True
    with pytest.raises(ModelNotFoundError, match=r"evil\.json"):
        sources.resolve_huggingface("ORG/Tiny.1", options)
    assert not list(tmp_path.rglob("evil.json"))


def test_a_repository_without_config_is_no_model(hub: Hub, options: SourceOptions) -> None:
    hub.files = {"tokenizer.json": b"{}"}
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        sources.resolve_huggingface("ORG/Tiny.1", options)
