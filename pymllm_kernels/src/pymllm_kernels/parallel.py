"""Several compilations at once, as many as cores and free memory allow."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
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


def build_all(
    recipes: Sequence[Recipe],
    *,
    jobs: int | None = None,
    anew: bool = False,
    done: Callable[[Recipe, Path], None] | None = None,
) -> list[Path]:
    """The libraries of all recipes, in their order; those that are missing are compiled together.

    jobs: at most so many at once; by default what `job_limit` finds. anew: compile all of them, whatever
    cache and bundles hold. done: called for each one that was compiled.
    Raises KernelBuildError, that of the first one that fails; none is started after it.
    """
    libraries = {} if anew else {recipe.name: found for recipe in recipes if (found := find_library(recipe))}
    missing = [recipe for recipe in recipes if recipe.name not in libraries]
    if missing:
        limit = min(jobs or job_limit(max(recipe.memory for recipe in missing)), len(missing))
        seconds = sum(recipe.seconds for recipe in missing) // limit
        # A warning, so that nobody waits for a minute without knowing for what.
        logger.warning(
            "compiling %d kernel libraries, %d at a time (once; about %d s on an idle machine)",
            len(missing),
            limit,
            seconds,
        )
        started = time.monotonic()
        with ThreadPoolExecutor(limit) as pool:  # of threads: each compiler is a process of its own
            futures = {pool.submit(build_library, recipe, anew=anew): recipe for recipe in missing}
            try:
                for future in as_completed(futures):
                    recipe = futures[future]
                    libraries[recipe.name] = future.result()
                    if done is not None:
                        done(recipe, libraries[recipe.name])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        logger.warning("compiled %d kernel libraries in %.0f s", len(missing), time.monotonic() - started)
    return [libraries[recipe.name] for recipe in recipes]
