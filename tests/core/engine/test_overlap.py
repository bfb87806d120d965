"""Launching a step before the last one's tokens are read changes no answer and wastes little."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

from pymllm_core.output import Completion
from pymllm_core.request import Request, SamplingParams
from pymllm_core.testing.engines import (
    LogitsRecorder,
    check_idle,
    complete,
    greedy,
    make_engine,
    prompts_of,
    run,
)


def test_overlap_changes_no_answer(texty: tuple[Any, Path]) -> None:
    """Greedy and seeded, with eos, stop strings, stop ids, penalties, preemption and aborts."""
    _, folder = texty
    rng = random.Random(3)
    vocab = make_engine(folder).plan.vocab_size
    requests = []
    for index in range(40):
        prompt = tuple(rng.randrange(3, vocab) for _ in range(rng.randint(1, 25)))
        params = SamplingParams(
            max_tokens=rng.randint(1, 25),
            temperature=rng.choice([0.0, 0.8, 1.5]),
            seed=index,
            top_k=rng.choice([-1, 20]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            stop=rng.choice([(), ("e",), ("th", " t")]),
            stop_token_ids=tuple(rng.sample(range(vocab), 20)) if rng.random() < 0.3 else (),
            logprobs=rng.choice([None, 2]),
        )
        requests.append(Request(str(index), prompt, params))
    found: list[dict[str, Completion]] = []
    for overlap, pool in ((False, 4096), (True, 4096), (False, 64), (True, 64)):
        engine = make_engine(
            folder,
            overlap=overlap,
            max_running_requests=6,
            max_prefill_tokens=16,
            radix_cache_page_size=4,
            max_total_tokens=pool,
            schedule_conservativeness=0.01,
        )
        found.append(run(engine, requests))
        assert (engine.stats().preemptions > 0) == (pool == 64)
        check_idle(engine)
    reasons = Counter(answer.finish_reason for answer in found[0].values())
    assert min(reasons["stop"], reasons["length"]) >= 5
    for other in found[1:]:
        for name, answer in found[0].items():
            same = other[name]
            assert (same.token_ids, same.text, same.finish_reason, same.matched_stop) == (
                answer.token_ids,
                answer.text,
                answer.finish_reason,
                answer.matched_stop,
            )


def test_overlap_wastes_one_token_at_most(toy: tuple[Any, Path]) -> None:
    engine = make_engine(toy[1], overlap=True)
    (prompt,) = prompts_of([9], seed=4)
    free = complete(make_engine(toy[1]), [prompt], greedy(30))[0].token_ids
    recorder = LogitsRecorder(engine)
    token = free[10]
    (answer,) = complete(engine, [prompt], greedy(30, stop_token_ids=(token,)))
    computed = max(start + len(rows) for start, rows in recorder.computed["0"])
    # The stop token itself is put in once, in vain; without a stop, nothing is.
    assert computed == len(prompt) + len(answer.token_ids)
    recorder.computed.clear()
    complete(engine, [prompt], greedy(5))
    assert max(start + len(rows) for start, rows in recorder.computed["0"]) == len(prompt) + 4
