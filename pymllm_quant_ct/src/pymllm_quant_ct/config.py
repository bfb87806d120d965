"""Read a compressed-tensors ``quantization_config`` of any version, and refuse what is not supported.

Format: the compressed-tensors package, ``quantization/quant_config.py``, ``quant_scheme.py`` and
``quant_args.py`` of 0.6 to 0.20. Fields are missing in some versions and unknown ones come with new ones, so
nothing but what decides how weights are read and run is looked at. Every refusal names its field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pymllm_core.errors import CheckpointError
from pymllm_quant_ct.presets import preset

ROOT = "quantization_config"
PACKED = "pack-quantized"
PLAIN = ("int-quantized", "naive-quantized")
FORMATS = (PACKED, *PLAIN)
EXTRAS = ("kv_cache_scheme", "sparsity_config", "moe_sparsity_config", "transform_config")
"""What a config may ask for beside its groups."""
FUSED_TRANSFORMS = ("weight_input", "weight_output")


@dataclass(frozen=True, slots=True)
class Weights:
    """How weights are stored. group_size None: one group a row; strategy ``tensor``: one scale for all rows."""

    num_bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    g_idx: bool


@dataclass(frozen=True, slots=True)
class Activations:
    """How 8-bit inputs are quantised: with scales of the checkpoint (static), or found for each row."""

    static: bool
    symmetric: bool


@dataclass(frozen=True, slots=True)
class Group:
    """One entry of ``config_groups``. weights None: what it targets is not quantised."""

    field: str
    targets: tuple[str, ...]
    weights: Weights | None
    activations: Activations | None
    packed: bool


@dataclass(frozen=True, slots=True)
class Config:
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]


def refuse(field: str, found: object, wanted: str) -> NoReturn:
    """Raise the CheckpointError for a field that is not supported."""
    raise CheckpointError(f"{ROOT}.{field} is {found!r}, which is not supported; {wanted}")


def read_config(config: Mapping[str, Any]) -> Config:
    """The whole config. Raises CheckpointError naming the first field that is malformed or not supported."""
    config = unwrap(config)
    status = config.get("quantization_status")
    if status not in (None, "compressed"):
        refuse("quantization_status", status, "only `compressed` checkpoints can be loaded")
    file_format = config.get("format")
    if file_format not in (None, "mixed-precision", *FORMATS):
        refuse("format", file_format, f"supported are {', '.join(FORMATS)} and mixed-precision")
    check_extras(config)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{ROOT}.config_groups is missing, empty or no object")
    version = config.get("version")
    return Config(
        tuple(_group(str(name), group, file_format, version) for name, group in groups.items()),
        _names(config.get("ignore") or [], "ignore"),
    )


def unwrap(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config itself: some versions of transformers wrap it once more."""
    inner = config.get(ROOT)
    return {**config, **inner} if isinstance(inner, Mapping) else config


def check_extras(config: Mapping[str, Any]) -> None:
    """Refuse what changes the meaning of weights beside the groups."""
    if config.get("kv_cache_scheme"):
        refuse("kv_cache_scheme", config["kv_cache_scheme"], "the KV cache is not quantised")
    for name in ("sparsity_config", "moe_sparsity_config"):
        sparsity = config.get(name)
        if not sparsity:
            continue
        found = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
        if found not in (None, "dense"):
            refuse(f"{name}.format", found, "sparse weights are not read")
    transforms = config.get("transform_config")
    if not transforms:
        return
    groups = transforms.get("config_groups") if isinstance(transforms, Mapping) else None
    if not isinstance(groups, Mapping):
        refuse("transform_config", transforms, "it has no config_groups")
    for name, group in groups.items():
        applied = group.get("apply") if isinstance(group, Mapping) else None
        if not isinstance(applied, list):
            refuse(f"transform_config.config_groups.{name}.apply", applied, "it must be a list")
        for index, item in enumerate(applied):
            location = item.get("location") if isinstance(item, Mapping) else item
            if location not in FUSED_TRANSFORMS:
                field = f"transform_config.config_groups.{name}.apply[{index}].location"
                refuse(field, location, "online transforms are not run")


def _names(value: Any, field: str) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{ROOT}.{field} is {value!r}, expected a list of names")
    return tuple(value)


def _group(name: str, group: Any, file_format: str | None, version: Any) -> Group:
    field = f"config_groups.{name}"
    if isinstance(group, list):
        found = preset(name, version)
        if found is None:
            refuse(field, name, "no scheme of that name is implemented")
        group = {"targets": group, **found}
    if not isinstance(group, Mapping):
        raise CheckpointError(f"{ROOT}.{field} is {group!r}, expected an object")
    if "targets" not in group:
        raise CheckpointError(f"{ROOT}.{field}.targets is missing")
    targets = _names(group["targets"], f"{field}.targets")
    if group.get("output_activations"):
        refuse(f"{field}.output_activations", group["output_activations"], "outputs are not quantised")
    stored, inputs = group.get("weights"), group.get("input_activations")
    if not stored:
        if inputs:
            refuse(f"{field}.weights", stored, "activations are quantised only where weights are")
        return Group(field, targets, None, None, packed=False)
    weights = _weights(stored, f"{field}.weights")
    activations = None
    if inputs:
        activations = _activations(inputs, f"{field}.input_activations")
        _check_w8a8(weights, f"{field}.weights")
    group_format = group.get("format")
    if group_format is None and file_format != "mixed-precision":
        group_format = file_format
    if group_format is None:  # what compressed-tensors itself infers
        group_format = PACKED if activations is None else "int-quantized"
    if group_format not in FORMATS:
        refuse(f"{field}.format", group_format, f"supported are {', '.join(FORMATS)}")
    return Group(field, targets, weights, activations, packed=group_format == PACKED)


def _weights(args: Any, field: str) -> Weights:
    bits, symmetric, strategy, size = _args(args, field)
    if bits not in (4, 8):
        refuse(f"{field}.num_bits", bits, "supported are 4 and 8")
    if args.get("dynamic"):
        refuse(f"{field}.dynamic", args["dynamic"], "weights have stored scales")
    if strategy not in ("tensor", "channel", "group"):
        refuse(f"{field}.strategy", strategy, "supported are tensor, channel and group")
    if strategy == "group" and size is None:
        raise CheckpointError(f"{ROOT}.{field}.group_size is missing for strategy 'group'")
    order = args.get("actorder")
    order = order.lower() if isinstance(order, str) else order
    if order not in (None, False, True, "weight", "static", "group", "dynamic"):
        refuse(f"{field}.actorder", order, "supported are weight, static, group and null")
    g_idx = strategy == "group" and order in (True, "group", "dynamic")
    return Weights(bits, symmetric, strategy, size if strategy == "group" else None, g_idx)


def _activations(args: Any, field: str) -> Activations:
    bits, symmetric, strategy, _ = _args(args, field)
    if bits != 8:
        refuse(f"{field}.num_bits", bits, "supported is 8")
    dynamic = args.get("dynamic") or False
    wanted = {True: "token", False: "tensor"}
    if not isinstance(dynamic, bool):
        refuse(f"{field}.dynamic", dynamic, "supported are true and false")
    if strategy != wanted[dynamic]:
        refuse(f"{field}.strategy", strategy, f"with dynamic={dynamic} only {wanted[dynamic]} is supported")
    return Activations(static=not dynamic, symmetric=symmetric)


def _check_w8a8(weights: Weights, field: str) -> None:
    """With 8-bit activations, weights must be such that the product can be made of integers."""
    if weights.num_bits != 8:
        refuse(f"{field}.num_bits", weights.num_bits, "with input_activations only 8 is supported")
    if weights.strategy == "group":
        refuse(f"{field}.strategy", "group", "with input_activations only channel and tensor are supported")
    if not weights.symmetric:
        refuse(f"{field}.symmetric", False, "with input_activations weights must be symmetric")


def _args(args: Any, field: str) -> tuple[int, bool, str, int | None]:
    """num_bits, symmetric, strategy and group_size (None for -1), with the defaults of compressed-tensors."""
    if not isinstance(args, Mapping):
        raise CheckpointError(f"{ROOT}.{field} is {args!r}, expected an object")
    kind = args.get("type", "int")
    if str(kind).lower() != "int":
        refuse(f"{field}.type", kind, "only integer formats are implemented")
    bits = args.get("num_bits", 8)
    symmetric = args.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise CheckpointError(f"{ROOT}.{field}.symmetric is {symmetric!r}, expected true or false")
    size = args.get("group_size")
    if size is not None and (
        isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size > 0)
    ):
        raise CheckpointError(
            f"{ROOT}.{field}.group_size is {size!r}, expected a positive number, -1 or null"
        )
    strategy = args.get("strategy")
    if strategy is None:
        inferred = "tensor" if size is None else "channel" if size == -1 else "group"
        strategy = "token" if args.get("dynamic") is True and inferred == "tensor" else inferred
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise CheckpointError(f"{ROOT}.{field}.num_bits is {bits!r}, expected a number")
    return bits, symmetric, str(strategy).lower(), None if size == -1 else size
