"""Contract of a cache policy: who owns KV pages that no running sequence needs. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pymllm_core.kv.pool import PagePool


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """A cached prefix, locked until released: its pages in order and how many tokens they hold.

    handle: the policy's own; None where nothing matched.
    """

    pages: tuple[int, ...] = ()
    num_tokens: int = 0
    handle: Any = field(default=None)


class CachePolicy(Protocol):
    """Shares, keeps and evicts pages of a pool. All methods run on the engine's thread."""

    def __init__(self, pool: PagePool) -> None: ...

    def match(self, key_ids: Sequence[int], namespace: str) -> PrefixMatch:
        """Lock and return the longest cached prefix of `key_ids`, in whole pages."""
        ...

    def release(self, match: PrefixMatch) -> None:
        """Undo the lock of a match whose sequence keeps nothing (its own pages are freed elsewhere)."""
        ...

    def store(self, key_ids: Sequence[int], namespace: str, pages: Sequence[int], match: PrefixMatch) -> None:
        """Take over all `pages` of a sequence and undo its lock.

        Pages of `key_ids` that are whole may be kept for later matches; all others return to the pool.
        The first ``len(match.pages)`` pages are the match's own.
        """
        ...

    def evict(self, num_pages: int) -> int:
        """Return at least `num_pages` unlocked pages to the pool if there are as many; how many it were."""
        ...

    @property
    def evictable_pages(self) -> int:
        """How many pages `evict` could return now."""
        ...

    @property
    def kept_pages(self) -> int:
        """How many pages the policy holds, locked or not."""
        ...

    def clear(self) -> None:
        """Forget every unlocked prefix."""
        ...
