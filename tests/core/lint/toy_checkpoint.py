"""The checkpoint that the tests of lint look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pymllm_core.testing.checkpoints import save, toy_model


def toy(folder: Path, *, max_shard_size: str = "1GB", **fields: Any) -> Path:
    """A toy checkpoint in bfloat16, with these fields of its config."""
    model = toy_model(**fields).bfloat16()
    save(model, folder, max_shard_size=max_shard_size, architectures=["ToyForCausalLM"], model_type="toy")
    return folder
