"""Quantised tiny models by the CPU kernels of pymllm-kernels, against the references of tests/quant_ct."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pymllm_core.config import Settings
from pymllm_core.device import cpu_flags
from pymllm_core.engine.build import assemble
from pymllm_core.engine.loader import DummyReader
from pymllm_core.testing.engines import registry_of

sys.path.insert(0, str(Path(__file__).parents[1] / "quant_ct"))
import test_models as models
from ct_files import group, inputs, weights, write

pytestmark = pytest.mark.skipif(
    not {"avx512_bf16", "avx512_vnni"} <= cpu_flags(), reason="the kernels need AVX512-BF16 and AVX512-VNNI"
)

PLUGINS = (*models.PLUGINS, "pymllm_kernels.plugin")
CASES = {f"weight only, {name}": (*case, models.BFLOAT16) for name, case in models.WEIGHT_ONLY.items()}
# Of the norm of all logits. Activations in bfloat16 round to other codes than those in float64: 0.027 to 0.049
# were measured, and the same with torch's operators.
CASES |= {f"w8a8, {name}": (*case, 0.08) for name, case in models.W8A8.items()}


def chosen(folder: Path) -> dict[str, set[str]]:
    """Operations and the names of the kernels that serve them."""
    plan = assemble(Settings.of(str(folder), device="cpu", dtype="bfloat16"), registry_of(*PLUGINS)).plan
    kernels: dict[str, set[str]] = {}
    for label, choice in plan.kernels.items():
        kernels.setdefault(label.split()[0], set()).add(choice.spec.name)
    # A look-up and an argmax are torch's.
    assert kernels.pop("embedding", {"torch"}) == kernels.pop("greedy_step") == {"torch"}
    return kernels


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, fields, bound = CASES[case]
    expected = models.expect(write(tmp_path, groups, **fields), groups, tmp_path)
    for operation, names in chosen(tmp_path).items():
        assert all(name.startswith("cpu-avx512") for name in names), (operation, names)
    monkeypatch.setattr(models, "PLUGINS", PLUGINS)
    found = models.compute(tmp_path, dtype="bfloat16")
    error = float((found - expected).norm() / expected.norm())
    assert error < bound, error


MEASURE = """
import sys, threading
from pathlib import Path
import torch
torch.set_num_threads(1)
from pymllm_core.testing.engines import complete, greedy, make_engine

def private():
    # Pages of this process's own; those of the mapped file can be dropped at any time.
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

plugins = sys.argv[3].split(",")
def load(folder):
    return make_engine(Path(folder), *plugins, dtype="bfloat16", max_total_tokens=64, context_length=64)

complete(load(sys.argv[1]), [[1, 2, 3]], greedy(2))  # imports, compiled kernels and first-use costs
before = peak = private()
stop = threading.Event()
def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, private())
thread = threading.Thread(target=watch)
thread.start()
engine = load(sys.argv[2])
complete(engine, [[1, 2, 3]], greedy(2))
stop.set()
thread.join()
print(peak - before, private() - before, engine.plan.memory.weights)
"""


def fill(folder: Path, quantization: dict[str, Any], *, hidden: int, width: int, layers: int) -> None:
    """A checkpoint of random numbers of a Qwen3 of these sizes, quantised as `quantization` says."""
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64,
        "vocab_size": 4000, "max_position_embeddings": 64, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6, "quantization_config": quantization,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    settings = Settings.of(str(folder), device="cpu", dtype="bfloat16", load_format="dummy")
    builder = assemble(settings, registry_of(*PLUGINS)).builder
    read = DummyReader(0, torch.device("cpu"))
    slots = {slot.name: slot for node in builder.nodes for slot in node.slots() if not slot.optional}
    save_file({name: read(slot) for name, slot in slots.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
def test_loading_makes_no_second_copy(tmp_path: Path, scheme: str) -> None:
    """Of a quantised model of 100 MB, at most one copy and the largest single node are ever private memory."""
    activations = inputs() if scheme == "W8A8" else None
    bits = weights(8) if scheme == "W8A8" else weights(4, 128)
    form = "int-quantized" if scheme == "W8A8" else "pack-quantized"
    quantization = {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {**group(bits, activations), "format": form}},
    }
    layers = 8 if scheme == "W8A8" else 16
    fill(tmp_path / "small", quantization, hidden=128, width=256, layers=1)
    fill(tmp_path / "big", quantization, hidden=1024, width=3072, layers=layers)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "big"), ",".join(PLUGINS)],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
        # A fixed threshold: else glibc learns from what is freed to keep tens of megabytes of temporaries.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )
    peak, after, total = map(int, done.stdout.split())
    assert total > 100e6
    # The embedding stays in the mapped file; the head is packed in bfloat16.
    assert after < total + 20e6
    # A fused node of 6 million weights: read, fused, and unpacked to a byte a weight where it has 4 bits.
    assert peak < total + 4 * 6 * 1024**2 + 20e6 < 2 * total
