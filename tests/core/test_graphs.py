"""Decode steps over standing buffers (`engine.graphs`), with a replay that computes the step again on the CPU."""

from __future__ import annotations

import random
from collections import Counter as Counted
from pathlib import Path
from typing import Any

import pytest
import torch

from pymllm_core.bench.static_batch import StaticBatch
from pymllm_core.engine import graphs
from pymllm_core.engine.decode_buffers import TURNS, DecodeBuffers
from pymllm_core.engine.engine import Engine
from pymllm_core.engine.graphs import graph_sizes
from pymllm_core.nn.step_ops import DecodeState, TorchGreedyStep
from pymllm_core.request import Request, SamplingParams
from pymllm_core.testing.checkpoints import write_toy
from pymllm_core.testing.engines import check_idle, complete, greedy, join, make_engine, run

VOCAB = 300


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    return folder


class Reporting(TorchGreedyStep):
    """Puts the tokens where the host finds them, as kernels of a device do."""

    reports = True

    def __call__(self, logits: torch.Tensor, state: DecodeState) -> None:
        super().__call__(logits, state)
        rows, turn = len(logits), int(state.turn)
        state.chosen[turn % TURNS, :rows] = state.ids[:rows]
        state.turn.add_(1)


class Counter:
    """Captures by computing again; counts the replays."""

    def __init__(self) -> None:
        self.replays: Counted[str] = Counted()

    def __call__(self, step: Any) -> Any:
        result: torch.Tensor = step().clone()

        def replay() -> None:
            self.replays[step.func.__name__] += 1
            if step.func.__name__ == "_step":
                # What the device has worked out, or was sent, is what the host knows.
                assert step.args[0].kv_lens.tolist() == step.args[0].kv_lens_host
                assert (step.args[0].positions + 1).tolist() == step.args[0].kv_lens_host
                self.replays[f"{step.args[0].page_table.shape[1]} pages"] += 1
            result.copy_(step())

        return replay, result


def with_graphs(
    folder: Path, sizes: tuple[int, ...], *, short_context: int = 0, reports: bool = False, **settings: Any
) -> tuple[Engine, Counter]:
    """An engine whose decode steps run over the buffers of graphs. reports: see `GreedyStep`."""
    engine = make_engine(folder, max_running_requests=max(sizes), **settings)
    runner, counter = engine._runner, Counter()
    object.__setattr__(runner.config, "graph_sizes", sizes)
    runner._attention.short_context = short_context  # type: ignore[attr-defined]
    if reports:
        runner._greedy_step = Reporting()
    runner.capture(lambda done, total: None, capture=counter)
    # Nothing that padding reads may matter: what belongs to nobody is not a number.
    spare = runner.config.num_pages * runner.config.page_size
    with torch.inference_mode():
        for kv in runner.kv:
            kv.k[spare:], kv.v[spare:] = torch.nan, torch.nan
    return engine, counter


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("radix", [False, True], ids=["chunk", "radix"])
@pytest.mark.parametrize("pages", [None, 40], ids=["roomy", "tiny"])
@pytest.mark.parametrize("reports", [False, True], ids=["copied", "reported"])
def test_answers_do_not_depend_on_graphs(
    toy: Path, overlap: bool, radix: bool, pages: int | None, reports: bool
) -> None:
    """Sequences of unlike lengths come and go, sampled in every way, with preemption where memory is tiny."""
    settings: dict[str, Any] = {
        "overlap": overlap,
        "disable_radix_cache": not radix,
        "max_prefill_tokens": 16,
        "radix_cache_page_size": 2,
    }
    if pages is not None:
        settings["max_total_tokens"] = 2 * pages
    prompts = prompts_of([3, 9, 14, 5, 11, 2, 8, 1, 17])
    params: list[SamplingParams] = []
    for index in range(len(prompts)):
        tokens = 5 + 7 * index % 23
        if index % 3 == 0:
            params.append(greedy(tokens))
        elif index % 3 == 1:
            params.append(SamplingParams(max_tokens=tokens, temperature=0.9, seed=index, ignore_eos=True))
        else:
            params.append(greedy(tokens, repetition_penalty=1.3, logprobs=2))
    plain = make_engine(toy, max_running_requests=6, **settings)
    engine, counter = with_graphs(toy, (1, 2, 4, 6), reports=reports, **settings)
    for _ in range(2):  # the second time with prefixes in the cache
        expected, got = complete(plain, prompts, params), complete(engine, prompts, params)
        assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
        for answer, other in zip(got, expected, strict=True):
            assert (answer.logprobs is None) == (other.logprobs is None)
    assert counter.replays["_step"] > 20
    check_idle(engine)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_short_sequences_have_graphs_of_their_own(toy: Path, temperature: float) -> None:
    """While all fit the narrow table, and never where one does not; sampled tokens do not depend on it."""
    prompts = prompts_of([3, 5, 11])
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=3, ignore_eos=True)
    settings: dict[str, Any] = {"overlap": True, "radix_cache_page_size": 2}
    plain = make_engine(toy, max_running_requests=4, **settings)
    engine, counter = with_graphs(toy, (1, 2, 4), short_context=16, **settings)
    expected, got = complete(plain, prompts, params), complete(engine, prompts, params)
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    # 11 tokens and what comes after the first of the answer, up to 16; then 16 to 34.
    assert counter.replays["8 pages"] == 5
    assert counter.replays["_step"] > 20
    check_idle(engine)


def test_batches_with_enough_work_have_no_graphs_for_short_sequences(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "SHORT_SIZES", 1)
    engine, counter = with_graphs(toy, (1, 2), short_context=16, radix_cache_page_size=2, overlap=False)
    complete(engine, prompts_of([3, 4]), greedy(6))
    assert counter.replays["8 pages"] == 0
    complete(engine, prompts_of([3], seed=1), greedy(6))
    assert counter.replays["8 pages"] == 5


def test_steady_steps_send_nothing(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ids while the same sequences run, and no numbers but for new pages."""
    engine, counter = with_graphs(toy, (1, 2, 4), overlap=True, reports=True, radix_cache_page_size=8)
    sent: Counted[str] = Counted()

    def counted(name: str) -> Any:
        original = getattr(DecodeBuffers, name)

        def count(self: DecodeBuffers, *args: Any) -> None:
            sent[name] += 1
            original(self, *args)

        return count

    for name in ("send_ids", "send_numbers"):
        monkeypatch.setattr(DecodeBuffers, name, counted(name))
    expected = complete(make_engine(toy), prompts_of([3, 5, 7]), greedy(30))
    got = complete(engine, prompts_of([3, 5, 7]), greedy(30))
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    assert counter.replays["_step"] > 25
    # When the prompts are read, and when the number of sequences changes.
    assert 1 <= sent["send_ids"] <= 3
    # 12 pages are filled, none of them in the same step as another.
    assert sent["send_ids"] < sent["send_numbers"] <= 3 + 12


def test_rows_without_a_sequence_stay_on_the_page_of_nobody(toy: Path) -> None:
    """Also where pages are taken beforehand, so that nothing is sent for many steps; the padded row had real pages."""
    prompts = prompts_of([4, 6, 3])
    expected = complete(make_engine(toy, radix_cache_page_size=2), prompts, greedy(30))
    engine, counter = with_graphs(
        toy, (1, 2, 4), overlap=True, reports=True, radix_cache_page_size=2, disable_radix_cache=True,
        max_total_tokens=128,
    )  # fmt: skip
    complete(engine, prompts_of([9, 9, 9, 9]), greedy(12))
    steps = counter.replays["_step"]
    with StaticBatch(engine, prompts, 30) as batch:
        launched = batch.prefill()
        for _ in range(29):
            following = batch.decode()
            batch.read(launched)
            launched = following
        batch.read(launched)
        assert batch.generated == [list(answer.token_ids) for answer in expected]
    assert counter.replays["_step"] == steps + 29


def test_a_step_between_leaves_no_stale_positions(toy: Path) -> None:
    """A prompt that comes late is computed beside the decodes, outside of the graphs; then the same sequences go on."""
    prompts, late = prompts_of([4, 6]), prompts_of([9], seed=5)
    plain = complete(make_engine(toy), [*prompts, *late], greedy(25))
    engine, counter = with_graphs(toy, (1, 2, 4), overlap=True, reports=True, max_prefill_tokens=2)
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), tuple(prompt), greedy(25)))
    deltas: dict[str, list[Any]] = {"0": [], "1": [], "late": []}
    steps = 0
    while engine.has_work:
        if steps == 12:
            engine.add(Request("late", tuple(late[0]), greedy(25)))
        if steps == 14:
            engine.abort("late")
        steps += 1
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    for index in range(2):
        assert join(deltas[str(index)]).token_ids == plain[index].token_ids
    assert counter.replays["_step"] > 20
    check_idle(engine)


@pytest.mark.parametrize(
    "filters", [{}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.9}, {"top_k": 5, "min_p": 0.1}]
)
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_usual_sampling_is_captured(toy: Path, overlap: bool, filters: dict[str, Any]) -> None:
    """The same tokens as without graphs, for unlike parameters in one batch, whose composition changes."""
    prompts = prompts_of([3, 5, 7, 4])
    params = [
        SamplingParams(max_tokens=9 + 4 * i, temperature=0.6 + 0.3 * i, seed=i, ignore_eos=True, **filters)
        for i in range(4)
    ]
    expected = complete(make_engine(toy), prompts, params)
    engine, counter = with_graphs(toy, (1, 2, 4), overlap=overlap)
    got = complete(engine, prompts, params)
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    assert counter.replays["_draw_step"] == counter.replays["_step"] > 15


def test_large_draws_are_not_captured(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the whole vocabulary they hold much memory; what is cut to few candidates is captured for all sizes."""
    monkeypatch.setattr(graphs, "MAX_DRAW_BYTES", graphs.draw_bytes(0, 2, VOCAB))
    prompts = prompts_of([3, 5, 7, 4])
    for filters, expected_draws in (({}, False), ({"top_k": 20}, True)):
        params = [
            SamplingParams(max_tokens=9, temperature=0.8, seed=i, ignore_eos=True, **filters)  # type: ignore[arg-type]
            for i in range(4)
        ]
        expected = complete(make_engine(toy), prompts, params)
        engine, counter = with_graphs(toy, (1, 2, 4))
        got = complete(engine, prompts, params)
        assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
        assert (counter.replays["_draw_step"] > 0) == expected_draws


def test_an_abort_in_the_middle_leaves_the_others_alone(toy: Path) -> None:
    prompts = prompts_of([4, 6, 3])
    expected = complete(make_engine(toy), prompts, greedy(20))
    engine, _ = with_graphs(toy, (1, 2, 4), overlap=True)
    deltas: dict[str, list[Any]] = {"0": [], "1": [], "2": []}
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), tuple(prompt), greedy(20)))
    for step in range(200):
        if not engine.has_work:
            break
        if step == 6:
            assert engine.abort("1") is not None
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    for index in (0, 2):
        assert join(deltas[str(index)]).token_ids == expected[index].token_ids
    again = run(engine, [Request("again", tuple(prompts[1]), greedy(20))])
    assert again["again"].token_ids == expected[1].token_ids
    check_idle(engine)


def test_the_ladder_covers_every_size_once() -> None:
    for limit in (1, 2, 3, 7, 8, 9, 32, 200, 256, 1000):
        sizes = graph_sizes(limit)
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] == limit
        assert sizes[0] == 1
    assert len(graph_sizes(256)) < 20
