"""Model sources against hubs of our own on this machine: what is fetched, resumed, checked and refused."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pymllm_core.builtin import modelscope, sources
from pymllm_core.builtin.hub_files import check_safe, is_wanted
from pymllm_core.errors import CheckpointError, ModelNotFoundError
from pymllm_core.hookspecs import hookimpl
from pymllm_core.plugins import Registry, build_registry, module_candidate
from pymllm_core.protocols.source import SourceOptions
from pymllm_core.specs import CONTRACT, ModelSourceSpec

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"architectures": ["TinyForCausalLM"]}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"hello",
    "model.safetensors": bytes(range(256)) * 5000,
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"second copy",
    "README.md": b"read me",
}
WANTED = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}


@dataclass
class Hub:
    """A hub that speaks both APIs for one repository, ORG/Tiny.1, and remembers what it was asked."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    status: int = 200
    error_code: str = ""
    break_after: int | None = None
    """Cut the connection once, after so many bytes of a file."""
    wrong_sha256: bool = False
    no_ranges: bool = False
    hidden_names: bool = False
    """Leave the names out of the model's description; the listing of files still has them."""
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def served(self) -> set[str]:
        """Names of the files whose content was sent."""
        gets = [path for method, path, _ in self.asked if method == "GET"]
        names = {path.rpartition("/")[2] for path in gets if "/resolve/" in path}
        return names | {path.rpartition("FilePath=")[2] for path in gets if "FilePath=" in path}


def git_id(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = urllib.parse.unquote(self.path)
            hub.asked.append((self.command, path, dict(self.headers)))
            if hub.status != 200:
                self.send(hub.status, b"{}", {"X-Error-Code": hub.error_code} if hub.error_code else {})
            elif path.startswith("/api/models/ORG/Tiny.1/revision/main"):
                siblings = [{"rfilename": name} for name in hub.files if not hub.hidden_names]
                self.send_json({"id": "ORG/Tiny.1", "sha": COMMIT, "siblings": siblings, "private": False})
            elif path.startswith("/api/models/ORG/Tiny.1/tree/"):
                self.send_json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}
                        for name, data in hub.files.items()
                    ]
                )
            elif path.startswith("/ORG/Tiny.1/resolve/"):
                data = hub.files[path.rpartition("/")[2]]
                tag = {"ETag": f'"{git_id(data)}"', "X-Repo-Commit": COMMIT}
                self.send(200, data, tag, body=body)
            elif path.startswith("/api/v1/models/ORG/Tiny.1/repo/files?Revision=master"):
                self.send_json({"Code": 200, "Success": True, "Data": {"Files": self.modelscope_files()}})
            elif path.startswith("/api/v1/models/ORG/Tiny.1/repo?"):
                self.send_file(hub.files[path.rpartition("FilePath=")[2]])
            else:
                self.send(404, b'{"error": "not found"}', {"X-Error-Code": "RepoNotFound"})

        def modelscope_files(self) -> list[dict[str, Any]]:
            folder: dict[str, Any] = {"Path": "assets", "Type": "tree", "Size": 0, "Sha256": ""}
            return [folder] + [
                {
                    "Path": name,
                    "Type": "blob",
                    "Size": len(data),
                    "Sha256": "0" * 64 if hub.wrong_sha256 else hashlib.sha256(data).hexdigest(),
                }
                for name, data in hub.files.items()
            ]

        def send_file(self, data: bytes) -> None:
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            if start and not hub.no_ranges:
                end = len(data) - 1
                self.send(206, data[start:], {"Content-Range": f"bytes {start}-{end}/{len(data)}"})
            elif hub.break_after is not None and len(data) > hub.break_after:
                cut, hub.break_after = hub.break_after, None
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:cut])
                self.close_connection = True
            else:
                self.send(200, data)

        def send_json(self, value: Any) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(
            self, status: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if body and self.command != "HEAD":
                self.wfile.write(data)

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running hub, which the environment names as the endpoint of both kinds."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "PYMLLM_USE_MODELSCOPE", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(modelscope, "PAUSE_S", 0.0)
    yield hub
    from huggingface_hub import close_session

    close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def options(tmp_path: Path) -> SourceOptions:
    return SourceOptions(download_dir=tmp_path / "models")


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}


# Paths


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


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-of-this-name/x"])
def test_impossible_paths_are_no_crash(name: str, options: SourceOptions) -> None:
    with pytest.raises(ModelNotFoundError):
        sources.resolve_model(name, registry_of(source("path", 1)), options)


# Names of repositories


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


# Hugging Face


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


# ModelScope


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


# All sources together


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
