"""A small model for tests of the engine: Llama's graph, under an architecture that nobody else claims.

It shows what a model plugin needs, and has an outside reference: transformers' `LlamaForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pymllm_core.errors import CheckpointError
from pymllm_core.hookspecs import hookimpl
from pymllm_core.nn.builder import Builder
from pymllm_core.nn.rope import RopeConfig
from pymllm_core.protocols.attention import ForwardContext
from pymllm_core.protocols.model import ModelShape
from pymllm_core.specs import ModelSpec

ARCHITECTURE = "ToyForCausalLM"
CONTRACT = "1.0"


@hookimpl
def pymllm_models() -> list[ModelSpec]:
    return [ModelSpec(name=ARCHITECTURE, implementation="pymllm_core.testing.toy:ToyModel")]


class _Layer:
    def __init__(self, config: Mapping[str, Any], builder: Builder, index: int, rotary: Any) -> None:
        shape = ToyModel.shape(config)
        prefix, eps = f"model.layers.{index}", float(config["rms_norm_eps"])
        hidden, width = shape.hidden_size, int(config["intermediate_size"])
        q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        attention_bias = bool(config.get("attention_bias"))
        mlp_bias = bool(config.get("mlp_bias"))
        self.input_norm = builder.norm(f"{prefix}.input_layernorm", hidden, eps)
        self.qkv = builder.linear(
            f"{prefix}.self_attn", {"q_proj": q, "k_proj": kv, "v_proj": kv}, hidden, bias=attention_bias
        )
        self.attention = builder.attention(index, head_dim=shape.head_dim, rotary=rotary)
        self.o = builder.linear(f"{prefix}.self_attn", {"o_proj": hidden}, q, bias=attention_bias)
        self.post_norm = builder.norm(f"{prefix}.post_attention_layernorm", hidden, eps)
        self.gate_up = builder.linear(
            f"{prefix}.mlp", {"gate_proj": width, "up_proj": width}, hidden, bias=mlp_bias, act="silu_mul"
        )
        self.down = builder.linear(f"{prefix}.mlp", {"down_proj": hidden}, width, bias=mlp_bias)

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = self.o(self.attention(self.qkv(x, norm=self.input_norm), ctx), residual=x)
        return self.down(self.gate_up(x, norm=self.post_norm), residual=x)


class ToyModel:
    """The `Model` of ``ToyForCausalLM``; config.json has the fields of Llama."""

    @classmethod
    def shape(cls, config: Mapping[str, Any]) -> ModelShape:
        try:
            heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
            return ModelShape(
                num_layers=int(config["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(config["num_key_value_heads"]),
                head_dim=int(config.get("head_dim") or hidden // heads),
                hidden_size=hidden,
                vocab_size=int(config["vocab_size"]),
                max_positions=int(config["max_position_embeddings"]),
            )
        except KeyError as error:
            raise CheckpointError(f"config.json lacks the field {error}") from error

    def __init__(self, config: Mapping[str, Any], builder: Builder) -> None:
        shape = self.shape(config)
        self.embed = builder.embedding("model.embed_tokens", shape.vocab_size, shape.hidden_size)
        rope = RopeConfig.read(config, default_theta=10_000.0)
        rotary = builder.rotary(rope, shape.head_dim, shape.max_positions)
        self.layers = [_Layer(config, builder, index, rotary) for index in range(shape.num_layers)]
        self.norm = builder.norm("model.norm", shape.hidden_size, float(config["rms_norm_eps"]))
        self.head = builder.lm_head("lm_head", self.embed, tied=bool(config.get("tie_word_embeddings")))

    def forward(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
        x: Tensor = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, ctx)
        return x if ctx.output_rows is None else x[ctx.output_rows]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden, norm=self.norm, out_dtype=torch.float32)
