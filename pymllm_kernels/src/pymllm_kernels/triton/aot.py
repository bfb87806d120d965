"""Compiling kernels for a GPU that is not there: what every launch of a call would need of it.

    with recorded(capability=(8, 7), sms=16) as launches:
        TritonLinear().apply(x, packed)      # tensors on the device ``meta``: nothing is computed

Each launch is compiled with Triton and the ptxas that comes with it, not run.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from pymllm_kernels.triton.launch import LEAST_SHARED, SHARED, Gpu, pretend

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One launch. shared: bytes a block; registers: a thread; spills: bytes a thread, stores and loads."""

    kernel: str
    grid: tuple[int, ...]
    warps: int
    shared: int
    registers: int
    spills: int
    constants: dict[str, Any]
    ptx: str


@contextmanager
def recorded(*, capability: tuple[int, int], sms: int) -> Iterator[list[Compiled]]:
    """Compile every launch inside for the capability, on a GPU of `sms` multiprocessors, and run none.

    Raises what Triton or ptxas raise for a kernel that does not compile.
    """
    launches: list[Compiled] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        launches.append(_compile(kernel, args, kwargs, grid, capability))

    before = JITFunction.run
    JITFunction.run = run
    try:
        shared = SHARED.get(capability, LEAST_SHARED)
        with pretend(Gpu(sms, capability[0], shared, pdl=capability >= (9, 0))):
            yield launches
    finally:
        JITFunction.run = before


def _compile(kernel: Any, args: Any, kwargs: Any, grid: Any, capability: tuple[int, int]) -> Compiled:
    names = kernel.arg_names
    options = {name: value for name, value in kwargs.items() if name not in names}
    values = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    general = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            # torch allocates at multiples of 512 bytes; a view that starts elsewhere is compiled again.
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in constant or value is None or _is_one(name, value, general):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and name not in general:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options=options)
    registers, spills = _ptxas(compiled.asm["ptx"])
    return Compiled(
        kernel.__name__,
        tuple(grid),
        compiled.metadata.num_warps,
        compiled.metadata.shared,
        registers,
        spills,
        {name: value for name, value in constants.items() if name.isupper()},
        compiled.asm["ptx"],
    )


def _is_one(name: str, value: Any, general: set[str]) -> bool:
    """Whether Triton compiles the argument 1 in."""
    return isinstance(value, int) and value == 1 and name not in general


@functools.cache
def _ptxas(ptx: str) -> tuple[int, int]:
    """Registers a thread and bytes that it spills, as ``ptxas -v`` says."""
    match = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert match is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={match[1]}", str(path)]
        done = subprocess.run(
            [*command, "-o", str(path.with_suffix(".cubin"))], check=True, capture_output=True, text=True
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert registers is not None, done.stderr
    return int(registers[1]), sum(map(int, spills))
