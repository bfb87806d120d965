"""Logits to tokens, on the device, for a batch of unlike requests.

A row's result depends on its own logits, parameters and seed alone: the only randomness is one uniform
number a token, a hash of the seed and the token's index, which picks by the inverse of the cumulative
distribution. So the same seed gives the same tokens, whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pymllm_core.engine.inputs import on_device
from pymllm_core.engine.sequence import Sequence
from pymllm_core.request import SamplingParams

# Rows are cut to a prefix of their sorted logits whose length depends on the row's own parameters only.
_CANDIDATES = (64, 1024)
_MASK64 = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) for token `index` of a sequence: SplitMix64 (Steele et al., OOPSLA 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return float((z ^ (z >> 31)) >> 11) * 2.0**-53


@dataclass(slots=True)
class SamplerOutput:
    """tokens: [R] int64. logprobs of the chosen tokens [R] and of the best `top` [R, top], if asked for.

    reported: the tokens where the host will find them when the step is done, if the step itself puts them there.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    top_logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    reported: Tensor | None = None


@dataclass(slots=True)
class Group:
    """Rows that are drawn the same way. candidates 0: no filter; -1: the whole sorted vocabulary.

    index: [R] int64, the rows. The parameters are [R, 1] float64, on the device.
    """

    candidates: int
    rows: list[int] = field(default_factory=list)
    index: Tensor = field(default_factory=lambda: torch.empty(0))
    temperature: Tensor = field(default_factory=lambda: torch.empty(0))
    top_k: Tensor = field(default_factory=lambda: torch.empty(0))
    top_p: Tensor = field(default_factory=lambda: torch.empty(0))
    min_p: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(slots=True)
class _Prepared:
    """What follows from the composition of the batch alone; reused while it stays the same."""

    sequences: list[Sequence]
    all_greedy: bool
    groups: list[Group]
    penalised: list[int]
    buffers: Tensor | None
    penalties: Tensor | None
    bias: tuple[Tensor, Tensor, Tensor] | None
    logprobs: int | None

    @property
    def plain(self) -> bool:
        """No penalties, no biases, no log-probabilities."""
        return self.penalties is None and self.bias is None and self.logprobs is None


class Sampler:
    """Holds what sampling remembers of each running sequence: token counts, if it is penalised.

    vocab_size: ids from there on have no token and are never sampled. max_rows: rows of running sequences.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self._max_rows = max_rows
        self._device = device
        self._generated: Tensor | None = None
        self._prompted: Tensor | None = None
        self._prepared: _Prepared | None = None

    def admit(self, sequence: Sequence) -> None:
        """Reset the buffers of the sequence's row to its tokens."""
        # A row changed hands, so that what was prepared for the old owner no longer holds.
        self._prepared = None
        if not sequence.request.params.penalised:
            return
        if self._generated is None:
            # Taken at the first need: most deployments never penalise.
            size = (self._max_rows, self.vocab_size)
            self._generated = torch.zeros(size, dtype=torch.int32, device=self._device)
            self._prompted = torch.zeros(size, dtype=torch.bool, device=self._device)
        assert self._prompted is not None
        row = sequence.row
        self._generated[row].zero_()
        self._prompted[row].zero_()
        prompt, generated = (
            on_device([t for t in tokens if t < self.vocab_size], self._device, torch.int64)
            for tokens in (sequence.tokens[: sequence.prompt_len], sequence.tokens[sequence.prompt_len :])
        )
        self._prompted[row, prompt] = True
        self._generated[row].index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))

    def chooses_best(self, sequences: list[Sequence]) -> bool:
        """Whether every row gets its largest logit and nothing else is asked for."""
        prepared = self._prepared_for(sequences)
        return prepared.all_greedy and prepared.plain

    def common_group(self, sequences: list[Sequence]) -> Group | None:
        """The group of all rows, where all are drawn the same way and nothing else is asked for."""
        prepared = self._prepared_for(sequences)
        if not prepared.plain or len(prepared.groups) != 1:
            return None
        (group,) = prepared.groups
        return group if len(group.rows) == len(sequences) else None

    def _prepared_for(self, sequences: list[Sequence]) -> _Prepared:
        prepared = self._prepared
        if prepared is None or prepared.sequences != sequences:
            prepared = self._prepared = self._prepare(sequences)
        return prepared

    def sample(self, logits: Tensor, sequences: list[Sequence], indices: list[int]) -> SamplerOutput:
        """Choose a token for every row of logits [R, vocab] float32, which may be overwritten.

        indices: how many tokens each sequence has generated before this one.
        """
        prepared = self._prepared_for(sequences)
        logits = logits[:, : self.vocab_size]
        if prepared.penalties is not None:
            self._penalise(logits, prepared)
        if prepared.bias is not None:
            rows, ids, values = prepared.bias
            logits.index_put_((rows, ids), values, accumulate=True)
        tokens = logits.argmax(dim=-1)
        if not prepared.all_greedy:
            numbers = [uniform(s.seed, i) for s, i in zip(sequences, indices, strict=True)]
            draws = on_device(numbers, self._device, torch.float64)
            for group in prepared.groups:
                tokens[group.index] = draw(logits[group.index], group, draws[group.index])
        if prepared.penalties is not None:
            assert self._generated is not None
            rows = on_device(prepared.penalised, self._device)
            self._generated[prepared.buffers, tokens[rows]] += 1
        if prepared.logprobs is None:
            return SamplerOutput(tokens)
        return _with_logprobs(logits, tokens, prepared.logprobs)

    def _prepare(self, sequences: list[Sequence]) -> _Prepared:
        params = [sequence.request.params for sequence in sequences]
        groups: dict[int, Group] = {}
        for row, p in enumerate(params):
            if not p.greedy:
                size = self._candidates(p)
                groups.setdefault(size, Group(size)).rows.append(row)
        for group in groups.values():
            chosen = [params[row] for row in group.rows]
            group.index = on_device(group.rows, self._device)
            group.temperature = self._column([p.temperature for p in chosen])
            group.top_k = self._column([p.top_k if p.top_k > 0 else self.vocab_size for p in chosen])
            group.top_p = self._column([p.top_p for p in chosen])
            group.min_p = self._column([p.min_p for p in chosen])
        penalised = [row for row, p in enumerate(params) if p.penalised]
        penalties = buffers = None
        if penalised:
            buffers = on_device([sequences[row].row for row in penalised], self._device)
            each = [
                (params[r].repetition_penalty, params[r].frequency_penalty, params[r].presence_penalty)
                for r in penalised
            ]
            penalties = on_device(each, self._device, torch.float32)
        triples = [
            (row, token, value)
            for row, p in enumerate(params)
            for token, value in p.logit_bias.items()
            if token < self.vocab_size
        ]
        bias = None
        if triples:
            rows, ids, values = zip(*triples, strict=True)
            bias = (
                on_device(rows, self._device),
                on_device(ids, self._device),
                on_device(values, self._device, torch.float32),
            )
        wanted = [p.logprobs for p in params if p.logprobs is not None]
        return _Prepared(
            sequences=list(sequences),
            all_greedy=not groups,
            groups=list(groups.values()),
            penalised=penalised,
            buffers=buffers,
            penalties=penalties,
            bias=bias,
            logprobs=max(wanted) if wanted else None,
        )

    def _column(self, values: list[float] | list[int]) -> Tensor:
        return on_device(values, self._device, torch.float64)[:, None]

    def _candidates(self, params: SamplingParams) -> int:
        if params.top_k > 0:
            for size in _CANDIDATES:
                if params.top_k <= size < self.vocab_size:
                    return size
            return -1
        return -1 if params.top_p < 1.0 else 0

    def _penalise(self, logits: Tensor, prepared: _Prepared) -> None:
        assert self._generated is not None
        assert self._prompted is not None
        assert prepared.penalties is not None
        rows = torch.tensor(prepared.penalised, device=self._device)
        counts = self._generated[prepared.buffers]
        seen = (counts > 0) | self._prompted[prepared.buffers]
        repetition, frequency, presence = prepared.penalties[:, :, None].unbind(1)
        chosen = logits[rows]
        repeated = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
        chosen = torch.where(seen, repeated, chosen)
        logits[rows] = chosen - frequency * counts - presence * (counts > 0)


def draw(logits: Tensor, group: Group, draws: Tensor) -> Tensor:
    """Sample rows that share a way of being cut; [R] int64. Nothing is asked of the device, so it can be captured.

    logits: [R, vocab] float32. draws: [R] float64. Sums run in float64, in the order of the columns.
    """
    size = group.candidates
    if size == 0:
        weights = _weights(logits, logits.amax(dim=-1, keepdim=True), group.temperature)
        weights = weights * (weights >= group.min_p)
        return _pick(weights, draws)
    if size == -1:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
    else:
        values, ids = logits.topk(size, dim=-1)
    weights = _weights(values, values[:, :1], group.temperature)
    rank = torch.arange(values.shape[1], device=values.device)
    weights = weights * (rank < group.top_k)
    # The most likely token has weight 1, so that min_p compares with the weight itself. As in vLLM it acts
    # before top_p.
    weights = weights * (weights >= group.min_p)
    before = weights.cumsum(dim=-1)
    keep = (before - weights) < group.top_p * before[:, -1:]
    keep[:, 0] = True
    return ids.gather(1, _pick(weights * keep, draws)[:, None])[:, 0]


def _weights(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Unnormalised probabilities, 1 for the most likely token. A low temperature cannot overflow."""
    return ((logits - best).double() / temperature).exp()


def _pick(weights: Tensor, draws: Tensor) -> Tensor:
    """The first column at which the cumulative weight exceeds draw · total."""
    cumulative = weights.cumsum(dim=-1)
    chosen = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]
    # Rounding could point past the last column with weight; the total is first reached at that one.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0]
    return torch.minimum(chosen, last)


def _with_logprobs(logits: Tensor, tokens: Tensor, top: int) -> SamplerOutput:
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    if top == 0:
        return SamplerOutput(tokens, chosen)
    values, ids = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
    return SamplerOutput(tokens, chosen, values, ids)
