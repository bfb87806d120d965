"""The folder that `pymllm quantize` writes: shards, copies, how it appears, and what memory it takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ct_files import loaded_weights
from safetensors.torch import load_file, save_file
from test_quantize import model

from pymllm_core.engine.checkpoint import Checkpoint
from pymllm_core.engine.status import Progress
from pymllm_core.errors import CheckpointError, ConfigError
from pymllm_core.testing.checkpoints import write_tokenizer
from pymllm_quant_ct.quantize.run import quantise
from pymllm_quant_ct.quantize.scheme import Request
from pymllm_quant_ct.quantize.shards import Entry, ShardWriter

W4 = Request("W4A16", 32)


# ---- shards ----


def test_the_writer_writes_what_the_library_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(5, 3, generator=generator).bfloat16(),
        "b": torch.randint(-128, 128, (7, 9), generator=generator).to(torch.int8),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "名": torch.arange(6).view(2, 3),
        "strided": torch.arange(12, dtype=torch.int32).view(3, 4).t(),
        "flag": torch.tensor([True, False, True]),
    }
    dtypes = {
        "a": "BF16",
        "b": "I8",
        "scalar": "F32",
        "empty": "F32",
        "名": "I64",
        "strided": "I32",
        "flag": "BOOL",
    }
    entries = [Entry(name, dtypes[name], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with ShardWriter(tmp_path, entries, 1 << 20) as writer:
        for name in reversed(tensors):  # any order, in pieces
            tensor = tensors[name]
            for piece in tensor.split(2) if tensor.ndim else (tensor,):
                writer.write(name, piece)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"}
    )
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_too_much_or_too_little_is_noticed(tmp_path: Path) -> None:
    entries = [Entry("a", "F32", (2,)), Entry("b", "F32", (2,))]
    with pytest.raises(ValueError, match="12 bytes for a"), ShardWriter(tmp_path, entries, 100) as writer:
        writer.write("a", torch.zeros(3))
    with (
        pytest.raises(ValueError, match="not wholly written: b"),
        ShardWriter(tmp_path, entries, 100) as writer,
    ):
        writer.write("a", torch.zeros(2))
    with pytest.raises(CheckpointError, match="tensor x is of type F4, which cannot be copied"):
        Entry("x", "F4", (2,))


def test_shards(tmp_path: Path) -> None:
    """No file holds more than the limit, all are in the index, and the weights are those of one file."""
    from transformers import AutoModelForCausalLM

    model(tmp_path / "in")
    one = quantise(tmp_path / "in", tmp_path / "one", W4)
    several = quantise(tmp_path / "in", tmp_path / "several", W4, shard_bytes=12_000)
    files = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert several.files == len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == one.bytes_after == several.bytes_after
    whole, found = load_file(tmp_path / "one" / "model.safetensors"), {}
    for file in files:
        tensors = load_file(tmp_path / "several" / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 12_000
        assert all(index["weight_map"][name] == file for name in tensors)
        found.update(tensors)
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    assert loaded_weights(tmp_path / "several").keys() == one.errors.keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "several")


def test_a_sharded_model_is_read(tmp_path: Path) -> None:
    """Shards of the input, with an index, give the same file as one."""
    before = model(tmp_path / "in")
    quantise(tmp_path / "in", tmp_path / "one", W4)
    (tmp_path / "in" / "model.safetensors").unlink()
    names = list(before)
    halves = {"x-1.safetensors": names[::2], "x-2.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: before[name] for name in half}, tmp_path / "in" / file)
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    quantise(tmp_path / "in", tmp_path / "two", W4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


def test_rows_of_a_checkpoint(tmp_path: Path) -> None:
    tensor = torch.arange(70, dtype=torch.float32).view(7, 10)
    save_file({"a": tensor, "s": torch.tensor(2.0)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.dtypes == {"a": "F32", "s": "F32"}
    # Copied: the memory of what was handed out is let go, but comes back when it is looked at.
    kept = list(checkpoint.rows("a", 3))
    assert [len(part) for part in kept] == [3, 3, 1]
    assert torch.equal(torch.cat(kept), tensor)
    assert [part.item() for part in checkpoint.rows("s", 3)] == [2.0]


# ---- memory ----

MEASURE = """
import sys
from pathlib import Path
from pymllm_quant_ct.quantize.run import quantise
from pymllm_quant_ct.quantize.scheme import Request

def status(field):
    return int(Path("/proc/self/status").read_text().partition(field + ":")[2].split()[0]) * 1024

small, big, out = map(Path, sys.argv[1:4])
request = Request(*sys.argv[4:5], symmetric=sys.argv[4] == "W8A8")
quantise(small, out / "small", request)  # imports and first-use costs
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: man 5 proc
before = status("VmRSS")
quantise(big, out / "big", request)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads the memory of a process from /proc"
)
@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
def test_memory_does_not_grow_with_the_model(scheme: str, tmp_path: Path) -> None:
    """A model of 201 MB, each tensor 67 MB, is quantised within 40 MB, mapped pages of its file included.

    A block is 2^19 weights, 2 MiB in float32; what the package makes on its way (quotients, codes of 32 bit,
    what is read back) is some ten times that. One tensor alone would be 67 MB as it is stored.
    """
    shapes = {
        "model.embed_tokens.weight": (16384, 2048),
        "model.layers.0.mlp.down_proj.weight": (16384, 2048),
        "model.layers.1.mlp.down_proj.weight": (16384, 2048),
    }
    for folder, rows in (("small", 64), ("big", 16384)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        block = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
        tensors = {name: block.repeat(rows // 64, 1) for name in shapes}
        save_file(tensors, tmp_path / folder / "model.safetensors")
    arguments = [str(tmp_path / name) for name in ("small", "big", "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments, scheme],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
        # A fixed threshold: else glibc learns from what is freed to keep tens of megabytes of temporaries.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )
    assert (tmp_path / "big" / "model.safetensors").stat().st_size > 200e6
    print(done.stdout)
    assert int(done.stdout) < 40e6


# ---- folders ----


def test_files_beside_the_weights(tmp_path: Path) -> None:
    model(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    for name in (
        "LICENSE",
        "pytorch_model.bin",
        "README.md",
        "model.safetensors.index.json.old",
        "merges.txt",
    ):
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "elsewhere").write_text('{"linked": 1}')
    (tmp_path / "in" / "vocab.json").symlink_to(tmp_path / "elsewhere")  # as a hub's cache has it
    quantise(tmp_path / "in", tmp_path / "out", W4)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE", "merges.txt", "vocab.json",
    }  # fmt: skip
    assert not (tmp_path / "out" / "vocab.json").is_symlink()
    for name in found - {"config.json", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


def test_a_broken_run_leaves_nothing(tmp_path: Path) -> None:
    model(tmp_path / "in")

    def stop(news: Progress) -> None:
        if news.done > news.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise(tmp_path / "in", tmp_path / "out", W4, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    quantise(tmp_path / "in", tmp_path / "out", W4)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        quantise(tmp_path / "in", tmp_path / "out", Request("W8A8"), progress=stop, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_what_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "in")
    quantise(tmp_path / "in", tmp_path / "out", W4)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "out.partial":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ConfigError, match=r"out cannot be written: .*Permission denied"):
        quantise(tmp_path / "in", tmp_path / "out", Request("W8A8"), overwrite=True)
    assert "model.layers.0.mlp.up_proj.weight_packed" in load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_until_the_end_no_config_is_there(tmp_path: Path) -> None:
    """What a killed run leaves is under another name, and cannot be taken for a model."""
    model(tmp_path / "in")
    seen: list[Progress] = []

    def look(news: Progress) -> None:
        seen.append(news)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial" / "config.json").exists()

    quantise(tmp_path / "in", tmp_path / "out", W4, progress=look)
    assert [news.done for news in seen] == sorted(news.done for news in seen)
    assert seen[-1].done == seen[-1].total
    assert any(news.stage == "quantising model.layers.1.mlp.up_proj" for news in seen)


def test_a_folder_that_exists(tmp_path: Path) -> None:
    model(tmp_path / "in")
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)
    quantise(tmp_path / "in", out, W4)  # an empty one
    with pytest.raises(ConfigError, match=r"out exists; give another OUT, or --overwrite"):
        quantise(tmp_path / "in", out, Request("W8A8"))
    quantise(tmp_path / "in", out, Request("W8A8"), overwrite=True)
    assert load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (out / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"is no model's folder"):
        quantise(tmp_path / "in", out, W4, overwrite=True)


def test_a_run_that_was_killed_is_named(tmp_path: Path) -> None:
    model(tmp_path / "in")
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(ConfigError, match=r"out.partial is what a run left .*or give --overwrite"):
        quantise(tmp_path / "in", tmp_path / "out", W4)
    quantise(tmp_path / "in", tmp_path / "out", W4, overwrite=True)


@pytest.mark.parametrize("out", ["in", "in/out", "."])
def test_the_model_itself_is_never_touched(out: str, tmp_path: Path) -> None:
    model(tmp_path / "in")
    with pytest.raises(ConfigError, match="lie in each other"):
        quantise(tmp_path / "in", tmp_path / out, W4, overwrite=True)
    load_file(tmp_path / "in" / "model.safetensors")


def test_out_is_a_file(tmp_path: Path) -> None:
    model(tmp_path / "in")
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="out is a file"):
        quantise(tmp_path / "in", tmp_path / "out", W4)
    with pytest.raises(ConfigError, match=r"the folder .*out/x.partial cannot be made"):
        quantise(tmp_path / "in", tmp_path / "out" / "x", W4)


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "in")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ConfigError, match=r"has 0.0 GB free, and the quantised model takes"):
        quantise(tmp_path / "in", tmp_path / "out", W4)


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    model(tmp_path / "in")
    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(ConfigError, match=r"out cannot be written: .*No space left"):
        quantise(tmp_path / "in", tmp_path / "out", W4)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
