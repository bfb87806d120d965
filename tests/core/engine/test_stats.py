"""What the engine counts, and which requests share what the prefix cache keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pymllm_core.errors import RequestError
from pymllm_core.request import Request
from pymllm_core.testing.engines import complete, greedy, make_engine, prompts_of, run


def test_stats_usage_and_flush(toy: tuple[Any, Path]) -> None:
    engine = make_engine(toy[1], max_prefill_tokens=7, radix_cache_page_size=4)
    prompts = prompts_of([1, 8, 15, 30])
    answers = complete(engine, prompts, greedy(3))
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.cache_hit_tokens) == (54, 12, 0)
    assert (stats.running, stats.waiting, stats.preemptions) == (0, 0, 0)
    assert stats.pages_used == engine.scheduler.cache.kept_pages > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 3)
        assert answer.timings is not None
        assert min(answer.timings.queue_s, answer.timings.prefill_s, answer.timings.decode_s) >= 0
    again = complete(engine, [prompts[3]], greedy(3))[0]
    assert again.usage.cached_tokens == 28
    assert engine.stats().cache_hit_tokens == 28
    engine.add(Request("r", (5,), greedy(3)))
    assert not engine.flush_cache()
    engine.abort("r")
    assert engine.flush_cache()
    assert engine.stats().pages_used == 0
    assert complete(engine, [prompts[3]], greedy(3))[0].usage.cached_tokens == 0


def test_namespaces_and_key_ids_decide_what_is_shared(toy: tuple[Any, Path]) -> None:
    engine = make_engine(toy[1], radix_cache_page_size=4)
    ids = tuple(prompts_of([21])[0])

    def cached(name: str, **fields: Any) -> int:
        return run(engine, [Request(name, ids, greedy(2), **fields)])[name].usage.cached_tokens

    assert cached("a") == 0
    assert cached("b") == 20
    assert cached("c", cache_namespace="tenant") == 0
    assert cached("d", cache_namespace="tenant") == 20
    other = (*ids[:9], 10**9, *ids[10:])
    assert cached("e", key_ids=other) == 8
    assert cached("f", key_ids=other) == 20
    with pytest.raises(RequestError, match="key_ids and token_ids differ in length"):
        Request("g", ids, key_ids=(1,))


def test_an_idle_engine_has_not_stalled_when_work_comes(toy: tuple[Any, Path]) -> None:
    engine = make_engine(toy[1])
    engine._last_step -= 1000.0
    assert engine.stats().last_step_age_s >= 1000.0
    engine.add(Request("a", (1, 2, 3), greedy(2)))
    assert engine.stats().last_step_age_s < 100.0
    engine._last_step -= 1000.0
    engine.add(Request("b", (1, 2, 3), greedy(2)))
    assert engine.stats().last_step_age_s >= 1000.0, "more work must not hide a stall"
