"""Why a device can have no kernels of ours for a linear: what `Needs.check` of their specs names."""

from __future__ import annotations

import functools

import torch

from pymllm_core.specs import Want
from pymllm_kernels.cuda import few_rows_library, many_rows_library, some_rows_library
from pymllm_kernels.cuda.few_rows_library import Format, parts_of
from pymllm_kernels.cuda.library import why_missing
from pymllm_kernels.cutlass.tiles import Capability


def why_not_linear(want: Want) -> str | None:
    """Why no kernel for ``linear`` can be had, None where all its libraries are compiled or can be."""
    return _why_not(Format("bfloat16"), want)


def why_not_w8a8(want: Want) -> str | None:
    """The same for ``w8a8_linear``, which has one library."""
    return _why_not(Format("int8"), want)


def why_not_w4a16(want: Want) -> str | None:
    """The same for ``w4a16_linear``, which has one for each group size."""
    return _why_not(Format("int4", parts_of(want.shape["group_size"])), want)


def _why_not(form: Format, want: Want) -> str | None:
    assert want.device.capability is not None
    return _why_missing(form, want.device.capability)


@functools.cache  # asked for every linear of a model
def _why_missing(form: Format, capability: Capability) -> str | None:
    recipes = [few_rows_library.recipe(form, capability)]
    if form.weights == "bfloat16":
        recipes.append(some_rows_library.recipe(capability))
        recipes += many_rows_library.recipes(capability, [torch.bfloat16])
    return why_missing(recipes)
