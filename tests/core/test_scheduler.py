"""The scheduler and both cache policies against a model of the pool; nothing leaks, nobody starves."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pymllm_core.engine.sequence import Sequence, Status
from pymllm_core.errors import QueueFullError
from pymllm_core.kv.chunk import ChunkCache
from pymllm_core.kv.radix import RadixCache
from pymllm_core.testing.scheduling import Harness

POLICIES = [RadixCache, ChunkCache]


class Scheduling(RuleBasedStateMachine):
    """admit, step, abort, finish, evict and clear in any order, with and without overlap."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        num_pages=st.integers(1, 16),
        page_size=st.integers(1, 4),
        max_running=st.integers(1, 5),
        max_prefill=st.integers(1, 12),
        chunk=st.integers(1, 12),
        conservativeness=st.sampled_from([0.01, 1.0, 3.0]),
        overlap=st.booleans(),
    )
    def start(self, **limits: Any) -> None:
        limits["chunk"] = min(limits["chunk"], limits["max_prefill"])
        self.harness = Harness(**limits)

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=20),
        max_tokens=st.integers(1, 12),
        namespace=st.sampled_from(["", "tenant"]),
        shift=st.sampled_from([0, 0, 10]),
    )
    def admit(self, prompt: list[int], max_tokens: int, namespace: str, shift: int) -> None:
        pool = self.harness.pool
        capacity = pool.num_pages * pool.page_size
        if capacity > 1:
            self.harness.admit(prompt[: capacity - 1], max_tokens, namespace, shift)

    @rule(index=st.integers(0, 100), more=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def continue_an_old_one(self, index: int, more: list[int]) -> None:
        if self.harness.sequences:
            old = self.harness.sequences[index % len(self.harness.sequences)]
            capacity = self.harness.pool.num_pages * self.harness.pool.page_size
            self.harness.admit([*old.tokens, *more][: capacity - 1], 5, old.request.cache_namespace)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()

    @rule(index=st.integers(0, 100))
    def end_one(self, index: int) -> None:
        alive = [s for s in self.harness.sequences if s.status is not Status.FINISHED]
        if alive:
            self.harness.end(alive[index % len(alive)])

    @rule(count=st.integers(1, 5))
    def evict(self, count: int) -> None:
        cache, pool = self.harness.cache, self.harness.pool
        free, evictable = pool.free_pages, cache.evictable_pages
        freed = cache.evict(count)
        assert freed == pool.free_pages - free
        assert freed >= min(count, evictable)
        assert cache.evictable_pages == evictable - freed

    @precondition(lambda self: hasattr(self, "harness"))
    @rule()
    def clear(self) -> None:
        self.harness.cache.clear()
        assert self.harness.cache.evictable_pages == 0

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        harness = self.harness
        harness.drain(bound_of(harness))
        assert all(s.status is Status.FINISHED and s.pending == 0 for s in harness.sequences)
        assert harness.cache.evictable_pages == harness.cache.kept_pages
        harness.cache.clear()
        assert harness.pool.free_pages == harness.pool.num_pages


def bound_of(harness: Harness) -> int:
    """Steps after which all is done even if sequences ran one after another, chunk after chunk."""
    limits = harness.scheduler.limits
    chunk = min(limits.chunked_prefill_size, limits.max_prefill_tokens)
    alive = [s for s in harness.sequences if s.status is not Status.FINISHED]
    # A preempted sequence is computed again, at worst once for each token of those before it.
    return 20 + 4 * sum(s.max_tokens + 1 + (len(s.tokens) + s.max_tokens) // chunk for s in alive)


Scheduling.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestScheduling = Scheduling.TestCase


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("policy", POLICIES)
def test_10000_random_steps(policy: type[Any], overlap: bool) -> None:
    rng = random.Random(17)
    harness = Harness(
        policy, num_pages=24, page_size=3, max_running=5, max_prefill=9, chunk=6, overlap=overlap
    )
    alive: list[Sequence] = []
    for _ in range(10_000):
        alive = [s for s in alive if s.status is not Status.FINISHED]
        action = rng.random()
        if action < 0.15 and len(alive) < 12:
            prompt = [rng.randrange(3) for _ in range(rng.randint(1, 30))]
            if harness.sequences and rng.random() < 0.5:
                prompt = [*rng.choice(harness.sequences[-20:]).tokens[:40], *prompt[:8]]
            alive.append(harness.admit(prompt, rng.randint(1, 25), rng.choice(["", "", "tenant"])))
        elif action < 0.18 and alive:
            harness.end(rng.choice(alive))
        elif action < 0.19:
            harness.cache.evict(rng.randint(1, 6))
        harness.step(stop=0.03, rng=rng)
    harness.drain(bound_of(harness))
    assert harness.finished == len(harness.sequences) > 500
    assert harness.scheduler.num_preemptions > 100
    assert (harness.discarded > 0) == overlap
    if policy is RadixCache:
        assert sum(s.cached_tokens > 0 for s in harness.sequences) > 100
    harness.cache.clear()
    assert harness.pool.free_pages == harness.pool.num_pages


def test_decodes_come_before_prompts_and_a_long_prompt_stalls_nobody() -> None:
    harness = Harness(ChunkCache, num_pages=100, max_prefill=8, chunk=5)
    first = harness.admit([1, 2], 50)
    harness.step()
    harness.admit([0] * 100, 2)
    for _ in range(15):
        batch = harness.step()
        assert batch is not None
        assert batch.chunks[0].sequence is first
        assert [chunk.count for chunk in batch.chunks[1:]] == [5]
    assert first.num_generated == 16


def test_the_longest_decodes_come_first() -> None:
    harness = Harness(ChunkCache, num_pages=100, max_prefill=30, chunk=30)
    lengths = [3, 9, 1, 7]
    for length in lengths:
        harness.admit([0] * length, 3)
    first = harness.step()
    # A prompt of one token is a decode to the kernels.
    assert first is not None
    assert [chunk.count for chunk in first.chunks] == [1, 3, 9, 7]
    second = harness.step()
    assert second is not None
    assert [chunk.start for chunk in second.chunks] == sorted(lengths, reverse=True)


def test_prompts_share_the_budget_of_a_step() -> None:
    harness = Harness(ChunkCache, num_pages=100, max_prefill=8, chunk=5)
    harness.admit([0] * 7, 3)
    harness.admit([1] * 9, 3)
    counts = []
    while (batch := harness.step()) is not None:
        counts.append([chunk.count for chunk in batch.chunks])
    # 5 + 3 tokens; then 2 + 5; then a decode and the last token of the second prompt.
    assert counts[:3] == [[5, 3], [2, 5], [1, 1]]


def test_first_come_first_served() -> None:
    harness = Harness(ChunkCache, num_pages=100, max_running=1)
    sequences = [harness.admit([i % 3] * 3, 2) for i in range(5)]
    harness.drain(100)
    assert [s.finished_at for s in sequences] == sorted(s.finished_at for s in sequences)


def test_the_youngest_is_preempted_and_returns_to_the_front() -> None:
    harness = Harness(ChunkCache, num_pages=4, page_size=2, conservativeness=0.01, max_running=2)
    old, young = harness.admit([0, 1], 6), harness.admit([1, 2], 5)
    waiting = harness.admit([2, 2], 2)
    while not harness.scheduler.num_preemptions:
        harness.step()
    assert old.status is Status.RUNNING
    assert young.status is Status.WAITING
    assert list(harness.scheduler.waiting) == [young, waiting]
    harness.drain(100)
    assert [s.num_generated for s in (old, young, waiting)] == [6, 5, 2]


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    harness = Harness(RadixCache, num_pages=6, page_size=2, conservativeness=0.01, max_prefill=20, chunk=20)
    old, young = harness.admit([0] * 4, 8), harness.admit([1] * 5, 4)
    counts = []
    while young.status is not Status.FINISHED or old.status is not Status.FINISHED:
        batch = harness.step()
        assert batch is not None
        counts += [chunk.count for chunk in batch.chunks if chunk.sequence is young and chunk.start]
    assert harness.scheduler.num_preemptions
    assert young.cached_tokens == 0  # as it was first admitted
    assert sum(counts) < 5 + 4 + 8, "everything was computed again"


def test_a_pool_of_one_page() -> None:
    for policy in POLICIES:
        harness = Harness(policy, num_pages=1, page_size=4)
        sequences = [harness.admit(prompt, 10) for prompt in ([0], [1, 1, 2], [0, 2])]
        harness.drain(60)
        assert [s.num_generated for s in sequences] == [3, 1, 2]


def test_the_queue_has_a_limit() -> None:
    harness = Harness(ChunkCache, num_pages=50, max_running=2, max_queued=1)
    for _ in range(3):
        harness.admit([1, 2], 3)
    with pytest.raises(
        QueueFullError, match=r"3 requests are waiting, and max_queued_requests is 1; retry later"
    ):
        harness.admit([1, 2], 3)
    harness.step()  # two of them run now, one waits
    with pytest.raises(QueueFullError, match="1 requests are waiting") as caught:
        harness.admit([1, 2], 3)
    assert caught.value.status == 429
    harness.drain(60)
    harness.admit([1, 2], 3)


def test_abort_frees_everything_at_once() -> None:
    for overlap in (False, True):
        for when in range(8):
            harness = Harness(ChunkCache, num_pages=20, overlap=overlap)
            sequence = harness.admit([1] * 12, 9)
            for _ in range(when):
                harness.step()
            harness.end(sequence)
            assert harness.pool.free_pages == 20
            assert not harness.scheduler.has_work
            harness.drain(2)
            assert sequence.num_generated <= max(when, 1)


def test_overlap_discards_at_most_one_token() -> None:
    harness = Harness(RadixCache, num_pages=30, overlap=True)
    sequence = harness.admit([1, 2, 0], 20)
    while sequence.num_generated < 5:
        harness.step()
    harness.end(sequence)
    harness.drain(5)
    assert harness.discarded == 1
    # Without a stop nothing is computed in vain.
    harness.admit([2, 2, 0], 20)
    harness.drain(60)
    assert harness.discarded == 1


def test_a_batch_that_was_not_launched_leaves_nothing_behind() -> None:
    harness = Harness(RadixCache, num_pages=20, page_size=2, max_prefill=20, chunk=20)
    harness.admit([1, 2, 1, 2], 5)
    harness.step()
    harness.admit([0, 0, 0, 0], 5)
    states = [(s.num_computed, s.pending) for s in harness.sequences]
    batch = harness.scheduler.schedule()
    assert batch is not None
    assert len(batch.chunks) == 2
    harness.scheduler.roll_back(batch)
    assert [(s.num_computed, s.pending) for s in harness.sequences] == states
    for sequence in harness.sequences:
        harness.end(sequence)
    # Only the first prompt's pages were computed, and the tree says so.
    assert harness.cache.kept_pages == 2
    harness.check()
