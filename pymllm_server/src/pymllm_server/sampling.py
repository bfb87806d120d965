"""From wire fields to the engine's sampling parameters, and from one request to its n choices."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import TypeVar

from pymllm_core.request import Request, SamplingParams
from pymllm_server.errors import ApiError
from pymllm_server.interface import Processor
from pymllm_server.schemas import MAX_TOKEN_ID, Sampling

T = TypeVar("T")

INLINE_CHARACTERS = 20_000
"""Longer inputs are tokenised on a thread, so that they do not hold up everybody's streams."""


def sampling_params(
    processor: Processor, body: Sampling, *, max_tokens: int | None, logprobs: int | None = None
) -> SamplingParams:
    """Validated parameters; what the client left out comes from the checkpoint's generation config."""
    stop = (body.stop,) if isinstance(body.stop, str) else body.stop
    return processor.sampling(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias),
        seed=body.seed,
        stop=tuple(stop) if stop is not None else None,
        stop_token_ids=tuple(body.stop_token_ids) if body.stop_token_ids is not None else None,
        ignore_eos=body.ignore_eos,
        skip_special_tokens=body.skip_special_tokens,
        logprobs=logprobs,
    )


def _logit_bias(wire: dict[str, float] | None) -> dict[int, float] | None:
    if wire is None:
        return None
    bias = {}
    for key, value in wire.items():
        # int() alone would take " 1", "1_0" and the digits of other scripts.
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_TOKEN_ID):
            raise ApiError(400, f"logit_bias: {key[:40]!r} is no token id", param="logit_bias")
        bias[int(key)] = value
    return bias


def choices(request: Request, n: int) -> list[Request]:
    """n requests for one prompt, sharing its pages; a given seed differs for each, or all would agree."""
    if n == 1:
        return [request]
    result = []
    for index in range(n):
        params = request.params
        if params.seed is not None and index:
            params = dataclasses.replace(params, seed=(params.seed + index) % 2**63)
        result.append(dataclasses.replace(request, id=f"{request.id}-{index}", params=params))
    return result


async def off_loop(characters: int, call: Callable[[], T]) -> T:
    """Run a blocking call of the processor: inline where short, which is faster, else on a thread."""
    return call() if characters <= INLINE_CHARACTERS else await asyncio.to_thread(call)
