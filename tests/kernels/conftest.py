"""Lets the test files of this folder import their shared helpers, and Triton kernels run without a GPU."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    # Triton reads this when it is imported, which no other test of this folder does.
    os.environ["TRITON_INTERPRET"] = "1"
