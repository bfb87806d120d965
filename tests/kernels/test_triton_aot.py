"""Every Triton kernel compiles for the GPUs that it is meant for, within their limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; it has wheels for Linux only")

KERNELS = {
    "matvec_kernel", "few_rows_kernel", "rms_norm_kernel", "silu_mul_kernel", "quantize_rows_kernel",
    "w8a8_matvec_kernel", "w8a8_few_rows_kernel",
    "w8a8_matmul_kernel", "w4a16_few_rows_kernel",
    "w4a16_dequantize_kernel", "w8a16_matvec_kernel", "w8a16_few_rows_kernel", "w8a16_dequantize_kernel",
    "attention_prep_kernel", "decode_kernel", "prefill_kernel", "prepare_and_decode_kernel",
    "best_of_part_kernel", "next_step_kernel", "embedding_kernel",
}  # fmt: skip


@pytest.mark.parametrize("capability", ["8.7", "9.0"])
def test_all_kernels_compile(capability: str, repository: Path) -> None:
    script = repository / "benchmarks" / "triton_resources.py"
    path = (str(script.parent), os.environ.get("PYTHONPATH"))
    # A process of its own: this one has Triton's interpreter. The script itself fails over a limit.
    done = subprocess.run(
        [sys.executable, script, "--models", "0.6B", "--capabilities", capability, "--json"],
        # Its neighbours are modules of its own, also where Python is told not to look beside a script.
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    assert {launch["kernel"] for launch in launches} == KERNELS
    pdl = {launch["constants"].get("PDL", False) for launch in launches}
    assert pdl == ({True, False} if capability == "9.0" else {False})
