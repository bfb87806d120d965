"""The CPU kernels give the reference's greedy answers; and the comparison, which serves GPUs too, can fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from greedy_reference import MAX_TOKENS, TIE, Reference, greedy, reference

from pymllm_core import LLM


@pytest.mark.parametrize("model", TIE)
def test_answers_on_the_cpu(model: str) -> None:
    with LLM(model, device="cpu", dtype="bfloat16", max_total_tokens=8192, max_running_requests=8) as llm:
        found = reference(model)
        answers = [one.token_ids for one in llm.generate(found.prompts, greedy())]
    found.check(answers)


def expected(found: Reference, prompt: Sequence[int]) -> Any:
    return found.answer(prompt, MAX_TOKENS)


@pytest.mark.parametrize("place", [0, 5, MAX_TOKENS - 1])
def test_another_token_fails(place: int) -> None:
    found = reference("demo")
    for prompt in found.prompts[:3]:
        tokens = list(expected(found, prompt).token_ids)
        assert found.ties(prompt, tokens) == 0
        tokens[place] = (tokens[place] + 1) % 2000
        with pytest.raises(AssertionError, match=f"token {place} is"):
            found.ties(prompt, tokens)


def test_a_tie_is_excused_and_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the tolerance the second best may stand, and what follows must be what follows it."""
    found = reference("demo")
    prompt = found.prompts[1]
    whole = expected(found, prompt)
    top = whole.logprobs[4].top
    second, gap = top[1][0], top[0][1] - top[1][1]
    start = (*whole.token_ids[:4], second)
    rest = found.answer((*prompt, *start), MAX_TOKENS - 5).token_ids
    monkeypatch.setattr(found, "tie", gap + 0.01)
    assert found.ties(prompt, (*start, *rest)) == 1
    with pytest.raises(AssertionError, match="token 47 is"):
        found.ties(prompt, (*start, *rest[:-1], (rest[-1] + 1) % 2000))
    monkeypatch.setattr(found, "tie", gap - 0.01)
    with pytest.raises(AssertionError, match="token 4 is"):
        found.ties(prompt, (*start, *rest))


def test_missing_tokens_and_frequent_ties_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    found = reference("demo")
    answers = [expected(found, prompt).token_ids for prompt in found.prompts]
    with pytest.raises(AssertionError):
        found.ties(found.prompts[0], answers[0][:-1])
    monkeypatch.setattr(found, "ties", lambda prompt, tokens: 1)
    with pytest.raises(AssertionError, match="ties are no rule"):
        found.check(answers)
