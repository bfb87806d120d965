"""The scheduler: who computes how many tokens in the next step, and on which pages.

Plain Python without torch, deterministic. Running sequences come before waiting ones and decodes before
prompts, so a long prompt never stalls a decode. When pages run out, the policy evicts; when nothing is
left to evict, the youngest running sequence is preempted and computed again later.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from pymllm_core.engine.batch import Batch, Chunk
from pymllm_core.engine.sequence import Sequence, Status
from pymllm_core.errors import QueueFullError
from pymllm_core.kv.pool import PagePool
from pymllm_core.protocols.cache import CachePolicy, PrefixMatch


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_prefill_tokens bounds the prompt tokens of a step, chunked_prefill_size those of one sequence.

    conservativeness: pages left free for each running sequence when another is admitted.
    """

    max_running: int
    max_queued: int | None
    max_prefill_tokens: int
    chunked_prefill_size: int
    conservativeness: float = 1.0


class Scheduler:
    """Owns the sequences and their pages. Call `schedule`, run the batch, then `commit` each token."""

    def __init__(self, pool: PagePool, cache: CachePolicy, limits: SchedulerLimits) -> None:
        self.pool = pool
        self.cache = cache
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        # The head of the queue that did not fit, and the pages there were then: asked again when there are more.
        self._refused: tuple[Sequence, int] | None = None
        self._rows = list(range(limits.max_running - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises QueueFullError where `max_queued` sequences wait already."""
        limit = self.limits.max_queued
        if limit is not None and len(self.waiting) >= limit + self._free_places():
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting, and max_queued_requests is {limit}; retry later",
                code="queue_full",
            )
        self.waiting.append(sequence)

    def schedule(self) -> Batch | None:
        """The next step, or None where nothing can be computed before a pending token is read."""
        decodes: list[Chunk] = []
        prefills: list[Chunk] = []
        budget = self.limits.max_prefill_tokens
        preempted = self.num_preemptions
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING:
                continue  # preempted by an older one in this very loop
            remaining = sequence.num_tokens - sequence.num_computed
            if remaining == 1:
                if sequence.num_generated + sequence.pending >= sequence.max_tokens:
                    continue  # its last token is on the way
                if self._reserve(sequence, 1):
                    decodes.append(self._take(sequence, 1))
            elif remaining > 1 and budget:
                count = min(remaining, budget, self.limits.chunked_prefill_size)
                if self._reserve(sequence, count):
                    prefills.append(self._take(sequence, count))
                    budget -= count
        # Whoever was preempted just now would only take the pages back, and all others wait behind it.
        crowded = self.num_preemptions > preempted
        admitted = [] if crowded else self._admit(decodes, prefills, budget)
        chunks = [*decodes, *prefills]
        if not chunks:
            return None
        num_decodes = sum(1 for chunk in chunks if chunk.count == 1)
        # A chunk of one token is a decode to the kernels, whatever it is to the sequence. The longest come first:
        # attention takes them up in this order, and what it takes up last should be short. As all grow alike, the
        # order lasts until one joins.
        chunks.sort(key=lambda chunk: -chunk.start if chunk.count == 1 else 1)
        return Batch(tuple(chunks), num_decodes, tuple(admitted))

    def finish(self, sequence: Sequence) -> None:
        """End a sequence in whatever state it is; its pages go to the cache policy at once.

        A launched step may still write to them: it runs before any later step does.
        """
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._give_up_pages(sequence)
        sequence.status = Status.FINISHED
        sequence.finished_at = time.monotonic()

    def commit(self, sequence: Sequence, token: int) -> bool:
        """Account for a token that was read; False where its sequence no longer wants it."""
        sequence.pending -= 1
        if sequence.status is Status.FINISHED:
            return False
        sequence.append(token)
        if sequence.num_generated == 1:
            sequence.first_token_at = time.monotonic()
        return True

    def roll_back(self, batch: Batch) -> None:
        """Take back a batch that could not be launched: its tokens are not in the pages, nor on their way."""
        for chunk in batch.chunks:
            chunk.sequence.num_computed = chunk.start
            chunk.sequence.pending -= chunk.samples

    # -- pages --------------------------------------------------------------------------------------

    def _take(self, sequence: Sequence, count: int) -> Chunk:
        start = sequence.num_computed
        end = start + count
        samples = end == sequence.num_tokens
        chunk = Chunk(sequence, start, count, samples, from_device=start >= len(sequence.tokens))
        sequence.num_computed = end
        sequence.pending += samples
        return chunk

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Give `sequence` pages for `count` more tokens; False where it was itself preempted."""
        need = self.pool.pages_for(sequence.num_computed + count) - len(sequence.pages)
        if need <= 0:
            return True
        while not self._make_free(need):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += self.pool.take(need)
        return True

    def _make_free(self, pages: int) -> bool:
        missing = pages - self.pool.free_pages
        return missing <= 0 or self.cache.evict(missing) >= missing

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue's front; its pages may serve its own return."""
        self.running.remove(sequence)
        self._give_up_pages(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _give_up_pages(self, sequence: Sequence) -> None:
        written = min(sequence.num_computed, len(sequence.tokens))
        namespace = sequence.request.cache_namespace
        self.cache.store(sequence.key_ids[:written], namespace, sequence.pages, sequence.match)
        sequence.pages = []
        sequence.match = PrefixMatch()
        self._rows.append(sequence.row)
        sequence.row = -1

    # -- admission ----------------------------------------------------------------------------------

    def _free_places(self) -> int:
        return self.limits.max_running - len(self.running)

    def _admit(self, decodes: list[Chunk], prefills: list[Chunk], budget: int) -> list[Sequence]:
        admitted: list[Sequence] = []
        while self.waiting and budget and self._free_places():
            sequence = self.waiting[0]
            # A preempted sequence must know all its tokens before it can be computed again.
            if sequence.pending or not self._enter(sequence):
                break
            self.waiting.popleft()
            admitted.append(sequence)
            remaining = sequence.num_tokens - sequence.num_computed
            count = min(remaining, budget, self.limits.chunked_prefill_size)
            need = self.pool.pages_for(sequence.num_computed + count) - len(sequence.pages)
            freed = self._make_free(need)
            assert freed, "admission checked that the prompt fits"
            sequence.pages += self.pool.take(need)
            (decodes if remaining == 1 else prefills).append(self._take(sequence, count))
            budget -= count
        return admitted

    def _enter(self, sequence: Sequence) -> bool:
        """Make a waiting sequence a running one if its prompt fits beside the running ones."""
        obtainable = self.pool.free_pages + self.cache.evictable_pages
        if self._refused is not None and self._refused[0] is sequence and obtainable <= self._refused[1]:
            return False
        # The last token is always computed, since its logits are wanted.
        match = self.cache.match(
            sequence.key_ids[: len(sequence.tokens) - 1], sequence.request.cache_namespace
        )
        need = self.pool.pages_for(len(sequence.tokens)) - len(match.pages)
        spare = int(self.limits.conservativeness * len(self.running))
        if self.pool.free_pages + self.cache.evictable_pages < need + spare:
            self.cache.release(match)
            self._refused = (sequence, obtainable)
            return False
        sequence.match = match
        sequence.pages = list(match.pages)
        sequence.num_computed = match.num_tokens
        sequence.row = self._rows.pop()
        sequence.status = Status.RUNNING
        if not sequence.admitted_at:
            sequence.admitted_at = time.monotonic()
            sequence.cached_tokens = match.num_tokens
        self.running.append(sequence)
        return True
