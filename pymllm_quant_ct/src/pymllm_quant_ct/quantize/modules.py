"""Which tensors of a checkpoint are weights to be quantised, decided by names and shapes alone.

No model is built, so any architecture can be quantised: a floating matrix ``NAME.weight`` belongs to a linear
unless NAME says that it is an embedding.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pymllm_core.engine.checkpoint import Checkpoint
from pymllm_core.errors import CheckpointError, ConfigError
from pymllm_quant_ct.config import read_config
from pymllm_quant_ct.match import REGEX, Matcher

WEIGHT = ".weight"
FLOATS = ("BF16", "F16", "F32")
DEFAULT_IGNORE = ("lm_head", r"re:.*\.mlp\.gate$", r"re:.*\.shared_expert_gate$", r"re:.*visual\.")
"""The head, on which every token depends; routers, small and decisive; the visual tower, whose sizes often do not
divide into groups. llm-compressor's recipes leave out the same."""

_EMBEDDING = re.compile(r"(?:^|\.)[^.]*embed[^.]*$|(?:^|\.)w[tp]e$")
_FUSED = (
    (re.compile(r"\.experts\.\d+\..*$"), ".experts"),
    (re.compile(r"\.[qkv]_proj$"), ".qkv_proj"),
    (re.compile(r"\.(?:gate|up)_proj$"), ".gate_up_proj"),
)
"""Linears that engines compute as one."""


@dataclass(frozen=True, slots=True)
class Selection:
    """modules: names of the linears to be quantised; ignore: what the written config names; left: linears left."""

    modules: tuple[str, ...]
    ignore: tuple[str, ...]
    left: tuple[str, ...]


def check_plain(config: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError where a config.json says that its model is quantised already."""
    for place in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            found = place.get(key) if isinstance(place, Mapping) else None
            if found:
                method = found.get("quant_method", "?") if isinstance(found, Mapping) else found
                raise CheckpointError(
                    f"{name} is quantised already ({key}.quant_method is {method!r}); give the model that it "
                    "was made of, in bfloat16, float16 or float32"
                )


def select(checkpoint: Checkpoint, ignore: tuple[str, ...], group: int | None) -> Selection:
    """Divide the linears of a checkpoint into those to be quantised and those left as they are.

    ignore: names or ``re:`` expressions beside the default ones. Raises ConfigError or CheckpointError where
    an entry matches nothing, only some parts of a fused linear are ignored, a group does not divide the columns,
    or nothing is left to be quantised.
    """
    shapes, dtypes = checkpoint.shapes, checkpoint.dtypes
    linears = [
        name.removesuffix(WEIGHT)
        for name, shape in shapes.items()
        if name.endswith(WEIGHT) and len(shape) == 2 and not _EMBEDDING.search(name.removesuffix(WEIGHT))
    ]
    _check_ignore(ignore, linears)
    used = [pattern for pattern in DEFAULT_IGNORE if pattern == "lm_head" or _matching(pattern, linears)]
    patterns = tuple(dict.fromkeys([*used, *ignore]))
    matcher = _matcher(patterns)
    modules = [name for name in linears if matcher.group(name, "Linear") is not None]
    left = [name for name in linears if name not in set(modules)]
    if not modules:
        raise CheckpointError(
            f"{checkpoint.folder} has no weight to quantise: of its {len(linears)} linears "
            f"{len(left)} are ignored ({', '.join(patterns)})"
        )
    _check_experts(shapes)
    _check_dtypes(modules, dtypes)
    _check_fused(linears, set(modules))
    _check_groups(modules, shapes, group)
    return Selection(tuple(modules), patterns, tuple(left))


def _matcher(patterns: tuple[str, ...]) -> Matcher:
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 8}}
    return Matcher(read_config({"config_groups": {"group_0": scheme}, "ignore": list(patterns)}))


def _matching(pattern: str, linears: list[str]) -> list[str]:
    matcher = _matcher((pattern,))
    return [name for name in linears if matcher.group(name, "Linear") is None]


def _check_ignore(ignore: tuple[str, ...], linears: list[str]) -> None:
    for pattern in ignore:
        if pattern in DEFAULT_IGNORE or _matching(pattern, linears):
            continue
        ends = [name for name in linears if name.endswith(f".{pattern}")]
        near = difflib.get_close_matches(pattern, linears, n=1)
        if ends:
            hint = f"{len(ends)} end so: --ignore 're:.*{re.escape(pattern)}$'"
        elif near and not pattern.startswith(REGEX):
            hint = f"did you mean {near[0]}?"
        else:
            hint = "give a whole name, or re: and an expression that matches from its start"
            hint += f"; the first is {linears[0]}" if linears else ""
        raise ConfigError(f"--ignore {pattern} matches none of the {len(linears)} linears; {hint}")


def _check_experts(shapes: Mapping[str, tuple[int, ...]]) -> None:
    fused = [name for name, shape in shapes.items() if len(shape) == 3 and ".experts." in f"{name}."]
    if fused:
        raise CheckpointError(
            f"{fused[0]} holds all experts of a layer in one tensor, for which compressed-tensors has no form; "
            "give a checkpoint that stores each expert's projections"
        )


def _check_dtypes(modules: list[str], dtypes: Mapping[str, str]) -> None:
    for name in modules:
        found = dtypes[f"{name}{WEIGHT}"]
        if found not in FLOATS:
            raise CheckpointError(
                f"tensor {name}{WEIGHT} is of type {found}, expected {' or '.join(FLOATS)}; is it quantised already?"
            )


def _check_fused(linears: list[str], modules: set[str]) -> None:
    fused: dict[str, list[str]] = defaultdict(list)
    for name in linears:
        for pattern, replacement in _FUSED:
            key, count = pattern.subn(replacement, name)
            if count:
                fused[key].append(name)
                break
    for names in fused.values():
        kept = [name for name in names if name not in modules]
        if 0 < len(kept) < len(names):
            other = next(name for name in names if name in modules)
            raise ConfigError(
                f"--ignore leaves out {kept[0]}, but not {other}; engines compute them as one and need one format: "
                "ignore both or neither"
            )


def _check_groups(modules: list[str], shapes: Mapping[str, tuple[int, ...]], group: int | None) -> None:
    if group is None:
        return
    wrong = [name for name in modules if shapes[f"{name}{WEIGHT}"][1] % group]
    if not wrong:
        return
    columns = shapes[f"{wrong[0]}{WEIGHT}"][1]
    fitting = [size for size in (64, 32) if not any(shapes[f"{name}{WEIGHT}"][1] % size for name in wrong)]
    size = fitting[0] if fitting else -1
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    raise ConfigError(
        f"groups of {group} do not divide the {columns} columns of {wrong[0]}{more}; "
        f"use --group-size {size}, or leave it as it is with --ignore {wrong[0]}"
    )
