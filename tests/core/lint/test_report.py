"""What `pymllm lint-checkpoint` tells of a good checkpoint: layers, kernels, bytes, no findings."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_checkpoint import toy

from pymllm_core.engine.engine import Engine
from pymllm_core.nn.linear import Linear
from pymllm_core.testing.engines import make_engine
from pymllm_core.testing.linting import WEIGHTS, check, only


def linears(engine: Engine) -> dict[str, Linear]:
    """The linears that an engine runs, by the name of their first part."""
    model: Any = engine._runner._model
    found = [
        *(n for layer in model.layers for n in (layer.qkv, layer.o, layer.gate_up, layer.down)),
        model.head,
    ]
    return {node.layer.parts[0].name: node for node in found}


def test_a_good_checkpoint_has_no_findings(folder: Path, sharded: Path) -> None:
    assert not check(folder).findings
    assert not check(sharded).findings


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_are_those_that_an_engine_uses(folder: Path, dtype: str) -> None:
    report = check(folder, dtype=dtype)
    nodes = linears(make_engine(folder, dtype=dtype))
    seen = 0
    for row in report.rows:
        if row.kernel is None:
            assert row.operation == "embedding"
            continue
        if row.operation == "attention_prep":
            assert (row.kernel.partition(" ")[0], row.count) == ("torch", 2)
            continue
        names = [name for layer in range(2) for name in [row.names[0].replace("{0-1}", str(layer))]]
        for name in dict.fromkeys(names):
            node = nodes[name.partition("+")[0]]
            wanted = {"torch": "TorchLinear", "onednn": "OneDnnLinear"}[row.kernel.partition(" ")[0]]
            assert type(node.kernel).__name__ == wanted
            assert (row.rows, row.columns) == (node.layer.out_features, node.layer.in_features)
            assert row.operation == node.scheme.operation
            seen += 1
    assert seen == len(nodes) == 9


def test_like_layers_are_one_row(folder: Path) -> None:
    rows = check(folder).rows
    assert [(row.names, row.count, row.rows, row.columns) for row in rows] == [
        (("model.embed_tokens",), 1, 300, 32),
        (("model.layers.{0-1}.self_attn.q_proj+k_proj+v_proj",), 2, 64, 32),
        (("model.layers.{0-1}.self_attn.o_proj",), 2, 32, 32),
        (("model.layers.{0-1}.mlp.gate_proj+up_proj",), 2, 96, 32),
        (("model.layers.{0-1}.mlp.down_proj",), 2, 32, 48),
        (("lm_head",), 1, 300, 32),
        (("attention of layers {0-1}",), 2, None, None),
    ]


def test_the_bytes_of_a_token(folder: Path) -> None:
    """Worked out by hand: every weight but the embedding, one row of that, and K and V of the context."""
    totals = check(folder, bandwidth=102.4).totals
    stored = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())
    assert totals.stored == {"BF16": stored}
    assert sum(totals.weights.values()) == stored
    table = 300 * 32 * 2
    assert totals.weights_per_token == stored - table + 32 * 2
    assert totals.kv_per_token == 2 * 2 * 2 * 8 * 2
    first, last = totals.tokens
    assert (first.context, last.context) == (1, 256)
    assert last.num_bytes == totals.weights_per_token + 256 * totals.kv_per_token
    assert last.floor_ms == pytest.approx(last.num_bytes / 102.4e9 * 1000)
    assert check(folder).totals.tokens[0].floor_ms is None


def test_a_tied_table_weighs_once_and_is_read(tmp_path: Path) -> None:
    folder = toy(tmp_path / "tied", tie_word_embeddings=True)
    totals = check(folder).totals
    stored = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())
    assert sum(totals.weights.values()) == stored
    assert totals.weights_per_token == stored + 32 * 2


def test_a_head_that_is_rounded_at_loading(tmp_path: Path) -> None:
    """A tied table is then held twice: as it is for look-ups, as codes and scales for the head."""
    folder = toy(tmp_path / "tied", tie_word_embeddings=True)
    before, totals = check(folder).totals, check(folder, lm_head="int8").totals
    head = 300 * (32 + 2)
    assert totals.weights["int8 head channel sym"] == head
    assert totals.weights["bfloat16"] == before.weights["bfloat16"]
    assert before.weights_per_token is not None
    assert totals.weights_per_token == before.weights_per_token - 300 * 32 * 2 + head


def test_tensor_data_is_not_read(tmp_path: Path) -> None:
    """A file of 200 GB, of which only the header is there: reading a thousandth of it would take longer."""
    folder = toy(tmp_path / "toy")
    header, end = {}, 0
    shapes = {name: tensor.shape for name, tensor in load_file(folder / WEIGHTS).items()}
    shapes["model.embed_tokens.weight"] = shapes["lm_head.weight"] = torch.Size((50_000_000, 1024))
    for name, shape in shapes.items():
        size = shape.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    assert (folder / WEIGHTS).stat().st_size > 200e9
    start = time.perf_counter()
    finding = only(check(folder))
    assert time.perf_counter() - start < 2
    assert finding.message == "stored as [50000000, 1024], expected [300, 32]"
