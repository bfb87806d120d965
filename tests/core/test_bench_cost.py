"""Bytes and operations of a step, against counts made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from pymllm_core.bench.cost import ModelCost, Work, mean_context
from pymllm_core.bench.limits import DeviceLimits
from pymllm_core.config import Settings
from pymllm_core.engine.build import Assembly, assemble
from pymllm_core.testing.checkpoints import write_toy
from pymllm_core.testing.engines import TOY, registry_of

# The toy: 2 layers, hidden 32, 4 query and 2 KV heads of 8, MLP 48, 300 tokens.
QKV, OUT, GATE_UP, DOWN = 32 * (4 + 2 + 2) * 8, 32 * 32, 32 * 96, 48 * 32
LAYER, HEAD, NORMS = QKV + OUT + GATE_UP + DOWN, 32 * 300, (2 * 2 + 1) * 32
KV_PER_TOKEN = 2 * 2 * 2 * 8  # layers, K and V, heads, width


def toy(folder: Path, dtype: str = "float32", **fields: object) -> Assembly:
    write_toy(folder, **fields)
    return assemble(Settings.of(str(folder), device="cpu", dtype=dtype), registry_of(TOY))


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_decode_step_by_hand(tmp_path: Path, dtype: str, size: int, tied: bool) -> None:
    cost = ModelCost.of(toy(tmp_path, dtype, tie_word_embeddings=tied))
    weights = size * (2 * LAYER + HEAD + NORMS)
    assert cost.weight_bytes == weights
    work = cost.decode(3, 100)
    # A row of the embedding for each token, and the keys and values of all tokens of all sequences.
    assert work.bytes == weights + 3 * 32 * size + 3 * 100 * KV_PER_TOKEN * size
    products = 3 * 2 * (2 * LAYER + HEAD)
    attention = 3 * 2 * 4 * 100 * 2 * (8 + 8)  # layers, heads, tokens; q·k and p·v of width 8
    assert work.flops == {dtype: products + attention}
    assert work.total_flops == products + attention


def test_a_prefill_by_hand(tmp_path: Path) -> None:
    work = ModelCost.of(toy(tmp_path)).prefill(2, 5)
    assert work.bytes == 4 * (2 * LAYER + HEAD + NORMS + 10 * 32 + 10 * KV_PER_TOKEN)
    pairs = 1 + 2 + 3 + 4 + 5  # each token attends to itself and those before it
    attention = 2 * 2 * 4 * pairs * 2 * (8 + 8)
    # The head computes the last row of each prompt only.
    assert work.flops == {"float32": 2 * (10 * 2 * LAYER + 2 * HEAD) + attention}


def test_biases_are_read_too(tmp_path: Path) -> None:
    plain = ModelCost.of(toy(tmp_path / "plain")).weight_bytes
    biased = ModelCost.of(toy(tmp_path / "biased", attention_bias=True)).weight_bytes
    assert biased - plain == 4 * 2 * (32 + 16 + 16 + 32)


def test_the_mean_length_over_decode_steps() -> None:
    lengths = [20 + step for step in range(1, 10)]
    assert mean_context(20, 10) == sum(lengths) / len(lengths)


def test_floors() -> None:
    limits = DeviceLimits(read=100.0, matrix={"bfloat16": 1000.0, "int8": 4000.0}, measured="then")
    assert limits.seconds(Work(300, {"bfloat16": 500, "int8": 8000})) == (3.0, 2.5)
    assert limits.seconds(Work(300, {"float32": 1})) == (3.0, None)
