"""Train the demo model: ``python -m pymllm_demo.recipe.train --out DIR [--minutes M]``."""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from pymllm_demo.recipe import evaluate, network
from pymllm_demo.recipe import tokenizer as vocabulary
from pymllm_demo.recipe.stream import TOKENS, Workers

_WARM_UP = 0.04  # of the run
_LEARNT_SHARE = 0.14  # about what part of all tokens is the assistant's


def _rate(progress: float) -> float:
    """Linear warm-up, then a cosine to zero over the time or steps that there are."""
    return min(1.0, progress / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))


def _optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=next(model.parameters()).device.type == "cuda")


def _fit(fast: network.Trainable, workers: Workers, minutes: float, steps: int, peak: float) -> None:
    """Run until the minutes or the steps are over, whichever is first."""
    model, device = fast.model, fast.model.device
    optimizer = _optimizer(model)
    started, step, seen = time.monotonic(), 0, 0.0
    while True:
        elapsed = (time.monotonic() - started) / 60
        progress = max(elapsed / minutes, step / steps)
        if progress >= 1:
            return
        for group in optimizer.param_groups:
            group["lr"] = peak * _rate(progress)
        report = step % 200 == 0
        batch = workers.next()
        ids, where, wanted = (
            torch.from_numpy(part).to(device, non_blocking=True).long()
            for part in (batch.ids, batch.where, batch.wanted)
        )
        loss = fast.loss(ids, where, wanted)
        # A constant, not the count: else a token would weigh more in a batch of long prompts.
        (loss / (_LEARNT_SHARE * TOKENS)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + TOKENS
        if report:
            speed = seen / 1e6 / max(time.monotonic() - started, 1e-9)
            print(
                f"step {step} loss {loss.item() / len(batch.wanted):.4f} norm {norm.item():.2f} "
                f"lr {optimizer.param_groups[0]['lr']:.2e} {speed:.2f} Mtok/s "
                f"queue {workers.waiting()} left {60 * (minutes - elapsed):.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0, help="time for the training steps")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--start", type=Path, help="a model folder whose weights to go on from")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 4) - 3))
    parser.add_argument("--peak", type=float, default=1.5e-3, help="the highest learning rate")
    parser.add_argument("--cases", type=int, default=320, help="evaluation prompts per category")
    options = parser.parse_args()
    began = time.monotonic()

    kept = options.start and Tokenizer.from_file(str(options.start / "tokenizer.json"))
    tokenizer = kept or vocabulary.train()
    vocabulary.save(tokenizer, options.out)
    workers = Workers(options.out / "tokenizer.json", options.workers)
    end, pad = (vocabulary.token_id(tokenizer, tag) for tag in ("<|im_end|>", "<|endoftext|>"))
    settings = network.config(options.layers, end, pad)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model: Any = network.load(options.start) if options.start else network.build(settings)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{model.num_parameters() / 1e6:.2f} M parameters on {model.device}", flush=True)
    fast = network.trainable(model)
    print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
    _fit(fast, workers, options.minutes, options.steps, options.peak)
    workers.close()
    network.save(model, settings, options.out)
    print(f"saved after {time.monotonic() - began:.0f} s", flush=True)
    if options.cases:
        evaluate.report(options.out, options.cases, options.out)
    print(f"done after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
