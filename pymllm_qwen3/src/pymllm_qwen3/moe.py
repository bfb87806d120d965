"""Qwen3 with routed experts, e.g. Qwen3-30B-A3B (Qwen3 technical report, arXiv:2505.09388, section 2)."""

from __future__ import annotations

from torch import Tensor

from pymllm_core.nn.builder import Builder
from pymllm_core.nn.rope import Rotary
from pymllm_qwen3.config import Qwen3Config, Qwen3MoeConfig
from pymllm_qwen3.text import DecoderLayer, Qwen3ForCausalLM


class RoutedLayer(DecoderLayer):
    """A decoder layer whose MLP is norm + router + experts + residual: four nodes instead of five."""

    def build_mlp(self, config: Qwen3Config, builder: Builder, prefix: str) -> None:
        assert isinstance(config, Qwen3MoeConfig)
        self.moe = builder.moe(
            prefix,
            hidden_size=config.hidden_size,
            width=config.moe_intermediate_size,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            renormalise=config.norm_topk_prob,
        )

    def mlp(self, x: Tensor) -> Tensor:
        return self.moe(x, norm=self.post_norm, residual=x)


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """The `Model` of architecture ``Qwen3MoeForCausalLM``."""

    config_class = Qwen3MoeConfig

    @staticmethod
    def layer(config: Qwen3MoeConfig, builder: Builder, index: int, rotary: Rotary) -> DecoderLayer:
        kind = RoutedLayer if config.is_routed(index) else DecoderLayer
        return kind(config, builder, index, rotary)
