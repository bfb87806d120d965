"""Sampling against distributions computed in float64, and against the published formulas of the penalties."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymllm_core.engine.sampler import Sampler, uniform
from pymllm_core.engine.sequence import Sequence
from pymllm_core.errors import RequestError
from pymllm_core.request import Request, SamplingParams

CPU = torch.device("cpu")


def sequence(
    params: SamplingParams, *, seed: int = 1, row: int = 0, prompt: tuple[int, ...] = (1,)
) -> Sequence:
    made = Sequence(Request("r", prompt, params), max_tokens=10, seed=seed)
    made.row = row
    return made


def draw(logits: torch.Tensor, params: SamplingParams, count: int, *, seed: int = 1) -> list[int]:
    """`count` tokens of one sequence, all after the same logits."""
    sampler = Sampler(logits.shape[0], 4096, CPU)
    found: list[int] = []
    for start in range(0, count, 4096):
        indices = list(range(start, min(start + 4096, count)))
        sequences = [sequence(params, seed=seed) for _ in indices]
        found += sampler.sample(logits.repeat(len(indices), 1), sequences, indices).tokens.tolist()
    return found


def reference(logits: torch.Tensor, params: SamplingParams) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The distribution in float64: temperature, then top_k and min_p, then top_p of what is left."""
    scaled = logits.double().numpy() / params.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p[p < params.min_p * p.max()] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= params.top_p]] = 0
    return np.asarray(p / p.sum())


def assert_follows(tokens: list[int], expected: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    """Pearson's chi-square, 4.5 standard deviations wide (one in 300,000); nothing outside the support."""
    counts = np.bincount(tokens, minlength=len(expected)).astype(float)
    assert not counts[expected == 0].any(), "a token outside the filter was drawn"
    means = expected * len(tokens)
    common = means >= 5
    groups = [(counts[common], means[common])]
    if (rest := ~common & (expected > 0)).any():
        groups.append((np.array([counts[rest].sum()]), np.array([means[rest].sum()])))
    observed, mean = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    statistic = float(((observed - mean) ** 2 / mean).sum())
    freedom = max(len(mean) - 1, 1)
    # Wilson and Hilferty's cube root is normal even for few degrees of freedom.
    limit = freedom * (1 - 2 / (9 * freedom) + 4.5 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, (statistic, freedom)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.3},
    "top-k": {"top_k": 7},
    "top-k-large": {"top_k": 200, "temperature": 3.0},
    "top-k-of-half": {"top_k": 65, "temperature": 5.0},
    "top-k-beyond": {"top_k": 5000},
    "top-p": {"top_p": 0.7},
    "top-p-tiny": {"top_p": 1e-6},
    "min-p": {"min_p": 0.2},
    "min-p-one": {"min_p": 1.0},
    "all": {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    "top-p-min-p": {"top_p": 0.9, "min_p": 0.1, "temperature": 1.3},
}


@pytest.mark.parametrize("vocab", [5, 64, 300, 1030])
@pytest.mark.parametrize("case", CASES)
def test_the_distribution(case: str, vocab: int) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    params = SamplingParams(**{"temperature": 1.0, **CASES[case]})
    assert_follows(draw(logits, params, 8_000), reference(logits, params))


def test_the_check_of_distributions_can_fail() -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(300)) * 2
    tokens = draw(logits, SamplingParams(temperature=1.0), 12_000)
    with pytest.raises(AssertionError):
        assert_follows(tokens, reference(logits, SamplingParams(temperature=1.1)))
    with pytest.raises(AssertionError, match="outside the filter"):
        assert_follows(tokens, reference(logits, SamplingParams(temperature=1.0, top_k=100)))


def test_uniform_numbers() -> None:
    """SplitMix64 from state 0, as its authors publish it; and a Kolmogorov-Smirnov bound."""
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [uniform(0, i) for i in range(3)] == [(z >> 11) / 2**53 for z in first]
    for numbers in ([uniform(7, i) for i in range(20_000)], [uniform(s, 3) for s in range(-10_000, 10_000)]):
        ordered = np.sort(numbers)
        assert ordered[0] >= 0
        assert ordered[-1] < 1
        distance = np.abs(ordered - (np.arange(20_000) + 0.5) / 20_000).max()
        assert distance < 1.95 / math.sqrt(20_000)  # one in a thousand would be further
        # Successive numbers are not correlated.
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / math.sqrt(20_000)


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-6}, {"top_p": 1e-9}]
)
def test_greedy_and_what_comes_to_it(params: dict[str, Any]) -> None:
    logits = torch.randn(50, 997, generator=torch.Generator().manual_seed(2))
    sequences = [sequence(SamplingParams(**params), seed=s) for s in range(50)]
    found = Sampler(997, 50, CPU).sample(logits.clone(), sequences, [0] * 50).tokens
    assert found.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-6, 100.0])
def test_extreme_logits_are_no_trouble(temperature: float) -> None:
    logits = torch.full((400,), -1e30)
    logits[17], logits[18] = 3e4, 2.9e4
    for extra in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}):
        assert set(draw(logits, SamplingParams(temperature=temperature, **extra), 200)) <= {17, 18}
    logits = torch.full((400,), -math.inf)
    logits[3] = 0.0
    assert set(draw(logits, SamplingParams(temperature=1.0), 200)) == {3}


def test_ids_without_a_token_are_never_sampled() -> None:
    logits = torch.zeros(3000, 40)
    logits[:, 30:] = 50.0
    for params in (
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_k=35),
        SamplingParams(top_p=0.9),
    ):
        sequences = [sequence(params) for _ in range(3000)]
        output = Sampler(30, 3000, CPU).sample(logits.clone(), sequences, list(range(3000)))
        assert int(output.tokens.max()) < 30


def test_the_rest_of_the_batch_changes_nothing() -> None:
    vocab = 300
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(5)) * 2
    mixed = [
        SamplingParams(),
        SamplingParams(top_k=5),
        SamplingParams(temperature=0),
        SamplingParams(top_p=0.5, frequency_penalty=1.0),
        SamplingParams(top_k=100, min_p=0.01),
        SamplingParams(top_k=6, logit_bias={3: 5.0}),
    ]
    sequences = [sequence(p, seed=40 + i, row=i) for i, p in enumerate(mixed)]
    together = Sampler(vocab, 6, CPU)
    for s in sequences:
        together.admit(s)
    for index in range(50):
        tokens = together.sample(logits.clone(), sequences, [index] * 6).tokens.tolist()
        for row, s in enumerate(sequences):
            if s.request.params.penalised:
                continue
            alone = Sampler(vocab, 6, CPU)
            assert alone.sample(logits[row : row + 1].clone(), [s], [index]).tokens.tolist() == [tokens[row]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    frequency=st.sampled_from([-1.0, 0.0, 0.7]),
    presence=st.sampled_from([-0.5, 0.0, 1.9]),
    bias=st.dictionaries(st.integers(0, 9), st.floats(-100, 100), max_size=3),
    generated=st.lists(st.integers(0, 9), max_size=12),
)
def test_penalties_are_those_of_the_papers(
    repetition: float, frequency: float, presence: float, bias: dict[int, float], generated: list[int]
) -> None:
    """OpenAI: logit - count · frequency - [count > 0] · presence, over generated tokens. CTRL
    (arXiv:1909.05858, section 4.1): logits of tokens of prompt and answer divided by the penalty where
    positive; multiplied where negative, as every implementation since does.
    """
    prompt = (1, 2, 2)
    params = SamplingParams(
        temperature=0,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=bias,
        logprobs=10,
    )
    logits = torch.randn(10, generator=torch.Generator().manual_seed(len(generated))) * 3
    expected = logits.double().clone()
    for token in {*prompt, *generated}:
        expected[token] = (
            expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
        )
    for token, count in Counter(generated).items():
        expected[token] -= frequency * count + presence
    for token, value in bias.items():
        expected[token] += value
    s = sequence(params, prompt=prompt)
    for token in generated:
        s.append(token)
    sampler = Sampler(10, 2, CPU)
    sampler.admit(s)
    output = sampler.sample(logits[None].clone(), [s], [len(generated)])
    assert int(output.tokens[0]) == int(expected.argmax())
    assert output.top_logprobs is not None
    assert output.top_ids is not None
    by_id = dict(zip(output.top_ids[0].tolist(), output.top_logprobs[0].tolist(), strict=True))
    for token, value in enumerate(expected.log_softmax(-1).tolist()):
        assert by_id[token] == pytest.approx(value, abs=2e-5, rel=1e-5)


def test_counts_follow_what_is_sampled_and_belong_to_the_row() -> None:
    """Frequency penalty 2 on even logits: tokens take turns. A new owner of the row starts afresh."""
    sampler = Sampler(4, 2, CPU)
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    logits = torch.tensor([[1.0, 0.9, 0.8, 0.7]])
    for _ in range(2):
        s = sequence(params, row=1, prompt=(0, 0, 0))
        sampler.admit(s)
        tokens = []
        for index in range(8):
            token = int(sampler.sample(logits.clone(), [s], [index]).tokens[0])
            tokens.append(token)
            s.append(token)
        assert tokens == [0, 1, 2, 3] * 2


def test_logprobs_are_those_before_temperature() -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(3))
    each = [SamplingParams(temperature=t, logprobs=n) for t, n in ((0.0, 0), (3.0, 5), (0.7, 20))]
    sequences = [sequence(p) for p in each]
    output = Sampler(100, 3, CPU).sample(logits.clone(), sequences, [0, 1, 2])
    expected = logits.double().log_softmax(-1)
    assert output.logprobs is not None
    assert output.top_logprobs is not None
    torch.testing.assert_close(
        output.logprobs.double(), expected.gather(1, output.tokens[:, None])[:, 0], atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(output.top_logprobs.double(), expected.topk(20).values, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, r"temperature must lie in \[0, 100\], got -0.1"),
        ({"temperature": math.nan}, "temperature must lie in"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"min_p": 1.1}, r"min_p must lie in \[0, 1\], got 1.1"),
        ({"top_k": -2}, "top_k must be -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must lie in"),
        ({"frequency_penalty": 2.1}, "frequency_penalty must lie in"),
        ({"presence_penalty": math.inf}, "presence_penalty must lie in"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20, got 21"),
        ({"seed": 2**64}, "seed must fit in 64 bits"),
        ({"stop": ("",)}, "a stop string must not be empty"),
        ({"stop": tuple("abcdefghijklmnopq")}, "at most 16 stop strings are allowed, got 17"),
        ({"logit_bias": {1: 101.0}}, "logit_bias must lie in"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias has 1025 entries; at most 1024"),
    ],
)
def test_parameters_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(**fields)
    assert caught.value.status == 400
    assert caught.value.param == next(iter(fields))
