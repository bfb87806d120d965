"""Small pools, long prompts and full queues: preemption changes no answer, what can never run is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pymllm_core.errors import ConfigError, MemoryPlanError, QueueFullError, RequestError
from pymllm_core.request import Request, SamplingParams
from pymllm_core.testing.engines import check_idle, complete, greedy, make_engine, prompts_of, run


@pytest.mark.parametrize("radix", [True, False], ids=["radix", "chunk"])
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_a_tiny_pool_gives_the_answers_of_a_large_one(
    toy: tuple[Any, Path], radix: bool, overlap: bool
) -> None:
    _, folder = toy
    settings: dict[str, Any] = {"radix_cache_page_size": 2, "max_prefill_tokens": 16}
    prompts = prompts_of([3, 9, 14, 5, 11, 2, 8])
    params = [
        SamplingParams(
            max_tokens=20,
            ignore_eos=True,
            temperature=i % 2 * 0.9,
            seed=i,
            frequency_penalty=(i % 3) * 0.4,
            repetition_penalty=1.0 + (i % 2) * 0.2,
            logprobs=1,
        )
        for i in range(7)
    ]
    large = complete(make_engine(folder, **settings), prompts, params)
    tiny = make_engine(
        folder,
        overlap=overlap,
        max_total_tokens=40,
        disable_radix_cache=not radix,
        schedule_conservativeness=0.01,
        **settings,
    )
    small = complete(tiny, prompts, params)
    assert tiny.stats().preemptions > 3
    assert [a.token_ids for a in small] == [a.token_ids for a in large]
    for a, b in zip(small, large, strict=True):
        assert a.logprobs is not None
        assert b.logprobs is not None
        assert [x.logprob for x in a.logprobs] == pytest.approx([x.logprob for x in b.logprobs], abs=1e-4)
    check_idle(tiny)


def test_a_pool_of_one_page(toy: tuple[Any, Path]) -> None:
    _, folder = toy
    engine = make_engine(folder, max_total_tokens=16, radix_cache_page_size=16)
    assert engine.plan.memory.num_pages == 1
    prompts = prompts_of([5, 15, 1])
    answers = complete(engine, prompts, greedy())
    wanted = complete(make_engine(folder), prompts, [greedy(11), greedy(1), greedy(15)])
    assert [a.token_ids for a in answers] == [a.token_ids for a in wanted]
    assert {a.finish_reason for a in answers} == {"length"}


@pytest.mark.parametrize(
    ("settings", "limit", "flag"),
    [({"max_total_tokens": 32}, 32, "max_total_tokens"), ({"context_length": 20}, 20, "context_length")],
)
def test_a_prompt_that_can_never_fit(
    toy: tuple[Any, Path], settings: dict[str, Any], limit: int, flag: str
) -> None:
    engine = make_engine(toy[1], **settings)
    with pytest.raises(
        RequestError, match=rf"the prompt has {limit} tokens, but {flag} is {limit}"
    ) as caught:
        engine.add(Request("r", (5,) * limit))
    assert f"--server.{flag}" in str(caught.value)
    assert caught.value.code == "context_length_exceeded"
    assert not engine.has_work
    (answer,) = complete(engine, [[5] * (limit - 1)], greedy(7))
    assert len(answer.token_ids) == 1


def test_max_queued_requests(toy: tuple[Any, Path]) -> None:
    engine = make_engine(toy[1], max_running_requests=1, max_queued_requests=1)
    for name in "ab":
        engine.add(Request(name, (5,), greedy(2)))
    with pytest.raises(QueueFullError, match="max_queued_requests is 1; retry later"):
        engine.add(Request("c", (5,), greedy(2)))
    # The refused one left nothing behind: its id is free.
    while engine.has_work:
        engine.step()
    assert run(engine, [Request("c", (5,), greedy(2))])["c"].finish_reason == "length"


def test_two_requests_of_one_id(toy: tuple[Any, Path]) -> None:
    engine = make_engine(toy[1])
    engine.add(Request("same", (5,), greedy(2)))
    with pytest.raises(RequestError, match="a request with id 'same' is running already") as caught:
        engine.add(Request("same", (6,), greedy(2)))
    assert caught.value.param == "rid"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop_token_ids": (-1,)}, "stop_token_ids names token -1, outside the vocabulary of 300"),
        ({"logit_bias": {300: 1.0}}, "logit_bias names token 300, outside the vocabulary of 300"),
        ({"stop": ("x",)}, "stop strings need a tokenizer, and this model has none"),
    ],
)
def test_requests_that_are_refused(toy: tuple[Any, Path], params: dict[str, Any], message: str) -> None:
    engine = make_engine(toy[1])
    with pytest.raises(RequestError, match=message):
        engine.add(Request("r", (5,), SamplingParams(**params)))
    assert not engine.has_work


def test_an_empty_prompt() -> None:
    with pytest.raises(RequestError, match="the prompt is empty; send at least one token"):
        Request("r", ())


def test_memory_that_does_not_suffice(toy: tuple[Any, Path]) -> None:
    with pytest.raises(MemoryPlanError, match="nothing is left for KV") as caught:
        make_engine(toy[1], mem_fraction_static=1e-7)
    message = str(caught.value)
    assert "--server.mem_fraction_static" in message
    assert message.count("GiB") == 4
    with pytest.raises(
        MemoryPlanError, match=r"max_total_tokens=1000000000000 needs 238418\.58 GiB of KV"
    ) as caught:
        make_engine(toy[1], max_total_tokens=10**12)
    assert "Lower --server.max_total_tokens to at most" in str(caught.value)


def test_a_context_longer_than_the_model_supports(toy: tuple[Any, Path]) -> None:
    with pytest.raises(ConfigError, match="context_length 257 is more than the 256 positions"):
        make_engine(toy[1], context_length=257)
