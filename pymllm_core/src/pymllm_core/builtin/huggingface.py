"""Models from the Hugging Face hub, through its own library; its errors become messages that help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm_core.builtin.hub_files import IGNORED_PATTERNS, allowed_patterns, check_safe, offline
from pymllm_core.errors import CheckpointError, ModelNotFoundError
from pymllm_core.protocols.source import Progress, SourceOptions

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 10.0


def download(repo: str, revision: str, options: SourceOptions, cache: Path) -> Path:
    """The snapshot's folder in the hub's cache. Raises ModelNotFoundError saying what the hub answered."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    api = huggingface_hub.HfApi(endpoint=endpoint, library_name="pymllm")
    try:
        if not offline():
            _refuse_unsafe_names(api, repo, revision)
        return Path(
            api.snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache,
                local_files_only=offline(),
                allow_patterns=allowed_patterns(options.weights),
                ignore_patterns=list(IGNORED_PATTERNS),
                tqdm_class=_bar(repo, options.progress),
            )
        )
    except CheckpointError:
        raise
    except (OSError, HFValidationError, ValueError, RuntimeError) as error:
        raise ModelNotFoundError(_explain(error, repo, revision, endpoint)) from error


def _refuse_unsafe_names(api: HfApi, repo: str, revision: str) -> None:
    """Look at the names before the library writes any; an unreachable hub is left to the library.

    Recent versions of the library refuse such names themselves, older ones only on Windows.
    """
    try:
        # Not list_repo_files: it repeats itself for half a minute where there is no network.
        siblings = api.model_info(repo, revision=revision, timeout=TIMEOUT_S).siblings
    except Exception:
        # snapshot_download meets the same error, and then answers from the cache if it can.
        return
    for file in siblings or ():
        check_safe(file.rfilename, repo)


def _explain(error: Exception, repo: str, revision: str, endpoint: str) -> str:
    from huggingface_hub import errors

    cause: BaseException = error
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        cause = error.__cause__
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is no valid repository name: {error}"
    if offline():
        return f"{repo} is not in the local cache, and HF_HUB_OFFLINE=1 forbids downloading it"
    if isinstance(cause, errors.GatedRepoError):
        return (
            f"{repo} is gated: accept its licence at {endpoint}/{repo}, then set HF_TOKEN to a token of "
            "that account"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r} at {endpoint}"
    if isinstance(cause, errors.RepositoryNotFoundError):
        given = os.environ.get("HF_TOKEN")
        token = "the token of HF_TOKEN may not read it" if given else "if private, set HF_TOKEN"
        return f"{endpoint} has no model {repo} ({token})"
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status is not None:
        return f"{endpoint} answered {status} for {repo}; try again later, or set HF_ENDPOINT to a mirror"
    reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
    return (
        f"{repo} is not in the local cache and could not be fetched from {endpoint} ({reason}); "
        "check the network, set HF_ENDPOINT to a mirror, or give a local folder"
    )


def _bar(repo: str, progress: Progress | None) -> type[Any]:
    """A class in the shape of tqdm that tells `progress` of bytes, and draws nothing."""
    import io

    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    class Bar(tqdm):  # type: ignore[misc,unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            options.update(file=io.StringIO(), disable=False, miniters=1, mininterval=0)
            super().__init__(*args, **options)

        def display(self, *_: Any, **__: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> Any:
            shown = super().update(n)
            # Of the library's two byte bars, the one that counts what is written, not what is received.
            written = self.unit == "B" and not str(self.desc).startswith("Downloading bytes")
            if progress is not None and written:
                progress(repo, int(self.n), int(self.total or 0))
            return shown

    return Bar
