"""Loading: progress, cancelling, seeded dummy weights, and no second copy of the weights in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pymllm_core.config import Settings
from pymllm_core.engine import build
from pymllm_core.engine.build import assemble, build_engine
from pymllm_core.engine.checkpoint import Checkpoint
from pymllm_core.engine.loader import DummyReader, load_weights
from pymllm_core.engine.status import Cancelled, Progress
from pymllm_core.errors import CheckpointError
from pymllm_core.protocols.quant import WeightSlot
from pymllm_core.testing.checkpoints import write_toy
from pymllm_core.testing.engines import TOY, registry_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("toy")
    write_toy(made)
    return made


def test_progress_is_told_in_bytes(folder: Path) -> None:
    assembly = assemble(Settings.of(str(folder), device="cpu", dtype="float32"), registry_of(TOY))
    told: list[Progress] = []
    build_engine(assembly, progress=told.append)
    stages = list(dict.fromkeys(p.stage for p in told))
    assert stages == ["loading weights", "reading the tokenizer", "preparing the engine"]
    loading = [p for p in told if p.stage == "loading weights"]
    assert [p.done for p in loading] == sorted(p.done for p in loading)
    assert (loading[0].done, loading[0].fraction, loading[-1].fraction) == (0, 0.0, 1.0)
    # Untied weights in float32: as many bytes as the file has, but for its header.
    total = (folder / "model.safetensors").stat().st_size
    assert total - 10_000 < loading[-1].total < total


def test_a_broken_tokenizer_ends_the_loading_early(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read beside the weights, which can take minutes."""

    def broken(assembly: Any) -> Any:
        raise CheckpointError("the tokenizer is broken")

    def endless(*args: Any, progress: Callable[[Progress], None], **kwargs: Any) -> None:
        for _ in range(1000):
            progress(Progress("loading weights"))
            time.sleep(0.01)
        raise AssertionError("nobody told the loading")

    monkeypatch.setattr(build, "load_processor", broken)
    monkeypatch.setattr(build, "load_weights", endless)
    assembly = assemble(Settings.of(str(folder), device="cpu"), registry_of(TOY))
    with pytest.raises(CheckpointError, match="the tokenizer is broken"):
        build_engine(assembly)


def test_loading_can_be_cancelled_at_any_node(folder: Path) -> None:
    count = len(assemble(Settings.of(str(folder), device="cpu"), registry_of(TOY)).builder.nodes)
    for stop_at in (0, 1, count // 2, count - 1):
        assembly = assemble(Settings.of(str(folder), device="cpu"), registry_of(TOY))
        cancel = threading.Event()
        told: list[Progress] = []

        def report(
            progress: Progress,
            told: list[Progress] = told,
            cancel: threading.Event = cancel,
            at: int = stop_at,
        ) -> None:
            told.append(progress)
            if len(told) > at:
                cancel.set()

        with pytest.raises(Cancelled, match="loading was interrupted"):
            load_weights(assembly.builder, Checkpoint(folder), CPU, seed=0, progress=report, cancel=cancel)
        assert len(told) == stop_at + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dummy_weights_are_seeded_and_named(dtype: torch.dtype) -> None:
    slot = WeightSlot("a.weight", (513, 1025), dtype)
    first, again = DummyReader(3, CPU)(slot), DummyReader(3, CPU)(slot)
    assert first.dtype == dtype
    assert first.shape == slot.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, DummyReader(4, CPU)(slot))
    assert not torch.equal(first, DummyReader(3, CPU)(WeightSlot("b.weight", (513, 1025), dtype)))
    assert abs(float(first.float().mean())) < 1e-3
    assert float(first.float().std()) == pytest.approx(DummyReader.STD, rel=0.02)


def test_dummy_weights_of_other_kinds() -> None:
    reader = DummyReader(-1, CPU)
    assert torch.equal(reader(WeightSlot("norm", (7,), torch.float32)), torch.ones(7))
    packed = reader(WeightSlot("packed", (64, 64), torch.int8))
    assert packed.dtype == torch.int8
    assert len(packed.unique()) > 200
    # More numbers than one block holds.
    long = reader(WeightSlot("long", (3, DummyReader.BLOCK - 5), torch.bfloat16))
    assert int((long == 0).sum()) < 1000


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from pymllm_core.testing.engines import make_engine, complete, greedy

def private():
    # Pages of this process's own; those of the mapped file can be dropped at any time.
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024

make_engine(Path(sys.argv[1]), max_total_tokens=64)  # imports and first-use costs
before = peak = private()
stop = threading.Event()
def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, private())
thread = threading.Thread(target=watch)
thread.start()
engine = make_engine(Path(sys.argv[2]), max_total_tokens=64, load_format=sys.argv[3])
complete(engine, [[1, 2, 3]], greedy(2))
stop.set()
thread.join()
print(peak - before, private() - before, engine.plan.memory.weights)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_loading_makes_no_second_copy(tmp_path: Path, folder: Path, load_format: str) -> None:
    """Of weights of 120 MB, at most one copy and the largest single node are ever private memory."""
    big = tmp_path / "big"
    write_toy(
        big,
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=4,
        num_attention_heads=10,
        num_key_value_heads=10,
        head_dim=64,
        vocab_size=2000,
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(big), load_format],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        # A fixed threshold: else glibc learns from what is freed to keep tens of megabytes of temporaries.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )
    peak, after, weights = map(int, done.stdout.split())
    assert weights > 100e6
    largest = 2 * 2560 * 640 * 4
    # Random numbers are made in a block of float32 beside the tensor that they fill.
    block = 4 * DummyReader.BLOCK if load_format == "dummy" else 0
    assert peak < weights + 2 * largest + block + 20e6 < 2 * weights
    assert after < weights + 20e6


MANY = """
import sys, threading
from pathlib import Path
import torch
torch.set_num_threads(1)
from pymllm_core.engine.loader import load_weights
from pymllm_core.nn.builder import Builder
from pymllm_core.nn.memory import zeros_on_demand

class Copy:
    fuses, apply = frozenset(), None
    def pack(self, tensors, *, act):
        return zeros_on_demand(tuple(tensors["weight"].shape), torch.bfloat16).copy_(tensors["weight"])

def private():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

def load(count):
    builder = Builder(dtype=torch.bfloat16, max_positions=8, kernel=lambda *_: Copy())
    for index in range(count):
        builder.linear(f"experts.{index}", {"gate": 768, "up": 768}, 2048)
    load_weights(builder, None, torch.device("cpu"), seed=0, progress=lambda _: None, cancel=threading.Event())
    return builder

load(1)
before = private()
builder = load(60)
print(private() - before, builder.weight_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_many_small_weights_leave_no_second_copy() -> None:
    """60 weights of 6 MB, as those of experts: what is freed between them does not stay with the process."""
    done = subprocess.run(
        [sys.executable, "-c", MANY], capture_output=True, text=True, check=True, timeout=120
    )
    private, weights = map(int, done.stdout.split())
    assert weights > 370e6
    assert private < weights + (64 << 20)
