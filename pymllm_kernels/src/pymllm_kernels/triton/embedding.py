"""The operation ``embedding``: the first launch of a step, during which the next ones begin to read their weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pymllm_kernels.triton.launch import ceil_div, gpu, power_of_2

MAX_BLOCK = 2048


@triton.jit
def embedding_kernel(ids, weight, out, H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(ids + token).to(tl.int64)
    tl.store(out + token * H + cols, tl.load(weight + row * H + cols, mask=cols < H), mask=cols < H)


def triton_embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """`nn.ops.embedding`; the rows of weight lie without gaps, as they are loaded. Every id must be one of its rows."""
    tokens, columns = len(ids), weight.shape[1]
    out = torch.empty((tokens, columns), dtype=weight.dtype, device=weight.device)
    if tokens:
        assert ids.is_contiguous()
        assert weight.is_contiguous()
        block, pdl = min(power_of_2(columns), MAX_BLOCK), gpu(weight.device).pdl
        embedding_kernel[(tokens, ceil_div(columns, block))](
            ids, weight, out, columns, block, PDL=pdl, num_warps=4, launch_pdl=pdl
        )
    return out


def make_embedding() -> object:
    """The implementation as the plan makes it."""
    return triton_embedding
