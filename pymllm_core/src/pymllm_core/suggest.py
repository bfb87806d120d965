"""What a misspelt name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean …?`` with the nearest of `known`, or nothing."""
    known = list(known)
    # A bare field name (--port) stands for the flag that ends with it.
    near = [flag for flag in known if flag.rpartition(".")[2] == name.lstrip("-")]
    near += difflib.get_close_matches(name, known, n=2, cutoff=0.75)
    return f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
