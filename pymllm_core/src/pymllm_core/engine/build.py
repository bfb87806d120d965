"""From settings to an engine: choose everything (the plan), then load it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from pymllm_core import plugins
from pymllm_core.builtin.sources import resolve_model
from pymllm_core.config import Settings
from pymllm_core.device import describe_device
from pymllm_core.engine.checkpoint import Checkpoint
from pymllm_core.engine.choices import (
    Kernels,
    attention_want,
    choose_attention,
    choose_kv_dtype,
    choose_parser,
    graph_bytes,
    kv_bytes_per_token,
    stored_tensors,
    torch_dtype,
    unused_settings,
    workspace_bytes,
)
from pymllm_core.engine.engine import Engine
from pymllm_core.engine.graphs import graph_sizes
from pymllm_core.engine.headers import read_json
from pymllm_core.engine.loader import load_weights
from pymllm_core.engine.model_graph import make_graph
from pymllm_core.engine.processor import load_processor
from pymllm_core.engine.runner import Runner, RunnerConfig
from pymllm_core.engine.scheduler import Scheduler, SchedulerLimits
from pymllm_core.engine.status import Progress, ProgressCallback
from pymllm_core.kv.pool import PagePool
from pymllm_core.nn import ops
from pymllm_core.nn.builder import Builder
from pymllm_core.plan import Limits, Plan, divide_memory
from pymllm_core.plugins import Registry
from pymllm_core.protocols.attention import AttentionBackend, AttentionConfig
from pymllm_core.protocols.model import Model, ModelShape
from pymllm_core.protocols.source import SourceOptions
from pymllm_core.select import choose
from pymllm_core.specs import CachePolicySpec, Want

logger = logging.getLogger(__name__)

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
    kernels: Kernels
    model: Model


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
    stored = None if server.load_format == "dummy" else stored_tensors(folder)
    graph = make_graph(settings, registry, device, folder, config, stored)
    dtype, shape, builder = graph.dtype, graph.shape, graph.builder
    want = Want(device, dtype)
    kv_dtype = choose_kv_dtype(settings, dtype)
    attention = choose_attention(registry, attention_want(device, settings, shape, dtype, kv_dtype), settings)
    graph.kernels.choose(ops.GREEDY_STEP, {})
    cache = choose(
        registry,
        CachePolicySpec,
        want,
        what="cache policy",
        explicit="chunk" if server.disable_radix_cache else "radix",
    )
    running = server.max_running_requests or _DEFAULT_RUNNING[device.type]
    prefill = server.max_prefill_tokens or _DEFAULT_PREFILL[device.type]
    memory = divide_memory(
        available=device.available_memory,
        fraction=server.mem_fraction_static or _DEFAULT_FRACTION[device.type],
        weights=builder.weight_bytes,
        workspace=workspace_bytes(shape, running, prefill, torch_dtype(dtype).itemsize),
        graphs=(
            graph_bytes(shape, running)
            if device.type == "cuda" and builder.graph_safe and not server.disable_cuda_graph
            else 0
        ),
        kv_bytes_per_token=kv_bytes_per_token(shape, kv_dtype),
        page_size=server.radix_cache_page_size,
        wanted_tokens=server.max_total_tokens,
        useful_tokens=running * builder.max_positions,
    )
    plan = Plan(
        settings=settings,
        model_path=folder,
        architecture=graph.choice.spec.name,
        dtype=dtype,
        kv_dtype=kv_dtype,
        vocab_size=shape.vocab_size,
        device=device,
        model=graph.choice,
        quant=graph.quant,
        attention=attention,
        cache=cache,
        kernels=graph.kernels.choices,
        parsers={
            "reasoning": choose_parser(
                registry, want, "reasoning", server.reasoning_parser, graph.choice.spec.reasoning_parser
            ),
            "tool_calls": choose_parser(
                registry, want, "tool_calls", server.tool_call_parser, graph.choice.spec.tool_call_parser
            ),
        },
        memory=memory,
        limits=Limits(
            context_length=builder.max_positions,
            max_running_requests=running,
            max_queued_requests=server.max_queued_requests,
            max_prefill_tokens=prefill,
            chunked_prefill_size=min(server.chunked_prefill_size or prefill, prefill),
            max_total_tokens=memory.num_pages * memory.page_size,
        ),
        notes=tuple(unused_settings(settings, device, dtype)),
    )
    return Assembly(plan, config, shape, builder, graph.kernels, graph.model)


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
    if device.type == "cuda":
        # Triton launches on the thread's current device, wherever the tensors are.
        torch.cuda.set_device(device)
    if overlap is None:
        overlap = device.type == "cuda"
    # Beside the weights, which come from the disk or are made on the device.
    executor = ThreadPoolExecutor(1, thread_name_prefix="pymllm-tokenizer")
    reading = executor.submit(load_processor, plan)
    executor.shutdown(wait=False)

    def watched(now: Progress) -> None:
        if reading.done():
            reading.result()  # a tokenizer that cannot be read ends the loading at once
        progress(now)

    checkpoint = None if server.load_format == "dummy" else Checkpoint(plan.model_path)
    with torch.inference_mode():
        load_weights(
            assembly.builder,
            checkpoint,
            device,
            seed=server.random_seed,
            progress=watched,
            cancel=cancel or threading.Event(),
        )
        if checkpoint is not None:
            checkpoint.close()
        progress(Progress("reading the tokenizer"))
        processor = reading.result()
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
                kv_dtype=torch_dtype(plan.kv_dtype),
                device=device,
                overlap=overlap,
                graph_sizes=_graph_sizes(plan, assembly.builder, attention),
                graph_pieces=(
                    plan.device.type == "cuda"
                    and assembly.builder.graph_safe
                    and not server.disable_cuda_graph
                ),
            ),
            shape,
            assembly.model,
            attention,
            assembly.kernels(ops.GREEDY_STEP, {}),
        )
    runner.capture(lambda done, total: progress(Progress("capturing decode steps", done, total)))
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


def _graph_sizes(plan: Plan, builder: Builder, attention: AttentionBackend) -> tuple[int, ...]:
    """The numbers of sequences for which decode steps are captured; none where they cannot be."""
    if plan.device.type != "cuda" or plan.settings.server.disable_cuda_graph:
        return ()
    if not attention.graph_safe:
        logger.warning(
            "decode steps are launched kernel by kernel: the attention backend %s cannot be captured",
            plan.attention.spec.name,
        )
        return ()
    if not builder.graph_safe:
        logger.warning(
            "decode steps are launched kernel by kernel: the routed experts are served one by one, see the "
            "kernels of `pymllm plan`"
        )
        return ()
    return graph_sizes(plan.limits.max_running_requests)
