"""The attention backend ``cuda``: decodes by a kernel in CUDA C++, prompts by Triton's.

Graph-safe like `triton.attention`: a launch depends on the batch size and on the width of the page table alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pymllm_core.protocols.attention import AttentionConfig, ForwardContext, LayerKV
from pymllm_kernels.cuda.decode_library import DIMS, DTYPES, MAX_GROUP, Arguments, decode_library
from pymllm_kernels.cuda.decode_plan import SHORT, Split, choose_split
from pymllm_kernels.triton.attention import TritonAttention

ALIGNMENT = 16
"""Bytes: rows are moved 16 at a time."""


class CudaAttention(TritonAttention):
    """`protocols.attention.PreparingBackend`. head_dim: one of DIMS; at most MAX_GROUP query heads of a KV head.

    short_context: up to here `choose_split` launches a block or two for a sequence and KV head.
    """

    short_context = SHORT

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        if (
            config.head_dim not in DIMS
            or config.dtype not in DTYPES
            or not 1 <= self._group <= MAX_GROUP
            or config.page_size & (config.page_size - 1)
        ):
            raise ValueError(
                f"the attention backend cuda takes head_dim {DIMS}, {[*DTYPES]}, up to {MAX_GROUP} query heads of a "
                f"KV head and pages of a power of two of tokens; got {config}"
            )
        self._launch = decode_library(config.head_dim, config.dtype, config.device)
        self._split = Split(1)
        # Here once and for all, as `TritonAttention`'s, whose counters are too few for large batches that are split.
        size, device = (64 * self._gpu.sms, self._group), config.device
        self._partial = torch.empty((*size, config.head_dim), dtype=torch.float32, device=device)
        self._stats = torch.empty((*size, 2), dtype=torch.float32, device=device)
        self._counters = torch.zeros(size[0], dtype=torch.int32, device=device)

    def plan(self, ctx: ForwardContext) -> None:
        """Choose how a decode's cache is divided: a matter of the batch and of the table's width."""
        items = ctx.num_decodes * self._config.num_kv_heads
        width = ctx.page_table.shape[1] * ctx.page_size
        split = choose_split(items, width, self._gpu, self._config.head_dim)
        self._split = split if items * split.splits // split.cluster <= len(self._counters) else Split(1)

    def prepare_and_attend(  # type: ignore[override]  # its own parameters for measuring
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        kv: LayerKV,
        ctx: ForwardContext,
        *,
        split: Split | None = None,
        pdl: bool | None = None,
    ) -> Tensor:
        """`protocols.attention.PreparingBackend.prepare_and_attend`. split, pdl: for measuring.

        Raises ValueError where a tensor has another dtype, layout or size than the computation's.
        """
        config = self._config
        heads = config.num_heads + 2 * config.num_kv_heads
        if qkv.stride(1) != 1 or qkv.stride(0) * 2 % ALIGNMENT or qkv.data_ptr() % ALIGNMENT:
            qkv = qkv.clone(memory_format=torch.contiguous_format)
        if qkv.dtype != config.dtype or qkv.shape[1] != heads * config.head_dim:
            raise ValueError(f"qkv must be [T, {heads * config.head_dim}] {config.dtype}, got {_words(qkv)}")
        if (
            cos_sin.dtype != torch.float32
            or not cos_sin.is_contiguous()
            or cos_sin.shape[1] != config.head_dim
        ):
            raise ValueError(
                f"cos_sin must be [positions, {config.head_dim}] float32, contiguous, got {_words(cos_sin)}"
            )
        for weight in (q_weight, k_weight):
            if weight is not None and (weight.dtype != config.dtype or not weight.is_contiguous()):
                raise ValueError(f"norm weights must be {config.dtype}, contiguous, got {_words(weight)}")
        shape = (qkv.shape[0], config.num_heads, config.head_dim)
        out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
        arguments = self._arguments(qkv, kv, ctx, out, split, pdl)
        arguments.positions = ctx.positions.data_ptr()
        arguments.slots = ctx.slots.data_ptr()
        arguments.cos_sin = cos_sin.data_ptr()
        arguments.q_weight = None if q_weight is None else q_weight.data_ptr()
        arguments.k_weight = None if k_weight is None else k_weight.data_ptr()
        arguments.eps = eps
        arguments.prepare = 1
        arguments.batch = qkv.shape[0]
        self._run(arguments)
        return out

    def decode(  # type: ignore[override]
        self, q: Tensor, kv: LayerKV, ctx: ForwardContext, out: Tensor, *, split: Split | None = None
    ) -> None:
        """Fill the rows of the decodes, whose keys and values are in the cache. split: for measuring."""
        arguments = self._arguments(q, kv, ctx, out, split, None)
        arguments.batch = ctx.num_decodes
        self._run(arguments)

    def _arguments(
        self, q: Tensor, kv: LayerKV, ctx: ForwardContext, out: Tensor, split: Split | None, pdl: bool | None
    ) -> Arguments:
        config, split = self._config, split or self._split
        if kv.k.dtype != config.dtype or kv.k.stride() != kv.v.stride() or kv.k.stride(0) * 2 % ALIGNMENT:
            raise ValueError(
                f"the cache must be {config.dtype}, k and v alike, with slots at multiples of {ALIGNMENT} bytes; "
                f"got k {_words(kv.k)} and v {_words(kv.v)}"
            )
        return Arguments(
            q=q.data_ptr(),
            q_stride=q.stride(0),
            k_cache=kv.k.data_ptr(),
            v_cache=kv.v.data_ptr(),
            cache_stride=kv.k.stride(0),
            out=out.data_ptr(),
            page_table=ctx.page_table.data_ptr(),
            table_stride=ctx.page_table.stride(0),
            kv_lens=ctx.kv_lens.data_ptr(),
            partial=self._partial.data_ptr(),
            stats=self._stats.data_ptr(),
            counters=self._counters.data_ptr(),
            scale=self._scale,
            kv_heads=config.num_kv_heads,
            group=self._group,
            page_shift=ctx.page_size.bit_length() - 1,
            splits_shift=split.splits.bit_length() - 1,
            least=split.least,
            cluster_shift=split.cluster.bit_length() - 1,
            pdl=self._gpu.pdl if pdl is None else pdl,
            warps=split.warps,
        )

    def _run(self, arguments: Arguments) -> None:
        device = self._config.device
        clusters = 1 << (arguments.splits_shift - arguments.cluster_shift)
        if clusters > 1 and arguments.batch * arguments.kv_heads * clusters > len(self._counters):
            raise ValueError(
                f"{clusters} clusters for each of {arguments.batch} sequences have no room to meet"
            )
        if device.type != "cuda":  # emulated by a test
            self._launch(arguments, None)
            return
        with torch.cuda.device(device):
            self._launch(arguments, torch.cuda.current_stream(device).cuda_stream)


def _words(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
