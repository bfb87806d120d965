"""The compile cache: reuse, repair, concurrent builds and error messages."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cpu_support import needs_cpu_kernels

from pymllm_kernels.cpu_library import default_compiler
from pymllm_kernels.jit import build_library, checksum_file, load_library
from pymllm_kernels.recipe import CACHE_ENV, KernelBuildError, Recipe, Toolchain, cache_root, sha256

pytestmark = pytest.mark.skipif(
    shutil.which(default_compiler()) is None, reason=f"no C++ compiler {default_compiler()!r}"
)

FLAGS = ("-shared", "-fPIC")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    path = tmp_path / "src" / "answer.cpp"
    path.parent.mkdir()
    path.write_text('#include "value.h"\nextern "C" int answer() { return VALUE; }\n')
    path.with_name("value.h").write_text("#define VALUE 42\n")
    return path


def recipe(
    source: Path,
    flags: tuple[str, ...] = FLAGS,
    compiler: str | None = None,
    identity: tuple[str, ...] = (),
    arch: str = "here",
) -> Recipe:
    tools = Toolchain(compiler or default_compiler(), (), identity)
    return Recipe("answer", (source,), flags, lambda: tools, arch)


def build(source: Path) -> Path:
    return build_library(recipe(source))


def answer(library: Path) -> int:
    # In a process of its own: a second CDLL of a replaced file would return the old one.
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())"
    return int(subprocess.check_output([sys.executable, "-c", code]))


def test_second_build_is_a_hit(source: Path) -> None:
    library = build(source)
    stamp = library.stat().st_mtime_ns
    assert answer(library) == 42
    assert build(source) == library
    assert library.stat().st_mtime_ns == stamp


def test_headers_and_flags_are_part_of_the_key(source: Path) -> None:
    library = build(source)
    source.with_name("value.h").write_text("#define VALUE 43\n")
    changed = build(source)
    assert changed != library
    assert answer(changed) == 43
    assert build_library(recipe(source, (*FLAGS, "-O1"))) != changed


def test_versions_of_other_headers_and_the_target_are_part_of_the_key(source: Path) -> None:
    paths = {
        build(source),
        build_library(recipe(source, identity=("CUTLASS 4.5",))),
        build_library(recipe(source, arch="sm_87")),
    }
    assert len(paths) == 3


def test_forced_build_compiles_again(source: Path) -> None:
    library = build(source)
    stamp = library.stat().st_mtime_ns
    assert build_library(recipe(source), anew=True) == library
    assert library.stat().st_mtime_ns != stamp


@pytest.mark.parametrize("damage", ["delete", "truncate", "no_checksum", "flip"])
def test_damaged_entry_is_rebuilt(source: Path, damage: str) -> None:
    library = build(source)
    data = library.read_bytes()
    if damage == "delete":
        shutil.rmtree(library.parent)
    elif damage == "truncate":
        library.write_bytes(data[: len(data) // 2])
    elif damage == "no_checksum":
        library.with_name(library.name + ".sha256").unlink()
    else:
        library.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert build(source) == library
    assert answer(library) == 42


def test_entry_that_does_not_load_is_rebuilt(source: Path) -> None:
    library = build(source)
    library.write_bytes(b"not a library")
    checksum_file(library).write_text(sha256(library))
    loaded = load_library(recipe(source))
    assert isinstance(loaded, ctypes.CDLL)
    assert loaded.answer() == 42


def test_two_processes_at_once(source: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "slow-compiler"
    log = tmp_path / "runs"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || {{ echo run >> {log}; sleep 1; }}\n'
        f'exec {default_compiler()} "$@"\n'
    )
    compiler.chmod(0o755)
    code = (
        "from pathlib import Path; from pymllm_kernels.jit import build_library;"
        "from pymllm_kernels.recipe import Recipe, Toolchain;"
        f"tools = Toolchain({str(compiler)!r});"
        f"print(build_library(Recipe('answer', (Path({str(source)!r}),), {FLAGS!r}, lambda: tools, 'here')))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in started}
    assert all(process.returncode == 0 for process in started)
    assert len(paths) == 1
    assert answer(Path(paths.pop())) == 42
    assert log.read_text().split() == ["run"]


def test_missing_compiler_says_what_to_install(source: Path) -> None:
    with pytest.raises(KernelBuildError, match=r"no compiler 'absent-c\+\+'.*apt install g\+\+"):
        build_library(recipe(source, compiler="absent-c++"))


def test_compiler_errors_are_shown(source: Path) -> None:
    source.write_text("int broken( {\n")
    with pytest.raises(KernelBuildError, match=r"(?s)failed.*error:.*command:"):
        build(source)
    leftovers = [p for p in (cache_root() / "answer").iterdir() if p.suffix != ".lock"]
    assert leftovers == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_cache_names_the_variable(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    monkeypatch.setenv(CACHE_ENV, str(closed))
    with pytest.raises(KernelBuildError, match=CACHE_ENV):
        build(source)


@needs_cpu_kernels
def test_only_one_openmp_runtime_is_mapped() -> None:
    code = "from pymllm_kernels.cpu import self_check; self_check(); print(open('/proc/self/maps').read())"
    maps = subprocess.check_output([sys.executable, "-c", code], text=True)
    runtimes = set(re.findall(r"/\S*lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", maps))
    assert len(runtimes) == 1, runtimes
