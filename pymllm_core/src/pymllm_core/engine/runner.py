"""The runner: turns a batch into tensors in standing buffers, runs the model, samples.

`launch` returns before the device is done; `Launched.read` waits. A step's sampled tokens stay on the
device, where the next step finds them, so that it can be launched before they are read. Steps of decodes
alone are replayed from a graph where there are any (`graphs`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymllm_core.engine.batch import Batch, Chunk
from pymllm_core.engine.graphs import DecodeGraphs
from pymllm_core.engine.inputs import PageTables, StepInputs, on_device
from pymllm_core.engine.pieces import PieceGraphs
from pymllm_core.engine.sampler import Sampler, SamplerOutput, uniform
from pymllm_core.engine.sequence import Sequence
from pymllm_core.nn.memory import zeros_on_demand
from pymllm_core.nn.step_ops import GreedyStep
from pymllm_core.output import TokenLogprob
from pymllm_core.protocols.attention import AttentionBackend, ForwardContext, LayerKV
from pymllm_core.protocols.model import Model, ModelShape


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """Sizes of the standing buffers. vocab_size: the tokens that may be sampled.

    overlap: a step may be launched before the last one is read, so that sampled tokens stay on the device.
    graph_sizes: numbers of sequences for which decode steps are captured; none: no graphs. graph_pieces: whether
    steps with prompts are captured piece by piece.
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
    graph_sizes: tuple[int, ...] = ()
    graph_pieces: bool = False


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sequence's news from a step."""

    sequence: Sequence
    token: int
    logprob: TokenLogprob | None


class Launched:
    """A step on its way. `read` may be called once, before `decode_buffers.TURNS` more steps are launched."""

    def __init__(self, sequences: list[Sequence], output: SamplerOutput | None, device: torch.device) -> None:
        self._sequences = sequences
        self._output = output
        self._event: torch.cuda.Event | None = None
        cuda = device.type == "cuda"
        if output is not None:
            if output.reported is not None:
                output.tokens = output.reported
            else:
                # Also on a CPU: the next step may choose into the same buffer before this one is read.
                output.tokens = _to_host(output.tokens) if cuda else output.tokens.clone()
            if cuda and output.logprobs is not None:
                output.logprobs = _to_host(output.logprobs)
            if cuda and output.top_logprobs is not None and output.top_ids is not None:
                output.top_logprobs, output.top_ids = _to_host(output.top_logprobs), _to_host(output.top_ids)
        if not cuda:
            return
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


class Runner:
    """Owns the KV tensors and the input buffers."""

    def __init__(
        self,
        config: RunnerConfig,
        shape: ModelShape,
        model: Model,
        attention: AttentionBackend,
        greedy_step: GreedyStep,
    ) -> None:
        self.config = config
        self._model = model
        self._attention = attention
        self._greedy_step = greedy_step
        self._sampler = Sampler(min(config.vocab_size, shape.vocab_size), config.max_rows, config.device)
        # The page after the last belongs to nobody: padding tokens are written there.
        slots = (config.num_pages + 1) * config.page_size
        size = (slots, shape.num_kv_heads, shape.head_dim)
        self.kv = [LayerKV(self._cache(size), self._cache(size)) for _ in range(shape.num_layers)]
        # Two sets: the copies of the step in flight may not have happened when the next is prepared.
        self._inputs = [
            StepInputs(config.max_tokens, config.max_rows, config.device)
            for _ in range(2 if config.overlap else 1)
        ]
        self._turn = 0
        self._pages = PageTables(config.max_rows, config.max_pages)
        self._graphs: DecodeGraphs | None = None
        self._pieces: PieceGraphs | None = None
        self._num_heads = shape.num_heads
        # What the last step sampled, and where among it each sequence's row finds its token.
        self._tokens = torch.zeros(0, dtype=torch.int64, device=config.device)
        self._where: dict[int, int] = {}

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps are replayed from graphs."""
        return self._graphs is not None

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None], **options: Any) -> None:
        """Capture decode steps of the configured sizes; options: see `DecodeGraphs`."""
        config = self.config
        if config.graph_pieces:
            self.capture_pieces()
        if not config.graph_sizes:
            return
        self._graphs = DecodeGraphs(
            config.graph_sizes,
            model=self._model,
            attention=self._attention,
            greedy_step=self._greedy_step,
            kv=self.kv,
            pages=self._pages,
            page_size=config.page_size,
            vocab_size=self._sampler.vocab_size,
            device=config.device,
            **options,
        )
        self._graphs.prepare(progress)

    def capture_pieces(self, **options: Any) -> None:
        """Have steps with prompts captured piece by piece; options: see `PieceGraphs`."""
        config = self.config
        self._pieces = PieceGraphs(
            model=self._model,
            attention=self._attention,
            kv=self.kv,
            page_size=config.page_size,
            num_heads=self._num_heads,
            spare_slot=config.num_pages * config.page_size,
            max_tokens=config.max_tokens,
            max_rows=config.max_rows,
            dtype=config.dtype,
            device=config.device,
            **options,
        )

    @torch.inference_mode()
    def capture_next_piece(self) -> bool:
        """Capture a step with prompts that has not come yet, between two steps; False where there is none left."""
        return self._pieces is not None and self._pieces.capture_next()

    def _cache(self, size: tuple[int, int, int]) -> Tensor:
        if self.config.device.type == "cpu":
            return zeros_on_demand(size, self.config.kv_dtype)
        return torch.zeros(size, dtype=self.config.kv_dtype, device=self.config.device)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """Start computing a batch; everything it needs is copied before this returns."""
        for sequence in batch.admitted:
            self._pages.forget(sequence.row)
            self._sampler.admit(sequence)
        chunks = batch.chunks
        sampling = [index for index, chunk in enumerate(chunks) if chunk.samples]
        sequences = [chunks[index].sequence for index in sampling]
        # `pending` counts the token being sampled here already.
        indices = [s.num_generated + s.pending - 1 for s in sequences]
        if self._graphs is not None and self._graphs.fits(chunks):
            tokens, logits, reported = self._graphs.run(chunks, self._tokens, self._where)
            if self._sampler.chooses_best(sequences):
                output = SamplerOutput(tokens, reported=reported)
            elif (group := self._sampler.common_group(sequences)) and self._graphs.draws(group):
                numbers = [uniform(s.seed, i) for s, i in zip(sequences, indices, strict=True)]
                output = SamplerOutput(self._graphs.draw(group, numbers))
            else:
                output = self._sampler.sample(logits, sequences, indices)
                output.tokens = tokens.copy_(output.tokens)
        else:
            wanted = self._forward(batch, sampling)
            if wanted is None:
                return Launched([], None, self.config.device)
            output = self._sampler.sample(wanted, sequences, indices)
        if self.config.overlap:
            self._tokens = output.tokens
            self._where = {sequence.row: index for index, sequence in enumerate(sequences)}
        return Launched(sequences, output, self.config.device)

    def _forward(self, batch: Batch, sampling: list[int]) -> Tensor | None:
        """Logits of the rows that are sampled, if any."""
        input_ids, ctx = self._prepare(batch.chunks, batch.num_decodes)
        if len(sampling) != len(input_ids):
            last = np.cumsum(ctx.query_lens)[sampling] - 1
            ctx.output_rows = on_device(last, self.config.device)
        self._attention.plan(ctx)
        if self._pieces is not None and (logits := self._pieces.run(input_ids, ctx)) is not None:
            return logits
        hidden = self._model.forward(input_ids, ctx)
        return self._model.logits(hidden) if sampling else None

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
            self._pages.learn(sequence)
            if chunk.from_device:
                from_device.append(index)
            else:
                inputs.ids[token : token + count] = sequence.tokens[start : start + count]
            if count == 1:
                inputs.positions[token] = start
                inputs.slots[token] = self._pages.table[sequence.row, start // size] * size + start % size
            else:
                positions = np.arange(start, start + count)
                inputs.positions[token : token + count] = positions
                pages = self._pages.table[sequence.row, positions // size].astype(np.int64)
                inputs.slots[token : token + count] = pages * size + positions % size
            inputs.query_start[index] = token
            token += count
        inputs.query_start[len(chunks)] = token
        inputs.kv_lens[: len(chunks)] = kv_lens
        width = -(-max(kv_lens) // size)
        # Advanced indexing copies, so the table may change while the step is in flight.
        page_table = on_device(self._pages.table[rows, :width], self.config.device)
        ids = inputs.send("ids", token)
        if from_device:
            # Decodes come first and have one token each: an index into the batch is one into the tokens.
            where = on_device(from_device, self.config.device)
            which = on_device([self._where[rows[index]] for index in from_device], self.config.device)
            ids[where] = self._tokens[which]
        return ids, ForwardContext(
            positions=inputs.send("positions", token),
            slots=inputs.send("slots", token),
            query_start=inputs.send("query_start", len(chunks) + 1),
            kv_lens=inputs.send("kv_lens", len(chunks)),
            page_table=page_table,
            num_decodes=num_decodes,
            query_lens=query_lens,
            kv_lens_host=kv_lens,
            page_size=size,
            kv=self.kv,
            attention=self._attention,
        )
