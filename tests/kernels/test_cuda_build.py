"""Every CUDA source compiles for every device that it is meant for, within its limits. Nothing is run.

Where nvcc and the CUTLASS headers are found, the fastest tile to compile of each source is; with
PYMLLM_CUDA_BUILD=all every tile is, for every device, which takes some minutes. With the variable set to anything,
a missing compiler is a failure: `nox -s cuda-build` sets it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pymllm_kernels.cuda.decode_library import DIMS
from pymllm_kernels.cuda.few_rows_library import FORMATS
from pymllm_kernels.cuda.library import toolchain
from pymllm_kernels.cutlass.tiles import tiles_for
from pymllm_kernels.cutlass.toolchain import cutlass_toolchain
from pymllm_kernels.recipe import KernelBuildError

ASKED = os.environ.get("PYMLLM_CUDA_BUILD", "")
CAPABILITIES = ("8.0", "8.7", "8.9", "9.0")
SMALLEST = ("8.7 64x128x128-32x64-3", "9.0 64x64x256-1x1-pingpong")

FEW_ROWS = ("8.0:int8", "8.7:int4", "8.9:bfloat16", "9.0:int4_g32")
"""Each format of weights and each device once: five seconds each."""


@pytest.fixture(scope="module")
def compiler() -> None:
    try:
        cutlass_toolchain()
    except KernelBuildError as error:
        (pytest.fail if ASKED else pytest.skip)(f"`nox -s cuda-build` brings what is missing here: {error}")


@pytest.fixture(scope="module")
def nvcc() -> None:
    try:
        toolchain()
    except KernelBuildError as error:
        (pytest.fail if ASKED else pytest.skip)(f"`nox -s cuda-build` brings what is missing here: {error}")


def compiled(repository: Path, folder: Path, *arguments: str) -> list[dict[str, object]]:
    """The rows of benchmarks/cuda_resources.py, which itself ends with an error over a limit."""
    rows = folder / "rows.jsonl"
    script = repository / "benchmarks" / "cuda_resources.py"
    done = subprocess.run(
        [sys.executable, script, "--rows", rows, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in rows.read_text().splitlines()[1:]]


@pytest.mark.usefixtures("compiler")
def test_each_source_compiles(repository: Path, tmp_path: Path) -> None:
    rows = compiled(repository, tmp_path, "--tiles", *(text.replace(" ", ":") for text in SMALLEST))
    assert [f"{row['capability']} {row['tile']}" for row in rows] == list(SMALLEST)


@pytest.mark.skipif(ASKED != "all", reason="takes minutes: PYMLLM_CUDA_BUILD=all asks for it")
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_tile_compiles(repository: Path, tmp_path: Path, capability: str) -> None:
    rows = compiled(repository, tmp_path, "--capabilities", capability)
    tiles = tiles_for((int(capability[0]), int(capability[2])))
    assert [row["tile"] for row in rows] == [tile.name for tile, _ in tiles]


@pytest.mark.usefixtures("nvcc")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_decode_attention_compiles(repository: Path, tmp_path: Path, capability: str) -> None:
    rows = compiled(repository, tmp_path, "--kernels", "decode_attention", "--capabilities", capability)
    assert {str(row["tile"]).split(",")[0] for row in rows} == set(map(str, DIMS))
    written = (repository / "docs" / "reference" / "cuda-kernels.md").read_text()
    for row in rows:
        assert f"| {capability} | `decode_attention` | {row['tile']} |" in written


@pytest.mark.usefixtures("nvcc")
def test_few_rows_compile(repository: Path, tmp_path: Path) -> None:
    rows = compiled(repository, tmp_path, "--kernels", "few_rows", "--tiles", *FEW_ROWS)
    assert [f"{row['capability']}:{row['tile']}" for row in rows] == list(FEW_ROWS)


@pytest.mark.skipif(ASKED != "all", reason="takes minutes: PYMLLM_CUDA_BUILD=all asks for it")
@pytest.mark.usefixtures("nvcc")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_few_rows_of_every_format_compile(repository: Path, tmp_path: Path, capability: str) -> None:
    rows = compiled(repository, tmp_path, "--kernels", "few_rows", "--capabilities", capability)
    assert [row["tile"] for row in rows] == [form.name for form in FORMATS]


@pytest.mark.usefixtures("nvcc")
@pytest.mark.parametrize("capability", CAPABILITIES if ASKED == "all" else CAPABILITIES[-1:])
def test_some_rows_compile(repository: Path, tmp_path: Path, capability: str) -> None:
    """Twenty seconds each."""
    (row,) = compiled(repository, tmp_path, "--kernels", "some_rows", "--capabilities", capability)
    assert (row["capability"], row["tile"], row["kernels"]) == (capability, "bfloat16", 16)
    assert row["spill_stores"] == row["spill_loads"] == 0


@pytest.mark.usefixtures("nvcc")
def test_many_rows_compile(repository: Path, tmp_path: Path) -> None:
    """For Hopper, whose instructions they are."""
    (row,) = compiled(repository, tmp_path, "--kernels", "many_rows", "--capabilities", "8.7,9.0")
    assert (row["capability"], row["tile"], row["kernels"]) == ("9.0", "bfloat16", 20)
    assert row["spill_stores"] == row["spill_loads"] == 0


def test_written_table_has_every_format(repository: Path) -> None:
    text = (repository / "docs" / "reference" / "cuda-kernels.md").read_text()
    cells = [line.split(" | ") for line in text.splitlines() if "| `few_rows` |" in line]
    wanted = [(capability, form.name) for capability in CAPABILITIES for form in FORMATS]
    assert [(device[2:], tile.split(",")[0]) for device, _, tile, *_ in cells] == wanted


def test_written_table_is_of_these_tiles(repository: Path) -> None:
    """Every device's tiles have a line in the reference; the numbers are those of its compiler."""
    text = (repository / "docs" / "reference" / "cuda-kernels.md").read_text()
    lines = [line.split(" | ")[:3] for line in text.splitlines() if "`int8_gemm`" in line]
    wanted = [
        [f"| {capability}", "`int8_gemm`", tile.name]
        for capability in CAPABILITIES
        for tile, _ in tiles_for((int(capability[0]), int(capability[2])))
    ]
    assert lines == wanted
