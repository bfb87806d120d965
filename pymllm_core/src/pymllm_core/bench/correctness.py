"""``--correct``: a look at what the model says through the path that is being timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pymllm_core.bench.static_batch import StaticBatch
from pymllm_core.engine.engine import Engine
from pymllm_core.request import SamplingParams

PROMPTS = ("The capital of France is", "Today is a sunny day, and I like", "从前有座山，山里有")


@dataclass(frozen=True, slots=True)
class Answer:
    """differs: index of the first token that the scheduler's path answers differently; None where none is."""

    prompt: str
    text: str
    differs: int | None


def answers(engine: Engine, prompts: Sequence[str], output_len: int) -> list[Answer]:
    """Continue the prompts greedily as one static batch, and each alone as a server would.

    The two are the same computation with other numbers of rows. Where kernels round by the number of rows, a
    token may change; a first token that changes is a fault. Raises RequestError without a tokenizer.
    """
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    requests = [
        engine.processor.from_text(text, params, request_id=str(index)) for index, text in enumerate(prompts)
    ]
    with StaticBatch(engine, [request.token_ids for request in requests], output_len) as batch:
        batch.read(batch.prefill())
        for _ in range(output_len - 1):
            batch.read(batch.decode())
        generated = batch.generated
    found = []
    for text, request, tokens in zip(prompts, requests, generated, strict=True):
        engine.add(request)
        alone: list[int] = []
        while engine.has_work:
            alone += [token for delta in engine.step() for token in delta.token_ids]
        differs = next(
            (i for i, pair in enumerate(zip(tokens, alone, strict=True)) if pair[0] != pair[1]), None
        )
        found.append(Answer(text, engine.processor.decode(tokens), differs))
    return found
