"""Contract of an attention backend, and the forward context that every layer receives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """What a backend is built for. scale multiplies q·k before the softmax."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    scale: float
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's cache: k and v of shape [num_pages * page_size, num_kv_heads, head_dim].

    A token's slot is ``page * page_size + offset in the page``.
    """

    k: Tensor
    v: Tensor


@dataclass(slots=True)
class ForwardContext:
    """All that a forward pass needs beside the token ids; an argument, never a global.

    T tokens of S sequences lie one after another; the first `num_decodes` sequences have one token each.
    positions: [T] int64. slots: [T] int64, where each token's K and V go. query_start: [S + 1] int32, rows
    of a sequence. kv_lens: [S] int32, length of each sequence after this pass. page_table: [S, P] int32.
    kv: one `LayerKV` a layer. query_lens and kv_lens_host are the same numbers as lists, so that no
    backend has to read the device. page_size in tokens. output_rows: [R] int64, the rows whose hidden states
    are wanted after the last layer; None for all. captured: the pass is captured in a graph or replayed from
    one, each time with this very context. same_pages: the page table is what it was when a pass was last planned
    with this context. out: [T, num_heads, head_dim] without gaps, where given: memory in which `attend` may return its
    result, which spares a copy.
    """

    positions: Tensor
    slots: Tensor
    query_start: Tensor
    kv_lens: Tensor
    page_table: Tensor
    num_decodes: int
    query_lens: list[int]
    kv_lens_host: list[int]
    page_size: int
    kv: list[LayerKV]
    attention: AttentionBackend
    output_rows: Tensor | None = None
    captured: bool = False
    same_pages: bool = False
    out: Tensor | None = None


class AttentionBackend(Protocol):
    """Attends over the paged cache. K and V of this pass are in the cache before `attend` is called.

    graph_safe: `attend` of a pass of decodes alone may be captured in a CUDA graph. It then reads nothing but
    the context's tensors, whose addresses and shapes stay while their contents change; `page_table` is as wide
    as the longest sequence may become. `plan` is called before the capture and before every replay.

    prepares_decodes: it is a `PreparingBackend`, too.

    short_context, which a backend need not have: a number of tokens. Where its launches follow from the width of the
    page table, decodes of few sequences are captured for tables of this width as well, and replayed from those while
    all their sequences fit.
    """

    graph_safe: bool
    prepares_decodes: bool

    def __init__(self, config: AttentionConfig) -> None: ...

    def plan(self, ctx: ForwardContext) -> None:
        """Prepare for one pass; called once a step, before the first layer."""
        ...

    def attend(self, q: Tensor, kv: LayerKV, ctx: ForwardContext) -> Tensor:
        """Causal attention. q: [T, num_heads, head_dim]; the result has the same shape and dtype."""
        ...


class PreparingBackend(AttentionBackend, Protocol):
    """A backend that takes a whole attention node at once, in passes of decodes alone."""

    def prepare_and_attend(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        kv: LayerKV,
        ctx: ForwardContext,
    ) -> Tensor:
        """The operation ``attention_prep`` (`nn.ops`) and `attend` at once: [T, num_heads, head_dim]."""
        ...
