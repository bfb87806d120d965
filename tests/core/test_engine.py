"""The engine with the toy model: exactness, preemption, stops, seeds, aborts, overlap, failures."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pymllm_core.engine.engine import Engine
from pymllm_core.errors import ConfigError, MemoryPlanError, QueueFullError, RequestError
from pymllm_core.output import Completion, Delta
from pymllm_core.request import Request, SamplingParams
from pymllm_core.testing.checkpoints import write_toy
from pymllm_core.testing.engines import LogitsRecorder, check_idle, complete, greedy, join, make_engine, run

VOCAB = 300


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A checkpoint without a tokenizer, and its reference."""
    folder = tmp_path_factory.mktemp("toy")
    return write_toy(folder), folder


@pytest.fixture(scope="module")
def texty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("texty")
    return write_toy(folder, tokenizer=True), folder


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(n)] for n in lengths]


def logits_of(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"num_attention_heads": 9, "num_key_value_heads": 3, "mlp_bias": True, "hidden_size": 45},
    ],
    ids=["plain", "biases", "odd"],
)
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_logits_equal_those_of_llama(tmp_path: Path, fields: dict[str, Any], overlap: bool) -> None:
    model = write_toy(tmp_path, **fields)
    engine = make_engine(tmp_path, overlap=overlap, max_prefill_tokens=9, radix_cache_page_size=4)
    recorder = LogitsRecorder(engine)
    prompts = prompts_of([1, 9, 26])
    for index, answer in enumerate(complete(engine, prompts, greedy(12))):
        whole = [*prompts[index], *answer.token_ids][:-1]
        assert recorder.compare(str(index), logits_of(model, whole)) < 1e-4
    check_idle(engine)


# -- preemption and limits ----------------------------------------------------------------------------


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


# -- ends of an answer --------------------------------------------------------------------------------


def test_stop_token_ids_eos_and_max_tokens(toy: tuple[Any, Path]) -> None:
    _, folder = toy
    engine = make_engine(folder)
    (prompt,) = prompts_of([9], seed=4)
    free = complete(engine, [prompt], greedy(50))[0].token_ids
    token = free[10]
    end = free.index(token) + 1
    answers = complete(
        engine,
        [prompt] * 4,
        [
            greedy(50, stop_token_ids=(token, 299)),
            greedy(50, stop_token_ids=(token,), ignore_eos=False),
            greedy(end),
            greedy(end - 1, stop_token_ids=(token,)),
        ],
    )
    assert [(a.token_ids, a.finish_reason, a.matched_stop) for a in answers] == [
        (free[:end], "stop", token),
        (free[:end], "stop", token),
        (free[:end], "length", None),
        (free[: end - 1], "length", None),
    ]
    # The same token as the config's eos: ended by it, unless it is ignored.
    engine.processor.eos_token_ids = frozenset({token})
    ended, ignored = complete(engine, [prompt] * 2, [greedy(50, ignore_eos=False), greedy(50)])
    assert (ended.token_ids, ended.finish_reason, ended.matched_stop) == (free[:end], "stop", None)
    assert ignored.token_ids == free


def test_stop_strings_are_found_across_tokens_and_not_shown(texty: tuple[Any, Path]) -> None:
    _, folder = texty
    engine = make_engine(folder)
    ids = engine.processor.from_text("the end of the story")
    params = [SamplingParams(max_tokens=60, temperature=1.5, seed=s, ignore_eos=True) for s in range(8)]
    tokenizer: Any = engine.processor.tokenizer
    crossing = 0
    for index, answer in enumerate(complete(engine, [ids.token_ids] * 8, params)):
        assert answer.text == tokenizer.decode(list(answer.token_ids), skip_special_tokens=True).rstrip(
            "\ufffd"
        )
        clean = [i for i in range(5, len(answer.text) - 6) if "\ufffd" not in answer.text[i : i + 3]]
        for at in clean[:: max(len(clean) // 3, 1)]:
            stop = answer.text[at : at + 3]
            again = complete(
                engine,
                [ids.token_ids],
                SamplingParams(
                    max_tokens=60, temperature=1.5, seed=index, ignore_eos=True, stop=(stop, "never this")
                ),
            )[0]
            assert (again.finish_reason, again.matched_stop) == ("stop", stop)
            assert again.text == answer.text[: answer.text.index(stop)]
            assert again.token_ids == answer.token_ids[: len(again.token_ids)]
            # Not one token more than needed.
            assert stop not in tokenizer.decode(list(again.token_ids[:-1]), skip_special_tokens=True)
            crossing += stop not in (tokenizer.decode([t]) for t in again.token_ids)
    assert crossing > 5
    check_idle(engine)


def test_deltas_never_hold_what_turns_out_to_be_a_stop(texty: tuple[Any, Path]) -> None:
    engine = make_engine(texty[1])
    request = engine.processor.from_text("the quick brown fox")
    params = SamplingParams(max_tokens=80, temperature=1.2, seed=3, ignore_eos=True)
    free = run(engine, [Request("free", request.token_ids, params)])["free"]
    usable = free.text.partition("\ufffd")[0] if len(free.text.partition("\ufffd")[0]) > 20 else free.text
    stop = usable[10:16]
    engine.add(
        Request(
            "r",
            request.token_ids,
            SamplingParams(max_tokens=80, temperature=1.2, seed=3, stop=(stop,), ignore_eos=True),
        )
    )
    shown = ""
    while engine.has_work:
        for delta in engine.step():
            shown += delta.text
            assert not any(shown.endswith(stop[:n]) and delta.finish_reason is None for n in range(1, 7))
    assert shown == free.text[: free.text.index(stop)]


def test_what_was_held_back_comes_out_at_the_end(texty: tuple[Any, Path]) -> None:
    """The last characters could begin a stop string; the answer ends, so they do not."""
    engine = make_engine(texty[1])
    ids = engine.processor.from_text("the quick brown fox").token_ids
    for seed in range(6):
        fields: dict[str, Any] = {"max_tokens": 12, "temperature": 1.2, "seed": seed, "ignore_eos": True}
        (free,) = complete(engine, [ids], SamplingParams(**fields))
        stop = free.text[-3:] + "never"
        (same,) = complete(engine, [ids], SamplingParams(stop=(stop,), **fields))
        assert free.text
        assert (same.text, same.finish_reason) == (free.text, "length")
        # Also where a stop token ends it: the token itself is not shown.
        (ended,) = complete(
            engine, [ids], SamplingParams(stop=(stop,), stop_token_ids=free.token_ids[-1:], **fields)
        )
        whole = engine.processor.decode(ended.token_ids[:-1])
        assert ended.finish_reason == "stop"
        assert ended.text in {whole, *(whole[:-n] for n in (1, 2, 3) if whole.endswith("\ufffd" * n))}


def test_stream_interval(toy: tuple[Any, Path]) -> None:
    engine = make_engine(toy[1], stream_interval=4)
    engine.add(Request("r", (5, 6), greedy(10)))
    sizes = []
    while engine.has_work:
        sizes += [len(delta.token_ids) for delta in engine.step()]
    assert sizes == [4, 4, 2]


# -- sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_a_seed_decides_whatever_else_runs(toy: tuple[Any, Path], overlap: bool) -> None:
    _, folder = toy
    (prompt,) = prompts_of([12])
    wanted = SamplingParams(max_tokens=24, temperature=1.1, top_p=0.95, seed=99, ignore_eos=True)
    alone = complete(make_engine(folder), [prompt], wanted)[0].token_ids
    for settings in (
        {},
        {"max_prefill_tokens": 5},
        {"max_total_tokens": 64, "schedule_conservativeness": 0.01},
    ):
        engine = make_engine(folder, overlap=overlap, radix_cache_page_size=4, **settings)
        others = [SamplingParams(max_tokens=20, temperature=2.0, ignore_eos=True) for _ in range(6)]
        together = complete(engine, [*prompts_of([7] * 6, seed=8), prompt], [*others, wanted])
        assert together[-1].token_ids == alone
        assert len({a.token_ids for a in together}) == 7
    other = SamplingParams(max_tokens=24, temperature=1.1, top_p=0.95, seed=100, ignore_eos=True)
    assert complete(make_engine(folder), [prompt], other)[0].token_ids != alone


def test_without_a_seed_answers_differ_but_random_seed_repeats_them(toy: tuple[Any, Path]) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    def answers(seed: int) -> list[tuple[int, ...]]:
        engine = make_engine(toy[1], random_seed=seed)
        return [a.token_ids for a in complete(engine, [[5, 6]] * 5, params)]

    assert len(set(answers(1))) == 5
    assert answers(1) == answers(1)
    assert not set(answers(1)) & set(answers(2))


def test_logprobs_equal_log_softmax_of_transformers(toy: tuple[Any, Path]) -> None:
    model, folder = toy
    prompts = prompts_of([6, 13])
    answers = complete(make_engine(folder), prompts, [greedy(15, logprobs=5), greedy(15, logprobs=0)])
    for prompt, answer, top in zip(prompts, answers, (5, 0), strict=True):
        expected = logits_of(model, [*prompt, *answer.token_ids][:-1])[len(prompt) - 1 :].log_softmax(-1)
        assert answer.logprobs is not None
        for row, (token, entry) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            assert entry.token_id == token
            assert entry.logprob == pytest.approx(float(expected[row, token]), abs=1e-4)
            best = expected[row].topk(top)
            assert [i for i, _ in entry.top] == best.indices.tolist()
            assert [v for _, v in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"max_total_tokens": 48, "schedule_conservativeness": 0.01}])
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_penalised_answers_equal_a_loop_over_transformers(
    toy: tuple[Any, Path], settings: dict[str, Any], overlap: bool
) -> None:
    model, folder = toy
    prompts = prompts_of([10, 4, 9, 12], seed=6)
    params = [
        greedy(16, frequency_penalty=0.9, presence_penalty=0.4),
        greedy(16, repetition_penalty=1.7),
        greedy(16, repetition_penalty=0.6, frequency_penalty=1.1, logit_bias={7: 6.0, 8: -100.0}),
        greedy(16),
    ]
    engine = make_engine(folder, overlap=overlap, radix_cache_page_size=2, **settings)
    answers = complete(engine, prompts, params)
    assert (engine.stats().preemptions > 0) == bool(settings)
    for prompt, answer, p in zip(prompts, answers, params, strict=True):
        tokens = list(prompt)
        for _ in range(16):
            row = logits_of(model, tokens)[-1].double()
            for token in set(tokens):
                row[token] = (
                    row[token] / p.repetition_penalty if row[token] > 0 else row[token] * p.repetition_penalty
                )
            for token, count in Counter(tokens[len(prompt) :]).items():
                row[token] -= p.frequency_penalty * count + p.presence_penalty
            for token, value in p.logit_bias.items():
                row[token] += value
            tokens.append(int(row.argmax()))
        assert answer.token_ids == tuple(tokens[len(prompt) :])


# -- abort, overlap, failure --------------------------------------------------------------------------


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


# -- numbers ------------------------------------------------------------------------------------------


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


def test_dummy_weights_need_a_config_alone(tmp_path: Path, toy: tuple[Any, Path]) -> None:
    (tmp_path / "config.json").write_bytes((toy[1] / "config.json").read_bytes())
    first, second, other = (
        complete(
            make_engine(tmp_path, load_format="dummy", random_seed=s), prompts_of([9]), greedy(9, logprobs=3)
        )
        for s in (1, 1, 2)
    )
    assert first[0].logprobs == second[0].logprobs != other[0].logprobs


def test_an_idle_engine_has_not_stalled_when_work_comes(toy: tuple[Any, Path]) -> None:
    engine = make_engine(toy[1])
    engine._last_step -= 1000.0
    assert engine.stats().last_step_age_s >= 1000.0
    engine.add(Request("a", (1, 2, 3), greedy(2)))
    assert engine.stats().last_step_age_s < 100.0
    engine._last_step -= 1000.0
    engine.add(Request("b", (1, 2, 3), greedy(2)))
    assert engine.stats().last_step_age_s >= 1000.0, "more work must not hide a stall"
