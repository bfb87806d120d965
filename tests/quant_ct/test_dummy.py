"""``load_format dummy`` of quantised models: config.json alone gives the tensors that a checkpoint would."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ct_files import group, inputs, weights, write

from pymllm_core.engine.engine import Engine
from pymllm_core.request import Request
from pymllm_core.testing.engines import LogitsRecorder, greedy, make_engine, run

PLUGINS = ("pymllm_qwen3.plugin", "pymllm_quant_ct.plugin")
GROUPS: dict[str, list[dict[str, Any]]] = {
    "w4a16 g32": [group(weights(4, 32))],
    "w4a16 asymmetric": [group(weights(4, 32, symmetric=False))],
    "w8a16": [group(weights(8))],
    "w8a8": [group(weights(8), inputs())],
    "w8a8 asymmetric": [group(weights(8), inputs(symmetric=False))],
    "w8a8 static": [group(weights(8), inputs(dynamic=False))],
}


def tensors(engine: Engine) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of all tensors that the nodes hold, however they packed them."""
    found: list[tuple[tuple[int, ...], torch.dtype]] = []
    seen: set[int] = set()

    def walk(value: Any) -> None:
        if id(value) in seen or isinstance(value, type | str | bytes | int | float | None):
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append((tuple(value.shape), value.dtype))
            return
        if isinstance(value, dict):
            parts = list(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            parts = list(value)
        else:
            slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
            parts = [getattr(value, name, None) for name in slots] + list(
                getattr(value, "__dict__", {}).values()
            )
        for part in parts:
            walk(part)

    walk(engine._runner._model)
    assert len(found) > 4 * 6, "fewer than a norm or two and four linears a layer"
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", GROUPS)
def test_shapes_are_those_of_real_loading_and_logits_are_finite(
    name: str, dtype: str, tmp_path: Path
) -> None:
    real, config_only = tmp_path / "real", tmp_path / "config"
    write(real, GROUPS[name], hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    config_only.mkdir()
    shutil.copy(real / "config.json", config_only)
    loaded = make_engine(real, *PLUGINS, dtype=dtype, max_total_tokens=64)
    dummy = make_engine(config_only, *PLUGINS, dtype=dtype, max_total_tokens=64, load_format="dummy")
    assert tensors(dummy) == tensors(loaded)
    recorder = LogitsRecorder(dummy)
    run(dummy, [Request("a", tuple(range(1, 20)), greedy(4))])
    rows = torch.cat([rows for _, rows in recorder.computed["a"]])
    assert rows.isfinite().all()
    # Unlike rows and columns: a model of zeros or of one number would be timed in another way.
    assert float(rows.std()) > 0.01
