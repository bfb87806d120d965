"""Attention by plain PyTorch: every device and dtype, and the reference of the other backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm_core.protocols.attention import AttentionConfig, ForwardContext, LayerKV


class TorchAttention:
    """Gathers each sequence's pages and attends with `scaled_dot_product_attention`."""

    # Which slots it gathers depends on the lengths, which the host looks at.
    graph_safe = False
    prepares_decodes = False

    def __init__(self, config: AttentionConfig, *, batch_decodes: bool | None = None) -> None:
        self._config = config
        self._batch_decodes = config.device.type != "cpu" if batch_decodes is None else batch_decodes
        self._group = config.num_heads // config.num_kv_heads
        self._slots: list[Tensor] = []
        self._decode_slots = torch.empty(0)
        self._decode_mask = torch.empty(0)
        self._batched = 0

    def plan(self, ctx: ForwardContext) -> None:
        """Work out, once for all layers, which slots every sequence reads.

        On a GPU all decodes are one padded call; on a CPU, where a call is cheap and padding is not, each
        sequence has its own (unless `batch_decodes` says otherwise).
        """
        device = self._config.device
        self._batched = ctx.num_decodes if self._batch_decodes else 0
        offsets = torch.arange(ctx.page_size, device=device)
        if self._batched:
            longest = max(ctx.kv_lens_host[: self._batched])
            pages = ctx.page_table[: self._batched, : -(-longest // ctx.page_size)].long()
            slots = (pages[:, :, None] * ctx.page_size + offsets).flatten(1)
            valid = torch.arange(slots.shape[1], device=device)[None] < ctx.kv_lens[: self._batched, None]
            # Weight 0 times another sequence's NaN is NaN: what is masked reads the sequence's own first token.
            self._decode_slots = torch.where(valid, slots, slots[:, :1])
            self._decode_mask = valid[:, None, None, :]
        self._slots = []
        for index in range(self._batched, len(ctx.query_lens)):
            length = ctx.kv_lens_host[index]
            pages = ctx.page_table[index, : -(-length // ctx.page_size)].long()
            self._slots.append((pages[:, None] * ctx.page_size + offsets).flatten()[:length])

    def attend(self, q: Tensor, kv: LayerKV, ctx: ForwardContext) -> Tensor:
        out = torch.empty_like(q)
        batched = self._batched
        if batched:
            out[:batched] = self._decode(q[:batched], kv)
        row = batched
        for slots, count in zip(self._slots, ctx.query_lens[batched:], strict=True):
            out[row : row + count] = self._one(q[row : row + count], kv, slots)
            row += count
        return out

    def _decode(self, q: Tensor, kv: LayerKV) -> Tensor:
        """All decodes at once: the query heads of a group are the rows of one product. [B, H, D]."""
        batch, heads, dim = q.shape
        slots = self._decode_slots
        k = kv.k[slots].to(q.dtype).transpose(1, 2)
        v = kv.v[slots].to(q.dtype).transpose(1, 2)
        grouped = q.view(batch, heads // self._group, self._group, dim)
        out = F.scaled_dot_product_attention(
            grouped, k, v, attn_mask=self._decode_mask, scale=self._config.scale
        )
        return out.reshape(batch, heads, dim)

    def _one(self, q: Tensor, kv: LayerKV, slots: Tensor) -> Tensor:
        """One sequence, whose queries are its last tokens. q: [count, H, D]."""
        count, heads, dim = q.shape
        length = slots.shape[0]
        k = kv.k[slots].to(q.dtype).transpose(0, 1)
        v = kv.v[slots].to(q.dtype).transpose(0, 1)
        if count == 1:
            grouped = q.view(heads // self._group, self._group, dim)
            return F.scaled_dot_product_attention(
                grouped[None], k[None], v[None], scale=self._config.scale
            ).view(1, heads, dim)
        k = k.repeat_interleave(self._group, dim=0)
        v = v.repeat_interleave(self._group, dim=0)
        mask = None
        if count != length:
            positions = torch.arange(length - count, length, device=q.device)
            mask = torch.arange(length, device=q.device)[None] <= positions[:, None]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k[None],
            v[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._config.scale,
        )
        return out[0].transpose(0, 1)


def self_check() -> str:
    """Attend over three tokens on the CPU; what was done, for ``pymllm doctor``."""
    config = AttentionConfig(2, 1, 16, 4, 0.25, torch.float32, torch.device("cpu"))
    backend = TorchAttention(config)
    k, v = torch.randn(8, 1, 16), torch.randn(8, 1, 16)
    ctx = ForwardContext(
        positions=torch.arange(3),
        slots=torch.arange(3),
        query_start=torch.tensor([0, 3], dtype=torch.int32),
        kv_lens=torch.tensor([3], dtype=torch.int32),
        page_table=torch.tensor([[0]], dtype=torch.int32),
        num_decodes=0,
        query_lens=[3],
        kv_lens_host=[3],
        page_size=4,
        kv=[LayerKV(k, v)],
        attention=backend,
    )
    backend.plan(ctx)
    q = torch.randn(3, 2, 16)
    out = backend.attend(q, ctx.kv[0], ctx)
    # The first query sees the first token alone.
    if not torch.allclose(out[0], v[0].expand(2, 16), atol=1e-5):
        raise RuntimeError("PyTorch attention gave a wrong result for the first token")
    return "attended over 3 tokens with PyTorch on the CPU"
