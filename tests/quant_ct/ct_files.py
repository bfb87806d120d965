"""Checkpoints written by the compressed-tensors package itself, of whichever version is installed."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

# What the package says of formats that do not match, and its bars, would drown pytest's own output.
os.environ.setdefault("COMPRESSED_TENSORS_LOG_DISABLED", "true")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside of the package
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
    "bos_token_id": None,
}


def weights(bits: int, group: int | None = None, *, symmetric: bool = True, **fields: Any) -> dict[str, Any]:
    """The ``weights`` of a group; group None: one scale a row."""
    size = {} if group is None else {"group_size": group}
    strategy = "channel" if group is None else "group"
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, **size, **fields}


def inputs(*, dynamic: bool = True, symmetric: bool = True) -> dict[str, Any]:
    """The ``input_activations`` of a group, 8 bit."""
    strategy = "token" if dynamic else "tensor"
    return {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": dynamic}


def group(
    stored: Mapping[str, Any], activations: Mapping[str, Any] | None = None, *targets: str, **fields: Any
) -> dict[str, Any]:
    return {
        "targets": list(targets or ["Linear"]),
        "weights": dict(stored),
        "input_activations": None if activations is None else dict(activations),
        **fields,
    }


def dense(fields: Mapping[str, Any]) -> Any:
    """A tiny Qwen3 of transformers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**{**TINY, "tie_word_embeddings": True, **fields}))


def write(
    folder: Path,
    groups: list[dict[str, Any]],
    *,
    ignore: tuple[str, ...] = ("lm_head",),
    file_format: str | None = None,
    seed: int = 0,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    decompress: bool = True,
    build: Callable[[Mapping[str, Any]], Any] = dense,
    **fields: Any,
) -> nn.Module:
    """Quantise a tiny Qwen3 and write it; returns it with the weights that the package dequantises.

    file_format: what the package shall write. change: edits the tensors before they are written.
    decompress: let the package read back what it wrote (old versions cannot always do that).
    build: makes the model from the fields of its config.
    """
    from pymllm_core.testing.checkpoints import randomise

    model = randomise(build(fields), std=0.15, seed=seed).to(dtype)
    config = model.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named = {f"group_{index}": dict(found) for index, found in enumerate(groups)}
        quantised = QuantizationConfig(
            config_groups=named, ignore=list(ignore), **({"format": file_format} if file_format else {})
        )
        apply_quantization_config(model, quantised)
        for name, module in model.named_modules():
            if getattr(module, "quantization_scheme", None) is not None:
                _calibrate(name, module)
        wide = _rounded(model)
        compressor = _compressor(model, file_format)
        tensors = _compress(compressor, model, folder)
        if decompress:
            compressor.decompress_model(model)
            wide = dict(model.state_dict())
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(change(tensors) if change else tensors, folder / "model.safetensors")
    path = folder / "config.json"
    stored = {**json.loads(path.read_text()), "architectures": [type(model).__name__]}
    path.write_text(json.dumps(stored))
    if config.tie_word_embeddings:
        wide["lm_head.weight"] = wide["model.embed_tokens.weight"]
    reference = build(fields).double()
    reference.load_state_dict({name: wide[name].double() for name in reference.state_dict()})
    reference.train(False)
    return reference


def _calibrate(name: str, module: nn.Module) -> None:
    """Scales and zero points from the range of each group of weights, and a fixed range of inputs."""
    scheme: Any = module.quantization_scheme
    args = scheme.weights
    weight = module.weight.data.float()
    rows, columns = weight.shape
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if getattr(module, "weight_g_idx", None) is not None:
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(len(name)))
        g_idx = torch.empty(columns, dtype=torch.int32)
        g_idx[order] = (torch.arange(columns) // args.group_size).to(torch.int32)
        module.weight_g_idx.data.copy_(g_idx)
        weight = weight[:, order]
    sizes = {
        "tensor": (1, -1),
        "channel": (rows, 1, -1),
        "group": (rows, columns // (args.group_size or 1), -1),
    }
    view = weight.reshape(sizes[strategy])
    scale, zero_point = calculate_qparams(view.amin(-1), view.amax(-1), args)
    _set(module, "weight_scale", scale)
    _set(module, "weight_zero_point", zero_point)
    if getattr(module, "input_scale", None) is not None:
        # The same for all projections of one input, as calibration would find it.
        low, high = torch.tensor([-2.5]), torch.tensor([3.0])
        scale, zero_point = calculate_qparams(low, high, scheme.input_activations)
        _set(module, "input_scale", scale)
        _set(module, "input_zero_point", zero_point)
    module.quantization_status = QuantizationStatus.FROZEN


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    parameter = getattr(module, name, None)
    if parameter is not None:
        parameter.data.copy_(value.reshape(parameter.shape))


def _compressor(model: nn.Module, file_format: str | None) -> Any:
    found = {"quantization_format": file_format}
    if "sparsity_config" in inspect.signature(ModelCompressor.from_pretrained_model).parameters:
        found["sparsity_config"] = None
    return ModelCompressor.from_pretrained_model(model, **found)


def _compress(compressor: Any, model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The tensors as the package stores them; its config.json is written beside."""
    if hasattr(compressor, "compress_model"):
        compressor.compress_model(model)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    else:
        tensors = dict(compressor.compress(model))
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    compressor.update_config(folder)
    return tensors


def _rounded(model: nn.Module) -> dict[str, Tensor]:
    """The weights as the package rounds them while calibrating: what it would read back."""
    wide = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            g_idx = getattr(module, "weight_g_idx", None)
            wide[f"{name}.weight"] = fake_quantize(
                module.weight.data,
                module.weight_scale.data,
                getattr(module, "weight_zero_point", None),
                scheme.weights,
                **({} if g_idx is None else {"g_idx": g_idx}),
            )
    return wide


def loaded_weights(folder: Path, dtype: str = "bfloat16") -> dict[str, Tensor]:
    """The weights [N, K] of all quantised linears by module, as our loader reads and dequantises them."""
    from pymllm_core.config import Settings
    from pymllm_core.engine.build import assemble
    from pymllm_core.engine.checkpoint import Checkpoint
    from pymllm_core.nn.linear import Linear
    from pymllm_core.nn.quant_ops import dequantize, unpack_int4
    from pymllm_core.nn.split_linear import SplitLinear
    from pymllm_core.testing.engines import registry_of

    settings = Settings.of(str(folder), device="cpu", dtype=dtype)
    builder = assemble(settings, registry_of("pymllm_qwen3.plugin", "pymllm_quant_ct.plugin")).builder
    checkpoint = Checkpoint(folder)
    found = {}
    for node in builder.nodes:
        for linear in node.parts if isinstance(node, SplitLinear) else [node]:
            if not isinstance(linear, Linear) or linear.scheme.name == "dense":
                continue
            tensors = linear.scheme.load(checkpoint.read, torch.device("cpu"))
            codes = tensors["weight"]
            if linear.scheme.operation == "w4a16_linear":
                codes = unpack_int4(codes, linear.layer.in_features)
            scale = tensors["scale"] if "scale" in tensors else tensors["weight_scale"][:, None]
            weight = dequantize(codes, scale, tensors.get("zero_point"), tensors.get("g_idx"))
            rows = [part.out_features for part in linear.layer.parts]
            for part, piece in zip(linear.layer.parts, weight.split(rows), strict=True):
                found[part.name] = piece
    return found
