"""Schemes that a config may name instead of spelling them out: ``"config_groups": {"W4A16": ["Linear"]}``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_GROUP_128 = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
_CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_W8A8 = {"weights": _CHANNEL, "input_activations": _TOKEN}

_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "UNQUANTIZED": {},
    "W4A16": {"weights": {"num_bits": 4, **_GROUP_128}},
    "W4A16_ASYM": {"weights": {"num_bits": 4, **_GROUP_128, "symmetric": False}},
    "W8A16": {"weights": {"num_bits": 8, **_GROUP_128}},
    "W8A8": _W8A8,
    "INT8": _W8A8,
}


def preset(name: str, version: object) -> Mapping[str, Any] | None:
    """The group that `name` stands for, None where no such scheme is implemented.

    version: that of compressed-tensors; W8A16 meant one scale a row before 0.18.
    """
    name = name.upper()
    if name == "W8A16" and not _since(version, (0, 18)):
        return {"weights": _CHANNEL}
    return _PRESETS.get(name)


def _since(version: object, wanted: tuple[int, int]) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) >= wanted
