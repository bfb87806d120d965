"""Kernels of few rows ask for their weights before they wait for the kernel before: in what ptxas has made of them.

The order in the source is not enough: ptxas had moved loads of the read-only path behind the wait, where half of what
programmatic dependent launch gives was lost without a wrong result.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pymllm_kernels.cuda import many_rows_library, some_rows_library
from pymllm_kernels.cuda.few_rows_library import Format, recipe
from pymllm_kernels.recipe import KernelBuildError, Recipe

ASKED = os.environ.get("PYMLLM_CUDA_BUILD", "")
WAIT, LOAD, COPY, TILE = "ACQBULK", "LDG.E", "LDGSTS.E", "UTMALDG"


@pytest.fixture(scope="module")
def nvdisasm() -> str:
    beside = [str(Path(compiler).parent) for compiler in (os.environ.get("CUDACXX"),) if compiler]
    found = shutil.which("nvdisasm", path=os.pathsep.join([*beside, os.environ.get("PATH", "")]))
    if found is None:
        (pytest.fail if ASKED else pytest.skip)("`nox -s cuda-build` brings nvdisasm, which is missing here")
    return found


def before_the_wait(made: Recipe, load: str, nvdisasm: str, folder: Path) -> dict[str, int]:
    """Instructions named `load...` that a kernel has before it waits, by kernel."""
    try:
        tools = made.toolchain()
    except KernelBuildError as error:
        (pytest.fail if ASKED else pytest.skip)(f"`nox -s cuda-build` brings what is missing here: {error}")
    flags = [flag for flag in made.flags if not flag.startswith(("--shared", "--cudart", "-Xcompiler"))]
    code = folder / "library.cubin"
    command = [tools.compiler, *tools.search, *flags, "-cubin", *map(str, made.sources), "-o", str(code)]
    subprocess.run(command, check=True, capture_output=True)
    text = subprocess.run([nvdisasm, "-c", code], check=True, capture_output=True, text=True).stdout
    found = {}
    for section in re.split(r"\n\.text\.", text)[1:]:
        instructions = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", section)
        if WAIT in instructions:
            before = instructions[: instructions.index(WAIT)]
            found[section.split(":")[0]] = sum(name.startswith(load) for name in before)
    return found


@pytest.mark.parametrize(
    "form", [Format("bfloat16"), Format("int8"), Format("int4")], ids=lambda form: form.name
)
def test_weights_are_asked_for_before_the_wait(form: Format, nvdisasm: str, tmp_path: Path) -> None:
    found = before_the_wait(recipe(form, (9, 0)), LOAD, nvdisasm, tmp_path)
    products = {name: count for name, count in found.items() if "prepare" not in name}
    assert len(products) == {"bfloat16": 18, "int8": 23, "int4": 18}[form.weights]
    for name, before in products.items():
        if one_row := re.search(r"one_row_kernelILi(\d)ELb([01])ELi(\d+)E", name):
            rows, gated, ahead = map(int, one_row.groups())
            expected = rows * (1 + gated) * ahead
        else:
            # At least two units of a tile's two halves, whatever the kernel's number of units on their way.
            expected = 2 if form.weights == "int4" else 4
        assert before >= expected, f"{name} starts {before} loads before it waits, not {expected}"


def test_some_rows_ask_for_weights_before_the_wait(nvdisasm: str, tmp_path: Path) -> None:
    """All copies of a warp's rows of a chunk, in a loop over the chunks."""
    found = before_the_wait(some_rows_library.recipe((9, 0)), COPY, nvdisasm, tmp_path)
    assert len(found) == 16
    for name, before in found.items():
        values = re.search(r"some_rows_kernelILi\dELb([01])ELb[01]ELi(\d+)E", name)
        assert values is not None, name
        gated, block_k = map(int, values.groups())
        expected = 16 * (1 + gated) * block_k // 8 // 32
        assert before >= expected, f"{name} starts {before} copies before it waits, not {expected}"


def test_many_rows_ask_for_weights_before_the_wait(nvdisasm: str, tmp_path: Path) -> None:
    """Tiles of W, in a loop; where gated, of gate and of up."""
    found = before_the_wait(many_rows_library.recipe((9, 0)), TILE, nvdisasm, tmp_path)
    assert len(found) == 20
    for name, before in found.items():
        values = re.search(r"many_rows_kernelILi\d+ELi\dELb([01])E", name)
        assert values is not None, name
        assert before >= 1 + int(values[1]), f"{name} asks for {before} tiles before it waits"
