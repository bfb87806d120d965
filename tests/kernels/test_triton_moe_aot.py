"""The kernels of routed experts compile for every generation, within its shared memory and without spilling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; it has wheels for Linux only")

SMALLEST_SHARED = 99 << 10  # of capability 8.6 and 8.9
KERNELS = {
    "route_kernel",
    "expert_rows_kernel",
    "few_gate_up_kernel",
    "few_down_kernel",
    "grouped_kernel",
    "quantise_rows_kernel",
    "grouped_int8_kernel",
    "combine_kernel",
}


@pytest.mark.parametrize(("capability", "sms"), [(80, 108), (87, 16), (90, 132)])
def test_kernels_compile(capability: int, sms: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("moe_aot.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability), str(sms)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    assert {launch["kernel"] for launch in launches} == KERNELS
    for launch in launches:
        assert launch["shared"] <= SMALLEST_SHARED, launch
        # A few bytes of one address cost nothing beside the weights.
        assert launch["spills"] <= 32, launch
