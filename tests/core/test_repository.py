"""The packages move in lockstep, and each holds what a package must hold."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in REPOSITORY.glob("*/pyproject.toml"))
EXPECTED = {
    "pymllm", "pymllm_core", "pymllm_demo", "pymllm_kernels", "pymllm_quant_ct", "pymllm_qwen3",
    "pymllm_server",
}  # fmt: skip
MODULES_OF = {
    "fastapi": {"fastapi", "starlette"},
    "flashinfer-python": {"flashinfer"},
    "pydantic": {"pydantic", "pydantic_core"},
    "pyyaml": {"yaml"},
}
"""What distributions import as, where it is not their name, and what they promise along."""

each_package = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def project(folder: Path) -> dict[str, Any]:
    """The [project] table of a package."""
    found: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return found


def requirements(folder: Path) -> list[str]:
    """Dependencies of a package, those of its extras included."""
    table = project(folder)
    extras = table.get("optional-dependencies", {}).values()
    return [*table.get("dependencies", ()), *(need for extra in extras for need in extra)]


def name_of(requirement: str) -> str:
    """The distribution that a requirement names."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def test_all_packages_are_here() -> None:
    assert {folder.name for folder in FOLDERS} == EXPECTED


def test_versions_are_one() -> None:
    versions = {folder.name: project(folder)["version"] for folder in FOLDERS}
    assert len(set(versions.values())) == 1, versions


@each_package
def test_requirements_among_the_packages_are_pinned_to_that_version(folder: Path) -> None:
    table = project(folder)
    ours = [need for need in requirements(folder) if name_of(need).startswith("pymllm")]
    wrong = [need for need in ours if not need.endswith(f"=={table['version']}")]
    assert not wrong
    assert folder.name == "pymllm_core" or ours, "every package but the core needs the core"


@each_package
def test_package_metadata(folder: Path) -> None:
    table = project(folder)
    assert table["name"] == folder.name.replace("_", "-")
    assert table["requires-python"] == ">=3.10"
    assert table["license"] == "Apache-2.0"
    assert table["readme"] == "README.md"
    assert "Typing :: Typed" in table["classifiers"]
    assert table["description"]


@each_package
def test_package_holds_readme_licence_and_type_marker(folder: Path) -> None:
    assert (folder / "README.md").read_text().startswith(f"# {folder.name.replace('_', '-')}\n")
    assert (folder / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()
    assert (folder / "src" / folder.name / "py.typed").is_file()


@each_package
def test_every_import_is_declared(folder: Path) -> None:
    """What the sources import is the standard library's, the package's own, or declared by it."""
    allowed = set(sys.stdlib_module_names) | {folder.name, "tomllib"}
    for name in map(name_of, requirements(folder)):
        allowed |= MODULES_OF.get(name, {name.replace("-", "_")})
    undeclared: dict[str, str] = {}
    for path in (folder / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                if top not in allowed:
                    undeclared[top] = str(path.relative_to(REPOSITORY))
    assert not undeclared


def test_changelog_names_the_version() -> None:
    version = project(FOLDERS[0])["version"]
    changelog = (REPOSITORY / "CHANGELOG.md").read_text()
    assert f"## [{version}]" in changelog or "## [Unreleased]" in changelog
