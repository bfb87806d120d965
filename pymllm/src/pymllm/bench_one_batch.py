"""The historic entry point: ``python3 -m pymllm.bench_one_batch --server.model_path MODEL ...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pymllm_core.cli import run


def main(argv: Sequence[str] | None = None) -> int:
    """``pymllm bench one-batch`` with these arguments; the exit code."""
    return run(["bench", "one-batch", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
