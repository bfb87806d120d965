"""Writes ``fixtures/``: tiny checkpoints of several versions of compressed-tensors, with what they dequantise to.

Run it with each version on the path: ``PYTHONPATH=FOLDER_OF_0.9.4 python make_fixtures.py``. The files are kept
because one environment has one version of the package, and old versions do not go with every Python.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path

import torch
from ct_files import group, inputs, weights, write
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
KINDS = {
    "w4a16-asym": group(weights(4, 32, symmetric=False)),
    "w4a16-g-idx": group(weights(4, 32, actorder="group")),
    "w8a16": group(weights(8)),
    "w8a8": group(weights(8), inputs()),
    "w8a8-static": group(weights(8), inputs(dynamic=False, symmetric=False)),
}


def digest(weight: Tensor) -> str:
    """Of the bits of a weight in bfloat16, -0 taken for 0: rounding in place keeps a sign that codes have not."""
    data = (weight.to(torch.bfloat16) + 0).contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    version = importlib.metadata.version("compressed-tensors")
    parsed = tuple(int(number) for number in version.split("."))
    for kind, found in KINDS.items():
        if kind == "w4a16-g-idx" and parsed >= (0, 19):
            continue  # no longer written
        folder = FIXTURES / f"{version}-{kind}"
        file_format = "int-quantized" if found["input_activations"] else "pack-quantized"
        model = write(folder, [found], file_format=file_format, decompress=parsed >= (0, 19), **SMALL)
        digests = {name: digest(tensor) for name, tensor in model.state_dict().items() if "proj" in name}
        (folder / "expected.json").write_text(json.dumps(digests, indent=1) + "\n")
        print(folder.name)


if __name__ == "__main__":
    main()
