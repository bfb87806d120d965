"""Steps with prompts piece by piece (`engine.pieces`), with a replay that computes the step again on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pymllm_core.builtin.torch_attention import TorchAttention
from pymllm_core.engine import pieces
from pymllm_core.engine.engine import Engine
from pymllm_core.engine.pieces import Attend, AttentionSeam, Step
from pymllm_core.output import Completion, Delta
from pymllm_core.protocols.attention import ForwardContext, LayerKV
from pymllm_core.request import Request, SamplingParams
from pymllm_core.testing.checkpoints import write_toy
from pymllm_core.testing.engines import check_idle, complete, greedy, make_engine, prompts_of, run


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    return folder


class Recompute:
    """Captures by computing again around the real attention; counts captures and replays."""

    def __init__(self) -> None:
        self.captures: list[int] = []
        self.replays = 0

    def __call__(self, step: Step, out: Tensor) -> Callable[[Attend], Tensor]:
        self.captures.append(len(out))

        def replay(attend: Attend) -> Tensor:
            self.replays += 1
            return step(AttentionSeam(attend))

        return replay


def with_pieces(folder: Path, **settings: Any) -> tuple[Engine, Recompute]:
    engine = make_engine(folder, **settings)
    counter = Recompute()
    engine.runner.capture_pieces(capture=counter)
    spare = engine.runner.config.num_pages * engine.runner.config.page_size
    with torch.inference_mode():
        for kv in engine.runner.kv:
            kv.k[spare:], kv.v[spare:] = torch.nan, torch.nan
    return engine, counter


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("radix", [False, True], ids=["chunk", "radix"])
def test_answers_do_not_depend_on_pieces(toy: Path, overlap: bool, radix: bool) -> None:
    settings: dict[str, Any] = {
        "overlap": overlap,
        "disable_radix_cache": not radix,
        "max_prefill_tokens": 70,
        "radix_cache_page_size": 4,
        "max_running_requests": 5,
    }
    prompts = prompts_of([3, 60, 14, 100, 31, 2, 48, 1, 17, 33, 90])
    params = [
        greedy(9) if index % 2 else SamplingParams(max_tokens=7, seed=index, ignore_eos=True, logprobs=1)
        for index in range(len(prompts))
    ]
    plain = make_engine(toy, **settings)
    engine, counter = with_pieces(toy, **settings)
    for _ in range(2):
        expected, got = complete(plain, prompts, params), complete(engine, prompts, params)
        assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
        for answer, other in zip(got, expected, strict=True):
            for one, two in zip(answer.logprobs or (), other.logprobs or (), strict=True):
                assert abs(one.logprob - two.logprob) < 1e-4
    assert counter.replays > 10
    assert len(set(counter.captures)) >= 2
    assert len(counter.captures) == len(engine.runner._pieces._replays)  # type: ignore[union-attr]
    check_idle(engine)


def test_attention_may_return_its_result_where_it_is_read(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"disable_radix_cache": True}
    prompts = prompts_of([20, 33, 7])
    expected = complete(make_engine(toy, **settings), prompts, greedy(4))
    engine, counter = with_pieces(toy, **settings)
    plainly, given = TorchAttention.attend, []

    def attend(self: TorchAttention, q: Tensor, kv: LayerKV, ctx: ForwardContext) -> Tensor:
        result = plainly(self, q, kv, ctx)
        if ctx.out is None:
            return result
        given.append(ctx.out.shape == q.shape)
        return ctx.out.copy_(result)

    monkeypatch.setattr(TorchAttention, "attend", attend)
    for _ in range(2):
        got = complete(engine, prompts, greedy(4))
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    assert counter.replays > 0
    assert given
    assert all(given)


def test_a_size_is_captured_at_its_second_step(toy: Path) -> None:
    engine, counter = with_pieces(toy, disable_radix_cache=True)
    (prompt,) = prompts_of([20])
    answers = [complete(engine, [prompt], greedy(1))[0].token_ids for _ in range(4)]
    assert len(set(answers)) == 1
    assert counter.captures == [32]
    assert counter.replays == 3


def test_what_does_not_fit_is_launched_as_ever(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows sampled than a piece has, and more tokens than the largest."""
    monkeypatch.setattr(pieces, "SIZES", (16, 32))
    monkeypatch.setattr(pieces, "OUTPUTS", (4, 16))
    settings: dict[str, Any] = {"disable_radix_cache": True, "max_running_requests": 24}
    engine, counter = with_pieces(toy, **settings)
    many = prompts_of([2] * 20)
    (long,) = prompts_of([60])
    expected = complete(make_engine(toy, **settings), [*many, long], greedy(2))
    for _ in range(3):
        got = complete(engine, many, greedy(2))
        assert [a.token_ids for a in got] == [a.token_ids for a in expected[:-1]]
        alone = run(engine, [Request("long", tuple(long), greedy(2))])
        assert alone["long"].token_ids == expected[-1].token_ids
    # Decodes of up to 16 sequences are steps of few tokens, too, where there are no graphs for them.
    assert set(counter.captures) <= {16, 32}


def test_a_prompt_among_many_decodes_is_replayed(toy: Path) -> None:
    """Its step samples for all of them: other pieces than those of a prompt alone, with as many tokens."""
    settings: dict[str, Any] = {"disable_radix_cache": True, "max_running_requests": 24}
    engine, counter = with_pieces(toy, **settings)
    prompts = prompts_of([2] * 20 + [12] * 3)
    requests = [Request(str(n), tuple(prompt), greedy(20)) for n, prompt in enumerate(prompts)]
    expected = complete(make_engine(toy, **settings), prompts, greedy(20))
    found: dict[str, list[Delta]] = {request.id: [] for request in requests}
    replays = []
    for request in requests:
        engine.add(request)
        if len(request.token_ids) > 2 or request.id == "19":
            before = counter.replays
            for delta in engine.step():
                found[delta.request_id].append(delta)
            replays.append(counter.replays - before)
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id].append(delta)
    for request, answer in zip(requests, expected, strict=True):
        assert Completion.join(found[request.id]).token_ids == answer.token_ids
    # 40 tokens of twenty prompts, then 20, 21 and 22 decodes beside a prompt of 12: pieces of 48, 32, 48 and 48.
    assert replays == [0, 0, 1, 1]
    assert counter.captures[0] == 48


def test_pieces_are_captured_while_there_is_nothing_to_do(toy: Path) -> None:
    """All of them, one at a time and once; answers are the same, and nothing is captured for them."""
    settings: dict[str, Any] = {"max_prefill_tokens": 70, "max_running_requests": 5}
    prompts, params = prompts_of([3, 60, 14, 31, 48]), [greedy(4)] * 5
    expected = complete(make_engine(toy, **settings), prompts, params)
    engine, counter = with_pieces(toy, **settings)
    engine.add(Request("a", (1, 2, 3), greedy(2)))
    assert not engine.warm_up(), "there is work"
    while engine.has_work:
        engine.step()
    before = len(counter.captures)
    steps = 0
    while engine.warm_up():
        steps += 1
        assert len(counter.captures) == before + steps
    assert sorted(counter.captures) == sorted(
        size for size in pieces.SIZES if size <= engine.runner.config.max_tokens
    )
    got = complete(engine, prompts, params)
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    assert steps
    assert len(counter.captures) == before + steps
    check_idle(engine)


def test_without_memory_for_pieces_answers_are_the_same(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is tried once for each size, and said."""
    settings: dict[str, Any] = {"max_prefill_tokens": 70, "max_running_requests": 5}
    prompts, params = prompts_of([33, 33, 33, 33]), [greedy(4)] * 4
    expected = complete(make_engine(toy, **settings), prompts, params)
    engine = make_engine(toy, **settings)
    tried: list[int] = []

    def capture(step: Step, out: Tensor) -> Callable[[Attend], Tensor]:
        tried.append(len(out))
        raise torch.OutOfMemoryError("10 MiB more were asked for")

    engine.runner.capture_pieces(capture=capture)
    for _ in range(3):
        got = complete(engine, prompts, params)
        assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    while engine.warm_up():
        pass
    assert len(tried) == len(set(tried))
    assert "operator by operator: 10 MiB more were asked for" in caplog.text
    check_idle(engine)


def test_a_slow_device_is_not_kept_busy_beforehand(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first slow one may have compiled something; the second one is the last."""
    monkeypatch.setattr(pieces, "SLOW_S", -1.0)
    engine, counter = with_pieces(toy, max_prefill_tokens=70, max_running_requests=5)
    assert [engine.warm_up() for _ in range(3)] == [True, True, False]
    assert len(counter.captures) == 2
