"""Contract of a model source: a name becomes a local folder. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Progress = Callable[[str, int, int], None]
"""Told of a download's progress: what is downloaded, bytes so far, bytes in all (0: not known yet)."""


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How a source may fetch.

    download_dir: where downloads go, None for the hub's own cache. weights False: only config and
    tokenizer files are needed.
    """

    download_dir: Path | None = None
    progress: Progress | None = None
    weights: bool = True


class ModelSource(Protocol):
    """A callable that finds a model by name."""

    def __call__(self, name: str, options: SourceOptions) -> Path | None:
        """The folder of model `name`, fetched if need be; None where the name is not of this source's kind.

        Raises ModelNotFoundError where the name is of its kind but there is no such model (the next
        source is asked), CheckpointError where the model was found and is unusable (nobody else is).
        """
        ...
