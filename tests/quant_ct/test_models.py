"""Quantised tiny Qwen3 models, written by compressed-tensors, against transformers in float64.

The reference has the weights that the package itself dequantises. Where activations are quantised, it
quantises the input of every linear by the formulas of vLLM's kernels, written out here once more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ct_files import group, inputs, weights, write
from torch import Tensor, nn

from pymllm_core.errors import ConfigError
from pymllm_core.request import Request
from pymllm_core.testing.engines import LogitsRecorder, greedy, make_engine, run

PLUGINS = ("pymllm_qwen3.plugin", "pymllm_quant_ct.plugin")
PROMPT = tuple(
    int(token) for token in torch.randint(1, 64, (24,), generator=torch.Generator().manual_seed(7))
)

# Logits are about 10 in size. Float32: rounding alone, at most 4.5e-6 when measured. An activation that lies on
# the border of two codes may fall on either side, which moved a logit by at most 5e-3.
FLOAT32, FLOAT32_W8A8 = 5e-5, 2e-2
BFLOAT16 = 0.02  # of the norm of all logits

ATTENTION, MLP = "re:.*self_attn.*_proj$", "re:.*mlp.*_proj$"
EVERYTHING = {"ignore": (), "tie_word_embeddings": False}
WEIGHT_ONLY: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "w4 g32": ([group(weights(4, 32))], {}),
    "w4 g32 asymmetric": ([group(weights(4, 32, symmetric=False))], {}),
    "w4 channel": ([group(weights(4))], {}),
    "w4 channel asymmetric": ([group(weights(4, symmetric=False))], {}),
    "w4 tensor": ([group({"num_bits": 4, "strategy": "tensor", "symmetric": True})], {}),
    "w4 tensor asymmetric": ([group({"num_bits": 4, "strategy": "tensor", "symmetric": False})], {}),
    "w8 channel": ([group(weights(8))], {}),
    "w8 g32 asymmetric": ([group(weights(8, 32, symmetric=False))], {}),
    "w4 actorder": ([group(weights(4, 32, actorder="static"))], {}),
    "w8 int-quantized": ([group(weights(8, 32, symmetric=False))], {"file_format": "int-quantized"}),
    "w8 naive-quantized": ([group(weights(8))], {"file_format": "naive-quantized"}),
    "w4 naive-quantized": ([group(weights(4, 32))], {"file_format": "naive-quantized"}),
    "bias": ([group(weights(4, 32))], {"attention_bias": True}),
    "lm_head": ([group(weights(8))], EVERYTHING),
    "embedding and lm_head": ([group(weights(4, 32), None, "Linear", "Embedding")], EVERYTHING),
    "embedding, tied": ([group(weights(8, symmetric=False), None, "Linear", "Embedding")], {}),
    "two groups": ([group(weights(8), None, ATTENTION), group(weights(4, 32), None, MLP)], {}),
    "parts unlike": (
        [group(weights(8), None, "re:.*q_proj"), group(weights(4, 32), None, "re:.*(k|gate)_proj")],
        {"attention_bias": True},
    ),
    "part ignored": ([group(weights(4, 32))], {"ignore": ("lm_head", "re:.*up_proj", "re:.*0.*v_proj")}),
    "odd sizes": ([group(weights(4))], {"hidden_size": 60, "intermediate_size": 90, "head_dim": 30}),
}
W8A8: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    f"{'dynamic' if dynamic else 'static'} {'symmetric' if symmetric else 'asymmetric'}": (
        [group(weights(8), inputs(dynamic=dynamic, symmetric=symmetric))],
        {},
    )
    for dynamic in (True, False)
    for symmetric in (True, False)
}
W8A8["weights by tensor"] = ([group({"num_bits": 8, "strategy": "tensor"}, inputs())], {})
W8A8["bias"] = (W8A8["dynamic symmetric"][0], {"attention_bias": True})
W8A8["mixed-precision"] = (
    [group(weights(8), inputs(), ATTENTION), group(weights(4, 32), None, MLP)],
    {},
)


def fake_quantise(x: Tensor, module: nn.Module, *, dynamic: bool, symmetric: bool) -> Tensor:
    """x as 8-bit activations would have it, in float64."""
    if dynamic and symmetric:
        scale = x.abs().amax(-1, keepdim=True) / 127
        zero_point = torch.zeros_like(scale)
    elif dynamic:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = (high - low) / 255
        zero_point = (-128 - low / scale).round()
    else:
        scale, zero_point = module.static
    codes = ((x / scale).round() + zero_point).clamp(-128, 127)
    return (codes - zero_point) * scale


def expect(reference: nn.Module, groups: list[dict[str, Any]], folder: Path) -> Tensor:
    """[positions, vocab] of the prompt."""
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    for found in groups:
        args = found["input_activations"]
        for name, module in reference.named_modules() if args else ():
            if not isinstance(module, nn.Linear) or name == "lm_head":
                continue
            if found["targets"] != ["Linear"] and "self_attn" not in name:
                continue
            if not args["dynamic"]:
                zero = torch.zeros(1)
                zero_point = stored.get(f"{name}.input_zero_point", zero).double()
                module.static = (stored[f"{name}.input_scale"].double(), zero_point)

            def hook(module: nn.Module, given: tuple[Tensor], args: Any = args) -> tuple[Tensor]:
                return (
                    fake_quantise(given[0], module, dynamic=args["dynamic"], symmetric=args["symmetric"]),
                )

            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        return reference(torch.tensor([PROMPT])).logits[0]


def compute(folder: Path, *, plugins: tuple[str, ...] = PLUGINS, **settings: Any) -> Tensor:
    """[positions, vocab] of the prompt by our engine, in chunks of 10."""
    engine = make_engine(folder, *plugins, chunked_prefill_size=10, **settings)
    recorder = LogitsRecorder(engine)
    run(engine, [Request("a", PROMPT, greedy(2))])
    found = torch.full((len(PROMPT), 64), torch.nan)
    for start, rows in recorder.computed["a"]:
        found[start : start + len(rows)] = rows[: len(PROMPT) - start]
    return found.double()


@pytest.mark.parametrize("case", WEIGHT_ONLY)
def test_weight_only_float32(case: str, tmp_path: Path) -> None:
    groups, fields = WEIGHT_ONLY[case]
    reference = write(tmp_path, groups, dtype=torch.float32, **fields)
    difference = (compute(tmp_path) - expect(reference, groups, tmp_path)).abs().max()
    assert difference < FLOAT32


@pytest.mark.parametrize("case", W8A8)
def test_w8a8_float32(case: str, tmp_path: Path) -> None:
    groups, fields = W8A8[case]
    reference = write(tmp_path, groups, dtype=torch.float32, **fields)
    difference = (compute(tmp_path) - expect(reference, groups, tmp_path)).abs().max()
    assert difference < FLOAT32_W8A8


@pytest.mark.parametrize("case", ["w4 g32", "w4 channel asymmetric", "w8 channel", "embedding, tied"])
def test_weight_only_bfloat16(case: str, tmp_path: Path) -> None:
    groups, fields = WEIGHT_ONLY[case]
    expected = expect(write(tmp_path, groups, **fields), groups, tmp_path)
    found = compute(tmp_path, dtype="bfloat16")
    assert (found - expected).norm() / expected.norm() < BFLOAT16


def test_a_quantised_head_is_not_quantised_again(tmp_path: Path) -> None:
    groups, fields = WEIGHT_ONLY["lm_head"]
    write(tmp_path, groups, dtype=torch.float32, **fields)
    with pytest.raises(ConfigError, match=r"--quantization\.lm_head int8.*lm_head is quantised already"):
        make_engine(tmp_path, *PLUGINS, lm_head="int8")
