"""What the engine computes and draws equals transformers' model, and a seed decides it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pymllm_core.request import SamplingParams
from pymllm_core.testing.checkpoints import write_toy
from pymllm_core.testing.engines import LogitsRecorder, check_idle, complete, greedy, make_engine, prompts_of


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


def test_dummy_weights_need_a_config_alone(tmp_path: Path, toy: tuple[Any, Path]) -> None:
    (tmp_path / "config.json").write_bytes((toy[1] / "config.json").read_bytes())
    first, second, other = (
        complete(
            make_engine(tmp_path, load_format="dummy", random_seed=s), prompts_of([9]), greedy(9, logprobs=3)
        )
        for s in (1, 1, 2)
    )
    assert first[0].logprobs == second[0].logprobs != other[0].logprobs
