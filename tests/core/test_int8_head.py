"""``--quantization.lm_head int8``: the output head rounded to 8 bits at loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pymllm_core.nn import ops
from pymllm_core.nn.int8_head import Int8HeadScheme
from pymllm_core.nn.quant_ops import dequantize
from pymllm_core.protocols.quant import LinearLayer, LinearPart
from pymllm_core.testing.checkpoints import write_toy
from pymllm_core.testing.engines import LogitsRecorder, complete, greedy, make_engine

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_codes_are_the_nearest_ones(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Int8HeadScheme, "BLOCK", 640)  # several blocks, the last one not full
    layer = LinearLayer((LinearPart("lm_head", rows),), 64)
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).to(dtype)
    weight[0] = 0
    found = Int8HeadScheme(layer, dtype).load(lambda slot: weight, CPU)
    assert found["weight"].dtype == torch.int8
    assert found["scale"].shape == (rows, 1)
    assert found["scale"].dtype == dtype
    scale = weight.double().abs().amax(1, keepdim=True) / 127
    # bf16 keeps 8 bits of a scale, so that the largest code may be 127.5 rounded down.
    precision = 2**-8 if dtype == torch.bfloat16 else 2**-23
    assert torch.all((found["scale"].double() - scale).abs() <= precision * scale)
    exact = found["weight"].double() * found["scale"].double()
    assert torch.all((exact - weight.double()).abs() <= (0.5 + 128 * precision) * scale + 1e-12)
    assert dequantize(found["weight"], found["scale"]).dtype == dtype


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_are_those_of_the_rounded_head(tmp_path: Path, tied: bool) -> None:
    model = write_toy(tmp_path, tie_word_embeddings=tied)
    engine = make_engine(tmp_path, lm_head="int8")
    assert any(name.startswith(ops.W8A16_LINEAR) for name in engine.plan.kernels)
    recorder = LogitsRecorder(engine)
    prompt = [5, 17, 40, 8]
    (answer,) = complete(engine, [prompt], greedy(6))
    tokens = [*prompt, *answer.token_ids][:-1]
    with torch.no_grad():
        hidden = model.model(torch.tensor([tokens])).last_hidden_state[0]
        head = model.lm_head.weight
        scale = head.abs().amax(1, keepdim=True) / 127
        expected = hidden @ ((head / scale).round() * scale).t()
        plain = hidden @ head.t()
    assert recorder.compare("0", expected) < 1e-4
    assert float((expected - plain).abs().max()) > 1e-3  # the rounding is seen, so the test can fail


def test_the_plan_counts_what_is_kept(tmp_path: Path) -> None:
    write_toy(tmp_path)
    plain, rounded = make_engine(tmp_path), make_engine(tmp_path, lm_head="int8")
    columns = 32
    rows = plain.plan.vocab_size
    saved = rows * columns * 4 - rows * (columns + 4)
    assert plain.plan.memory.weights - rounded.plan.memory.weights == saved
