"""The one-batch benchmark: a static prefill, then decode steps, for every combination of sizes."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pymllm_core.bench.cost import ModelCost, mean_context
from pymllm_core.bench.limits import DeviceLimits, device_limits
from pymllm_core.bench.memory import peak_bytes, reset_peak
from pymllm_core.bench.profiling import ProfileOptions, profile_batch
from pymllm_core.bench.record import append_row, provenance
from pymllm_core.bench.static_batch import Timing, time_batch
from pymllm_core.config import Settings
from pymllm_core.engine.build import assemble, build_engine
from pymllm_core.engine.engine import Engine
from pymllm_core.engine.status import Progress, ProgressCallback
from pymllm_core.errors import ConfigError
from pymllm_core.plan import Plan

TOP_ID = 10_000
"""Random prompts take ids below this (and the vocabulary's size)."""
WARMUP_STEPS = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """One setting of the sweep. output_len counts the token that the prefill yields."""

    batch_size: int
    input_len: int
    output_len: int

    @property
    def label(self) -> str:
        return f"bs{self.batch_size}_in{self.input_len}_out{self.output_len}"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command's own flags say; see `commands.bench`."""

    run_name: str
    sizes: tuple[Sizes, ...]
    result_filename: Path
    log_decode_step: int
    seed: int
    skip_warmup: bool
    repeat: int
    limits: str
    profile: ProfileOptions | None
    command: str


def sweep(batch_sizes: Sequence[int], input_lens: Sequence[int], output_lens: Sequence[int]) -> list[Sizes]:
    """All combinations, the batch size changing slowest."""
    return [Sizes(*sizes) for sizes in itertools.product(batch_sizes, input_lens, output_lens)]


def fit(settings: Settings, sizes: Sequence[Sizes]) -> Settings:
    """The settings with room for the sweep: its prefills are single steps, whatever rounds a server takes.

    max_running_requests is taken from the sweep only where it was not set.
    """
    server = settings.server
    rows = server.max_running_requests or max(size.batch_size for size in sizes)
    fitting = [size for size in sizes if size.batch_size <= rows]
    tokens = max((size.batch_size * size.input_len for size in fitting), default=1)
    update = {"max_running_requests": rows, "max_prefill_tokens": max(server.max_prefill_tokens or 0, tokens)}
    return settings.model_copy(update={"server": server.model_copy(update=update)})


def misfit(plan: Plan, size: Sizes) -> str | None:
    """Why this engine cannot hold a batch of that size; None where it can."""
    limits, page = plan.limits, plan.memory.page_size
    if size.batch_size > limits.max_running_requests:
        return f"max_running_requests is {limits.max_running_requests}"
    tokens = size.input_len + size.output_len
    if tokens > limits.context_length:
        return f"{tokens} tokens a sequence, and context_length is {limits.context_length}"
    pages = size.batch_size * -(-tokens // page)
    if pages > plan.memory.num_pages:
        return f"the KV pool needs {pages * page} tokens, and max_total_tokens is {limits.max_total_tokens}"
    return None


def random_prompts(size: Sizes, vocab_size: int, seed: int) -> list[list[int]]:
    """[batch_size][input_len] token ids, the same for the same seed."""
    numbers = random.Random(seed)
    top = min(vocab_size, TOP_ID)
    return [[numbers.randrange(top) for _ in range(size.input_len)] for _ in range(size.batch_size)]


class OneBatch:
    """A loaded model and what its rows have in common."""

    def __init__(
        self, settings: Settings, options: Options, progress: ProgressCallback = lambda _: None
    ) -> None:
        self.options = options
        self.limits: DeviceLimits | None = None
        begin = time.perf_counter()
        assembly = assemble(
            fit(settings, options.sizes),
            progress=lambda *step: progress(Progress(*step)),
            weights=True,
        )
        plan = assembly.plan
        if options.profile and options.profile.activities == ("GPU",) and plan.device.type == "cpu":
            raise ConfigError(
                "--profile-activities GPU records nothing here: the engine runs on the CPU; add CPU"
            )
        if options.limits != "off":
            progress(Progress("measuring the device"))
            start = time.perf_counter()
            self.limits = device_limits(plan.device, plan.dtype, again=options.limits == "measure")
            begin += time.perf_counter() - start
            reset_peak(torch.device(plan.device.torch_name))
        self.cost = ModelCost.of(assembly)
        self.engine: Engine = build_engine(assembly, progress=progress)
        self.load_seconds = time.perf_counter() - begin
        self._provenance = provenance(options.command)

    @property
    def plan(self) -> Plan:
        return self.engine.plan

    def rows(
        self,
        skipped: Callable[[Sizes, str], None],
        traced: Callable[[Path], None],
        logged: Callable[[int, float], None],
    ) -> Iterator[dict[str, Any]]:
        """Measure one setting after another; each row is appended to the result file before it is yielded."""
        for index, size in enumerate(self.options.sizes):
            if why := misfit(self.plan, size):
                skipped(size, why)
                continue
            prompts = random_prompts(size, self.plan.vocab_size, self.options.seed + index)
            timings = self._time(size, prompts, logged)
            row = self.row(size, timings)
            append_row(self.options.result_filename, row)
            yield row
            if self.options.profile is not None:
                label = f"{self.options.run_name}_{size.label}"
                for path in profile_batch(self.engine, prompts, size.output_len, self.options.profile, label):
                    traced(path)

    def _time(
        self, size: Sizes, prompts: list[list[int]], logged: Callable[[int, float], None]
    ) -> list[Timing]:
        every = self.options.log_decode_step

        def on_step(step: int, seconds: float) -> None:
            if every and step % every == 0:
                logged(step, seconds)

        if not self.options.skip_warmup:
            # Each setting, because kernels may be compiled or chosen for each number of rows; then a step with prompts
            # is captured, as a server does before it comes.
            for steps in (WARMUP_STEPS, 1):
                time_batch(self.engine, prompts, min(size.output_len, steps + 1))
        return [
            time_batch(self.engine, prompts, size.output_len, on_step) for _ in range(self.options.repeat)
        ]

    def row(self, size: Sizes, timings: Sequence[Timing]) -> dict[str, Any]:
        """One line of the result file; docs/reference/bench-one-batch.md has the meaning of each field."""
        plan, batch = self.plan, size.batch_size
        prefill = statistics.median(timing.prefill for timing in timings)
        total = statistics.median(timing.total for timing in timings)
        decodes = [seconds for timing in timings for seconds in timing.decodes]
        decode = statistics.median(decodes) if decodes else 0.0
        return {
            "run_name": self.options.run_name,
            "batch_size": batch,
            "input_len": size.input_len,
            "output_len": size.output_len,
            "prefill_latency": prefill,
            "prefill_throughput": batch * size.input_len / prefill,
            "median_decode_latency": decode,
            "median_decode_throughput": batch / decode if decode else 0.0,
            "total_latency": total,
            "overall_throughput": batch * (size.input_len + size.output_len) / total,
            "device": plan.device.torch_name,
            "dtype": plan.dtype,
            "cuda_graph": self.engine.runner.captures_graphs,
            "p90_decode_latency": _percentile(decodes, 90),
            "max_decode_latency": max(decodes, default=0.0),
            "repeat": self.options.repeat,
            "seed": self.options.seed,
            "overlap": self.engine.runner.config.overlap,
            **self._work(size, prefill, decode),
            "model": plan.settings.server.model_path,
            "architecture": plan.architecture,
            "load_format": plan.settings.server.load_format,
            "quantisation": plan.quant.spec.name if plan.quant else None,
            "kv_dtype": plan.kv_dtype,
            "attention": plan.attention.spec.name,
            "kernels": {label: choice.spec.name for label, choice in plan.kernels.items()},
            "device_name": plan.device.name,
            "threads": torch.get_num_threads(),
            "load_seconds": self.load_seconds,
            "peak_memory_bytes": peak_bytes(self.engine.runner.config.device),
            **self._provenance,
        }

    def _work(self, size: Sizes, prefill: float, decode: float) -> dict[str, Any]:
        """Bytes, operations and their shares of the device's limits; null where nothing is known."""
        context = mean_context(size.input_len, size.output_len)
        stages = {
            "prefill": (self.cost.prefill(size.batch_size, size.input_len), prefill),
            "decode": (self.cost.decode(size.batch_size, context), decode),
        }
        fields: dict[str, Any] = {"weight_bytes": self.cost.weight_bytes}
        for stage, (work, seconds) in stages.items():
            moving, computing = self.limits.seconds(work) if self.limits else (None, None)
            known = [floor for floor in (moving, computing) if floor is not None]
            fields |= {
                f"{stage}_bytes": round(work.bytes),
                f"{stage}_flops": round(work.total_flops),
                f"{stage}_floor": max(known) if len(known) == 2 else None,
                f"{stage}_bandwidth_share": moving / seconds if moving and seconds else None,
                f"{stage}_matrix_share": computing / seconds if computing and seconds else None,
            }
        limits = self.limits
        return {
            **fields,
            "read_bandwidth": limits.read if limits else None,
            "matrix_rate": dict(limits.matrix) if limits else None,
            "limits_measured": limits.measured if limits else None,
        }


def _percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest ranks (NumPy's default); 0 of nothing."""
    if not values:
        return 0.0
    import numpy as np

    return float(np.percentile(values, percent))
