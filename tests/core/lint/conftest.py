"""What the tests of lint look at: toy checkpoints, good as they are, to be made wrong."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves siblings unimportable

from toy_checkpoint import toy


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to be made wrong."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in several files, to be made wrong."""
    path = toy(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path
