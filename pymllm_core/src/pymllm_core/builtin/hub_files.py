"""Which files of a hub's repository are fetched: never pickles, never a name that leaves the folder."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from pathlib import PurePosixPath

from pymllm_core.errors import CheckpointError

WEIGHT_PATTERNS = ("*.safetensors",)
SMALL_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.tiktoken", "*.model", "tokenization*.py")
# Second copies of the weights, in other tools' layouts.
IGNORED_PATTERNS = ("consolidated*", "original/*", "onnx/*", "openvino/*", "*.bin", "*.pt", "*.pth", "*.pkl")


def allowed_patterns(weights: bool) -> list[str]:
    """Patterns of the files that are needed."""
    return [*SMALL_PATTERNS, *(WEIGHT_PATTERNS if weights else ())]


def is_wanted(path: str, weights: bool) -> bool:
    """Whether a file of a repository is needed."""

    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)

    return matches(allowed_patterns(weights)) and not matches(IGNORED_PATTERNS)


def check_safe(path: str, repo: str) -> str:
    """The path again. Raises CheckpointError where it would be written outside of the model's folder."""
    parts = PurePosixPath(path).parts
    unsafe = not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path or "\0" in path
    if unsafe:
        raise CheckpointError(f"the hub lists the unsafe file name {path!r} for {repo}; nothing was fetched")
    return path


def offline() -> bool:
    """Whether the user forbade network access to the hubs."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}
