"""Which path and block sizes routed experts run with: explicit rules over shapes, nothing tried at run time."""

from __future__ import annotations

from dataclasses import dataclass

from pymllm_kernels.triton.launch import ceil_div, power_of_2

MAX_FEW_TOKENS = {16: 4, 8: 8, 4: 8}
"""By a weight's bits: up to so many tokens, each pair of token and expert reads its weights by itself, as few pairs
share an expert. Measured on an H200 with the sizes of Qwen3-30B-A3B (`benchmarks/notes.md`)."""


@dataclass(frozen=True, slots=True)
class VectorBlocks:
    """block_n: results a program. block_k: columns a step. sub: columns that are summed at once."""

    block_n: int
    block_k: int
    sub: int
    warps: int = 4
    unroll: int = 1


@dataclass(frozen=True, slots=True)
class GroupedBlocks:
    """block_m: pairs of one expert a program. block_n: results, block_k: columns a step, stages: of the loop.

    weights_left: the weights, not the rows, are the products' left operand, whose rows a tile has many of.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    weights_left: bool


def group_part(group: int, most: int) -> int:
    """The largest power of two, up to `most`, that divides the group's columns: it has one scale."""
    return min(group & -group, most)


def vector_blocks(
    n: int, k: int, group: int, bits: int, sms: int, programs: int, *, gated: bool
) -> VectorBlocks:
    """For few tokens. programs: how many stand beside each other for other pairs or tokens."""
    block_k = min(power_of_2(max(k, 32)), 512 if bits == 16 else 1024)
    while block_k > 128 and k % block_k and k % (block_k // 2) == 0:
        block_k //= 2
    sub = 8 if bits == 16 else group_part(group, block_k)
    # 16 KB of weights in flight a program, and rather small programs than idle multiprocessors.
    matrices = 2 if gated else 1
    block_n = max(16384 * 8 // (block_k * bits * matrices), 1)
    while block_n > 1 and ceil_div(n, block_n) * programs < 4 * sms:
        block_n //= 2
    return VectorBlocks(min(block_n, 16), block_k, sub, unroll=min(ceil_div(k, block_k), 2))


def grouped_blocks(
    tokens: int, top_k: int, experts: int, n: int, group: int, bits: int, *, gated: bool
) -> GroupedBlocks:
    """For many tokens; block_m follows the pairs that an expert has on average.

    Tokens count as the next power of two: so a step runs the kernels that a graph for some more tokens captures.
    """
    mean = power_of_2(tokens) * top_k / experts
    block_m = 16 if mean <= 16 else 32 if mean <= 32 else 64 if mean <= 96 else 128
    # As many bytes of weights a step as the registers of many rows leave room for.
    most = 128 if bits == 4 and block_m <= 32 else 64
    block_k = most if bits == 16 else group_part(group, most)
    block_n = min(64 if gated or block_m <= 32 else 128, max(power_of_2(n), 16))
    warps = 8 if block_m == 128 else 4
    # Within the 99 KB of shared memory that the smallest of these devices gives a block.
    stages = 3 if block_m >= 64 else 4
    return GroupedBlocks(block_m, block_n, block_k, warps, stages, weights_left=block_m <= 32)


def max_blocks(pairs: int, experts: int, block_m: int) -> int:
    """How many blocks of block_m pairs of one expert each any routing can make."""
    return pairs // block_m + min(pairs, experts)
