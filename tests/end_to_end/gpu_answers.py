"""What the tests of all formats and backends on a GPU share."""

from __future__ import annotations

import pytest
from greedy_reference import QUESTIONS, TIE, chat, greedy, reference

from pymllm_core import LLM, SamplingParams

FORMATS = pytest.mark.parametrize("model", TIE)
GRAPHS = pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])


def check_answers(model: str, backend: str, graphs: bool) -> None:
    """All prompts at once, so that batches shrink through the sizes of the graphs; then sampled ones."""
    found = reference(model)
    with LLM(
        model,
        device="cuda",
        attention_backend=backend,
        disable_cuda_graph=not graphs,
        mem_fraction_static=0.1,
        max_running_requests=20,
        max_prefill_tokens=256,
    ) as llm:
        assert llm.plan.attention.spec.name == backend
        for _ in range(2):  # the second time with prefixes in the cache, and with prompts in captured pieces
            found.check([one.token_ids for one in llm.generate(found.prompts, greedy())])
        for seed in range(3):
            sampled = SamplingParams(max_tokens=16, temperature=0.8, top_p=0.9, seed=seed)
            # The same tokens again; and among greedy ones, whose answers it must not touch.
            alone = llm.chat(chat(QUESTIONS[1]), sampled)
            assert alone.token_ids == llm.chat(chat(QUESTIONS[1]), sampled).token_ids
            first, mixed, last = llm.generate(found.prompts[:3], [greedy(), sampled, greedy()])
            assert mixed.finish_reason is not None
            found.ties(found.prompts[0], first.token_ids)
            found.ties(found.prompts[2], last.token_ids)
