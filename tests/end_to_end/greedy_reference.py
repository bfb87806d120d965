"""Greedy answers by PyTorch's operators on the CPU, which another device or kernel must give as well.

Kernels sum in unlike orders and round in unlike places, so that two candidates whose logits are close are a tie,
which either may win. After a tie the reference goes on from the token that was chosen, so that every token is
checked. Answers run on behind their end (`ignore_eos`), and some prompts are random tokens: what a model is less
sure of tells more.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

from pymllm_core import Completion, SamplingParams
from pymllm_core.testing.engines import complete, make_engine

TIE = {"demo": 0.25, "demo-w8a8": 0.75, "demo-w4a16": 0.25}
"""How far apart two logits may be to be a tie. bf16 keeps 8 bits of them: PyTorch's own results in bf16 and
float32, and our CPU kernels', have gaps between candidates that differ by 0.11 (W4A16: 0.14) in 99 of 100 cases and
0.37 at most. An activation on the border of two int8 codes moves by a whole step: 0.22 and 0.62 with W8A8. (Of
the one token that an H200 chose otherwise the two best are 0.56 to 0.69 apart in bf16 by PyTorch, 0.46 by our CPU
kernels and 0.25 in float32.)"""

MAX_TOKENS = 48
_CANDIDATES = 8
"""How many of the best candidates are looked at; more are never within a tie."""

QUESTIONS = [
    "你好,只回复:ok",
    "Hello!",
    "Reply only: blue whale 42",
    "只回复:苹果树",
    "What is 37 + 48?",
    "What is 91 - 25?",
    "Reverse the word: planet",
    "What is the capital of France?",
    "法国的首都是哪里?",
    "Repeat three times: moon",
    "How many letters are in: banana",
    "Give me JSON with keys name and age for Tom, 12",
    "Who are you?",
    "Repeat after me: " + " ".join(f"word{n}" for n in range(120)),
]
THINKING = ["What is 37 + 48?", "Reverse the word: planet", "Repeat three times: moon"]
RANDOM = (3, 20, 70, 130)
"""Lengths of prompts of random tokens."""


def chat(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}]


def greedy(max_tokens: int = MAX_TOKENS, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **fields)


class Reference:
    """The greedy answers of one model in bf16 on the CPU, without the kernels of `pymllm-kernels`.

    prompts: the token ids of all. tie: see `TIE`.
    """

    PLUGINS = ("pymllm_demo.plugin", "pymllm_qwen3.plugin", "pymllm_quant_ct.plugin")

    def __init__(self, model: str) -> None:
        self.tie = TIE[model]
        fields: dict[str, Any] = {
            "dtype": "bfloat16",
            "attention_backend": "pytorch",
            "max_total_tokens": 8192,
        }
        self._engine = make_engine(model, *self.PLUGINS, **fields)
        processor = self._engine.processor
        chats = [processor.from_chat(chat(question)) for question in QUESTIONS]
        thinking = {"enable_thinking": True}
        chats += [processor.from_chat(chat(question), template_kwargs=thinking) for question in THINKING]
        generator, vocab = random.Random(0), processor.vocab_size or 0
        noise = [tuple(generator.randrange(vocab) for _ in range(length)) for length in RANDOM]
        self.prompts = [*(one.request.token_ids for one in chats), *noise]
        answers = complete(self._engine, self.prompts, greedy(logprobs=_CANDIDATES))
        self._known = dict(zip(self.prompts, answers, strict=True))

    def answer(self, ids: Sequence[int], max_tokens: int) -> Completion:
        """What follows these tokens."""
        key = tuple(ids)
        if key not in self._known:
            (self._known[key],) = complete(self._engine, [key], greedy(max_tokens, logprobs=_CANDIDATES))
        return self._known[key]

    def ties(self, prompt: Sequence[int], tokens: Sequence[int]) -> int:
        """How often an answer took the other side of a tie; fails at a token that no tie excuses."""
        assert len(tokens) == MAX_TOKENS
        done = ties = 0
        while done < MAX_TOKENS:
            expected = self.answer((*prompt, *tokens[:done]), MAX_TOKENS - done)
            assert expected.logprobs is not None
            pairs = zip(tokens[done:], expected.token_ids, strict=True)
            index = next((at for at, (got, wanted) in enumerate(pairs) if got != wanted), None)
            if index is None:
                break
            got, top = tokens[done + index], dict(expected.logprobs[index].top)
            best = max(top.values())
            assert got in top, f"token {done + index} is {got}, none of the best {top}; answer {list(tokens)}"
            assert best - top[got] < self.tie, (
                f"token {done + index} is {got} of {top}; answer {list(tokens)}"
            )
            done, ties = done + index + 1, ties + 1
        return ties

    def check(self, answers: Sequence[Sequence[int]]) -> None:
        """The tokens of the answers to all prompts."""
        found = [self.ties(prompt, one) for prompt, one in zip(self.prompts, answers, strict=True)]
        print(f"{sum(found)} ties in {sum(map(bool, found))} of {len(found)} answers")
        assert sum(map(bool, found)) <= len(found) // 3, f"ties are no rule: {found}"


@functools.cache
def reference(model: str) -> Reference:
    """The reference of a model, made once for all tests of a process."""
    return Reference(model)
