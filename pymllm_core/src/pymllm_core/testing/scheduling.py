"""A model of the page pool, in plain sets, against which scheduler and cache policies are checked.

`Harness` plays the engine: it schedules, "computes" a batch by writing down which key id lies in which
slot, "samples" made-up tokens, and after each step compares everything with the books it keeps itself.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from pymllm_core.engine.batch import Batch
from pymllm_core.engine.scheduler import Scheduler, SchedulerLimits
from pymllm_core.engine.sequence import Sequence, Status
from pymllm_core.kv.pool import PagePool
from pymllm_core.kv.radix import RadixCache
from pymllm_core.protocols.cache import CachePolicy
from pymllm_core.request import Request, SamplingParams

Content = tuple[str, tuple[int, ...]]
"""What a slot's K and V depend on: the namespace, and all key ids up to and with its own."""


class Harness:
    """Drives a `Scheduler` by hand. overlap: a batch is scheduled before the last one's tokens are known."""

    def __init__(
        self,
        policy: type[Any],
        *,
        num_pages: int = 12,
        page_size: int = 3,
        max_running: int = 4,
        max_prefill: int = 8,
        chunk: int = 5,
        max_queued: int | None = None,
        conservativeness: float = 1.0,
        overlap: bool = False,
    ) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.cache: CachePolicy = policy(self.pool)
        limits = SchedulerLimits(max_running, max_queued, max_prefill, chunk, conservativeness)
        self.scheduler = Scheduler(self.pool, self.cache, limits)
        self.overlap = overlap
        self.sequences: list[Sequence] = []
        self.in_flight: list[Sequence] = []
        self.slots: dict[int, Content] = {}
        self.discarded = 0
        self.finished = 0

    # -- actions ------------------------------------------------------------------------------------

    def admit(self, prompt: list[int], max_tokens: int, namespace: str = "", shift: int = 0) -> Sequence:
        """Queue a sequence; `shift` makes its key ids differ from its tokens."""
        room = self.pool.num_pages * self.pool.page_size - len(prompt)
        assert room > 0
        request = Request(
            str(len(self.sequences)),
            tuple(prompt),
            SamplingParams(max_tokens=max_tokens),
            key_ids=tuple(token + shift for token in prompt) if shift else None,
            cache_namespace=namespace,
        )
        sequence = Sequence(request, max_tokens=min(max_tokens, room), seed=0)
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        return sequence

    def step(self, stop: float = 0.0, rng: random.Random | None = None) -> Batch | None:
        """One round; each token read ends its sequence with probability `stop`."""
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        batch = self.scheduler.schedule()
        self._check_batch(batch, oldest)
        launched = [] if batch is None else self._compute(batch)
        ready = launched
        if self.overlap:
            ready, self.in_flight = self.in_flight, launched
        for sequence in ready:
            known = sequence.status is not Status.FINISHED
            generated = sequence.num_generated
            # A repetitive little language, so that sequences share prefixes beyond their prompts.
            accepted = self.scheduler.commit(sequence, (sequence.tokens[-1] * 2 + generated) % 3)
            assert accepted == known
            self.discarded += not accepted
            if accepted:
                assert sequence.num_generated == generated + 1 <= sequence.max_tokens
                ended = sequence.num_generated == sequence.max_tokens
                if ended or (rng is not None and rng.random() < stop):
                    self.end(sequence)
        self.check()
        return batch

    def end(self, sequence: Sequence) -> None:
        """Finish or abort: to the scheduler they are the same."""
        self.scheduler.finish(sequence)
        assert not sequence.pages
        self.finished += 1

    def drain(self, bound: int) -> int:
        """Step until nothing is left to do; fails after `bound` steps."""
        for count in range(bound):
            if not self.scheduler.has_work and not self.in_flight:
                return count
            self.step()
        raise AssertionError(f"after {bound} steps {len(self.scheduler.running)} run still")

    # -- the model ----------------------------------------------------------------------------------

    def _compute(self, batch: Batch) -> list[Sequence]:
        size = self.pool.page_size
        written: set[int] = set()
        for chunk in batch.chunks:
            sequence = chunk.sequence
            for position in range(chunk.start, chunk.start + chunk.count):
                slot = sequence.pages[position // size] * size + position % size
                assert slot not in written, "two tokens of a step go to one slot"
                written.add(slot)
                # The pending token's id is not known yet, but what it will be is fixed.
                self.slots[slot] = (sequence.request.cache_namespace, self._key(sequence, position + 1))
        return [chunk.sequence for chunk in batch.chunks if chunk.samples]

    @staticmethod
    def _key(sequence: Sequence, length: int) -> tuple[int, ...]:
        keys = list(sequence.key_ids)
        generated, last = sequence.num_generated, sequence.tokens[-1]
        while len(keys) < length:
            last = (last * 2 + generated) % 3
            generated += 1
            keys.append(last)
        return tuple(keys[:length])

    def _check_batch(self, batch: Batch | None, oldest: Sequence | None) -> None:
        limits = self.scheduler.limits
        if batch is None:
            # Only where every token that is missing is on its way.
            assert all(s.pending for s in self.scheduler.running)
            assert not self.scheduler.waiting or self.scheduler.running or self.scheduler.waiting[0].pending
            return
        chunks = batch.chunks
        assert [chunk.count == 1 for chunk in chunks] == sorted((c.count == 1 for c in chunks), reverse=True)
        assert batch.num_decodes == sum(chunk.count == 1 for chunk in chunks)
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        assert len({chunk.sequence.row for chunk in chunks}) == len(chunks)
        assert max(chunk.count for chunk in chunks) <= limits.chunked_prefill_size
        assert sum(chunk.count for chunk in chunks if chunk.count > 1) <= limits.max_prefill_tokens
        assert batch.num_tokens <= limits.max_prefill_tokens + limits.max_running
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            assert sequence.status is Status.RUNNING
            assert sequence.num_computed == end
            # A token that this chunk samples is pending by now.
            assert chunk.samples == (end == sequence.num_tokens - chunk.samples)
            assert chunk.from_device == (chunk.start >= len(sequence.tokens))
            assert not chunk.from_device or (self.overlap and chunk.count == 1)
        if oldest is not None and oldest.num_generated + oldest.pending < oldest.max_tokens:
            assert any(chunk.sequence is oldest for chunk in chunks), "the oldest sequence stood still"

    def check(self) -> None:
        """Everything that must hold between two steps."""
        scheduler, pool, size = self.scheduler, self.pool, self.pool.page_size
        running = scheduler.running
        free = Counter(pool._free)
        private: Counter[int] = Counter()
        for sequence in running:
            assert sequence.status is Status.RUNNING
            matched = len(sequence.match.pages)
            assert tuple(sequence.pages[:matched]) == sequence.match.pages
            private.update(sequence.pages[matched:])
            assert len(sequence.pages) >= pool.pages_for(sequence.num_computed)
            # What the sequence reads is what it, or somebody with the same beginning, wrote.
            for position in range(min(sequence.num_computed, len(sequence.tokens))):
                slot = sequence.pages[position // size] * size + position % size
                expected = (sequence.request.cache_namespace, tuple(sequence.key_ids[: position + 1]))
                assert self.slots[slot] == expected, f"position {position} reads another token's K and V"
        kept = Counter(self._kept())
        total = free + kept + private
        assert total == Counter(range(pool.num_pages)), "pages lost, or owned twice"
        assert self.cache.kept_pages == sum(kept.values())
        rows = [s.row for s in running] + scheduler._rows
        assert sorted(rows) == list(range(scheduler.limits.max_running))
        for sequence in scheduler.waiting:
            assert sequence.status is Status.WAITING
            assert not sequence.pages
            assert sequence.match.handle is None
        if isinstance(self.cache, RadixCache):
            self._check_radix(self.cache)
        else:
            assert self.cache.evictable_pages == self.cache.kept_pages == 0

    def _kept(self) -> list[int]:
        if not isinstance(self.cache, RadixCache):
            return []
        pages: list[int] = []
        nodes = list(self.cache._roots.values())
        while nodes:
            node = nodes.pop()
            pages += node.pages
            nodes += node.children.values()
        return pages

    def _check_radix(self, cache: RadixCache) -> None:
        users: Counter[int] = Counter()
        for sequence in self.scheduler.running:
            node = sequence.match.handle
            while node is not None and node.parent is not None:
                users[id(node)] += 1
                node = node.parent
        evictable = 0
        size = self.pool.page_size
        for namespace, root in cache._roots.items():
            stack: list[tuple[Any, tuple[int, ...]]] = [(root, ())]
            while stack:
                node, before = stack.pop()
                assert len(node.keys) == len(node.pages)
                assert node.parent is None or node.pages
                assert node.locks == users[id(node)], "a lock was lost, or kept"
                evictable += 0 if node.locks else len(node.pages)
                keys = before
                for key, page in zip(node.keys, node.pages, strict=True):
                    keys += key
                    for offset in range(size):
                        content = (namespace, keys[: len(keys) - size + offset + 1])
                        assert self.slots[page * size + offset] == content, "the tree lies about a page"
                for first, child in node.children.items():
                    assert child.parent is node
                    assert child.keys[0] == first
                    stack.append((child, keys))
        assert cache.evictable_pages == evictable
