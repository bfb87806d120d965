"""The quantisation method: from a config and what is stored to the scheme of each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from pymllm_core.protocols.quant import LinearLayer, LinearScheme, Stored
from pymllm_quant_ct.config import Group, read_config, refuse
from pymllm_quant_ct.match import Matcher
from pymllm_quant_ct.storage import Storage
from pymllm_quant_ct.w8a8 import Int8Scheme
from pymllm_quant_ct.wna16 import WeightOnlyScheme


class CompressedTensors:
    """The `QuantMethod` of a checkpoint; see `pymllm_core.protocols.quant`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._matcher = Matcher(read_config(config))

    def fuses(self, layer: LinearLayer, stored: Stored | None) -> bool:
        groups = [self._group(part.name, layer.module, stored) for part in layer.parts]
        if len(groups) == 1:
            return True
        if any(group is not None and group.weights is not None and group.weights.g_idx for group in groups):
            return False  # each part may have an order of columns of its own
        return all(_same(groups[0], group) for group in groups)

    def linear(self, layer: LinearLayer, dtype: torch.dtype, stored: Stored | None) -> LinearScheme | None:
        group = self._group(layer.parts[0].name, layer.module, stored)
        if group is None:
            return None
        if group.activations is None:
            return WeightOnlyScheme(Storage(layer, group, dtype, stored), dtype)
        if layer.module == "Embedding":
            name = layer.parts[0].name
            refuse(
                f"{group.field}.input_activations", "set", f"{name} is an embedding, whose inputs are tokens"
            )
        return Int8Scheme(Storage(layer, group, dtype, stored), group.activations)

    def _group(self, name: str, module: str, stored: Stored | None) -> Group | None:
        """The group by which the module is quantised; None where it is not.

        A targeted module that is stored as a plain weight without scales was not quantised, whatever the
        config says: ignored names move between versions of transformers. Where nothing is stored yet, a router
        of experts is taken for not quantised, as in all published checkpoints.
        """
        if stored is None and module == "Router":
            return None
        group = self._matcher.group(name, module)
        if group is None or group.weights is None:
            return None
        if stored is not None and f"{name}.weight" in stored and f"{name}.weight_scale" not in stored:
            return None
        return group


def _same(one: Group | None, other: Group | None) -> bool:
    """Whether two parts are stored alike, by whichever group."""
    if one is None or other is None:
        return one is other
    return dataclasses.replace(one, field="", targets=()) == dataclasses.replace(other, field="", targets=())
