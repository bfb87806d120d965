"""What the engine's tests share: checkpoints of the toy model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pymllm_core.testing.checkpoints import write_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A checkpoint without a tokenizer, and its reference."""
    folder = tmp_path_factory.mktemp("toy")
    return write_toy(folder), folder


@pytest.fixture(scope="session")
def texty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("texty")
    return write_toy(folder, tokenizer=True), folder
