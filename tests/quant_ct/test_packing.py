"""Packing and dequantising: the worked examples of the format, and the package itself bit for bit."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from ct_files import calculate_qparams, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pymllm_core.nn.quant_ops import dequantize, unpack_int4
from pymllm_core.protocols.quant import LinearLayer, LinearPart, WeightSlot
from pymllm_quant_ct.method import CompressedTensors
from pymllm_quant_ct.packing import pack, unpack, unpack_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

CPU = torch.device("cpu")


def int8(*values: int) -> Tensor:
    return torch.tensor([values], dtype=torch.int8)


def test_four_bit_codes_fill_a_word_from_its_low_end() -> None:
    codes = int8(-8, -7, -1, 0, 1, 2, 6, 7)
    assert pack(codes, 4).tolist() == [[-22444272]]
    assert torch.equal(unpack(pack(codes, 4), 4, 8), codes)


def test_eight_bit_codes() -> None:
    assert pack(int8(-128, -1, 0, 127), 8).view(torch.uint8).tolist() == [[0x00, 0x7F, 0x80, 0xFF]]


def test_zero_points_are_packed_along_the_rows() -> None:
    zero_points = torch.stack((torch.arange(-8, 0), torch.arange(8)), dim=1).to(torch.int8)
    packed = torch.tensor([[0x76543210, 0xFEDCBA98 - (1 << 32)]], dtype=torch.int32)
    assert torch.equal(unpack_rows(packed, 4, 8), zero_points)


@pytest.mark.parametrize(
    ("codes", "scale", "zero_point", "expected"),
    [
        (int8(7, -3, 1, 0), 0.09326171875, None, [0.65234375, -0.279296875, 0.09326171875, 0]),
        (int8(7, -8, -2, -3), 0.06689453125, -3, [0.66796875, -0.333984375, 0.06689453125, 0]),
    ],
)
def test_worked_examples(codes: Tensor, scale: float, zero_point: int | None, expected: list[float]) -> None:
    scales = torch.tensor([[scale]], dtype=torch.bfloat16)
    found = dequantize(codes, scales, None if zero_point is None else int8(zero_point))
    assert found.tolist() == [expected]


@given(data=st.data(), bits=st.sampled_from([4, 8]), rows=st.integers(1, 9), columns=st.integers(1, 21))
def test_packing_round_trips(data: st.DataObject, bits: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpack(packed, bits, columns), codes)
    if bits == 4:
        assert torch.equal(unpack_int4(packed.view(torch.uint8), columns), codes)


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    # The package (0.19, 0.20) cannot read back zero points that it packed into a single word a column.
    rows=st.lists(st.integers(9, 40), min_size=1, max_size=3),
    columns=st.integers(1, 3),
    strategy=st.sampled_from(["tensor", "channel", "g32", "g64", "g128"]),
    symmetric=st.booleans(),
    order=st.sampled_from([None, "static", "weight", "group"]),
    file_format=st.sampled_from(["pack-quantized", "int-quantized", "naive-quantized"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 1 << 20),
)
def test_dequantised_weights_are_the_packages_own(
    bits: int,
    rows: list[int],
    columns: int,
    strategy: str,
    symmetric: bool,
    order: str | None,
    file_format: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Bit for bit, for fused parts of any number of rows, whatever is stored."""
    generator = torch.Generator().manual_seed(seed)
    size = int(strategy[1:]) if strategy.startswith("g") else None
    if size is None and order == "group":
        order = None
    if size is None:
        columns = columns * 8 + seed % 5
    else:
        columns *= size
    if order == "group":
        rows = rows[:1]
    args = weights(bits, size, symmetric=symmetric)
    if strategy == "tensor":
        args["strategy"] = "tensor"
    stored: dict[str, Tensor] = {}
    expected = []
    for index, count in enumerate(rows):
        weight = torch.randn(count, columns, generator=generator).to(dtype)
        permutation = torch.randperm(columns, generator=generator)
        given_weight = weight[:, permutation] if order == "group" else weight
        found, wide = _package(given_weight, args, file_format)
        if order == "group":  # the file holds columns in their own order, the package's answer is permuted
            inverse = permutation.argsort()
            wide = wide[:, inverse]
            found["weight_g_idx"] = (inverse // (size or 1)).to(torch.int32)
            _reorder(found, bits, inverse)
        stored.update({f"m.{index}.{name}": tensor for name, tensor in found.items()})
        expected.append(wide)
    config = {
        "config_groups": {"g": {"targets": ["Linear"], "weights": {**args, "actorder": order}}},
        "format": file_format,
    }
    method = CompressedTensors(config)
    layer = LinearLayer(tuple(LinearPart(f"m.{i}", count) for i, count in enumerate(rows)), columns)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    scheme = method.linear(layer, dtype, shapes)
    assert scheme is not None
    slots = {slot.name: slot for slot in scheme.slots()}
    assert shapes.keys() <= slots.keys()
    assert all(slots[name].shape == shape for name, shape in shapes.items())

    def read(slot: WeightSlot) -> Tensor | None:
        return stored.get(slot.name)

    tensors = scheme.load(read, CPU)
    codes = tensors["weight"] if bits == 8 else unpack_int4(tensors["weight"], columns)
    ours = dequantize(codes, tensors["scale"], tensors.get("zero_point"), tensors.get("g_idx"))
    theirs = torch.cat(expected)
    assert ours.dtype == theirs.dtype == dtype
    assert torch.equal(ours, theirs)


def _package(weight: Tensor, args: dict[str, Any], file_format: str) -> tuple[dict[str, Tensor], Tensor]:
    """What the package stores for a weight, and what it reads back."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    rows = weight.shape[0]
    shape = {"tensor": (1, -1), "channel": (rows, 1, -1), "group": (rows, -1, args.get("group_size", 1))}
    view = weight.float().reshape(shape[args["strategy"]])
    scale, zero_point = calculate_qparams(view.amin(-1), view.amax(-1), scheme.weights)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero_point}
    compressor = BaseCompressor.get_value_from_registry(file_format)
    stored = compressor.compress(state, scheme)
    wide = compressor.decompress(stored, scheme)["weight"]
    return dict(stored), wide


def _reorder(stored: dict[str, Tensor], bits: int, inverse: Tensor) -> None:
    """Put the columns of the stored codes back into their own order."""
    if "weight" in stored:
        stored["weight"] = stored["weight"][:, inverse].contiguous()
    else:
        codes = unpack(stored["weight_packed"], bits, len(inverse))
        stored["weight_packed"] = pack(codes[:, inverse], bits)
