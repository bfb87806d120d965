"""The embedding by Triton against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from triton_support import DEVICE, randn

from pymllm_kernels.triton.embedding import triton_embedding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [1, 24, 1024, 2560, 4100])
def test_rows_as_they_are(columns: int, dtype: torch.dtype) -> None:
    """Twice the same one, the first and the last."""
    weight = randn(columns, 50, columns, dtype=dtype)
    ids = torch.tensor([7, 0, 49, 7, 13], device=DEVICE)
    for tokens in (0, 1, 5):
        assert torch.equal(triton_embedding(ids[:tokens], weight), F.embedding(ids[:tokens], weight))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 5000])
def test_a_table_of_more_than_two_gigabytes(tokens: int) -> None:
    weight = torch.zeros((300_000, 4096), dtype=torch.bfloat16, device=DEVICE)
    ids = torch.randint(290_000, 300_000, (tokens,), device=DEVICE)
    weight[290_000:] = torch.randn((10_000, 4096), dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(triton_embedding(ids, weight), F.embedding(ids, weight))
