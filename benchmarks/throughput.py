"""Tokens a second over many requests of unlike lengths, offline: the benchmark of nano-vllm.

256 prompts of 100 to 1024 random tokens, answers of 100 to 1024 tokens, seed 0
(https://github.com/GeeeekExplorer/nano-vllm/blob/main/bench.py); greedy, without the prefix cache. Appends one
JSON line a round: in the first one kernels may be compiled, and steps with prompts are captured. Extra arguments are
settings, e.g. --server.attention_backend triton.

    python benchmarks/throughput.py MODEL [--requests 256] [--rounds 2] [--out FILE] [--server.load_format dummy ...]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

from pymllm_core import LLM, SamplingParams
from pymllm_core.bench.record import provenance
from pymllm_core.settings import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--low", type=int, default=100)
    parser.add_argument("--high", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/throughput.jsonl"))
    args, rest = parser.parse_known_args()
    random.seed(0)
    lengths = range(args.requests)
    prompts = [
        [random.randint(0, 10000) for _ in range(random.randint(args.low, args.high))] for _ in lengths
    ]
    params = [
        SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=random.randint(args.low, args.high))
        for _ in lengths
    ]
    settings = load_settings(["--server.model_path", args.model, "--server.disable_radix_cache", *rest])
    start = time.perf_counter()
    with LLM.from_settings(settings) as llm:
        ready = time.perf_counter() - start
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
        for turn in range(args.rounds):
            before = llm.stats()
            start = time.perf_counter()
            answers = llm.generate(prompts, params)
            seconds = time.perf_counter() - start
            stats, plan = llm.stats(), llm.plan
            tokens = sum(len(answer.token_ids) for answer in answers)
            assert tokens == sum(p.max_tokens or 0 for p in params)
            row = {
                "test": "throughput",
                "model": args.model,
                "requests": args.requests,
                "round": turn + 1,
                "tokens": tokens,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(tokens / seconds, 1),
                "steps": stats.steps - before.steps,
                "preemptions": stats.preemptions - before.preemptions,
                "ready_s": round(ready, 2),
                "attention": plan.attention.spec.name,
                "device_name": plan.device.name,
                **provenance(" ".join(sys.argv)),
            }
            print(json.dumps(row))
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
