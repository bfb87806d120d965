"""Bundles, several compilations at once, and the commands over both, with small C++ sources for CUDA's."""

from __future__ import annotations

import json
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from pymllm_core.errors import ConfigError
from pymllm_kernels import bundle, catalogue, commands, parallel
from pymllm_kernels.bundle import BUNDLE_ENV, prebuilt_library, write_bundle
from pymllm_kernels.cpu_library import default_compiler
from pymllm_kernels.jit import build_library, find_library, load_library
from pymllm_kernels.recipe import CACHE_ENV, KernelBuildError, Recipe, Toolchain, cache_root

pytestmark = pytest.mark.skipif(
    shutil.which(default_compiler()) is None, reason=f"no C++ compiler {default_compiler()!r}"
)


def no_compiler() -> Toolchain:
    raise KernelBuildError("no CUDA compiler found")


def recipe(folder: Path, name: str, value: int = 1, *, compiler: bool = True) -> Recipe:
    source = folder / f"{name}.cpp"
    source.write_text(f'extern "C" int {name}() {{ return {value}; }}\n')
    tools = (lambda: Toolchain(default_compiler())) if compiler else no_compiler
    return Recipe(name, (source,), ("-shared", "-fPIC"), tools, "sm_87", memory=1 << 20)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.delenv(BUNDLE_ENV, raising=False)
    folder = tmp_path / "sources"
    folder.mkdir()
    return folder


@pytest.fixture
def packed(sources: Path, tmp_path: Path) -> Path:
    """A bundle of two libraries; the cache that they were built in is gone."""
    made = [recipe(sources, "one"), recipe(sources, "two", 2)]
    folder = write_bundle(tmp_path / "bundle", [(item, build_library(item)) for item in made])
    shutil.rmtree(cache_root())
    return folder


def test_bundled_library_needs_no_compiler(
    sources: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(sources, "two", 2, compiler=False)
    assert find_library(wanted) is None
    monkeypatch.setenv(BUNDLE_ENV, str(packed))
    library = build_library(wanted)
    assert packed in library.parents
    assert catalogue.state_of(wanted).word == "bundled"


def test_bundle_unpacked_into_the_cache_folder_is_found(sources: Path, packed: Path) -> None:
    shutil.copytree(packed, cache_root())
    assert build_library(recipe(sources, "one", compiler=False)).is_relative_to(cache_root())


def test_bundle_of_other_sources_is_not_taken(
    sources: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BUNDLE_ENV, str(packed))
    changed = recipe(sources, "two", 3, compiler=False)
    assert prebuilt_library(changed) is None
    with pytest.raises(KernelBuildError, match="no CUDA compiler"):
        build_library(changed)
    state = catalogue.state_of(changed)
    assert state.word == "missing"
    assert state.note.startswith("no bundle has it and no CUDA compiler")


@pytest.mark.parametrize(("damage", "word"), [("delete", "missing"), ("flip", "damaged")])
def test_damaged_bundle_is_named(
    sources: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, damage: str, word: str
) -> None:
    monkeypatch.setenv(BUNDLE_ENV, str(packed))
    library = next(packed.rglob("libone.so"))
    if damage == "delete":
        library.unlink()
    else:
        library.write_bytes(library.read_bytes()[:-1] + b"x")
    with pytest.raises(KernelBuildError, match=rf"libone\.so.*is {word}; copy the bundle again"):
        build_library(recipe(sources, "one", compiler=False))
    assert catalogue.state_of(recipe(sources, "one", compiler=False)).word == "broken"


def test_bundled_library_that_does_not_load_says_so(
    sources: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = packed / "text"
    file.write_text("no library")
    write_bundle(packed, [(recipe(sources, "one"), file)])
    monkeypatch.setenv(BUNDLE_ENV, str(packed))
    with pytest.raises(
        KernelBuildError, match=r"does not load \(.*cannot be compiled anew: no CUDA compiler"
    ):
        load_library(recipe(sources, "one", compiler=False))


def test_wrong_bundle_folder_is_an_error(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BUNDLE_ENV, str(tmp_path))
    with pytest.raises(KernelBuildError, match=r"names no bundle: there is no manifest\.json"):
        build_library(recipe(sources, "one"))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 2, "kernels": []}', '{"format": 1, "kernels": [{}]}']
)
def test_unreadable_manifest_is_an_error(packed: Path, text: str) -> None:
    (packed / bundle.MANIFEST).write_text(text)
    with pytest.raises(KernelBuildError, match=r"build it anew|build the bundle anew"):
        bundle.read_manifest(packed)


def test_bundle_is_added_to_and_never_written_over_other_files(
    sources: Path, packed: Path, tmp_path: Path
) -> None:
    more = recipe(sources, "three", 3)
    write_bundle(packed, [(more, build_library(more))])
    assert {item.name for item in bundle.read_manifest(packed)} == {"one", "two", "three"}
    other = tmp_path / "home"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(KernelBuildError, match="neither empty nor a bundle"):
        write_bundle(other, [(more, build_library(more))])


# ---- several at once ----


def test_jobs_are_bounded_by_memory_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    for available, expected in ((8, 1), (9, 2), (1, 1), (100, 12)):
        monkeypatch.setattr(parallel, "memory_info", lambda free=available: (0, free << 30))
        assert parallel.job_limit(4 << 30) == expected


def test_missing_ones_are_compiled_together_and_no_more_than_allowed(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, guard = 0, 0, threading.Lock()
    together = threading.Barrier(2, timeout=60)

    def watched(item: Recipe, *, anew: bool = False) -> Path:
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        together.wait()  # passes only if two run at once
        path = build_library(item, anew=anew)
        with guard:
            running -= 1
        return path

    monkeypatch.setattr(parallel, "build_library", watched)
    wanted = [recipe(sources, name) for name in ("a", "b", "c", "d", "e")]
    first = build_library(wanted[2])
    done: list[str] = []
    paths = parallel.build_all(wanted, jobs=2, done=lambda item, _: done.append(item.name))
    assert most == 2
    assert paths[2] == first
    assert [path.stem for path in paths] == ["liba", "libb", "libc", "libd", "libe"]
    assert sorted(done) == ["a", "b", "d", "e"]
    assert parallel.build_all(wanted) == paths  # nothing is compiled: the barrier would not pass


def test_failure_is_raised_and_nothing_is_started_after_it(sources: Path) -> None:
    wanted = [recipe(sources, name) for name in ("a", "b", "c")]
    wanted[0].sources[0].write_text("int broken( {\n")
    with pytest.raises(KernelBuildError, match=r"failed.* on the a kernels"):
        parallel.build_all(wanted, jobs=1)
    assert find_library(wanted[2]) is None


# ---- commands ----

Run = Callable[..., Result]


@pytest.fixture
def run(sources: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls ``pymllm kernels`` where each device has two libraries of C++."""

    def recipes(capability: tuple[int, int], dtypes: Iterable[torch.dtype]) -> list[Recipe]:
        return [recipe(sources, f"gemm{capability[0]}{capability[1]}_{str(t)[6:]}") for t in dtypes]

    monkeypatch.setattr(catalogue, "cutlass_recipes", recipes)
    for name in ("decode_recipes", "few_rows_recipes", "some_rows_recipes", "many_rows_recipes"):
        monkeypatch.setattr(catalogue, name, lambda capability, dtypes: [])
    monkeypatch.setattr(catalogue, "this_capability", lambda: None)
    monkeypatch.setattr(catalogue, "REQUIRED_CPU_FLAGS", frozenset({"a feature that no CPU has"}))

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(commands.command, arguments, catch_exceptions=False)

    return call


def test_build_and_list(run: Run, tmp_path: Path) -> None:
    before = json.loads(run("list", "--json", "--arch", "8.7").output)
    assert [(row["name"], row["state"]) for row in before] == [
        ("gemm87_bfloat16", "missing"),
        ("gemm87_float16", "missing"),
    ]
    built = run("build", "--arch", "8.7,9.0", "--dtype", "bfloat16")
    assert built.exit_code == 0
    assert "compiled gemm87_bfloat16" in built.output
    assert "2 libraries are ready" in built.output
    after = json.loads(run("list", "--json", "--arch", "8.7").output)
    assert [row["state"] for row in after] == ["built", "missing"]
    assert after[0]["bytes"] == Path(after[0]["path"]).stat().st_size
    Path(after[0]["path"]).write_bytes(b"")
    table = run("list", "--arch", "8.7").output
    assert "broken: it is compiled anew at its next use" in table
    assert "missing: it is compiled at its first use" in table


def test_bundle_as_a_tar_file(
    run: Run, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "orin.tar.gz"
    output = run("build", "--arch", "8.7", "--dtype", "float16", "--out", str(file)).output
    assert f"bundle: {file}" in output
    assert "export PYMLLM_KERNELS_BUNDLE=kernels" in output
    target = tmp_path / "kernels"
    with tarfile.open(file) as archive:
        archive.extractall(target, filter="data")
    shutil.rmtree(cache_root())
    monkeypatch.setenv(BUNDLE_ENV, str(target))
    assert json.loads(run("list", "--json", "--arch", "8.7").output)[1]["state"] == "bundled"
    assert build_library(recipe(sources, "gemm87_float16", compiler=False)).is_relative_to(target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "--arch", "7.5"), "--arch 7.5 was asked for.*8.0, 8.6, 8.7, 8.9, 9.0 only"),
        (("build", "--out", "x"), "--out was given, but torch sees no GPU.*--arch 8.7"),
        (("build",), "nothing to build for this machine"),
    ],
)
def test_what_cannot_be_built_says_why(run: Run, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*arguments)
