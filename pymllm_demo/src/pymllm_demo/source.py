"""Turns the names of the demo models into folders of this package."""

from __future__ import annotations

from pathlib import Path

_FOLDERS = {"demo": "model", "demo-w4a16": "model-w4a16", "demo-w8a8": "model-w8a8"}


def resolve(name: str, options: object) -> Path | None:
    """The folder of a demo model; None for any other name, which another source may know."""
    folder = _FOLDERS.get(name)
    return None if folder is None else Path(__file__).parent / folder
