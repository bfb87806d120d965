"""The runner: turns a batch into tensors in standing buffers, runs the model, samples.

`launch` returns before the device is done; `Launched.read` waits. A step's sampled tokens stay on the
device in `_last_tokens`, where the next step finds them, so that it can be launched before they are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pymllm_core.engine.batch import Batch, Chunk
from pymllm_core.engine.sampler import Sampler, SamplerOutput
from pymllm_core.engine.sequence import Sequence
from pymllm_core.nn.memory import zeros_on_demand
from pymllm_core.output import TokenLogprob
from pymllm_core.protocols.attention import AttentionBackend, ForwardContext, LayerKV
from pymllm_core.protocols.model import Model, ModelShape


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """Sizes of the standing buffers. vocab_size: the tokens that may be sampled.

    overlap: a step may be launched before the last one is read, so that sampled tokens stay on the device.
    """

    max_tokens: int
    max_rows: int
    max_pages: int
    num_pages: int
    page_size: int
    vocab_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    overlap: bool


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sequence's news from a step."""

    sequence: Sequence
    token: int
    logprob: TokenLogprob | None


class Launched:
    """A step on its way. `read` may be called once."""

    def __init__(self, sequences: list[Sequence], output: SamplerOutput | None, device: torch.device) -> None:
        self._sequences = sequences
        self._output = output
        self._event: torch.cuda.Event | None = None
        if device.type != "cuda":
            return
        if output is not None:
            output.tokens = _to_host(output.tokens)
            if output.logprobs is not None:
                output.logprobs = _to_host(output.logprobs)
            if output.top_logprobs is not None and output.top_ids is not None:
                output.top_logprobs, output.top_ids = _to_host(output.top_logprobs), _to_host(output.top_ids)
        # Also where nothing was sampled: input buffers are written again once the step was read.
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> list[Sampled]:
        """Wait for the device; one entry for each sequence that got a token."""
        if self._event is not None:
            self._event.synchronize()
        output = self._output
        if output is None:
            return []
        tokens = output.tokens.tolist()
        if output.logprobs is None:
            return [Sampled(s, t, None) for s, t in zip(self._sequences, tokens, strict=True)]
        chosen = output.logprobs.tolist()
        ids = output.top_ids.tolist() if output.top_ids is not None else [[]] * len(tokens)
        values = output.top_logprobs.tolist() if output.top_logprobs is not None else [[]] * len(tokens)
        sampled = []
        for sequence, token, logprob, top_ids, top in zip(
            self._sequences, tokens, chosen, ids, values, strict=True
        ):
            wanted = sequence.request.params.logprobs
            best = tuple(zip(top_ids, top, strict=True))[: wanted or 0]
            sampled.append(
                Sampled(sequence, token, None if wanted is None else TokenLogprob(token, logprob, best))
            )
        return sampled


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class _Inputs:
    """One set of input buffers: written as NumPy on the host, read as tensors on the device."""

    def __init__(self, config: RunnerConfig) -> None:
        self._device = config.device
        self._cuda = config.device.type == "cuda"
        self._host: dict[str, Tensor] = {}
        self._there: dict[str, Tensor] = {}
        self.ids = self._make("ids", (config.max_tokens,), torch.int64)
        self.positions = self._make("positions", (config.max_tokens,), torch.int64)
        self.slots = self._make("slots", (config.max_tokens,), torch.int64)
        self.query_start = self._make("query_start", (config.max_rows + 1,), torch.int32)
        self.kv_lens = self._make("kv_lens", (config.max_rows,), torch.int32)

    def _make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
        host = torch.zeros(shape, dtype=dtype, pin_memory=self._cuda)
        self._host[name] = host
        self._there[name] = torch.zeros(shape, dtype=dtype, device=self._device) if self._cuda else host
        array: np.ndarray = host.numpy()
        return array

    def send(self, name: str, count: int) -> Tensor:
        """The first `count` entries, on the device."""
        there = self._there[name][:count]
        return there.copy_(self._host[name][:count], non_blocking=True) if self._cuda else there


class Runner:
    """Owns the KV tensors and the input buffers."""

    def __init__(
        self, config: RunnerConfig, shape: ModelShape, model: Model, attention: AttentionBackend
    ) -> None:
        self.config = config
        self.captures_graphs = False  # every step is launched operator by operator
        self._model = model
        self._attention = attention
        self._sampler = Sampler(min(config.vocab_size, shape.vocab_size), config.max_rows, config.device)
        # The page after the last belongs to nobody: padding tokens are written there.
        slots = (config.num_pages + 1) * config.page_size
        size = (slots, shape.num_kv_heads, shape.head_dim)
        self.kv = [LayerKV(self._cache(size), self._cache(size)) for _ in range(shape.num_layers)]
        # Two sets: the copies of the step in flight may not have happened when the next is prepared.
        self._inputs = [_Inputs(config) for _ in range(2 if config.overlap else 1)]
        self._turn = 0
        self._pages = np.zeros((config.max_rows, config.max_pages), dtype=np.int32)
        self._pages_known = [0] * config.max_rows
        self._last_tokens = torch.zeros(config.max_rows, dtype=torch.int64, device=config.device)

    def _cache(self, size: tuple[int, int, int]) -> Tensor:
        if self.config.device.type == "cpu":
            return zeros_on_demand(size, self.config.kv_dtype)
        return torch.zeros(size, dtype=self.config.kv_dtype, device=self.config.device)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """Start computing a batch; everything it needs is copied before this returns."""
        for sequence in batch.admitted:
            self._pages_known[sequence.row] = 0
            self._sampler.admit(sequence)
        chunks = batch.chunks
        input_ids, ctx = self._prepare(chunks, batch.num_decodes)
        self._attention.plan(ctx)
        hidden = self._model.forward(input_ids, ctx)
        sampling = [index for index, chunk in enumerate(chunks) if chunk.samples]
        if not sampling:
            return Launched([], None, self.config.device)
        sequences = [chunks[index].sequence for index in sampling]
        if len(sampling) != hidden.shape[0]:
            last = torch.tensor(sampling, device=self.config.device) + 1
            hidden = hidden[(ctx.query_start[last] - 1).long()]
        # `pending` counts the token being sampled here already.
        indices = [s.num_generated + s.pending - 1 for s in sequences]
        output = self._sampler.sample(self._model.logits(hidden), sequences, indices)
        if self.config.overlap:
            rows = torch.tensor([s.row for s in sequences], device=self.config.device)
            self._last_tokens[rows] = output.tokens
        return Launched(sequences, output, self.config.device)

    def _prepare(self, chunks: tuple[Chunk, ...], num_decodes: int) -> tuple[Tensor, ForwardContext]:
        inputs = self._inputs[self._turn]
        self._turn = (self._turn + 1) % len(self._inputs)
        size = self.config.page_size
        rows = [chunk.sequence.row for chunk in chunks]
        kv_lens = [chunk.start + chunk.count for chunk in chunks]
        query_lens = [chunk.count for chunk in chunks]
        from_device: list[int] = []
        token = 0
        for index, chunk in enumerate(chunks):
            sequence, start, count = chunk.sequence, chunk.start, chunk.count
            self._learn_pages(sequence)
            if chunk.from_device:
                from_device.append(index)
            else:
                inputs.ids[token : token + count] = sequence.tokens[start : start + count]
            if count == 1:
                inputs.positions[token] = start
                inputs.slots[token] = self._pages[sequence.row, start // size] * size + start % size
            else:
                positions = np.arange(start, start + count)
                inputs.positions[token : token + count] = positions
                pages = self._pages[sequence.row, positions // size].astype(np.int64)
                inputs.slots[token : token + count] = pages * size + positions % size
            inputs.query_start[index] = token
            token += count
        inputs.query_start[len(chunks)] = token
        inputs.kv_lens[: len(chunks)] = kv_lens
        width = -(-max(kv_lens) // size)
        # Advanced indexing copies, so the table may change while the step is in flight.
        page_table = torch.from_numpy(self._pages[rows, :width])
        ids = inputs.send("ids", token)
        if from_device:
            # Decodes come first and have one token each: an index into the batch is one into the tokens.
            where = torch.tensor(from_device, device=self.config.device)
            which = torch.tensor([rows[index] for index in from_device], device=self.config.device)
            ids[where] = self._last_tokens[which]
        return ids, ForwardContext(
            positions=inputs.send("positions", token),
            slots=inputs.send("slots", token),
            query_start=inputs.send("query_start", len(chunks) + 1),
            kv_lens=inputs.send("kv_lens", len(chunks)),
            page_table=page_table.to(self.config.device, non_blocking=True),
            num_decodes=num_decodes,
            query_lens=query_lens,
            kv_lens_host=kv_lens,
            page_size=size,
            kv=self.kv,
            attention=self._attention,
        )

    def _learn_pages(self, sequence: Sequence) -> None:
        """Copy the pages that a sequence gained since its last step into the table's row."""
        row, pages = sequence.row, sequence.pages
        known = self._pages_known[row]
        if known < len(pages):
            self._pages[row, known : len(pages)] = pages[known:]
            self._pages_known[row] = len(pages)
