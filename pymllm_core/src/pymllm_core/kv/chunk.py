"""The chunk cache: nothing is shared and nothing outlives its sequence (``disable_radix_cache``)."""

from __future__ import annotations

from collections.abc import Sequence

from pymllm_core.kv.pool import PagePool
from pymllm_core.protocols.cache import PrefixMatch

_NOTHING = PrefixMatch()


class ChunkCache:
    """A `CachePolicy` that keeps no page."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool

    def match(self, key_ids: Sequence[int], namespace: str) -> PrefixMatch:
        return _NOTHING

    def release(self, match: PrefixMatch) -> None:
        pass

    def store(self, key_ids: Sequence[int], namespace: str, pages: Sequence[int], match: PrefixMatch) -> None:
        self._pool.give_back(pages)

    def evict(self, num_pages: int) -> int:
        return 0

    @property
    def evictable_pages(self) -> int:
        return 0

    @property
    def kept_pages(self) -> int:
        return 0

    def clear(self) -> None:
        pass
