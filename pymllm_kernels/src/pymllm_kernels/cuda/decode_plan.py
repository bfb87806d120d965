"""How a decode's cache is divided among blocks: explicit rules over the batch, nothing tried at run time.

They follow sweeps of 9 to 16 ways on an H200, in chains with the products before and after the attention
(benchmarks/gpu_decode.py; benchmarks/notes.md has the figures).
"""

from __future__ import annotations

from dataclasses import dataclass

from pymllm_kernels.cuda.decode_library import TILE, shared_bytes
from pymllm_kernels.triton.launch import Gpu, ceil_div, power_of_2

MAX_SPLITS = 16
"""Of a sequence."""

SHORT = 512
"""Tokens of a table up to which clusters are not worth their launch."""


@dataclass(frozen=True, slots=True)
class Split:
    """How a decode's cache is divided.

    All are powers of two but `least`. splits: parts of a sequence, at most. least: blocks of `warps` tiles that a part
    has at least. cluster: so many parts are a thread block cluster and meet in its shared memory; clusters meet in
    global memory. warps: 4 or 8.
    """

    splits: int
    least: int = 1
    cluster: int = 1
    warps: int = 4


def choose_split(items: int, max_kv_len: int, gpu: Gpu, dim: int) -> Split:
    """For `items` pairs of a sequence and a KV head, of sequences that may grow to max_kv_len tokens."""
    room = gpu.sms // max(items, 1)
    if room and gpu.shared >= shared_bytes(dim, 8, cluster=2):
        # A block a multiprocessor at most, so large that two rounds of its warps are 256 tokens. Blocks without tokens
        # leave at once, but the next kernel starts only when all have begun: few tokens, few blocks.
        splits = min(1 << (room.bit_length() - 1), MAX_SPLITS, power_of_2(ceil_div(max_kv_len, 16 * TILE)))
        if gpu.major >= 9 and splits > 1 and max_kv_len > SHORT:
            return Split(splits, cluster=2, warps=8)
        return Split(splits, least=2, warps=8)
    # Several blocks a multiprocessor, which take the longest sequences first (the scheduler's order): whole ones even
    # out, 3 to 7 % faster than parts of 512 tokens. Parts are for one that would last longer than all others. Clusters
    # of two are 2 % faster for many long sequences; steps of 64 short ones were 10 % longer, on another machine.
    least = 24 if items >= 4 * gpu.sms else 16
    return Split(min(4, power_of_2(ceil_div(max_kv_len, least * 4 * TILE))), least=least)
