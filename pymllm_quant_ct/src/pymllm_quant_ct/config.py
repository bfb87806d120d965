"""Read a compressed-tensors ``quantization_config`` as far as needed to say what it asks for.

Format: the compressed-tensors package, ``compressed_tensors/quantization/quant_config.py``. This version
executes no quantised scheme yet: every config is refused by name, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from pymllm_core.errors import CheckpointError


def describe(config: Mapping[str, Any]) -> str:
    """One line on what the config's groups hold, e.g. ``pack-quantized: group_0 W4A16 group_size 128``.

    Raises CheckpointError naming a field that is malformed.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("quantization_config.config_groups is missing or empty")
    return f"{config.get('format') or 'no format'}: " + ", ".join(
        f"{name} {_group(name, group)}" for name, group in groups.items()
    )


def _group(name: str, group: Any) -> str:
    if isinstance(group, list):
        return f"preset for {', '.join(map(str, group))}"
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"quantization_config.config_groups.{name}.weights is missing or no object")
    activations = group.get("input_activations") or {}
    if not isinstance(activations, Mapping):
        raise CheckpointError(f"quantization_config.config_groups.{name}.input_activations is no object")
    scheme = f"W{weights.get('num_bits')}A{activations.get('num_bits') or 16}"
    size = weights.get("group_size")
    return scheme if size in (None, -1) else f"{scheme} group_size {size}"


def quant_method(config: Mapping[str, Any]) -> NoReturn:
    """The `QuantMethodFactory`. Raises CheckpointError saying what was found and what to do instead."""
    raise CheckpointError(
        f"the checkpoint is quantised by compressed-tensors ({describe(config)}), which this version of "
        "pymllm-quant-ct reads but does not execute; serve the unquantised checkpoint, or a newer version"
    )
