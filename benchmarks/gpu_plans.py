"""Times whole decode steps of the engine while the plan of one linear changes, on a GPU.

The rules of `few_rows_plan` and of `some_rows_plan` come from this: a chain of like launches (gpu_few_rows.py) says
something else, because what a kernel asks for early needs room beside the kernel before it, which in a step is another
one. One plan of one node is changed, the step captured anew and replayed. Rows are appended to the file; the screen
shows the best.

    python benchmarks/gpu_plans.py MODEL [--rows 8] [--nodes qkv,o,gate_up,down] [--closer 0,512,1024,2048]
                                         [--out results.jsonl]

MODEL is a folder with config.json; weights are dummies. --rows: sequences; 2 to 16 of a bfloat16 model try plans of
some rows. With --closer, the rules' plans with that many bytes instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pymllm_core.bench.one_batch import Sizes, fit, random_prompts
from pymllm_core.bench.record import append_row, provenance
from pymllm_core.bench.static_batch import time_batch
from pymllm_core.engine.build import assemble, build_engine
from pymllm_core.engine.engine import Engine
from pymllm_core.settings import load_settings
from pymllm_kernels.cuda import few_rows
from pymllm_kernels.cuda.few_rows_library import FewRowsError, Plan
from pymllm_kernels.cuda.few_rows_plan import most_warps
from pymllm_kernels.cuda.some_rows_library import Plan as SomePlan
from pymllm_kernels.cuda.some_rows_library import shared_bytes
from pymllm_kernels.triton.launch import Gpu, gpu

Node = tuple[int, int, bool]
"""Results, columns, gated."""

REPLAYS, TURNS, PROMPT = 20, 3, 128


def nodes(config: dict[str, Any]) -> dict[str, Node]:
    hidden, width, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    return {
        "qkv": (q + 2 * kv, hidden, False),
        "o": (hidden, q, False),
        "gate_up": (width, hidden, True),
        "down": (hidden, width, False),
    }


def candidates(codes: bool, *, gated: bool, sms: int) -> Iterator[Plan]:
    """codes: weights of 4 bits, on the tensor cores; others have one row by multiply-adds."""
    if codes:
        for row_tiles, warps in itertools.product((1, 2, 4), (2, 3, 4, 5, 6, 8, 10, 12)):
            if warps <= most_warps(1, row_tiles, "int4") and (row_tiles > 1 or not gated):
                yield Plan(row_tiles, warps, staged=True)
        return
    loops = ((1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (2, 5), (2, 8), (4, 2), (4, 4))
    for (row_tiles, ahead), warps, turns in itertools.product(loops, (4, 8), (1, 2, 4, None)):
        yield Plan(row_tiles, warps, True, ahead, 1 << 30 if turns is None else turns * sms)


def some_candidates(rows: int, node: Node, device: Gpu) -> Iterator[SomePlan]:
    """Of all stages that fit, those that leave room for 1 to 4 blocks a multiprocessor."""
    _, k, gated = node
    splits = (1, 2, 4, 8) if device.major >= 9 else (1,)
    found: set[SomePlan] = set()
    for warps, block_k, split in itertools.product((2, 3, 4, 5, 6, 8), (64, 128), splits):
        if k % block_k or k // block_k < 2 * split:
            continue
        for blocks in (1, 2, 3, 4):
            plans = (SomePlan(warps, block_k, stages, split) for stages in range(8, 1, -1))
            room = (device.shared + 1024) // blocks - 1024
            found.update(
                itertools.islice(
                    (p for p in plans if shared_bytes(rows, p, gated=gated, norm=True) <= room), 1
                )
            )
    yield from sorted(found, key=str)


class Step:
    """A captured decode step, with plans that may be replaced."""

    def __init__(self, model: Path, rows: int) -> None:
        self.rows = rows
        self.plans: dict[Node, Plan | SomePlan] = {}
        self.closer: dict[Node, int] = {}
        for name in ("one_row_plan", "tiles_plan", "some_rows_plan"):
            setattr(few_rows, name, functools.partial(self._plan, getattr(few_rows, name)))
        flags = [
            "--server.load_format",
            "dummy",
            "--server.disable_radix_cache",
            "--server.max_total_tokens",
            str(4000 * rows),
        ]
        sizes = Sizes(rows, PROMPT, 9)
        settings = load_settings(
            ["--server.model_path", str(model), "--server.max_running_requests", str(rows), *flags]
        )
        self.engine: Engine = build_engine(assemble(fit(settings, [sizes]), weights=True))
        # Leaves the buffers of a step at the prompt's end, where the replays stay.
        time_batch(self.engine, random_prompts(sizes, self.engine.plan.vocab_size, 0), sizes.output_len)

    def _plan(self, rule: Any, *numbers: int, gated: bool, **options: Any) -> Plan | SomePlan:
        n, k = numbers[-3:-1]
        plan: Plan | SomePlan = self.plans.get((n, k, gated)) or rule(*numbers, gated=gated, **options)
        if isinstance(plan, SomePlan):
            return plan
        return dataclasses.replace(plan, closer=self.closer.get((n, k, gated), plan.closer))

    @torch.inference_mode()
    def milliseconds(self) -> float:
        """The best turn of a step that is captured for this."""
        graphs = self.engine.runner._graphs
        assert graphs is not None
        key = max(key for key in graphs._contexts if key[0] == self.rows)
        context = graphs._contexts[key]
        graphs._buffers.state.steps.zero_()  # replays stay where they are
        graphs._attention.plan(context)
        replay, _ = graphs._capture(functools.partial(graphs._step, context, self.rows))
        best = float("inf")
        for _ in range(TURNS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPLAYS):
                replay()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / REPLAYS)
        return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--nodes", default="qkv,o,gate_up,down")
    parser.add_argument("--closer", default="")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_plans.jsonl"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device, and torch sees none")
    step = Step(args.model, args.rows)
    config = json.loads((args.model / "config.json").read_text())
    groups = config.get("quantization_config", {}).get("config_groups", {})
    codes = any(group["weights"]["num_bits"] == 4 for group in groups.values())
    device = gpu(torch.device("cuda"))
    about = {
        "model": args.model.name,
        "rows": args.rows,
        "device_name": torch.cuda.get_device_name(),
        **provenance("gpu_plans.py"),
    }
    for name in args.nodes.split(","):
        node = nodes(config)[name]
        rules = step.milliseconds()
        found: list[tuple[float, Any]] = [(rules, "rules")]
        if args.closer:
            for size in map(int, args.closer.split(",")):
                step.closer = {node: size}
                found.append((step.milliseconds(), {"closer": size}))
        else:
            plans: Iterator[Plan | SomePlan] = candidates(codes, gated=node[2], sms=device.sms)
            if args.rows > 1 and not groups:
                plans = some_candidates(args.rows, node, device)
            for plan in plans:
                step.plans = {node: plan}
                try:
                    found.append((step.milliseconds(), dataclasses.asdict(plan)))
                except FewRowsError as error:
                    print(f"{plan}: {error}")
        step.plans, step.closer = {}, {}
        for milliseconds, plan_of in found:
            append_row(
                args.out,
                {"node": name, "n": node[0], "k": node[1], "plan": plan_of, "ms": milliseconds, **about},
            )
        print(
            f"{name} {node}: rules {rules:.4f}; "
            + "; ".join(f"{p} {t:.4f}" for t, p in sorted(found, key=lambda f: f[0])[:5])
        )


if __name__ == "__main__":
    main()
