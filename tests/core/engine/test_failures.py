"""Aborted requests and failed steps: pages are free at once, and nothing is poisoned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pymllm_core.engine.engine import Engine
from pymllm_core.output import Delta
from pymllm_core.request import Request
from pymllm_core.testing.engines import check_idle, complete, greedy, join, make_engine, prompts_of, run


@pytest.mark.parametrize("radix", [True, False], ids=["radix", "chunk"])
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_abort_at_any_point_frees_everything_at_once(
    toy: tuple[Any, Path], radix: bool, overlap: bool
) -> None:
    engine = make_engine(
        toy[1], overlap=overlap, max_prefill_tokens=8, radix_cache_page_size=4, disable_radix_cache=not radix
    )
    (prompt,) = prompts_of([30])
    wanted = complete(make_engine(toy[1]), [prompt], greedy(8))[0]
    for when in range(14):
        engine.add(Request("r", tuple(prompt), greedy(8)))
        deltas = [delta for _ in range(when) for delta in engine.step()]
        last = engine.abort("r")
        if last is None:
            assert deltas[-1].finish_reason == "length"
        else:
            assert last.finish_reason == "abort"
            answer = join([*deltas, last])
            assert answer.token_ids == wanted.token_ids[: len(answer.token_ids)]
        assert engine.abort("r") is None
        check_idle(engine)
        # At once, and for the same id: what was in flight disturbs nobody.
        again = run(engine, [Request("r", tuple(prompt), greedy(8))])["r"]
        assert again.token_ids == wanted.token_ids
        check_idle(engine)


def test_abort_of_a_waiting_and_of_an_unknown_request(toy: tuple[Any, Path]) -> None:
    engine = make_engine(toy[1], max_running_requests=1)
    engine.add(Request("a", (5,), greedy(5)))
    engine.add(Request("b", (6,), greedy(5)))
    engine.step()
    last = engine.abort("b")
    assert last is not None
    assert (last.finish_reason, last.token_ids, last.usage.completion_tokens) == ("abort", (), 0)
    assert last.timings is not None
    assert last.timings.prefill_s == last.timings.decode_s == 0
    assert engine.abort("nobody") is None


class Failing:
    """Makes the model raise in chosen steps."""

    def __init__(self, engine: Engine, steps: set[int], error: BaseException) -> None:
        self._launch = engine._runner.launch
        self._steps, self._error, self._count = steps, error, 0
        engine._runner.launch = self.launch  # type: ignore[method-assign]

    def launch(self, batch: Any) -> Any:
        self._count += 1
        if self._count in self._steps:
            raise self._error
        return self._launch(batch)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("when", [1, 2, 3, 5])
def test_a_failed_step_ends_its_requests_and_poisons_nothing(
    toy: tuple[Any, Path], overlap: bool, when: int
) -> None:
    """Pages whose K and V were never computed must not serve the next request."""
    engine = make_engine(
        toy[1], overlap=overlap, max_prefill_tokens=12, max_running_requests=2, radix_cache_page_size=4
    )
    prompts = prompts_of([20, 9, 5])
    wanted = complete(make_engine(toy[1]), prompts, greedy(8))
    Failing(engine, {when}, RuntimeError("device lost"))
    requests = [Request(str(i), tuple(p), greedy(8)) for i, p in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    deltas: list[Delta] = []
    while engine.has_work:
        try:
            deltas += engine.step()
        except RuntimeError as error:
            failed = engine.fail(error)
            assert {delta.request_id for delta in failed} <= {"0", "1"}
            assert all(d.error == "RuntimeError: device lost" for d in failed)
            deltas += failed
    ends = {d.request_id: d.finish_reason for d in deltas if d.finish_reason is not None}
    assert ends["2"] == "length", "a request that waited is not concerned"
    assert "error" in ends.values()
    check_idle(engine)
    assert [a.token_ids for a in complete(engine, prompts, greedy(8))] == [a.token_ids for a in wanted]


def test_an_interrupted_step_poisons_nothing(toy: tuple[Any, Path]) -> None:
    engine = make_engine(toy[1], radix_cache_page_size=4)
    (prompt,) = prompts_of([22])
    wanted = complete(make_engine(toy[1]), [prompt], greedy(8))[0].token_ids
    Failing(engine, {1}, KeyboardInterrupt())
    engine.add(Request("r", tuple(prompt), greedy(8)))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.abort("r")
    check_idle(engine)
    assert complete(engine, [prompt], greedy(8))[0].token_ids == wanted
