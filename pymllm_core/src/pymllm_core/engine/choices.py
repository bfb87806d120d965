"""The single decisions behind a plan: dtype, context length, quantisation, parsers, kernels, memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pymllm_core.config import Settings
from pymllm_core.device import DeviceInfo
from pymllm_core.engine.graphs import MAX_DRAW_BYTES, SHORT_SIZES, draw_bytes, graph_sizes
from pymllm_core.engine.headers import scan
from pymllm_core.errors import CheckpointError, ConfigError
from pymllm_core.plugins import Registry
from pymllm_core.protocols.model import ModelShape
from pymllm_core.protocols.quant import QuantMethod, Stored
from pymllm_core.select import Choice, choose
from pymllm_core.specs import AttentionBackendSpec, KernelSpec, OutputParserSpec, QuantMethodSpec, Want

# CPU features that make bf16 products at least as fast as float32 ones.
_CPU_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


class Kernels:
    """Chooses a kernel for each operation and shape, and remembers what it chose."""

    def __init__(self, registry: Registry, device: DeviceInfo, dtype: str) -> None:
        self.choices: dict[str, Choice[KernelSpec]] = {}
        self._registry = registry
        self._device = device
        self._dtype = dtype
        self._instances: dict[str, Any] = {}

    def choose(self, operation: str, shape: Mapping[str, int]) -> Choice[KernelSpec]:
        """The choice for an operation and its dimensions. Raises SelectionError where no kernel fits."""
        label = " ".join([operation, *(f"{name}={value}" for name, value in shape.items())])
        if label not in self.choices:
            among = [r for r in self._registry.all(KernelSpec) if r.spec.operation == operation]
            want = Want(self._device, self._dtype, dict(shape))
            self.choices[label] = choose(
                self._registry, KernelSpec, want, what=f"kernel for {label}", among=among
            )
        return self.choices[label]

    def __call__(self, operation: str, shape: Mapping[str, int]) -> Any:
        spec = self.choose(operation, shape).spec
        if spec.key not in self._instances:
            self._instances[spec.key] = spec.load()()
        return self._instances[spec.key]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name such as ``bfloat16``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def architecture_of(config: Mapping[str, Any], folder: Path) -> str:
    """The architecture that config.json names first. Raises CheckpointError where it names none."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{folder / 'config.json'} names no architecture (field `architectures`)")
    return names[0]


def compute_dtype(settings: Settings, config: Mapping[str, Any], device: DeviceInfo) -> str:
    """The computation's dtype. auto follows the checkpoint where the device is good at it."""
    if settings.server.dtype != "auto":
        return settings.server.dtype
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if stored not in ("bfloat16", "float16", "float32"):
        raise CheckpointError(f"config.json: dtype {stored!r} is not supported; set --server.dtype")
    if stored == "float32":
        return stored
    if device.type == "cpu":
        return "bfloat16" if device.cpu_flags & _CPU_BF16 else "float32"
    assert device.capability is not None
    return stored if device.capability >= (8, 0) else "float16"


def choose_kv_dtype(settings: Settings, dtype: str) -> str:
    """The KV cache's dtype. Raises ConfigError for one that no installed backend reads."""
    wanted = settings.quantization.kv_cache_dtype
    if wanted.startswith("fp8"):
        raise ConfigError(
            f"--quantization.kv_cache_dtype {wanted} is refused: no installed attention backend reads an fp8 "
            "cache; use auto, float16 or bfloat16"
        )
    return dtype if wanted == "auto" else wanted


def choose_context_length(settings: Settings, shape: ModelShape) -> int:
    """The longest sequence: the setting, or what the model's positions allow. Raises ConfigError over that."""
    wanted = settings.server.context_length
    if wanted is not None and wanted > shape.max_positions:
        raise ConfigError(
            f"--server.context_length {wanted} is more than the {shape.max_positions} positions that the model "
            "supports; lower it, or add a rope scaling to config.json"
        )
    return wanted or shape.max_positions


def choose_quantisation(
    registry: Registry, want: Want, settings: Settings, config: Mapping[str, Any]
) -> tuple[Choice[QuantMethodSpec] | None, QuantMethod | None]:
    """The checkpoint's quantisation method, or (None, None). Raises ConfigError where the settings disagree."""
    stored = config.get("quantization_config") or config.get("compression_config")
    asked = settings.quantization.method
    if not stored:
        if asked is not None:
            raise ConfigError(
                f"--quantization.method {asked} was asked for, but config.json has no quantization_config; "
                "leave the flag out for an unquantised checkpoint"
            )
        return None, None
    if not isinstance(stored, Mapping):
        raise CheckpointError("config.json: quantization_config is no object")
    method = str(stored.get("quant_method") or "compressed-tensors")
    if asked is not None and asked != method:
        raise ConfigError(
            f"--quantization.method {asked} was asked for, but the checkpoint says quant_method={method}"
        )
    choice = choose(
        registry, QuantMethodSpec, want, what="quantisation method", explicit=method, asked_by="config.json"
    )
    quant: QuantMethod = choice.spec.load()(stored)
    return choice, quant


def stored_tensors(folder: Path) -> Stored | None:
    """What the folder's weight files hold, from their headers; None where they are not (all) there yet."""
    found = scan(folder)
    # A plan can be made without weights; loading will say what is wrong with the files.
    return None if found.problems else {name: tensor.shape for name, tensor in found.tensors.items()}


def attention_want(
    device: DeviceInfo, settings: Settings, shape: ModelShape, dtype: str, kv_dtype: str
) -> Want:
    """The situation that an attention backend is chosen for."""
    situation = {
        "head_dim": shape.head_dim,
        "group": shape.num_heads // shape.num_kv_heads,
        "page_size": settings.server.radix_cache_page_size,
        "same_kv_dtype": int(kv_dtype == dtype),
    }
    return Want(device, dtype, situation)


def choose_attention(registry: Registry, want: Want, settings: Settings) -> Choice[AttentionBackendSpec]:
    """The attention backend. Raises SelectionError where none fits the model, the device and the cache."""
    return choose(
        registry,
        AttentionBackendSpec,
        want,
        what="attention backend",
        explicit=settings.server.attention_backend,
    )


def kv_bytes_per_token(shape: ModelShape, kv_dtype: str) -> int:
    """K and V of all layers."""
    return shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * torch_dtype(kv_dtype).itemsize


def choose_parser(
    registry: Registry, want: Want, kind: str, asked: str | None, default: str | None
) -> Choice[OutputParserSpec] | None:
    """The output parser of one kind: as asked, else the model family's; None where it is switched off."""
    name = asked or default
    if name in (None, "none"):
        return None
    among = [r for r in registry.all(OutputParserSpec) if r.spec.kind == kind]
    return choose(
        registry,
        OutputParserSpec,
        want,
        what=f"{kind} parser",
        explicit=name,
        asked_by="the settings" if asked else "the model family",
        among=among,
    )


def workspace_bytes(shape: ModelShape, running: int, prefill: int, itemsize: int) -> int:
    """An upper estimate of what a step needs beside weights and KV, in bytes.

    Logits in float32 with two copies while sampling, about 16 hidden-sized rows for each token, and what its
    routed experts hold.
    """
    width = 16 * shape.hidden_size + shape.routed_width
    return 3 * running * shape.vocab_size * 4 + (prefill + running) * width * itemsize


def graph_bytes(shape: ModelShape, running: int) -> int:
    """An upper estimate of what captured decode steps hold, in bytes.

    All sizes share one pool, as large as the largest needs: its logits in float32, and its activations, which
    are small beside them, and what draws from them. Each graph takes a few megabytes of the driver's memory.
    """
    row = 4 * (shape.vocab_size + 16 * shape.hidden_size + shape.routed_width)
    draws = min(draw_bytes(0, running, shape.vocab_size), MAX_DRAW_BYTES)
    sizes = graph_sizes(running)
    count = len(sizes) + sum(size <= SHORT_SIZES for size in sizes)
    return running * row + draws + count * (6 << 20)


def unused_settings(settings: Settings, device: DeviceInfo, dtype: str) -> list[str]:
    """Settings that are accepted and concern nothing here, said aloud."""
    server = settings.server
    notes = [
        f"--server.{flag} is unused: this model has no gated delta-net layers"
        for flag in ("gdn_decode_backend", "gdn_extend_backend")
        if getattr(server, flag) != "auto"
    ]
    if server.enable_mamba_cache:
        notes.append("--server.enable_mamba_cache is unused: this model has no state-space layers")
    if server.disable_cuda_graph and device.type != "cuda":
        notes.append("--server.disable_cuda_graph is unused: there are no CUDA graphs on a CPU")
    if device.type == "cpu" and dtype == "float16":
        notes.append("float16 is slow on CPUs; bfloat16 or float32 is faster here")
    return notes
