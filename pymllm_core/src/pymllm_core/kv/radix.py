"""The radix cache: finished sequences leave their whole pages in a tree of prefixes for later matches.

An edge holds a run of pages; the key of a page is the tuple of its tokens' key ids, so a match is exact
by construction. Locks count the running sequences that use a node or something under it. Unlocked leaves
are evicted, least recently used first. The idea is RadixAttention's (Zheng et al. 2024, arXiv:2312.07104).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from pymllm_core.kv.pool import PagePool
from pymllm_core.protocols.cache import PrefixMatch

PageKey = tuple[int, ...]


class _Node:
    """A run of pages below `parent`; `keys[i]` are the key ids in `pages[i]`."""

    __slots__ = ("children", "keys", "locks", "pages", "parent", "used")

    def __init__(self, parent: _Node | None, keys: list[PageKey], pages: list[int], used: int) -> None:
        self.parent = parent
        self.keys = keys
        self.pages = pages
        self.children: dict[PageKey, _Node] = {}
        self.locks = 0
        self.used = used


class RadixCache:
    """A `CachePolicy` that shares prefixes. Costs are linear in the pages touched."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._roots: dict[str, _Node] = {}
        self._clock = 0
        self._evictable = 0
        self._kept = 0
        # Candidates for eviction as (used, tie-break, node); stale entries are skipped when popped.
        self._leaves: list[tuple[int, int, _Node]] = []
        self._pushes = 0

    # -- the policy ---------------------------------------------------------------------------------

    def match(self, key_ids: Sequence[int], namespace: str) -> PrefixMatch:
        root = self._roots.get(namespace)
        if root is None:
            return PrefixMatch()
        node, pages = self._walk(root, self._page_keys(key_ids))
        if not pages:
            return PrefixMatch()
        self._lock(node)
        return PrefixMatch(tuple(pages), len(pages) * self._pool.page_size, node)

    def release(self, match: PrefixMatch) -> None:
        if match.handle is not None:
            self._unlock(match.handle)

    def store(self, key_ids: Sequence[int], namespace: str, pages: Sequence[int], match: PrefixMatch) -> None:
        root = self._roots.setdefault(namespace, _Node(None, [], [], 0))
        keys = self._page_keys(key_ids)[: len(pages)]
        node, cached = self._walk(root, keys)
        # What the tree has already, beyond what it lent to this sequence, is a duplicate.
        self._pool.give_back(pages[len(match.pages) : len(cached)])
        if len(cached) < len(keys):
            leaf = _Node(node, keys[len(cached) :], list(pages[len(cached) : len(keys)]), self._tick())
            node.children[leaf.keys[0]] = leaf
            self._kept += len(leaf.pages)
            self._evictable += len(leaf.pages)
            self._push(leaf)
        self._pool.give_back(pages[max(len(keys), len(match.pages)) :])
        self.release(match)

    def evict(self, num_pages: int) -> int:
        freed = 0
        while freed < num_pages and self._leaves:
            used, _, node = heapq.heappop(self._leaves)
            if node.used != used or node.locks or node.children or not node.pages or node.parent is None:
                continue
            count = min(num_pages - freed, len(node.pages))
            first = node.keys[0]
            self._pool.give_back(node.pages[-count:])
            del node.pages[-count:], node.keys[-count:]
            freed += count
            if node.pages:
                self._push(node)
            else:
                del node.parent.children[first]
                self._push(node.parent)
        self._evictable -= freed
        self._kept -= freed
        return freed

    @property
    def evictable_pages(self) -> int:
        return self._evictable

    @property
    def kept_pages(self) -> int:
        return self._kept

    def clear(self) -> None:
        self.evict(self._evictable)
        self._roots = {name: root for name, root in self._roots.items() if root.children}

    # -- the tree -----------------------------------------------------------------------------------

    def _page_keys(self, key_ids: Sequence[int]) -> list[PageKey]:
        size = self._pool.page_size
        return [tuple(key_ids[i : i + size]) for i in range(0, len(key_ids) - size + 1, size)]

    def _walk(self, node: _Node, keys: list[PageKey]) -> tuple[_Node, list[int]]:
        """The deepest node whose path is a prefix of `keys` (an edge is split where needed), its pages."""
        pages: list[int] = []
        used = self._tick()
        while len(pages) < len(keys):
            child = node.children.get(keys[len(pages)])
            if child is None:
                break
            start = len(pages)
            length = 1
            limit = min(len(child.keys), len(keys) - start)
            while length < limit and child.keys[length] == keys[start + length]:
                length += 1
            if length < len(child.keys):
                child = self._split(child, length)
            child.used = used
            if not child.children and not child.locks:
                self._push(child)
            pages += child.pages
            node = child
        return node, pages

    def _split(self, node: _Node, length: int) -> _Node:
        """Cut an edge after `length` pages; returns the new upper node."""
        assert node.parent is not None
        upper = _Node(node.parent, node.keys[:length], node.pages[:length], node.used)
        upper.locks = node.locks
        node.parent.children[upper.keys[0]] = upper
        node.keys, node.pages, node.parent = node.keys[length:], node.pages[length:], upper
        upper.children[node.keys[0]] = node
        return upper

    def _lock(self, node: _Node) -> None:
        walk: _Node | None = node
        while walk is not None and walk.parent is not None:
            if walk.locks == 0:
                self._evictable -= len(walk.pages)
            walk.locks += 1
            walk = walk.parent

    def _unlock(self, node: _Node) -> None:
        walk: _Node | None = node
        while walk is not None and walk.parent is not None:
            walk.locks -= 1
            if walk.locks == 0:
                self._evictable += len(walk.pages)
                self._push(walk)
            walk = walk.parent

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _push(self, node: _Node) -> None:
        """Offer a node for eviction if it is an unlocked leaf."""
        if node.parent is None or node.children or node.locks:
            return
        if len(self._leaves) > 64 + 2 * self._kept:
            alive = {id(entry[2]): entry[2] for entry in self._leaves}
            self._leaves = [
                (leaf.used, index, leaf)
                for index, leaf in enumerate(alive.values())
                if leaf.pages and not leaf.children and not leaf.locks
            ]
            heapq.heapify(self._leaves)
            self._pushes = len(self._leaves)
        self._pushes += 1
        heapq.heappush(self._leaves, (node.used, self._pushes, node))
