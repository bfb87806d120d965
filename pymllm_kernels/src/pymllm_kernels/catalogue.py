"""All libraries that this package compiles, and what has become of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from pymllm_core.device import cpu_flags
from pymllm_kernels.bundle import bundle_folders, prebuilt_library
from pymllm_kernels.cpu_library import REQUIRED_CPU_FLAGS, cpu_recipe
from pymllm_kernels.cuda.decode_library import recipes as decode_recipes
from pymllm_kernels.cuda.few_rows_library import recipes as few_rows_recipes
from pymllm_kernels.cuda.many_rows_library import recipes as many_rows_recipes
from pymllm_kernels.cuda.some_rows_library import recipes as some_rows_recipes
from pymllm_kernels.cutlass.library import recipes as cutlass_recipes
from pymllm_kernels.cutlass.tiles import Capability
from pymllm_kernels.jit import cache_entry, is_intact
from pymllm_kernels.recipe import KernelBuildError, Recipe

CAPABILITIES: tuple[Capability, ...] = ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0))
"""The devices that have CUDA sources: A100; consumer Ampere; Orin; Ada; Hopper."""


@dataclass(frozen=True, slots=True)
class State:
    """word: ``bundled``, ``built``, ``broken`` or ``missing``. note: why, where that is not plain."""

    recipe: Recipe
    word: str
    path: Path | None = None
    note: str = ""

    @property
    def size(self) -> int | None:
        return self.path.stat().st_size if self.path is not None and self.path.is_file() else None


def this_capability() -> Capability | None:
    """The compute capability of this machine's first CUDA device, None where torch sees none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def all_recipes(capabilities: Iterable[Capability], dtypes: Iterable[str], *, cpu: bool) -> list[Recipe]:
    """What these devices may ask for, for results of these types; with `cpu`, this machine's CPU library first.

    A CPU that lacks the features which its kernels need has none. Raises ValueError for a device without
    CUDA sources.
    """
    kinds = [getattr(torch, name) for name in dtypes]
    own = [cpu_recipe()] if cpu and cpu_flags() >= REQUIRED_CPU_FLAGS else []
    for capability in capabilities:
        for recipes in (
            cutlass_recipes,
            decode_recipes,
            few_rows_recipes,
            some_rows_recipes,
            many_rows_recipes,
        ):
            own += recipes(capability, kinds)
    return own


def state_of(recipe: Recipe) -> State:
    """What a bundle or the cache holds of a recipe; compiles nothing."""
    try:
        library = prebuilt_library(recipe)
    except KernelBuildError as error:
        return State(recipe, "broken", note=str(error))
    if library is not None:
        return State(recipe, "bundled", library)
    try:
        entry = cache_entry(recipe)
    except KernelBuildError as error:
        bundled = "no bundle has it and " if bundle_folders() else ""
        return State(recipe, "missing", note=bundled + str(error))
    library = entry / f"lib{recipe.name}.so"
    if is_intact(library):
        return State(recipe, "built", library)
    if entry.exists():
        return State(recipe, "broken", library, "it is compiled anew at its next use")
    return State(recipe, "missing", note="it is compiled at its first use")
