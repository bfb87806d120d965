"""The attention backend ``triton``: paged split-KV decode, and paged causal prefill, a launch each.

Graph-safe decode: a pass of decodes alone reads nothing but device tensors, allocates only its result, and
its launch depends on the batch size and on the width of the page table, not on the lengths. So a CUDA graph
captured with ``kv_lens``, ``page_table``, ``slots`` and ``positions`` in standing tensors may be replayed for
every batch of that size whose sequences fit the table. A row of padding has kv_len 0, and gets zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pymllm_core.protocols.attention import AttentionConfig, ForwardContext, LayerKV
from pymllm_kernels.triton.attention_kernels import decode_kernel, prefill_kernel
from pymllm_kernels.triton.decode_kernels import prepare_and_decode_kernel
from pymllm_kernels.triton.launch import ceil_div, gpu, power_of_2

MAX_SPLITS = 16
"""The last program of a sequence merges its splits alone, which takes longer than it saves with more."""


LEAST_BLOCKS = 1
"""Blocks of the cache that a split has at least."""


class TritonAttention:
    """`protocols.attention.AttentionBackend`.

    graph_safe: a pass of decodes alone may be captured in a CUDA graph; see above for what it depends on.
    short_context: a decode launches as many splits as the table's width asks for, and those without work cost time:
    2.5 us a layer at 128 tokens on an H200.
    """

    graph_safe = True
    short_context = 512

    def __init__(self, config: AttentionConfig) -> None:
        self._config = config
        # The halves of a head are operands of a product each.
        self.prepares_decodes = config.head_dim in (32, 64, 128, 256)
        self._group = config.num_heads // config.num_kv_heads
        self._scale = config.scale * math.log2(math.e)
        self._gpu = gpu(config.device)
        self._splits = 1
        # Two programs find room on a multiprocessor; the second pair fills in for those that exit at once.
        self._programs = 4 * self._gpu.sms
        # Here once and for all: a captured graph holds their addresses. Layers use them one after another.
        size, device = (self._programs, self._group), config.device
        self._partial = torch.empty((*size, config.head_dim), dtype=torch.float32, device=device)
        self._stats = torch.empty((*size, 2), dtype=torch.float32, device=device)
        self._counters = torch.zeros(self._programs, dtype=torch.int32, device=device)

    def plan(self, ctx: ForwardContext) -> None:
        """Choose into how many parts a decode's cache is split: a matter of the batch and of the table's width."""
        self._splits = self.splits(ctx.num_decodes, ctx.page_table.shape[1] * ctx.page_size)

    def splits(self, batch: int, max_kv_len: int) -> int:
        """A power of two, so many that `batch` sequences give every multiprocessor work."""
        room = max(self._programs // max(batch * self._config.num_kv_heads, 1), 1)
        useful = power_of_2(ceil_div(max_kv_len, self.block))
        return min(1 << (room.bit_length() - 1), useful, MAX_SPLITS)

    @property
    def block(self) -> int:
        """Tokens of the cache that a decode reads at a time."""
        return 64 if self._config.head_dim <= 128 else 32

    def attend(self, q: Tensor, kv: LayerKV, ctx: ForwardContext) -> Tensor:
        q = q.contiguous()
        out = torch.empty_like(q) if ctx.out is None else ctx.out
        if ctx.num_decodes:
            self.decode(q, kv, ctx, out)
        if ctx.num_decodes < len(ctx.query_lens):
            self.prefill(q, kv, ctx, out)
        return out

    def prepare_and_attend(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        kv: LayerKV,
        ctx: ForwardContext,
        *,
        block: int | None = None,
        least: int = LEAST_BLOCKS,
        warps: int = 4,
        stages: int = 2,
    ) -> Tensor:
        """`protocols.attention.PreparingBackend.prepare_and_attend`. The rest: for measuring."""
        config = self._config
        qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
        tokens = qkv.shape[0]
        out = torch.empty((tokens, config.num_heads, config.head_dim), dtype=qkv.dtype, device=qkv.device)
        prepare_and_decode_kernel[(self._splits, config.num_kv_heads, tokens)](
            qkv,
            ctx.positions,
            cos_sin,
            q_weight,
            k_weight,
            eps,
            ctx.slots,
            kv.k,
            kv.v,
            out,
            ctx.page_table,
            ctx.kv_lens,
            self._partial,
            self._stats,
            self._counters,
            self._scale,
            qkv.stride(0),
            kv.k.stride(0),
            ctx.page_table.stride(0),
            DIM=config.head_dim,
            KV_HEADS=config.num_kv_heads,
            GROUP=self._group,
            BLOCK_G=max(power_of_2(self._group), 16),
            PAGE=ctx.page_size,
            BLOCK=block or self.block,
            SPLITS=self._splits,
            LEAST=least,
            STAGES=stages,
            Q_NORM=q_weight is not None,
            K_NORM=k_weight is not None,
            PDL=self._gpu.pdl,
            num_warps=warps,
            launch_pdl=self._gpu.pdl,
        )
        return out

    def decode(
        self, q: Tensor, kv: LayerKV, ctx: ForwardContext, out: Tensor, *, blocks: tuple[int, ...] = ()
    ) -> None:
        """Fill the rows of the decodes. blocks: splits, BLOCK, warps and stages, where not the usual."""
        config = self._config
        splits, block, warps, stages = blocks or (self._splits, self.block, 4, 2)
        decode_kernel[(splits, config.num_kv_heads, ctx.num_decodes)](
            q,
            kv.k,
            kv.v,
            out,
            ctx.page_table,
            ctx.kv_lens,
            self._partial,
            self._stats,
            self._counters,
            self._scale,
            q.stride(0),
            kv.k.stride(0),
            ctx.page_table.stride(0),
            DIM=config.head_dim,
            GROUP=self._group,
            BLOCK_G=max(power_of_2(self._group), 16),
            PAGE=ctx.page_size,
            BLOCK=block,
            SPLITS=splits,
            STAGES=stages,
            PDL=self._gpu.pdl,
            num_warps=warps,
            launch_pdl=self._gpu.pdl,
        )

    def prefill(
        self, q: Tensor, kv: LayerKV, ctx: ForwardContext, out: Tensor, *, blocks: tuple[int, ...] = ()
    ) -> None:
        """Fill the rows of all other sequences. blocks: BLOCK_M, BLOCK_N, warps, stages, where not the usual."""
        config = self._config
        lengths = ctx.query_lens[ctx.num_decodes :]
        block_m, block_n, warps, stages = blocks or self.prefill_blocks(max(lengths))
        prefill_kernel[(config.num_heads, ceil_div(max(lengths), block_m), len(lengths))](
            q,
            kv.k,
            kv.v,
            out,
            ctx.page_table,
            ctx.kv_lens,
            ctx.query_start,
            ctx.num_decodes,
            self._scale,
            q.stride(0),
            kv.k.stride(0),
            ctx.page_table.stride(0),
            DIM=config.head_dim,
            GROUP=self._group,
            PAGE=ctx.page_size,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            STAGES=stages,
            num_warps=warps,
        )

    def prefill_blocks(self, longest: int) -> tuple[int, int, int, int]:
        """BLOCK_M, BLOCK_N, warps and stages for prompts of at most `longest` tokens."""
        if self._config.head_dim > 128:
            return 64, 32, 8, 2
        # Few queries: smaller blocks give more multiprocessors work.
        if longest > 512:
            return 128, 64, 8, 2
        # Before Hopper, whose products read shared memory, 64 keys a step do not fit the registers.
        return 64, 64 if self._gpu.major >= 9 else 32, 4, 2
