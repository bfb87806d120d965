"""What the CUDA kernels for linears ask for: shapes, and every library that they load."""

from __future__ import annotations

from pathlib import Path

import pytest

from pymllm_core.device import DeviceInfo
from pymllm_core.specs import Want
from pymllm_kernels.bundle import BUNDLE_ENV, write_bundle
from pymllm_kernels.cuda import few_rows_library, library, many_rows_library, needs, some_rows_library
from pymllm_kernels.cuda.few_rows_library import Format
from pymllm_kernels.plugin import pymllm_kernels
from pymllm_kernels.recipe import CACHE_ENV, KernelBuildError, Recipe

HOPPER = (9, 0)
DEVICE = DeviceInfo("cuda", "a GPU", 1 << 34, 1 << 34, capability=HOPPER)
LINEAR = next(spec.needs for spec in pymllm_kernels() if (spec.operation, spec.name) == ("linear", "cuda"))

ONE, SOME = few_rows_library.recipe(Format("bfloat16"), HOPPER), some_rows_library.recipe(HOPPER)
MANY = many_rows_library.recipe(HOPPER)
INT8, INT4 = (
    few_rows_library.recipe(Format("int8"), HOPPER),
    few_rows_library.recipe(Format("int4", 2), HOPPER),
)


@pytest.fixture(autouse=True)
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor anything that one has made."""

    def missing() -> Path:
        raise KernelBuildError("no CUDA compiler found")

    monkeypatch.setattr(library, "find_nvcc", missing)
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    needs._why_missing.cache_clear()


def bundle(folder: Path, monkeypatch: pytest.MonkeyPatch, *recipes: Recipe) -> None:
    file = folder / "library"
    file.write_bytes(b"one of CUDA")
    monkeypatch.setenv(BUNDLE_ENV, str(write_bundle(folder / "bundle", [(item, file) for item in recipes])))


def want(k: int = 1024) -> Want:
    return Want(DEVICE, "bfloat16", {"K": k, "N": 64, "group_size": 64})


@pytest.mark.parametrize(
    ("there", "lacks"), [((ONE, MANY), SOME), ((SOME,), ONE), ((ONE, SOME), MANY), ((INT8, INT4), ONE)]
)
def test_linear_needs_all_of_its_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[Recipe, ...], lacks: Recipe
) -> None:
    bundle(tmp_path, monkeypatch, *there)
    reason = needs.why_not_linear(want())
    assert reason == f"no bundle holds {lacks.name}, and it cannot be compiled: no CUDA compiler found"


def test_a_bundle_serves_without_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle(tmp_path, monkeypatch, ONE, SOME, MANY)
    assert needs.why_not_linear(want()) is None
    assert str(needs.why_not_w8a8(want())).startswith(f"no bundle holds {INT8.name}, ")
    assert str(needs.why_not_w4a16(want())).startswith(f"no bundle holds {INT4.name}, ")
    needs._why_missing.cache_clear()
    bundle(tmp_path, monkeypatch, INT8, INT4)
    assert needs.why_not_w8a8(want()) is None
    assert needs.why_not_w4a16(want()) is None


@pytest.mark.parametrize(
    ("k", "reason"), [(8, None), (1000, None), (32768, None), (12, "multiple of 8"), (32776, "32768")]
)
def test_columns_of_linear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int, reason: str | None
) -> None:
    """By the spec that is registered, which asks for the libraries last."""
    bundle(tmp_path, monkeypatch, ONE, SOME, MANY)
    found = LINEAR.reason(want(k))
    assert found is None if reason is None else reason in str(found)
