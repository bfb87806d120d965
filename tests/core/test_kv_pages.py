"""The page pool and the chunk cache."""

from __future__ import annotations

import pytest

from pymllm_core.kv.chunk import ChunkCache
from pymllm_core.kv.pool import PagePool


def test_every_page_is_handed_out_once() -> None:
    pool = PagePool(7, 4)
    taken = pool.take(3) + pool.take(0) + pool.take(4)
    assert sorted(taken) == list(range(7))
    assert pool.free_pages == 0
    with pytest.raises(AssertionError, match="1 pages were taken from a pool with 0 free"):
        pool.take(1)
    pool.give_back(taken[2:5])
    assert sorted(pool.take(3)) == sorted(taken[2:5])


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_pages_for_tokens(tokens: int, pages: int) -> None:
    assert PagePool(1, 4).pages_for(tokens) == pages


def test_the_chunk_cache_keeps_nothing() -> None:
    pool = PagePool(5, 2)
    cache = ChunkCache(pool)
    match = cache.match([1, 2, 3, 4], "")
    assert (match.pages, match.num_tokens, match.handle) == ((), 0, None)
    cache.store([1, 2, 3, 4], "", pool.take(3), match)
    assert pool.free_pages == 5
    assert cache.match([1, 2, 3, 4], "").pages == ()
    assert (cache.evict(3), cache.evictable_pages, cache.kept_pages) == (0, 0, 0)
    cache.release(match)
    cache.clear()
    assert pool.free_pages == 5
