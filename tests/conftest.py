"""What all tests share: the reference data of Qwen3, and what a machine must have for a marked test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_VARIABLE = "PYMLLM_SHARED"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_qwen() -> Path:
    """Configurations, tokenizers and reference outputs of Qwen3 checkpoints, which lie beside the repository.

    PYMLLM_SHARED names the folder that holds ``qwen``; by default it is ``shared`` beside the repository.
    A test that needs them is skipped, by name, where they are not.
    """
    shared = Path(os.environ.get(SHARED_VARIABLE) or REPOSITORY.parent / "shared")
    folder = shared / "qwen"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}; {SHARED_VARIABLE} names the folder that holds qwen")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; see `nox -s gpu`"))
