"""Models from ModelScope, through the two requests of its HTTP API that a download needs.

The `modelscope` package is no dependency: with what it requires it weighs more than the rest of the core,
and this is a file list and a download with resume and checksum. Files go where that package keeps its
own, so that either finds what the other fetched.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymllm_core.builtin.hub_files import check_safe, is_wanted, offline
from pymllm_core.errors import CheckpointError, ModelNotFoundError
from pymllm_core.protocols.source import Progress, SourceOptions

DEFAULT_ENDPOINT = "https://www.modelscope.cn"
TIMEOUT_S = 30.0
ATTEMPTS = 4
PAUSE_S = 1.0
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository; sha256 is empty where the hub does not tell it."""

    path: str
    size: int
    sha256: str


class _Unreachable(Exception):
    """The hub did not answer; what is in the cache may still serve."""


def endpoint() -> str:
    """The hub's address: MODELSCOPE_ENDPOINT, or the older MODELSCOPE_DOMAIN, or the public one."""
    address = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or DEFAULT_ENDPOINT
    return (address if "://" in address else f"https://{address}").rstrip("/")


def cache_folder(repo: str, options: SourceOptions) -> Path:
    """Where the model's files lie; the hub's own package writes dots of a name as ``___``."""
    base = options.download_dir or Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope/hub")
    owner, name = repo.split("/")
    return base.expanduser() / "models" / owner / name.replace(".", "___")


def download(repo: str, revision: str, options: SourceOptions) -> Path:
    """The model's folder, with every wanted file complete and checked.

    Where the hub cannot be reached, a complete folder of an earlier download is used.
    """
    folder = cache_folder(repo, options)
    try:
        if offline():
            raise _Unreachable("HF_HUB_OFFLINE=1 forbids downloading")
        files = [file for file in list_files(repo, revision) if is_wanted(file.path, options.weights)]
        with _locked(folder):
            _fetch_all(repo, revision, folder, files, options.progress)
    except _Unreachable as error:
        if _is_complete(folder, options.weights):
            return folder
        raise ModelNotFoundError(
            f"{repo} is not in the local cache ({folder}) and could not be fetched from {endpoint()} "
            f"({error}); check the network, set MODELSCOPE_ENDPOINT to a mirror, or give a local folder"
        ) from error
    return folder


def list_files(repo: str, revision: str) -> list[HubFile]:
    """All files of the repository. Raises ModelNotFoundError where the hub does not know or show it."""
    query = urllib.parse.urlencode({"Revision": revision, "Recursive": "True"})
    with _opened(f"{_api(repo)}/repo/files?{query}", repo, revision) as response:
        try:
            body = json.load(response)
            entries = body["Data"]["Files"]
            files = [
                HubFile(entry["Path"], int(entry.get("Size") or 0), entry.get("Sha256") or "")
                for entry in entries
                if entry.get("Type") != "tree"
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelNotFoundError(
                f"{endpoint()} answered with something that is no file list of {repo}; "
                "is MODELSCOPE_ENDPOINT the address of a ModelScope hub?"
            ) from error
    for file in files:
        check_safe(file.path, repo)
    return files


def _api(repo: str) -> str:
    return f"{endpoint()}/api/v1/models/{repo}"


@contextmanager
def _opened(url: str, repo: str, revision: str, start: int = 0) -> Iterator[Any]:
    """The response to a GET from byte `start` on; errors are translated."""
    request = urllib.request.Request(url, headers={"User-Agent": "pymllm", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    if token := os.environ.get("MODELSCOPE_API_TOKEN"):
        # Not sent on redirects: files are served from another host, by signed addresses.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
        request.add_unredirected_header("Cookie", f"m_session_id={token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            yield response
    except urllib.error.HTTPError as error:
        with error:
            status = error.code
        if status in (401, 403):
            hint = "MODELSCOPE_API_TOKEN may not read it" if token else "if private, set MODELSCOPE_API_TOKEN"
            raise ModelNotFoundError(f"{endpoint()} does not show {repo} ({hint})") from error
        if status == 404:
            message = f"{endpoint()} has no model {repo} with revision {revision!r}"
            raise ModelNotFoundError(message) from error
        raise _Unreachable(f"it answered {status}") from error
    except urllib.error.URLError as error:
        raise _Unreachable(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Unreachable(f"{type(error).__name__}: {error}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two processes that fetch the same model do so one after the other."""
    from filelock import FileLock

    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".pymllm.lock"):
        yield


def _fetch_all(
    repo: str, revision: str, folder: Path, files: list[HubFile], progress: Progress | None
) -> None:
    total = sum(file.size for file in files)
    done = 0
    for file in files:
        target = folder / file.path
        if not (target.is_file() and target.stat().st_size == file.size and _unchanged(target, file)):

            def report(so_far: int, before: int = done) -> None:
                if progress is not None:
                    progress(repo, before + so_far, total)

            _fetch(repo, revision, file, target, report)
        done += file.size
        if progress is not None:
            progress(repo, done, total)


def _unchanged(target: Path, file: HubFile) -> bool:
    """Small files may change within their size; large ones were checked when fetched."""
    return file.size > 16 * CHUNK or not file.sha256 or _sha256(target).hexdigest() == file.sha256


def _sha256(path: Path) -> hashlib._Hash:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest


def _fetch(repo: str, revision: str, file: HubFile, target: Path, report: Any) -> None:
    """Fetch one file, going on where an earlier attempt stopped; it appears only when complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".incomplete")
    query = urllib.parse.urlencode({"Revision": revision, "FilePath": file.path})
    for attempt in range(ATTEMPTS):
        try:
            _append(f"{_api(repo)}/repo?{query}", repo, revision, file, partial, report)
            break
        except _Unreachable:
            if attempt + 1 == ATTEMPTS:
                raise
            time.sleep(PAUSE_S * 2**attempt)
    _check(repo, file, partial)
    partial.replace(target)


def _append(url: str, repo: str, revision: str, file: HubFile, partial: Path, report: Any) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    if have > file.size:
        partial.unlink()
        have = 0
    if have == file.size and partial.exists():
        return
    with _opened(url, repo, revision, start=have) as response:
        if response.status != http.client.PARTIAL_CONTENT:
            have = 0  # the server ignored the range and sends all
        with _writing(partial), partial.open("ab" if have else "wb") as stream:
            while block := _read(response):
                stream.write(block)
                have += len(block)
                report(have)
    if have < file.size:
        raise _Unreachable(f"the connection broke after {have} of {file.size} bytes of {file.path}")


def _read(response: Any) -> bytes:
    """The next block; a broken connection is told apart from a disk that cannot be written."""
    try:
        block: bytes = response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Unreachable(f"{type(error).__name__}: {error}") from error
    return block


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def _check(repo: str, file: HubFile, partial: Path) -> None:
    size, wanted = partial.stat().st_size, file.sha256.lower()
    found = _sha256(partial).hexdigest() if wanted else ""
    if size != file.size or found != wanted:
        partial.unlink()
        what = f"sha256 {found} instead of {wanted}"
        if size != file.size:
            what = f"{size} bytes instead of {file.size}"
        raise CheckpointError(f"{file.path} of {repo} arrived with {what}; it was deleted, try again")


def _is_complete(folder: Path, weights: bool) -> bool:
    """Whether an earlier download left all that is needed, as far as the folder itself can tell."""
    if not (folder / "config.json").is_file() or any(folder.glob("**/*.incomplete")):
        return False
    if not weights:
        return True
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    shards = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    return all((folder / shard).is_file() for shard in shards)
