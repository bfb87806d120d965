"""Attention by FlashInfer (Ye et al., arXiv:2501.01005; https://docs.flashinfer.ai), where it is installed.

Its planner looks at the lengths of all sequences on the host and divides their pages among the thread blocks.
A plan stays valid while every sequence has the same number of pages, so that a decode step plans anew only
when one of them begins a page; the lengths within the last pages are a tensor that every step sends.
"""

from __future__ import annotations

import os
from typing import Any

import flashinfer
import numpy as np
import torch
from torch import Tensor

from pymllm_core.errors import ConfigError
from pymllm_core.protocols.attention import AttentionConfig, ForwardContext, LayerKV

WORKSPACE_ENV = "PYMLLM_FLASHINFER_WORKSPACE_SIZE"
TENSOR_CORE_ENV = "PYMLLM_FLASHINFER_USE_TENSOR_CORE"


class FlashInferAttention:
    """The `AttentionBackend` ``flashinfer``: decodes and prompts each by their own kernel."""

    graph_safe = True
    prepares_decodes = False

    def __init__(self, config: AttentionConfig) -> None:
        self._config = config
        size = _positive(WORKSPACE_ENV, 128 << 20)
        self._workspace = torch.zeros(size, dtype=torch.uint8, device=config.device)
        # Groups of query heads fill a tensor core's tile from about four heads on.
        group = config.num_heads // config.num_kv_heads
        self._tensor_cores = _flag(TENSOR_CORE_ENV, group >= 4)
        self._eager = _Decodes(self, None)
        self._captured: dict[int, _Decodes] = {}
        self._decodes = self._eager
        self._prefill: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
        # FlashInfer copies its plan from one pinned buffer: not to be written before that copy has happened.
        self._copied = torch.cuda.Event()

    def plan(self, ctx: ForwardContext) -> None:
        """Divide the work of this pass, once for all layers."""
        count = ctx.num_decodes
        if ctx.captured:
            if count not in self._captured:
                self._captured[count] = _Decodes(self, ctx)
            self._decodes = self._captured[count]
        else:
            self._decodes = self._eager
        if count:
            self._decodes.plan(ctx, count)
        if count == len(ctx.query_lens):
            return
        starts = np.cumsum([0, *ctx.query_lens[count:]], dtype=np.int32)
        indptr, last = _page_counts(ctx.kv_lens_host[count:], ctx.page_size)
        self.wait()
        self._prefill.plan(
            torch.from_numpy(starts),
            torch.from_numpy(indptr),
            _page_indices(ctx.page_table[count:], indptr),
            torch.from_numpy(last),
            causal=True,
            head_dim_qk=self._config.head_dim,
            **self.common(),
        )
        self.copied()

    def attend(self, q: Tensor, kv: LayerKV, ctx: ForwardContext) -> Tensor:
        count = ctx.num_decodes
        pages = _paged(kv.k, ctx.page_size), _paged(kv.v, ctx.page_size)
        if count == len(ctx.query_lens):
            return self._decodes.run(q, pages)
        out = torch.empty_like(q) if ctx.out is None else ctx.out
        if not count:
            self._prefill.run(q, pages, out=out)
            return out
        out[:count] = self._decodes.run(q[:count], pages)
        self._prefill.run(q[count:], pages, out=out[count:])
        return out

    def wrapper(self, **buffers: Any) -> Any:
        """A new decode wrapper over the common workspace."""
        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_tensor_cores=self._tensor_cores, **buffers
        )

    def common(self) -> dict[str, Any]:
        """The arguments that all plans have in common."""
        config = self._config
        return {
            "num_qo_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "page_size": config.page_size,
            "sm_scale": config.scale,
            "q_data_type": config.dtype,
            "kv_data_type": config.dtype,
        }

    @property
    def head_dim(self) -> int:
        return self._config.head_dim

    def wait(self) -> None:
        """Until the plan before this one has left the pinned buffer."""
        self._copied.synchronize()

    def copied(self) -> None:
        self._copied.record()


class _Decodes:
    """Decodes of one number of sequences in a graph, or of any number without one (`ctx` None)."""

    def __init__(self, owner: FlashInferAttention, ctx: ForwardContext | None) -> None:
        self._owner = owner
        self._last: Tensor | None = None
        if ctx is None:
            self._wrapper = owner.wrapper()
            return
        device, (size, width) = ctx.page_table.device, ctx.page_table.shape
        self._last = torch.ones(size, dtype=torch.int32, device=device)
        self._wrapper = owner.wrapper(
            use_cuda_graph=True,
            paged_kv_indptr_buffer=torch.zeros(size + 1, dtype=torch.int32, device=device),
            paged_kv_indices_buffer=torch.zeros(size * width, dtype=torch.int32, device=device),
            paged_kv_last_page_len_buffer=self._last,
        )

    def plan(self, ctx: ForwardContext, count: int) -> None:
        owner = self._owner
        indptr, last = _page_counts(ctx.kv_lens_host[:count], ctx.page_size)
        if self._last is not None and ctx.same_pages:
            self._last.copy_(torch.from_numpy(last), non_blocking=True)
            return
        owner.wait()
        self._wrapper.plan(
            torch.from_numpy(indptr),
            _page_indices(ctx.page_table[:count], indptr),
            torch.from_numpy(last),
            head_dim=owner.head_dim,
            **owner.common(),
        )
        owner.copied()

    def run(self, q: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        result: Tensor = self._wrapper.run(q, pages)
        return result


def _page_counts(kv_lens: list[int], page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each sequence's pages begin [S + 1], and how full its last page is [S]; int32."""
    lens = np.asarray(kv_lens, dtype=np.int32)
    indptr = np.zeros(len(lens) + 1, dtype=np.int32)
    np.cumsum(-(-lens // page_size), out=indptr[1:])
    return indptr, (lens - 1) % page_size + 1


def _page_indices(table: Tensor, indptr: np.ndarray) -> Tensor:
    """The pages of all sequences one after another, from their table [S, P]."""
    counts = np.diff(indptr)
    row = np.repeat(np.arange(len(counts)), counts)
    column = np.arange(indptr[-1]) - np.repeat(indptr[:-1], counts)
    return torch.take(table, torch.from_numpy(row * table.shape[1] + column).to(table.device))


def _paged(cache: Tensor, page_size: int) -> Tensor:
    """[slots, heads, dim] as [pages, page size, heads, dim]."""
    return cache.view(-1, page_size, *cache.shape[1:])


def _positive(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{name}={text!r}: expected a number of bytes")
    return int(text)


def _flag(name: str, default: bool) -> bool:
    text = os.environ.get(name, "").lower()
    if not text:
        return default
    if text not in ("0", "1", "false", "true"):
        raise ConfigError(f"{name}={text!r}: expected 0, 1, false or true")
    return text in ("1", "true")
