"""From settings and a config.json to the model's graph: every choice that concerns a layer.

One function for all who must agree on what serves a layer: the engine, ``pymllm plan`` and
``pymllm lint-checkpoint``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymllm_core.config import Settings
from pymllm_core.device import DeviceInfo
from pymllm_core.engine.choices import (
    Kernels,
    architecture_of,
    choose_context_length,
    choose_quantisation,
    compute_dtype,
    torch_dtype,
)
from pymllm_core.nn.builder import Builder
from pymllm_core.plugins import Registry
from pymllm_core.protocols.model import Model, ModelShape
from pymllm_core.protocols.quant import Stored
from pymllm_core.select import Choice, choose
from pymllm_core.specs import ModelSpec, QuantMethodSpec, Want


@dataclass(frozen=True)
class ModelGraph:
    """A model without weights, and what was chosen for it. dtype: the computation's."""

    dtype: str
    shape: ModelShape
    choice: Choice[ModelSpec]
    quant: Choice[QuantMethodSpec] | None
    kernels: Kernels
    builder: Builder
    model: Model


def choose_model(
    registry: Registry, want: Want, config: Mapping[str, Any], folder: Path
) -> Choice[ModelSpec]:
    """The model of the architecture that config.json names. Raises SelectionError listing those there are."""
    architecture = architecture_of(config, folder)
    return choose(
        registry, ModelSpec, want, what="model architecture", explicit=architecture, asked_by="config.json"
    )


def make_graph(
    settings: Settings,
    registry: Registry,
    device: DeviceInfo,
    folder: Path,
    config: Mapping[str, Any],
    stored: Stored | None,
    *,
    kernels: type[Kernels] = Kernels,
    builder: type[Builder] = Builder,
) -> ModelGraph:
    """Choose dtype, model, quantisation and the kernel of each layer.

    stored: what the checkpoint holds, None where that is not known. kernels, builder: where others than the
    engine's are wanted. Raises CheckpointError, SelectionError or ConfigError.
    """
    dtype = compute_dtype(settings, config, device)
    want = Want(device, dtype)
    choice = choose_model(registry, want, config, folder)
    model_class: type[Model] = choice.spec.load()
    shape = model_class.shape(config)
    context = choose_context_length(settings, shape)
    quant_choice, quant = choose_quantisation(registry, want, settings, config)
    chosen = kernels(registry, device, dtype)
    made = builder(
        dtype=torch_dtype(dtype),
        max_positions=context,
        kernel=chosen,
        quant=quant,
        stored=None if quant is None else stored,
        int8_head=settings.quantization.lm_head == "int8",
    )
    model = model_class(config, made)
    return ModelGraph(dtype, shape, choice, quant_choice, chosen, made, model)
