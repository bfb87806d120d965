"""The demo's `Qwen3ForCausalLM` and a faster forward pass over its parameters for training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

from pymllm_demo.recipe.stream import TOKENS
from pymllm_demo.recipe.tokenizer import VOCAB_SIZE

ROPE_THETA = 10_000.0


def config(layers: int, end: int, pad: int) -> dict[str, Any]:
    """config.json in the form of Qwen's own; all widths are multiples of 128, for quantisation."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }


def build(settings: dict[str, Any]) -> Qwen3ForCausalLM:
    """A fresh model; what writes to the residual stream starts smaller, as in GPT-2."""
    model = Qwen3ForCausalLM(Qwen3Config(**{**settings, "torch_dtype": "float32"}))
    shrink = 1 / math.sqrt(2 * settings["num_hidden_layers"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(shrink)
    return model


def load(folder: Path) -> Qwen3ForCausalLM:
    """An earlier result, in the precision of training."""
    model: Qwen3ForCausalLM = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def save(model: Qwen3ForCausalLM, settings: dict[str, Any], folder: Path) -> None:
    """Write bf16 weights, config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        model.bfloat16().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # the writer's default hides it from other users
    generation = {
        "do_sample": True,
        "eos_token_id": [settings["eos_token_id"], settings["pad_token_id"]],
        "pad_token_id": settings["pad_token_id"],
        "temperature": 0.3,
        "top_k": 20,
        "top_p": 0.95,
    }
    for name, content in (("config", settings), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (scaled * weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight.to(x.dtype))


Weights = tuple[Tensor, ...]


def _enter(x: Tensor, weights: Weights, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer before its attention, over flat tokens: norm, projections, q/k norm, rotary."""
    norm, wq, wk, wv, q_norm, k_norm = weights
    h = _rms(x, norm)
    heads = (x.shape[0], -1, q_norm.shape[0])
    q = _rotate(_rms(_linear(h, wq).view(heads), q_norm), cos, sin)
    k = _rotate(_rms(_linear(h, wk).view(heads), k_norm), cos, sin)
    v = _linear(h, wv).view(heads)
    groups = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def _leave(x: Tensor, attended: Tensor, weights: Weights) -> Tensor:
    """A layer after its attention: output projection, norm, MLP."""
    wo, norm, gate, up, down = weights
    x = x + _linear(attended, wo)
    h = _rms(x, norm)
    return x + _linear(functional.silu(_linear(h, gate)) * _linear(h, up), down)


def _cross(
    x: Tensor, attended: Tensor, leaving: Weights, entering: Weights, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From one layer's attention to the next one's, as one compiled piece."""
    x = _leave(x, attended, leaving)
    return x, *_enter(x, entering, cos, sin)


def _entering(layer: Any) -> Weights:
    attention = layer.self_attn
    return (
        layer.input_layernorm.weight, attention.q_proj.weight, attention.k_proj.weight,
        attention.v_proj.weight, attention.q_norm.weight, attention.k_norm.weight,
    )  # fmt: skip


def _leaving(layer: Any) -> Weights:
    mlp = layer.mlp
    return (
        layer.self_attn.o_proj.weight, layer.post_attention_layernorm.weight,
        mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
    )  # fmt: skip


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class Trainable:
    """The model's forward pass over flat tokens: only attention sees the shape of the rows.

    All row lengths share one token count, so what is compiled has one shape for all of them.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        dtype: torch.dtype,
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]] = _same,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self._enter = compiler(_enter)
        self._cross = compiler(_cross)
        self._leave = compiler(_leave)
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}

    def _rotary(self, length: int, tokens: int) -> tuple[Tensor, Tensor]:
        if length not in self._angles:
            device = self.model.device
            half = self.model.config.head_dim // 2
            rates = ROPE_THETA ** (-torch.arange(half, device=device) / half)
            angles = torch.outer(torch.arange(length, device=device), rates).repeat(tokens // length, 2)
            self._angles[length] = (
                angles.cos().to(self.dtype).unsqueeze(1),
                angles.sin().to(self.dtype).unsqueeze(1),
            )
        return self._angles[length]

    def hidden(self, ids: Tensor) -> Tensor:
        """Hidden states [tokens, width] of right-padded rows, after the final norm."""
        rows, length = ids.shape
        inner: Any = self.model.model
        cos, sin = self._rotary(length, ids.numel())

        def attend(*flat: Tensor) -> Tensor:
            q, k, v = (part.view(rows, length, *part.shape[1:]).transpose(1, 2) for part in flat)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return mixed.transpose(1, 2).reshape(ids.numel(), -1)

        x = functional.embedding(ids.flatten(), inner.embed_tokens.weight).to(self.dtype)
        mixed = attend(*self._enter(x, _entering(inner.layers[0]), cos, sin))
        for layer, following in pairwise(inner.layers):
            x, *parts = self._cross(x, mixed, _leaving(layer), _entering(following), cos, sin)
            mixed = attend(*parts)
        return _rms(self._leave(x, mixed, _leaving(inner.layers[-1])), inner.norm.weight)

    def loss(self, ids: Tensor, where: Tensor, wanted: Tensor) -> Tensor:
        """Summed cross-entropy at the positions that predict the assistant's tokens."""
        states = self.hidden(ids)[where]
        logits = _linear(states, self.model.model.embed_tokens.weight)
        return functional.cross_entropy(logits.float(), wanted, reduction="sum")


def trainable(model: Qwen3ForCausalLM) -> Trainable:
    """The compiled forward pass on a GPU if the compiler works there, else the plain one."""
    if model.device.type != "cuda":
        return Trainable(model, torch.float32)
    fast = Trainable(model, torch.bfloat16, partial(torch.compile, dynamic=False))
    ids = torch.zeros((TOKENS // 256, 256), dtype=torch.long, device=model.device)
    try:
        fast.loss(ids, ids[0], ids[0]).backward()
    except Exception as error:  # any failure of the compiler costs speed, not the run
        print(f"torch.compile failed, training goes on without it: {error}", flush=True)
        fast = Trainable(model, torch.bfloat16)
    model.zero_grad(set_to_none=True)
    return fast
