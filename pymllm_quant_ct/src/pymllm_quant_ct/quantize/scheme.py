"""What is asked for (`Request`), as the compressed-tensors package describes it.

The package writes the configuration and packs the weights, so that what comes out is its format.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pymllm_core.errors import ConfigError, PluginError

REQUIREMENT = "pymllm-quant-ct[quantize]"
OLDEST = (0, 19)
SCHEMES = ("W4A16", "W8A16", "W8A8")
GROUP_SIZES = (32, 64, 128, -1)
DEFAULT_GROUP_SIZE = 128

# What the package says of itself is no news to whoever quantises; set before it is first imported.
os.environ.setdefault("COMPRESSED_TENSORS_LOG_DISABLED", "true")


@dataclass(frozen=True, slots=True)
class Request:
    """What the weights shall become.

    scheme: one of SCHEMES. group_size: weights of a row that share a scale, -1 for the whole row; None is
    128, and the whole row for W8A8. symmetric False: with zero points. observer: how a group's range is
    found (`rounding`).
    """

    scheme: str
    group_size: int | None = None
    symmetric: bool = True
    observer: str = "minmax"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ConfigError(f"--scheme: found {self.scheme!r}, allowed: {', '.join(SCHEMES)}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            allowed = ", ".join(map(str, GROUP_SIZES))
            raise ConfigError(
                f"--group-size: found {self.group_size}, allowed: {allowed} (-1: the whole row)"
            )
        if self.scheme == "W8A8":
            # Sums of products of integers are scaled once a row and column: see `w8a8`.
            if self.group_size not in (None, -1):
                raise ConfigError(
                    f"--group-size {self.group_size} cannot be had with --scheme W8A8, whose weights have one scale "
                    "a row; leave it out, or take W8A16"
                )
            if not self.symmetric:
                raise ConfigError(
                    "--asymmetric cannot be had with --scheme W8A8, whose weights are symmetric; leave it out, "
                    "or take W8A16"
                )

    @property
    def bits(self) -> int:
        return 4 if self.scheme == "W4A16" else 8

    @property
    def group(self) -> int | None:
        """Columns that share a scale; None where all columns of a row do."""
        size = self.group_size or (-1 if self.scheme == "W8A8" else DEFAULT_GROUP_SIZE)
        return None if size == -1 else size

    def scheme_of_package(self) -> Any:
        """The package's QuantizationScheme for all linears, its format with it."""
        check_package()
        with _quietly():
            from compressed_tensors.compressors.format import infer_module_format
            from compressed_tensors.quantization import QuantizationScheme
        import torch

        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group else "channel",
            "observer": self.observer,
        }
        if self.group:
            weights["group_size"] = self.group
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        scheme = QuantizationScheme(
            targets=["Linear"], weights=weights, input_activations=inputs if self.scheme == "W8A8" else None
        )
        scheme.format = infer_module_format(torch.nn.Linear, scheme)
        return scheme


def quantization_config(scheme: Any, ignore: tuple[str, ...]) -> Mapping[str, Any]:
    """``quantization_config`` of config.json, with the fields that the package's own writer adds to it.

    Those are in `compressed_tensors.compressors.ModelCompressor.update_config`, which wants a whole model.
    """
    with _quietly():
        from compressed_tensors.quantization import QuantizationConfig

    found = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=list(ignore),
        format=scheme.format.value,
        quantization_status="compressed",
    )
    return {
        **found.model_dump(mode="json"),
        "version": importlib.metadata.version("compressed-tensors"),
        "sparsity_config": {},
        "transform_config": {},
    }


def check_package() -> None:
    """Raise PluginError where the installed compressed-tensors is missing or older than what is called here."""
    try:
        version = importlib.metadata.version("compressed-tensors")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise PluginError(
            f"quantize needs compressed-tensors {wanted} or newer, found {version}: pip install '{REQUIREMENT}'"
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Importing the package warns of its own dependencies' deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
