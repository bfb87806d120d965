"""Prefill and decode rates of the whole engine on this CPU, one JSON line a figure.

usage: python benchmarks/cpu_engine.py MODEL [--batch 1 8] [--prompt 512] [--decode 128] [--depth 1 512]

MODEL is a folder (weights may be absent with --dummy). `pp` is the prefill of --prompt tokens, `tg` the
decode of --decode tokens after --depth tokens; tokens per second, all sequences together, median of
--repeat runs. `python_ms` is the engine's own time of a decode step: everything outside the model and the sampler.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from pymllm_core import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--depth", type=int, nargs="*", default=[1, 512])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--dummy", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    llm = LLM(
        args.model,
        dtype=args.dtype,
        device="cpu",
        load_format="dummy" if args.dummy else "auto",
        max_prefill_tokens=8 * args.prompt,
        max_running_requests=max(args.batch),
        max_total_tokens=2 * max(args.batch) * (args.prompt + args.decode),
        disable_radix_cache=True,
        tokenizer_mode="auto",
    )
    kernels = {name: choice.spec.name for name, choice in llm.plan.kernels.items()}
    common = {
        "engine": "pymllm",
        "model": args.model,
        "dtype": llm.plan.dtype,
        "attention": llm.plan.attention.spec.name,
        "kernels": sorted(set(kernels.values())),
        "threads": args.threads,
        "cpu": llm.plan.device.name,
        "commit": _commit(),
        "load_s": round(time.perf_counter() - start, 2),
    }
    engine, vocab = llm._engine, llm.plan.vocab_size
    model_s = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args)
            model_s[0] += time.perf_counter() - begin
            return result

        return call

    # What is neither the model's forward pass and head nor the sampler's products over the vocabulary is the
    # engine's own: scheduling, preparing tensors, committing, detokenising.
    model, sampler = engine._runner._model, engine._runner._sampler
    model.forward, model.logits = timed(model.forward), timed(model.logits)  # type: ignore[method-assign]
    sampler.sample = timed(sampler.sample)  # type: ignore[method-assign]
    rng = random.Random(0)

    def generate(batch: int, depth: int, new: int) -> tuple[float, float, float]:
        """(seconds to the first tokens, seconds of the others, engine's own seconds of those)."""
        top = min(vocab - 2000, 100000)
        prompts = [[rng.randrange(100, top) for _ in range(depth)] for _ in range(batch)]
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        begin = time.perf_counter()
        for index, prompt in enumerate(prompts):
            engine.add(llm.processor.from_ids(prompt, params, request_id=str(index)))
        engine.step()
        first = time.perf_counter()
        model_s[0] = 0.0
        while engine.has_work:
            engine.step()
        end = time.perf_counter()
        return first - begin, end - first, end - first - model_s[0]

    def emit(test: str, batch: int, rates: list[float], **extra: Any) -> None:
        row = {**common, "test": test, "batch": batch, "median": round(statistics.median(rates), 2)}
        row |= {"best": round(max(rates), 2), "runs": [round(r, 2) for r in rates], **extra}
        row["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps(row), flush=True)

    for batch in args.batch:
        generate(batch, args.prompt, 2)
        times = [generate(batch, args.prompt, 1)[0] for _ in range(args.repeat)]
        emit(f"pp{args.prompt}", batch, [batch * args.prompt / t for t in times])
        for depth in args.depth:
            runs = [generate(batch, depth, args.decode + 1) for _ in range(args.repeat)]
            emit(
                f"tg{args.decode}@{depth}",
                batch,
                [batch * args.decode / decode for _, decode, _ in runs],
                python_ms=round(1e3 * statistics.median(own for _, _, own in runs) / args.decode, 3),
            )


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
