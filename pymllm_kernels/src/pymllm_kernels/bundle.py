"""Bundles: compiled CUDA libraries for a device that has no compiler, with a manifest.

A bundle is a folder: ``manifest.json`` beside the libraries. It is looked for in the folder that
PYMLLM_KERNELS_BUNDLE names, then in the cache's own folder. The manifest tells a library by what it was made
of (`Recipe.source_key`), so a bundle of other sources is never taken for this one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymllm_kernels import __version__
from pymllm_kernels.recipe import KernelBuildError, Recipe, cache_root, sha256

BUNDLE_ENV = "PYMLLM_KERNELS_BUNDLE"
MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Item:
    """One library of a bundle. key: its recipe's source key. file: relative to the manifest."""

    name: str
    arch: str
    key: str
    file: str
    sha256: str
    size: int


def bundle_folders() -> list[Path]:
    """Where bundles are looked for: folders that hold a manifest.

    Raises KernelBuildError where PYMLLM_KERNELS_BUNDLE names a folder without one.
    """
    named = os.environ.get(BUNDLE_ENV)
    if named and not (Path(named) / MANIFEST).is_file():
        raise KernelBuildError(
            f"{BUNDLE_ENV}={named} names no bundle: there is no {MANIFEST} in it; "
            "make one with `pymllm kernels build --out FOLDER`, and unpack it if it is a tar file"
        )
    folders = [Path(named)] if named else []
    root = cache_root()
    return [*folders, root] if (root / MANIFEST).is_file() else folders


def prebuilt_library(recipe: Recipe) -> Path | None:
    """The recipe's library where a bundle has it, else None.

    Raises KernelBuildError where the bundle's file is missing or damaged: it was meant to be there.
    """
    folders = bundle_folders()
    if not folders:
        return None
    key = recipe.source_key()
    for folder in folders:
        for item in read_manifest(folder):
            if item.name == recipe.name and item.key == key:
                return _checked(folder, item)
    return None


def read_manifest(folder: Path) -> tuple[Item, ...]:
    """The items of a bundle. Raises KernelBuildError where the manifest cannot be read."""
    path = folder / MANIFEST
    return _parse(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _parse(path: Path, _changed: int) -> tuple[Item, ...]:
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise KernelBuildError(
                f"{path} has format {document['format']}, this version reads {FORMAT}; build the bundle anew"
            )
        return tuple(Item(**item) for item in document["kernels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KernelBuildError(
            f"{path} is no manifest of a kernel bundle ({error!r}); build it anew"
        ) from error


@functools.cache
def _checked(folder: Path, item: Item) -> Path:
    path = folder / item.file
    if not path.is_file() or sha256(path) != item.sha256:
        state = "is damaged" if path.is_file() else "is missing"
        raise KernelBuildError(f"{path} of the kernel bundle {state}; copy the bundle again")
    return path.resolve()


def write_bundle(target: Path, built: Iterable[tuple[Recipe, Path]]) -> Path:
    """Write libraries as a bundle: a folder, or a tar file where `target` ends in .tar or .tar.gz.

    A folder must be new or a bundle, whose items are kept where nothing replaces them.
    """
    if target.name.endswith((".tar", ".tar.gz")):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "kernels"
            _write_folder(folder, built)
            target.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(target, "w:gz" if target.name.endswith(".gz") else "w") as archive:
                archive.add(folder, arcname=".")
        return target
    _write_folder(target, built)
    return target


def _write_folder(folder: Path, built: Iterable[tuple[Recipe, Path]]) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise KernelBuildError(f"{folder} is neither empty nor a bundle; name another folder with --out")
    items = {(i.name, i.key): i for i in read_manifest(folder)} if (folder / MANIFEST).is_file() else {}
    for recipe, library in built:
        key = recipe.source_key()
        file = f"{recipe.name}/{key}/{library.name}"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, folder / file)
        items[recipe.name, key] = Item(
            recipe.name, recipe.arch, key, file, sha256(folder / file), library.stat().st_size
        )
    document: dict[str, Any] = {
        "format": FORMAT,
        "pymllm_kernels": __version__,
        "machine": platform.machine(),
        "kernels": [dataclasses.asdict(item) for item in items.values()],
    }
    (folder / MANIFEST).write_text(json.dumps(document, indent=2) + "\n")
