"""The documentation is held to the code: generated pages, links, commands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from pymllm_core.errors import PymllmError
from pymllm_core.hookspecs import HOOKS
from pymllm_core.plugins import registry
from pymllm_core.specs import CommandSpec

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("*/README.md"), *DOCS.rglob("*.md")])


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """docs/generate_reference.py as a module."""
    spec = importlib.util.spec_from_file_location("generate_reference", DOCS / "generate_reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["settings.md", "hooks.md"])
def test_reference_page_is_what_the_code_says(generator: ModuleType, name: str) -> None:
    written = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert written == generator.PAGES[name](), "run `python docs/generate_reference.py`"


def test_every_hook_has_its_section() -> None:
    page = (DOCS / "reference" / "hooks.md").read_text(encoding="utf-8")
    assert not [name for name in HOOKS if f"## `{name}`" not in page]


def test_every_command_is_described() -> None:
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    commands = [found.spec.name for found in registry().all(CommandSpec)]
    assert not [name for name in commands if f"## `pymllm {name}" not in page]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_errors_page_names_every_error() -> None:
    """The tree of errors in the architecture page is complete."""

    def names(error: type[PymllmError]) -> list[str]:
        children = [child for child in error.__subclasses__() if child.__module__ == error.__module__]
        return [error.__name__, *(name for child in children for name in names(child))]

    page = (DOCS / "explanation" / "architecture.md").read_text(encoding="utf-8")
    assert not [name for name in names(PymllmError) if f"`{name}`" not in page]
