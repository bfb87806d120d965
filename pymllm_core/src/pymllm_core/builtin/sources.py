"""Where models come from: a folder, the Hugging Face hub, ModelScope, and whatever plugins add."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pymllm_core.errors import CheckpointError, ModelNotFoundError, PluginError
from pymllm_core.plugins import Registry
from pymllm_core.protocols.source import SourceOptions
from pymllm_core.specs import ModelSourceSpec

USE_MODELSCOPE = "PYMLLM_USE_MODELSCOPE"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DEFAULT_REVISION = {"hf": "main", "modelscope": "master"}


def resolve_model(name: str, registry: Registry, options: SourceOptions) -> Path:
    """The folder of model `name`: every registered source is asked, the highest priority first.

    Raises ModelNotFoundError saying what each source answered, CheckpointError for an unusable model.
    """
    if not name.strip():
        raise ModelNotFoundError("the model's name is empty; give a folder or a name such as Qwen/Qwen3-0.6B")
    answers: list[str] = []
    specs = [found.spec for found in registry.all(ModelSourceSpec)]
    for spec in sorted(specs, key=lambda spec: -spec.priority):
        missing = [need for module, need in spec.needs.modules.items() if not _importable(module)]
        if missing:
            answers.append(f"{spec.name}: needs {', '.join(missing)}, which is not installed")
            continue
        try:
            found = spec.load()(name, options)
        except (ModelNotFoundError, PluginError) as error:
            answers.append(f"{spec.name}: {error}")
            continue
        if found is not None:
            return check_folder(Path(found))
        knows = f" (it knows {spec.describes})" if spec.describes else ""
        answers.append(f"{spec.name}: not a name of this source{knows}")
    lines = "\n".join(f"  {answer}" for answer in answers) or "  no plugin provides a model source"
    near = difflib.get_close_matches(name, set(_known_names(options, specs)), n=3, cutoff=0.6)
    hint = f"\nDid you mean {' or '.join(near)}?" if near else ""
    raise ModelNotFoundError(f"there is no model {name!r}:\n{lines}{hint}")


def _importable(module: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _known_names(options: SourceOptions, specs: list[ModelSourceSpec]) -> Iterator[str]:
    """Names that a misspelt one may have meant: named models, folders beside, models downloaded before."""
    yield from (spec.name for spec in specs)
    try:
        yield from (f"./{entry.name}" for entry in Path().iterdir() if (entry / "config.json").is_file())
        for folder in huggingface_cache(options).glob("models--*--*"):
            yield folder.name.removeprefix("models--").replace("--", "/", 1)
    except OSError:
        return


def check_folder(folder: Path) -> Path:
    """The folder again, absolute. Raises CheckpointError where it holds no config.json."""
    if not (folder / "config.json").is_file():
        present = sorted(entry.name for entry in folder.iterdir())[:8]
        shown = ", ".join(present) or "nothing"
        raise CheckpointError(f"{folder} holds no config.json, so it is no model; found there: {shown}")
    return folder.absolute()


def resolve_path(name: str, options: SourceOptions) -> Path | None:
    """A local folder. Names like ORG/NAME are left to the hubs unless such a folder exists here."""
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return check_folder(path)
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, unknown ~user, NUL
        raise ModelNotFoundError(f"{name!r} cannot be a path: {error}") from error
    if exists:
        wanted = "GGUF files are not supported; " if path.suffix == ".gguf" else ""
        raise CheckpointError(f"{path} is a file; {wanted}give the folder that holds config.json")
    if name.startswith(("/", "./", "../", "~", ".\\")):
        parent = path.parent
        siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=3)
        hint = f"; near it are {', '.join(near)}" if near else ""
        where = "" if parent.is_dir() else f" (nor a folder {parent})"
        raise ModelNotFoundError(f"there is no folder {path}{where}{hint}")
    return None


def repository(name: str, prefix: str, *, bare: bool) -> tuple[str, str] | None:
    """(ORG/NAME, revision) of a name for the hub `prefix`, or None where it is not for that hub.

    bare: whether names without a prefix are this hub's. A revision may follow after ``@``.
    """
    explicit = name.startswith(f"{prefix}:")
    if not explicit and (not bare or ":" in name):
        return None
    repo, _, revision = name.removeprefix(f"{prefix}:").partition("@")
    if not _REPOSITORY.fullmatch(repo):
        if explicit:
            raise ModelNotFoundError(f"{name!r} is not of the form {prefix}:ORG/NAME")
        return None
    return repo, revision or _DEFAULT_REVISION[prefix]


def modelscope_is_default() -> bool:
    """Whether names without a prefix go to ModelScope."""
    return os.environ.get(USE_MODELSCOPE, "").strip().lower() in {"1", "true", "yes", "on"}


def resolve_huggingface(name: str, options: SourceOptions) -> Path | None:
    """``hf:ORG/NAME``, or ORG/NAME where PYMLLM_USE_MODELSCOPE is not set; ``@REVISION`` may follow."""
    found = repository(name, "hf", bare=not modelscope_is_default())
    if found is None:
        return None
    from pymllm_core.builtin.huggingface import download

    return check_folder(download(*found, options, huggingface_cache(options)))


def huggingface_cache(options: SourceOptions) -> Path:
    """Where Hugging Face models lie: the download folder, or the hub's cache as its library finds it."""
    if options.download_dir is not None:
        return options.download_dir.expanduser()
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or home).expanduser() / "hub"


def resolve_modelscope(name: str, options: SourceOptions) -> Path | None:
    """``modelscope:ORG/NAME``, or ORG/NAME where PYMLLM_USE_MODELSCOPE=1; ``@REVISION`` may follow."""
    found = repository(name, "modelscope", bare=modelscope_is_default())
    if found is None:
        return None
    from pymllm_core.builtin.modelscope import download

    return check_folder(download(*found, options))
