"""From settings to an engine: choose everything (the plan), then load it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pymllm_core import plugins
from pymllm_core.builtin.sources import resolve_model
from pymllm_core.config import Settings
from pymllm_core.device import DeviceInfo, describe_device
from pymllm_core.engine.checkpoint import Checkpoint, read_json
from pymllm_core.engine.engine import Engine
from pymllm_core.engine.loader import load_weights
from pymllm_core.engine.processor import Processor, load_tokenizer
from pymllm_core.engine.runner import Runner, RunnerConfig
from pymllm_core.engine.scheduler import Scheduler, SchedulerLimits
from pymllm_core.engine.status import Progress, ProgressCallback
from pymllm_core.errors import CheckpointError, ConfigError
from pymllm_core.kv.pool import PagePool
from pymllm_core.nn.builder import Builder
from pymllm_core.plan import Limits, Plan, divide_memory
from pymllm_core.plugins import Registry
from pymllm_core.protocols.attention import AttentionConfig
from pymllm_core.protocols.model import Model, ModelShape
from pymllm_core.protocols.quant import QuantMethod, Stored
from pymllm_core.protocols.source import SourceOptions
from pymllm_core.select import Choice, choose
from pymllm_core.specs import (
    AttentionBackendSpec,
    CachePolicySpec,
    KernelSpec,
    ModelSpec,
    OutputParserSpec,
    QuantMethodSpec,
    Want,
)

# CPU features that make bf16 products at least as fast as float32 ones.
_CPU_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_DEFAULT_FRACTION = {"cuda": 0.85, "cpu": 0.5}
_DEFAULT_RUNNING = {"cuda": 256, "cpu": 32}
_DEFAULT_PREFILL = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True)
class Assembly:
    """A plan and the graph it was made with, whose weights are not loaded yet."""

    plan: Plan
    config: Mapping[str, Any]
    shape: ModelShape
    builder: Builder
    model: Model


class _Kernels:
    """Chooses a kernel for each operation and shape, and remembers what it chose."""

    def __init__(self, registry: Registry, device: DeviceInfo, dtype: str) -> None:
        self.choices: dict[str, Choice[KernelSpec]] = {}
        self._registry = registry
        self._device = device
        self._dtype = dtype
        self._instances: dict[str, Any] = {}

    def __call__(self, operation: str, shape: Mapping[str, int]) -> Any:
        label = " ".join([operation, *(f"{name}={value}" for name, value in shape.items())])
        if label not in self.choices:
            among = [r for r in self._registry.all(KernelSpec) if r.spec.operation == operation]
            want = Want(self._device, self._dtype, dict(shape))
            self.choices[label] = choose(
                self._registry, KernelSpec, want, what=f"kernel for {label}", among=among
            )
        spec = self.choices[label].spec
        if spec.key not in self._instances:
            self._instances[spec.key] = spec.load()()
        return self._instances[spec.key]


def make_plan(settings: Settings, registry: Registry | None = None) -> Plan:
    """What would serve the model; reads config.json and no weights."""
    return assemble(settings, registry).plan


def assemble(
    settings: Settings,
    registry: Registry | None = None,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    weights: bool = False,
) -> Assembly:
    """Choose everything. weights: let a hub's source download them, too.

    Raises ModelNotFoundError, CheckpointError, SelectionError, ConfigError or MemoryPlanError.
    """
    registry = registry or plugins.registry()
    server = settings.server
    device = describe_device(server.base_gpu_id, force=None if server.device == "auto" else server.device)
    options = SourceOptions(
        download_dir=server.download_dir,
        progress=progress,
        weights=weights and server.load_format != "dummy",
    )
    folder = resolve_model(server.model_path, registry, options)
    config = read_json(folder / "config.json")
    dtype = _dtype(settings, config, device)
    want = Want(device, dtype)
    architecture = _architecture(config, folder)
    model_choice = choose(
        registry, ModelSpec, want, what="model architecture", explicit=architecture, asked_by="config.json"
    )
    model_class: type[Model] = model_choice.spec.load()
    shape = model_class.shape(config)
    context = _context_length(settings, shape)
    quant_choice, quant = _quantisation(registry, want, settings, config)
    kernels = _Kernels(registry, device, dtype)
    builder = Builder(
        dtype=_torch_dtype(dtype),
        max_positions=context,
        kernel=kernels,
        quant=quant,
        stored=None if quant is None or server.load_format == "dummy" else _stored(folder),
    )
    model = model_class(config, builder)
    kv_dtype = _kv_dtype(settings, dtype)
    page_size = server.radix_cache_page_size
    attention = choose(
        registry,
        AttentionBackendSpec,
        Want(
            device,
            dtype,
            {
                "head_dim": shape.head_dim,
                "group": shape.num_heads // shape.num_kv_heads,
                "page_size": page_size,
                "same_kv_dtype": int(kv_dtype == dtype),
            },
        ),
        what="attention backend",
        explicit=server.attention_backend,
    )
    cache = choose(
        registry,
        CachePolicySpec,
        want,
        what="cache policy",
        explicit="chunk" if server.disable_radix_cache else "radix",
    )
    running = server.max_running_requests or _DEFAULT_RUNNING[device.type]
    prefill = server.max_prefill_tokens or _DEFAULT_PREFILL[device.type]
    kv_itemsize = _torch_dtype(kv_dtype).itemsize
    memory = divide_memory(
        available=device.available_memory,
        fraction=server.mem_fraction_static or _DEFAULT_FRACTION[device.type],
        weights=builder.weight_bytes,
        workspace=_workspace(shape, running, prefill, _torch_dtype(dtype).itemsize),
        kv_bytes_per_token=shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * kv_itemsize,
        page_size=page_size,
        wanted_tokens=server.max_total_tokens,
        useful_tokens=running * context,
    )
    plan = Plan(
        settings=settings,
        model_path=folder,
        architecture=architecture,
        dtype=dtype,
        kv_dtype=kv_dtype,
        vocab_size=shape.vocab_size,
        device=device,
        model=model_choice,
        quant=quant_choice,
        attention=attention,
        cache=cache,
        kernels=kernels.choices,
        parsers={
            "reasoning": _parser(
                registry, want, "reasoning", server.reasoning_parser, model_choice.spec.reasoning_parser
            ),
            "tool_calls": _parser(
                registry, want, "tool_calls", server.tool_call_parser, model_choice.spec.tool_call_parser
            ),
        },
        memory=memory,
        limits=Limits(
            context_length=context,
            max_running_requests=running,
            max_queued_requests=server.max_queued_requests,
            max_prefill_tokens=prefill,
            chunked_prefill_size=min(server.chunked_prefill_size or prefill, prefill),
            max_total_tokens=memory.num_pages * page_size,
        ),
        notes=tuple(_notes(settings, device, dtype)),
    )
    return Assembly(plan, config, shape, builder, model)


def build_engine(
    assembly: Assembly,
    *,
    progress: ProgressCallback = lambda _: None,
    cancel: threading.Event | None = None,
    overlap: bool | None = None,
) -> Engine:
    """Load what was assembled. overlap None: where the device runs on its own (CUDA)."""
    plan, shape = assembly.plan, assembly.shape
    server = plan.settings.server
    device = torch.device(plan.device.torch_name)
    if overlap is None:
        overlap = device.type == "cuda"
    progress(Progress("reading the tokenizer"))
    folder = plan.model_path
    if server.tokenizer_path is not None and server.tokenizer_path != server.model_path:
        folder = Path(server.tokenizer_path).expanduser()
        if not folder.is_dir():
            options = SourceOptions(download_dir=server.download_dir, weights=False)
            folder = resolve_model(server.tokenizer_path, plugins.registry(), options)
    processor = Processor(plan, load_tokenizer(folder, server), assembly.config)
    checkpoint = None if server.load_format == "dummy" else Checkpoint(plan.model_path)
    with torch.inference_mode():
        load_weights(
            assembly.builder,
            checkpoint,
            device,
            seed=server.random_seed,
            progress=progress,
            cancel=cancel or threading.Event(),
        )
        if checkpoint is not None:
            checkpoint.close()
        progress(Progress("preparing the engine"))
        dtype, page_size = assembly.builder.dtype, plan.memory.page_size
        attention = plan.attention.spec.load()(
            AttentionConfig(
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                page_size=page_size,
                scale=shape.head_dim**-0.5,
                dtype=dtype,
                device=device,
            )
        )
        limits = plan.limits
        # The whole pool may belong to one sequence, and a step may hold a full round of prompts and decodes.
        runner = Runner(
            RunnerConfig(
                max_tokens=limits.max_prefill_tokens + limits.max_running_requests,
                max_rows=limits.max_running_requests,
                max_pages=min(plan.memory.num_pages, -(-limits.context_length // page_size)),
                num_pages=plan.memory.num_pages,
                page_size=page_size,
                vocab_size=processor.vocab_size or shape.vocab_size,
                dtype=dtype,
                kv_dtype=_torch_dtype(plan.kv_dtype),
                device=device,
                overlap=overlap,
            ),
            shape,
            assembly.model,
            attention,
        )
    pool = PagePool(plan.memory.num_pages, page_size)
    scheduler = Scheduler(
        pool,
        plan.cache.spec.load()(pool),
        SchedulerLimits(
            max_running=limits.max_running_requests,
            max_queued=limits.max_queued_requests,
            max_prefill_tokens=limits.max_prefill_tokens,
            chunked_prefill_size=limits.chunked_prefill_size,
            conservativeness=server.schedule_conservativeness,
        ),
    )
    return Engine(plan, processor, scheduler, runner, overlap=overlap)


# -- single decisions ---------------------------------------------------------------------------------


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _architecture(config: Mapping[str, Any], folder: Path) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{folder / 'config.json'} names no architecture (field `architectures`)")
    return names[0]


def _dtype(settings: Settings, config: Mapping[str, Any], device: DeviceInfo) -> str:
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


def _kv_dtype(settings: Settings, dtype: str) -> str:
    wanted = settings.quantization.kv_cache_dtype
    if wanted.startswith("fp8"):
        raise ConfigError(
            f"--quantization.kv_cache_dtype {wanted} is refused: no installed attention backend reads an fp8 "
            "cache; use auto, float16 or bfloat16"
        )
    return dtype if wanted == "auto" else wanted


def _context_length(settings: Settings, shape: ModelShape) -> int:
    wanted = settings.server.context_length
    if wanted is not None and wanted > shape.max_positions:
        raise ConfigError(
            f"--server.context_length {wanted} is more than the {shape.max_positions} positions that the model "
            "supports; lower it, or add a rope scaling to config.json"
        )
    return wanted or shape.max_positions


def _quantisation(
    registry: Registry, want: Want, settings: Settings, config: Mapping[str, Any]
) -> tuple[Choice[QuantMethodSpec] | None, QuantMethod | None]:
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


def _stored(folder: Path) -> Stored | None:
    """What the folder's weight files hold, from their headers; None where they are not (all) there yet."""
    try:
        checkpoint = Checkpoint(folder)
    except CheckpointError:
        # A plan can be made without weights; loading will say what is wrong with the files.
        return None
    shapes = checkpoint.shapes
    checkpoint.close()
    return shapes


def _parser(
    registry: Registry, want: Want, kind: str, asked: str | None, default: str | None
) -> Choice[OutputParserSpec] | None:
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


def _workspace(shape: ModelShape, running: int, prefill: int, itemsize: int) -> int:
    """An upper estimate of what a step needs beside weights and KV, in bytes.

    Logits in float32 with two copies while sampling, and about 16 hidden-sized rows for each token.
    """
    tokens = prefill + running
    return 3 * running * shape.vocab_size * 4 + 16 * tokens * shape.hidden_size * itemsize


def _notes(settings: Settings, device: DeviceInfo, dtype: str) -> list[str]:
    """Settings that are accepted and concern nothing here, said aloud."""
    server = settings.server
    notes = [
        f"--server.{flag} is unused: this model has no gated delta-net layers"
        for flag in ("gdn_decode_backend", "gdn_extend_backend")
        if getattr(server, flag) != "auto"
    ]
    if server.enable_mamba_cache:
        notes.append("--server.enable_mamba_cache is unused: this model has no state-space layers")
    if server.disable_cuda_graph:
        notes.append("--server.disable_cuda_graph is unused: no installed plugin captures graphs")
    if device.type == "cpu" and dtype == "float16":
        notes.append("float16 is slow on CPUs; bfloat16 or float32 is faster here")
    return notes
