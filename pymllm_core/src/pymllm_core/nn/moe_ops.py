"""Definitions of the operations of routed experts in plain torch: what every kernel for them must compute."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm_core.nn.ops import silu_mul


class Route(Protocol):
    """The operation ``moe_route``: from the router's logits to each token's experts and their weights."""

    def __call__(self, logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]: ...


def route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, then the `top_k` most probable, as transformers' Qwen3MoeTopKRouter.

    logits: [T, E] float32. Returns weights [T, top_k] float32 and ids [T, top_k] int64, the most probable first;
    of equally probable experts the one of the lower number. renormalise: the weights of a token sum to 1.
    """
    # torch.topk leaves open which of equal values it takes, and takes others on a CPU than on a GPU.
    probabilities, order = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights, ids = probabilities[:, :top_k], order[:, :top_k]
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids


def moe_experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Σ over a token's experts e of weight · down_e(silu(gate_e x) · up_e x), summed in float32.

    x: [T, H]. weights: [T, k] float32, ids: [T, k]. gate_up: [E, 2 I, H], rows [gate; up]; down: [E, H, I].
    Returns [T, H] in x's dtype. (Shazeer et al., arXiv:1701.06538, with the SwiGLU experts of Mixtral.)
    """
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(gate_up.shape[0]):
        y = F.linear(silu_mul(F.linear(x, gate_up[expert])), down[expert]).float()
        chosen = ids == expert
        weight = torch.where(chosen, weights, 0.0).sum(-1, keepdim=True)
        # Selected, not multiplied by zero: an expert that overflows concerns only those who chose it.
        total += torch.where(chosen.any(-1, keepdim=True), y * weight, 0.0)
    return total.to(x.dtype)
