"""Files that are missing, damaged or not what their index says."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pymllm_core.testing.engines import make_engine
from pymllm_core.testing.linting import WEIGHTS, check, only

INDEX = "model.safetensors.index.json"


def test_a_file_that_was_cut_off(folder: Path) -> None:
    path = folder / WEIGHTS
    size = path.stat().st_size
    os.truncate(path, size - 1)
    report = check(folder)
    finding = only(report)
    assert (finding.severity, finding.code, finding.where) == ("error", "damaged-file", (WEIGHTS,))
    assert f"({size - 1:,} bytes) is no whole safetensors file: it was cut off" in finding.message
    assert len(report.rows) == 7  # what its header says is looked at all the same


def test_a_header_that_is_garbage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**50) + b"x" * 100)
    finding = only(check(folder))
    assert finding.code == "damaged-file"
    assert WEIGHTS in finding.message


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    finding = only(check(folder))
    assert (finding.severity, finding.code) == ("error", "no-weights")
    assert finding.message == f"{folder} holds no .safetensors file"
    finding = only(check(folder, weights=False))
    assert (finding.severity, finding.code) == ("note", "weights-not-here")


def test_missing_shards(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    files[1].unlink()
    report = check(sharded)
    missing, tensors = report.findings
    assert missing.code == "missing-file"
    assert f"lacks {files[1].name}, which {INDEX} names" in missing.message
    assert tensors.code == "missing-tensor"
    assert "may be in the files that cannot be read" in tensors.message
    (sharded / INDEX).unlink()
    finding = check(sharded).findings[0]
    assert finding.where == (files[1].name,)
    assert f"the other shards' names tell of {files[1].name}" in finding.message


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)
    found = [finding for finding in check(sharded).findings if finding.code == "duplicate-tensor"]
    assert len(found) == len(load_file(first))
    assert found[0].message.endswith(f"is stored twice, in {first.name} and {second.name}")


def test_an_index_that_differs_from_the_files(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    places = index["weight_map"]
    files = [file for file in sorted(set(places.values())) if list(places.values()).count(file) > 1]
    moved = next(name for name, file in places.items() if file == files[0])
    removed = next(name for name, file in places.items() if file == files[1])
    places[moved] = files[1]
    del places[removed]
    (sharded / INDEX).write_text(json.dumps(index))
    save_file({"left": torch.zeros(1)}, sharded / "old.safetensors")
    (sharded / "model-00001-of-00002.safetensors.incomplete").write_bytes(b"")
    report = check(sharded)
    found = {(finding.severity, finding.code): finding for finding in report.findings}
    assert len(report.findings) == 4
    one, other = (finding for finding in report.findings if finding.code == "index-mismatch")
    assert (one.severity, one.where) == ("warning", (moved,))
    assert one.message == f"{INDEX} has them in {files[1]}, the headers in {files[0]}"
    assert other.where == (removed,)
    assert found["note", "unread-file"].where == ("old.safetensors",)
    assert found["warning", "unfinished-file"].where == ("model-00001-of-00002.safetensors.incomplete",)
    make_engine(sharded)  # none of this stops loading


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', "[", '{"weight_map": {"a": "../x.safetensors"}}']
)
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    finding = only(check(sharded), "error")
    assert (finding.code, finding.where) == ("bad-index", (INDEX,))
