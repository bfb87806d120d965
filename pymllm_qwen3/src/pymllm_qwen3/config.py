"""The part of a Qwen3 config.json that the model reads, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from pymllm_core.errors import CheckpointError
from pymllm_core.nn.rope import RopeConfig
from pymllm_core.protocols.model import ModelShape

DEFAULT_THETA = 1_000_000.0
ConfigT = TypeVar("ConfigT", bound="Qwen3Config")


class Qwen3Config(BaseModel):
    """Field names are config.json's; sizes in elements. Class defaults are no model's values."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True)

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, multiple_of=2)
    max_position_embeddings: int = Field(gt=0)
    rms_norm_eps: float = Field(1e-6, gt=0)
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    use_sliding_window: bool = False
    rope: RopeConfig

    @classmethod
    def read(cls: type[ConfigT], config: Mapping[str, Any]) -> ConfigT:
        """From config.json. Raises CheckpointError naming each field at fault."""
        # An absent head_dim is 128, as in transformers' Qwen3Config; every published config names it.
        fields = {**config, "head_dim": config.get("head_dim") or 128}
        try:
            read = cls(**{**fields, "rope": RopeConfig.read(config, default_theta=DEFAULT_THETA)})
        except ValidationError as error:
            found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise CheckpointError(f"config.json of a Qwen3 model: {found}") from error
        if read.num_attention_heads % read.num_key_value_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads={read.num_attention_heads} is no multiple of "
                f"num_key_value_heads={read.num_key_value_heads}"
            )
        if read.hidden_act != "silu":
            raise CheckpointError(
                f"config.json: hidden_act={read.hidden_act!r} is not supported; Qwen3 has silu"
            )
        if read.use_sliding_window:
            raise CheckpointError("config.json: use_sliding_window=true is not supported")
        return read

    def shape(self) -> ModelShape:
        # YaRN stretches the trained length; published configs keep the unstretched number beside it.
        scaling = self.rope.scaling
        original = float(scaling.get("original_max_position_embeddings") or 0)
        stretched = original * float(scaling.get("factor") or 1)
        return ModelShape(
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            max_positions=max(self.max_position_embeddings, int(stretched)),
        )


class Qwen3MoeConfig(Qwen3Config):
    """Fields of Qwen3 with routed experts. Layers without them have an MLP of `intermediate_size`.

    transformers 5 writes ``num_local_experts`` for ``num_experts``. Absent fields are what transformers' class
    takes for them.
    """

    num_experts: int = Field(gt=0, validation_alias=AliasChoices("num_experts", "num_local_experts"))
    num_experts_per_tok: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    norm_topk_prob: bool = False
    decoder_sparse_step: int = Field(1, gt=0)
    mlp_only_layers: tuple[NonNegativeInt, ...] = ()

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Qwen3MoeConfig:
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            config = {**config, "head_dim": config.get("head_dim") or hidden // heads}
        read = super().read({**config, "mlp_only_layers": config.get("mlp_only_layers") or ()})
        if read.num_experts_per_tok > read.num_experts:
            raise CheckpointError(
                f"config.json: num_experts_per_tok={read.num_experts_per_tok} is more than "
                f"num_experts={read.num_experts}"
            )
        return read

    def is_routed(self, layer: int) -> bool:
        """Whether decoder layer `layer` has experts (transformers' Qwen3MoeDecoderLayer)."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def shape(self) -> ModelShape:
        # An expert's hidden row of gate and up, their product and the result, for each expert of a token.
        width = self.num_experts_per_tok * (3 * self.moe_intermediate_size + self.hidden_size)
        return dataclasses.replace(super().shape(), routed_width=width)
