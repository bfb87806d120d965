"""Several compilations at once, as many as cores and free memory allow."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pymllm_core.device import memory_info
from pymllm_kernels.jit import build_library, find_library
from pymllm_kernels.recipe import Recipe

logger = logging.getLogger(__name__)


def job_limit(memory_each: int) -> int:
    """How many compilations of `memory_each` bytes this process may run at once: 1 at least.

    Bounded by the cores that it may use and by the memory that is available now, in the machine and in
    its cgroup; a tenth of that stays free.
    """
    _, available = memory_info()
    return max(1, min(len(os.sched_getaffinity(0)), available * 9 // 10 // memory_each))


def build_all(recipes: Sequence[Recipe], *, jobs: int | None = None, anew: bool = False) -> list[Path]:
    """The libraries of all recipes, in their order; those that are missing are compiled together.

    jobs: at most so many at once; by default what `job_limit` finds.
    Raises KernelBuildError, that of the first one that failed, after the others have ended.
    """
    missing = [recipe for recipe in recipes if anew or find_library(recipe) is None]
    if missing:
        limit = jobs or job_limit(max(recipe.memory for recipe in missing))
        limit = min(limit, len(missing))
        seconds = sum(recipe.seconds for recipe in missing) // limit
        logger.info(
            "compiling %d kernel libraries, %d at a time (once; about %d s on an idle machine)",
            len(missing),
            limit,
            seconds,
        )
        started = time.monotonic()
        with ThreadPoolExecutor(limit) as pool:
            # The compiler is a process of its own, so threads suffice.
            futures = [pool.submit(build_library, recipe, anew=anew) for recipe in missing]
        for future in futures:
            future.result()
        logger.info("compiled %d kernel libraries in %.0f s", len(missing), time.monotonic() - started)
    return [build_library(recipe) for recipe in recipes]
