"""What enters the engine: token ids and how to sample after them. Both are complete when built."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from pymllm_core.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next tokens are chosen; validated when built (RequestError names the field).

    temperature 0 is greedy and exact. top_k -1 or 0, top_p 1 and min_p 0 switch the filter off. Penalties
    as OpenAI (frequency, presence: over generated tokens) and as CTRL (repetition: prompt too).
    max_tokens None: as far as the context reaches. logprobs: how many alternatives to report for each
    token; 0 reports the chosen one alone, None nothing. seed None: the engine draws one.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0, above=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {self.max_tokens}", param="max_tokens")
        if self.top_k < -1:
            raise RequestError(f"top_k must be -1 (off) or more, got {self.top_k}", param="top_k")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise RequestError(
                f"logprobs must be between 0 and {MAX_LOGPROBS}, got {self.logprobs}", param="logprobs"
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise RequestError(f"seed must fit in 64 bits, got {self.seed}", param="seed")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"at most {MAX_STOP_STRINGS} stop strings are allowed, got {len(self.stop)}", param="stop"
            )
        if any(not text for text in self.stop):
            raise RequestError("a stop string must not be empty", param="stop")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are allowed",
                param="logit_bias",
            )
        for bias in self.logit_bias.values():
            _within("logit_bias", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def penalised(self) -> bool:
        """Whether sampling depends on the tokens that came before."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


def _within(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Raise where value is NaN or outside [low, high], with `above` outside (low, high]."""
    if math.isnan(value) or not (low < value if above else low <= value) or value > high:
        interval = f"{'(' if above else '['}{low:g}, {high:g}]"
        raise RequestError(f"{name} must lie in {interval}, got {value}", param=name)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued.

    token_ids: the prompt. key_ids: what the prefix cache compares instead, same length; an image's
    placeholder tokens carry numbers derived from its content there. cache_namespace: requests of
    different namespaces never share pages (adapters, tenants). stream: whether tokens are wanted as they
    come; where not, the only delta is the last. detokenize: whether deltas have text, without which there are no
    stop strings.
    """

    id: str
    token_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    key_ids: tuple[int, ...] | None = None
    cache_namespace: str = ""
    stream: bool = True
    detokenize: bool = True
    arrival: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise RequestError("the prompt is empty; send at least one token", param="prompt")
        if self.key_ids is not None and len(self.key_ids) != len(self.token_ids):
            raise RequestError("key_ids and token_ids differ in length", param="prompt")
        if self.params.stop and not self.detokenize:
            raise RequestError("stop strings are found in text only; leave detokenize on", param="stop")
