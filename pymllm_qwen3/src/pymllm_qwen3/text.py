"""Qwen3, dense: five nodes a decoder layer (Qwen3 technical report, arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pymllm_core.nn.builder import Builder
from pymllm_core.nn.rope import Rotary
from pymllm_core.protocols.attention import ForwardContext
from pymllm_core.protocols.model import ModelShape
from pymllm_qwen3.config import Qwen3Config


class DecoderLayer:
    """norm + qkv, attention, o + residual, norm + gate_up + SwiGLU, down + residual."""

    def __init__(self, config: Qwen3Config, builder: Builder, index: int, rotary: Rotary) -> None:
        prefix = f"model.layers.{index}"
        hidden, eps, dim = config.hidden_size, config.rms_norm_eps, config.head_dim
        q_width, kv_width = config.num_attention_heads * dim, config.num_key_value_heads * dim
        bias = config.attention_bias
        self.input_norm = builder.norm(f"{prefix}.input_layernorm", hidden, eps)
        self.qkv = builder.linear(
            f"{prefix}.self_attn",
            {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width},
            hidden,
            bias=bias,
        )
        self.attention = builder.attention(
            index,
            head_dim=dim,
            rotary=rotary,
            q_norm=builder.norm(f"{prefix}.self_attn.q_norm", dim, eps),
            k_norm=builder.norm(f"{prefix}.self_attn.k_norm", dim, eps),
        )
        self.o = builder.linear(f"{prefix}.self_attn", {"o_proj": hidden}, q_width, bias=bias)
        self.post_norm = builder.norm(f"{prefix}.post_attention_layernorm", hidden, eps)
        self.build_mlp(config, builder, f"{prefix}.mlp")

    def build_mlp(self, config: Qwen3Config, builder: Builder, prefix: str) -> None:
        hidden, width = config.hidden_size, config.intermediate_size
        self.gate_up = builder.linear(prefix, {"gate_proj": width, "up_proj": width}, hidden, act="silu_mul")
        self.down = builder.linear(prefix, {"down_proj": hidden}, width)

    def mlp(self, x: Tensor) -> Tensor:
        """norm, MLP and residual of x [T, hidden]."""
        h = self.gate_up(x, norm=self.post_norm)
        return self.down(h, residual=x)

    def __call__(self, x: Tensor, ctx: ForwardContext, rows: Tensor | None = None) -> Tensor:
        """rows: those of which the result is wanted, None for all."""
        qkv = self.qkv(x, norm=self.input_norm)
        a = self.attention(qkv, ctx)
        if rows is not None:
            a, x = a[rows], x[rows]
            if not len(rows):
                return x  # the keys and values are cached; nobody asks for more
        return self.mlp(self.o(a, residual=x))


class Qwen3ForCausalLM:
    """The `Model` of architecture ``Qwen3ForCausalLM``."""

    config_class: type[Qwen3Config] = Qwen3Config

    @classmethod
    def shape(cls, config: Mapping[str, Any]) -> ModelShape:
        return cls.config_class.read(config).shape()

    @staticmethod
    def layer(config: Any, builder: Builder, index: int, rotary: Rotary) -> DecoderLayer:
        """Build decoder layer `index`."""
        return DecoderLayer(config, builder, index, rotary)

    def __init__(self, config: Mapping[str, Any], builder: Builder) -> None:
        c = self.config_class.read(config)
        self.embed = builder.embedding("model.embed_tokens", c.vocab_size, c.hidden_size)
        rotary = builder.rotary(c.rope, c.head_dim, c.max_position_embeddings)
        self.layers = [self.layer(c, builder, index, rotary) for index in range(c.num_hidden_layers)]
        self.norm = builder.norm("model.norm", c.hidden_size, c.rms_norm_eps)
        self.head = builder.lm_head("lm_head", self.embed, tied=c.tie_word_embeddings)

    def forward(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers[:-1]:
            x = layer(x, ctx)
        return self.layers[-1](x, ctx, ctx.output_rows)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden, norm=self.norm, out_dtype=torch.float32)
