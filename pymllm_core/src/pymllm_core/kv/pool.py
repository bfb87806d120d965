"""The pool of KV pages: which are free. The tensors they index live with the runner."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Numbers of free pages. page_size in tokens. Every page is either free or owned by someone else."""

    __slots__ = ("_free", "num_pages", "page_size")

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages, which the caller now owns. The caller has checked `free_pages`."""
        if count > len(self._free):
            raise AssertionError(f"{count} pages were taken from a pool with {len(self._free)} free")
        if count == 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        taken.reverse()
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Return pages that the caller owned."""
        self._free.extend(pages)

    def pages_for(self, tokens: int) -> int:
        """How many pages `tokens` need."""
        return -(-tokens // self.page_size)
