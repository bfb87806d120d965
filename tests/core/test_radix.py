"""The radix cache: exact matches, locks, order of eviction; against a list of all prefixes as reference."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from pymllm_core.kv.pool import PagePool
from pymllm_core.kv.radix import RadixCache


def make(num_pages: int = 20, page_size: int = 2) -> tuple[PagePool, RadixCache]:
    pool = PagePool(num_pages, page_size)
    return pool, RadixCache(pool)


def put(pool: PagePool, cache: RadixCache, keys: list[int], namespace: str = "") -> list[int]:
    """As a sequence would: match, compute the rest on own pages, leave; the pages that it used."""
    match = cache.match(keys, namespace)
    pages = [*match.pages, *pool.take(pool.pages_for(len(keys)) - len(match.pages))]
    cache.store(keys, namespace, pages, match)
    return pages


def test_a_match_is_the_longest_prefix_in_whole_pages() -> None:
    pool, cache = make()
    pages = put(pool, cache, [1, 2, 3, 4, 5, 6, 7])
    assert cache.kept_pages == cache.evictable_pages == 3
    assert pool.free_pages == 17  # the half-full last page went back
    for keys, count in (
        ([1, 2, 3, 4, 5, 6, 7, 8], 3),
        ([1, 2, 3, 4, 5, 6], 3),
        ([1, 2, 3, 4, 5], 2),
        ([1, 2, 3, 9, 5, 6], 1),
        ([1], 0),
        ([2, 2, 3, 4], 0),
        ([], 0),
    ):
        match = cache.match(keys, "")
        assert match.pages == tuple(pages[:count])
        assert match.num_tokens == 2 * count
        cache.release(match)
    assert cache.evictable_pages == 3


def test_namespaces_share_nothing() -> None:
    pool, cache = make()
    put(pool, cache, [1, 2, 3, 4], "a")
    assert cache.match([1, 2, 3, 4], "b").pages == ()
    assert cache.match([1, 2, 3, 4], "").pages == ()
    assert len(cache.match([1, 2, 3, 4], "a").pages) == 2


def test_locked_pages_are_not_evicted_and_neither_is_what_leads_to_them() -> None:
    pool, cache = make()
    put(pool, cache, [1, 2, 3, 4, 5, 6])
    put(pool, cache, [1, 2, 7, 8])
    match = cache.match([1, 2, 3, 4], "")
    assert cache.evictable_pages == 2
    assert cache.evict(10) == 2  # [5, 6] and [7, 8]
    assert cache.kept_pages == 2
    second = cache.match([1, 2, 3, 4], "")
    cache.release(match)
    assert cache.evictable_pages == 0
    cache.release(second)
    assert cache.evict(10) == 2
    assert pool.free_pages == 20


def test_the_least_recently_used_end_goes_first() -> None:
    pool, cache = make()
    put(pool, cache, [1, 1, 1, 2])
    put(pool, cache, [2, 1, 2, 2])
    put(pool, cache, [3, 1, 3, 2])
    cache.release(cache.match([1, 1, 1, 2], ""))  # the first is the freshest now
    assert cache.evict(3) == 3
    left = {first: len(cache.match([first, 1, first, 2], "").pages) for first in (1, 2, 3)}
    assert left == {1: 2, 2: 0, 3: 1}


def test_a_page_computed_twice_is_kept_once() -> None:
    pool, cache = make()
    first, second = cache.match([1, 2, 3, 4], ""), cache.match([1, 2, 3, 4], "")
    mine, yours = pool.take(2), pool.take(2)
    cache.store([1, 2, 3, 4], "", mine, first)
    cache.store([1, 2, 3, 4], "", yours, second)
    assert cache.kept_pages == 2
    assert pool.free_pages == 18
    assert cache.match([1, 2, 3, 4], "").pages == tuple(mine)


def test_a_sequence_that_computed_nothing_returns_its_pages() -> None:
    pool, cache = make()
    put(pool, cache, [1, 2, 3, 4])
    match = cache.match([1, 2], "")
    cache.store([1, 2], "", [*match.pages, *pool.take(5)], match)
    assert pool.free_pages == 18
    assert cache.evictable_pages == 2


Keys = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(Keys, st.sampled_from(["", "x"])), max_size=25), st.integers(1, 3))
def test_matches_equal_those_of_a_list_of_prefixes(puts: list[tuple[list[int], str]], size: int) -> None:
    pool, cache = make(400, size)
    known: dict[tuple[str, tuple[int, ...]], int] = {}
    for keys, namespace in puts:
        match = cache.match(keys, namespace)
        expected = []
        for end in range(size, len(keys) + 1, size):
            page = known.get((namespace, tuple(keys[:end])))
            if page is None:
                break
            expected.append(page)
        assert list(match.pages) == expected
        cache.release(match)
        for index, page in enumerate(put(pool, cache, keys, namespace)[: len(keys) // size]):
            known[namespace, tuple(keys[: (index + 1) * size])] = page
    assert cache.kept_pages == cache.evictable_pages == len(known)
    cache.clear()
    assert pool.free_pages == 400
    assert cache.kept_pages == 0


def test_cost_is_linear_in_the_pages_touched() -> None:
    """Work on one branch must not depend on how much else the tree holds."""

    def seconds(branches: int) -> float:
        pool, cache = make(2 * branches + 10, 1)
        for branch in range(branches):
            put(pool, cache, [branch, branch])
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for branch in range(500):
                cache.release(cache.match([branch, branch], ""))
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(20_000) < 8 * seconds(1_000)


def test_stale_entries_do_not_pile_up() -> None:
    pool, cache = make(64, 1)
    put(pool, cache, [1, 2, 3])
    for _ in range(20_000):
        cache.release(cache.match([1, 2, 3], ""))
    assert len(cache._leaves) < 500
    assert cache.evict(3) == 3
