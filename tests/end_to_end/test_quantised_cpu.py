"""Quantised tiny models by the CPU kernels of pymllm-kernels, against the references of tests/quant_ct."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pymllm_core.config import Settings
from pymllm_core.device import cpu_flags
from pymllm_core.engine.build import assemble
from pymllm_core.testing.engines import registry_of

sys.path.insert(0, str(Path(__file__).parents[1] / "quant_ct"))
import test_models as models
from ct_files import write

pytestmark = pytest.mark.skipif(
    not {"avx512_bf16", "avx512_vnni"} <= cpu_flags(), reason="the kernels need AVX512-BF16 and AVX512-VNNI"
)

PLUGINS = (*models.PLUGINS, "pymllm_kernels.plugin")
CASES = {f"weight only, {name}": (*case, models.BFLOAT16) for name, case in models.WEIGHT_ONLY.items()}
# Of the norm of all logits. Activations in bfloat16 round to other codes than those in float64: 0.027 to 0.049
# were measured, and the same with torch's operators.
CASES |= {f"w8a8, {name}": (*case, 0.08) for name, case in models.W8A8.items()}


def chosen(folder: Path) -> dict[str, set[str]]:
    """Operations and the names of the kernels that serve them."""
    plan = assemble(Settings.of(str(folder), device="cpu", dtype="bfloat16"), registry_of(*PLUGINS)).plan
    kernels: dict[str, set[str]] = {}
    for label, choice in plan.kernels.items():
        kernels.setdefault(label.split()[0], set()).add(choice.spec.name)
    return kernels


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, fields, bound = CASES[case]
    expected = models.expect(write(tmp_path, groups, **fields), groups, tmp_path)
    for operation, names in chosen(tmp_path).items():
        assert all(name.startswith("cpu-avx512") for name in names), (operation, names)
    monkeypatch.setattr(models, "PLUGINS", PLUGINS)
    found = models.compute(tmp_path, dtype="bfloat16")
    error = float((found - expected).norm() / expected.norm())
    assert error < bound, error
