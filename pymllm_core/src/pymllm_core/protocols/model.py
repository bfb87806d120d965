"""Contract of a model: plain data about its shape, a graph of nodes, a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from pymllm_core.protocols.attention import ForwardContext

if TYPE_CHECKING:
    from pymllm_core.nn.builder import Builder


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the engine must know before the model exists.

    max_positions: the longest sequence that the positions allow. routed_width: numbers that a layer of routed
    experts holds for one token at a time, over all of its experts; 0 where there are none.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    routed_width: int = 0


class Model(Protocol):
    """A causal language model. Building it declares its weights and allocates none of them."""

    @classmethod
    def shape(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read config.json. Raises CheckpointError naming a field that is missing or not supported."""
        ...

    def __init__(self, config: Mapping[str, Any], builder: Builder) -> None: ...

    def forward(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """[T] int64 token ids to [R, hidden_size], before the final norm.

        R are the rows `ctx.output_rows` in their order, all T where it is None. Most of a prompt's rows serve
        only the cache: the last layer need not finish them.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden_size] rows of `forward` to [R, vocab_size] float32."""
        ...
