"""The linear nodes of few, some and many rows on the CPU: their sources compiled by g++, the hardware emulated."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pymllm_kernels.cuda import few_rows
from pymllm_kernels.cuda.few_rows_library import UNIT, FewRows, Format
from pymllm_kernels.cuda.many_rows_library import ManyRows
from pymllm_kernels.cuda.some_rows_library import SomeRows

HERE = Path(__file__).parent
SOURCES = Path(few_rows.__file__).parent.parent / "csrc" / "cuda"


class Emulation:
    """The libraries of all formats, those of some and of many rows, compiled when they are first asked for."""

    def __init__(self, folder: Path, compiler: str) -> None:
        self._folder, self._compiler = folder, compiler
        self._libraries: dict[str, ctypes.CDLL] = {}

    def library(self, form: Format) -> ctypes.CDLL:
        macros = (f"-DPYMLLM_FORMAT={list(UNIT).index(form.weights)}", f"-DPYMLLM_PARTS={form.parts}")
        return self._compiled(form.name, "few_rows.cu", macros)

    def some_rows(self) -> ctypes.CDLL:
        return self._compiled("some_rows", "some_rows.cu", ())

    def many_rows(self) -> ctypes.CDLL:
        return self._compiled("many_rows", "many_rows.cu", ())

    def _compiled(self, name: str, source: str, macros: tuple[str, ...]) -> ctypes.CDLL:
        if name not in self._libraries:
            target = self._folder / f"{name}.so"
            flags = (
                "-std=c++17",
                "-O1",
                "-ffp-contract=off",
                "-fPIC",
                "-shared",
                "-Wno-unknown-pragmas",
                "-fno-gnu-unique",
                # Loads and stores that are not aligned, which a GPU refuses, end the process.
                "-fsanitize=alignment",
                "-fsanitize-undefined-trap-on-error",
            )
            places = (f"-I{SOURCES}", f"-I{HERE}", "-DPYMLLM_EMULATED")
            command = (
                self._compiler,
                *flags,
                *macros,
                *places,
                "-x",
                "c++",
                str(SOURCES / source),
                "-o",
                str(target),
            )
            subprocess.run(command, check=True)
            self._libraries[name] = library = ctypes.CDLL(str(target))
            library.emulated_allows.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
            library.emulated_arrives.argtypes = [ctypes.c_int, *(ctypes.c_void_p,) * 2, ctypes.c_size_t]
        self._libraries[name].emulated_clear()
        return self._libraries[name]


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulation with")
    return Emulation(tmp_path_factory.mktemp("emulation"), compiler)


@pytest.fixture(scope="module")
def emulated_nodes(emulation: Emulation) -> Iterator[None]:
    """The nodes get the emulation on the CPU, where their other kernels are Triton's."""
    patch = pytest.MonkeyPatch()
    patch.setattr(few_rows, "kernels_for", lambda weight, form: FewRows(emulation.library(form), form))
    patch.setattr(few_rows, "some_kernels_for", lambda weight: SomeRows(emulation.some_rows()))
    patch.setattr(few_rows, "many_kernels_for", lambda weight: ManyRows(emulation.many_rows()))
    patch.setattr(few_rows, "why_not_here", lambda capability, dtype: "emulated")
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield
    patch.undo()
