"""The demo model does what its evaluation claims, answered by this engine: held-out prompts, judged by meaning."""

from __future__ import annotations

from collections import Counter

from pymllm_core import LLM
from pymllm_demo.recipe.evaluate import build_cases

PER_CATEGORY = 320  # as the committed evaluation


def test_every_category_reaches_95_percent() -> None:
    cases = build_cases(per_category=PER_CATEGORY)
    right: Counter[str] = Counter()
    with LLM("demo", device="cpu") as llm:
        params = llm.processor.sampling(temperature=0.0, max_tokens=300)
        requests = [
            llm.processor.from_chat(
                list(case.messages),
                params,
                request_id=str(index),
                tools=list(case.tools),
                template_kwargs={"enable_thinking": case.enable_thinking},
            ).request.token_ids
            for index, case in enumerate(cases)
        ]
        answers = llm.generate(requests, params)
    for case, answer in zip(cases, answers, strict=True):
        right[case.category] += case.check(answer.text)
    found = {category: right[category] / PER_CATEGORY for category in sorted({c.category for c in cases})}
    print(found)
    assert all(share >= 0.95 for share in found.values()), found
