"""Triton's hash of its compiler begins when the kernels are made for a GPU, and not when modules are imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed; it has wheels for Linux only")

SCRIPT = """
import importlib, pkgutil, sys, threading
from pymllm_core.builtin import plugin as builtin
from pymllm_core.device import DeviceInfo
from pymllm_core.engine.choices import Kernels
from pymllm_core.nn import ops
from pymllm_core.plugins import build_registry, module_candidate
from pymllm_kernels import cuda, cutlass, plugin, triton
from triton.runtime.cache import triton_key

for package in (triton, cuda, cutlass):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
assert "pymllm_kernels.triton.launch" in sys.modules
print([thread.name for thread in threading.enumerate()], triton_key.cache_info().currsize)

registry = build_registry([module_candidate(builtin, "builtin"), module_candidate(plugin, "kernels")])
device = DeviceInfo("cuda", "a GPU", 1 << 34, 1 << 34, capability=(9, 0))
started, start = [], threading.Thread.start
threading.Thread.start = lambda thread: (started.append(thread), start(thread))
for _ in range(2):  # two engines in one process
    Kernels(registry, device, "bfloat16")(ops.ATTENTION_PREP, {"head_dim": 128})
print([(thread.name, thread.daemon) for thread in started])
for thread in started:
    thread.join()
print(triton_key.cache_info().currsize)
"""


def test_the_hash_begins_with_the_kernels_and_once() -> None:
    """In a process of its own, where nothing of Triton's has been imported yet."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['MainThread'] 0", "[('pymllm-triton-key', True)]", "1"]
