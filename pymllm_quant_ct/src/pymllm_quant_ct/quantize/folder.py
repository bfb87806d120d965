"""The folder that is written: whether it may be, how it appears at once, and what is copied into it."""

from __future__ import annotations

import fnmatch
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pymllm_core.errors import ConfigError

COPIED = ("*.json", "*.txt", "*.jinja", "*.tiktoken", "*.model", "tokenization*.py", "LICENSE*", "NOTICE*")
"""What a model's folder holds beside its weights: configurations, tokenizer, template, licence."""
NOT_COPIED = ("config.json", "*.safetensors.index.json", "*.bin.index.json")


def check_out(model: Path, out: Path, size: int, overwrite: bool) -> None:
    """Raise ConfigError where `out` may not or cannot be written."""
    target, source = out.resolve(), model.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise ConfigError(f"{out} and the model's folder {model} lie in each other; give another OUT")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give the folder that shall hold the quantised model")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise ConfigError(f"{out} exists; give another OUT, or --overwrite to replace it")
        if not (out / "config.json").is_file():
            raise ConfigError(f"{out} is no model's folder (it holds no config.json), so it is not replaced")
    partial = _partial(out)
    if partial.exists() and not overwrite:
        raise ConfigError(
            f"{partial} is what a run left that is still at work or was killed; "
            "remove it, or give --overwrite"
        )
    above = next(folder for folder in target.parents if folder.is_dir())
    free = shutil.disk_usage(above).free
    if free < size:
        raise ConfigError(
            f"{above} has {free / 1e9:.1f} GB free, and the quantised model takes {size / 1e9:.1f} GB"
        )


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


@contextmanager
def appearing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, or is removed where something fails."""
    out = out.absolute()
    partial = _partial(out)
    if overwrite:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"the folder {partial} cannot be made: {error}") from error
    try:
        yield partial
        _replace(out, partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(f"{out} cannot be written: {error}") from error
        raise


def _replace(out: Path, partial: Path) -> None:
    if not out.is_dir():
        partial.rename(out)
        return
    # The old folder goes by its name at once, so that no half of it is ever taken for a model.
    aside = Path(tempfile.mkdtemp(prefix=f"{out.name}.replaced-", dir=out.parent))
    out.rename(aside / "old")
    try:
        partial.rename(out)
    except OSError:
        (aside / "old").rename(out)
        raise
    finally:
        shutil.rmtree(aside)


def copy_files(model: Path, folder: Path) -> None:
    """Copy what is neither weights nor written anew; links into a hub's cache become files."""
    for path in sorted(model.iterdir()):
        wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in COPIED)
        if wanted and path.is_file() and not any(fnmatch.fnmatch(path.name, no) for no in NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
