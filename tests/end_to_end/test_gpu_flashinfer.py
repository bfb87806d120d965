"""On a CUDA device, with FlashInfer's attention: the same answers as on the CPU, in all formats.

In a file of its own because FlashInfer compiles its kernels at their first use, for one to two minutes.
"""

from __future__ import annotations

import pytest
from gpu_answers import FORMATS, GRAPHS, check_answers

pytestmark = pytest.mark.gpu

pytest.importorskip("flashinfer", reason="FlashInfer is not installed", exc_type=ImportError)


@FORMATS
@GRAPHS
def test_answers(model: str, graphs: bool) -> None:
    check_answers(model, "flashinfer", graphs)
