"""Headers of safetensors files: read as the safetensors library reads them, hostile ones refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from pymllm_core.engine.headers import BITS, read_header, scan

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: Any, data: int = 0, *, raw: bytes | None = None) -> Path:
    """A file with this header, and `data` bytes behind it."""
    text = json.dumps(header).encode() if raw is None else raw
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def theirs(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """What the safetensors library reads, None where it refuses the file."""
    try:
        with safe_open(path, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}
    except (SafetensorError, OSError):
        return None


def ours(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    found, problem = read_header(path)
    return None if problem else {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}


SIZES = st.integers(0, 3) | st.sampled_from([-1, True, 1.0, None, "1", 2**40, 2**63, 2**64, 2**70])


@st.composite
def headers(draw: st.DrawFn) -> tuple[Any, int]:
    """A header that is right, or nearly so, and how many bytes follow it."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.text(max_size=3), max_size=3, unique=True)):
        dtype = draw(st.sampled_from([*BITS, "F33"]))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        bits = BITS.get(dtype, 8)
        for size in shape:
            bits *= size
        start, end = end, end + bits // 8
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        if draw(st.integers(0, 5)) == 0:
            field = draw(st.sampled_from([*entry, "more"]))
            wrong: st.SearchStrategy[Any] = st.none() | st.sampled_from(
                ["F32", "f32", 3, [end, start], [start]]
            )
            entry[field] = draw(st.lists(SIZES, max_size=3) | wrong)
            if draw(st.booleans()):
                del entry[field]
        header[name] = draw(st.sampled_from([entry] * 8 + [None, [], 3]))
    if draw(st.integers(0, 4)) == 0:
        header["__metadata__"] = draw(st.sampled_from([None, {}, {"a": "b"}, {"a": 1}, [], "x"]))
    return header, max(end + draw(st.sampled_from([0, 0, 0, 0, -1, 1])), 0)


@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(made=headers())
def test_headers_are_read_as_the_library_reads_them(tmp_path: Path, made: tuple[Any, int]) -> None:
    path = write(tmp_path / "x.safetensors", *made)
    assert ours(path) == theirs(path)


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(at=st.integers(0, 150), byte=st.integers(0, 255), cut=st.none() | st.integers(0, 150))
def test_damaged_bytes_are_refused_as_the_library_refuses_them(
    tmp_path: Path, at: int, byte: int, cut: int | None
) -> None:
    header = {"a.weight": GOOD, "b": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [8, 12]}}
    raw = bytearray(write(tmp_path / "x.safetensors", header, 12).read_bytes())
    raw[min(at, len(raw) - 1)] = byte
    (tmp_path / "x.safetensors").write_bytes(raw[:cut])
    path = tmp_path / "x.safetensors"
    assert ours(path) == theirs(path)


HOSTILE = {
    "empty": (b"", "shorter than the length of a header"),
    "zeros": (bytes(4096), "begins with zeros, as a file that was allocated and not written"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
    "huge": (struct.pack("<Q", 2**63) + b"{}", "its header would have 9,223,372,036,854,775,808 bytes"),
    "over the limit": (struct.pack("<Q", 100_000_001) + bytes(10), "its header would have 100,000,001 bytes"),
    "longer than the file": (struct.pack("<Q", 99) + b"{}", "its header would have 99 bytes"),
    "no json": (struct.pack("<Q", 3) + b"{a}", "its header is no JSON"),
    "no utf-8": (struct.pack("<Q", 4) + b'{"\xff"', "its header is no UTF-8"),
    "a list": (struct.pack("<Q", 2) + b"[]", "its header is a JSON list"),
    "deep": (struct.pack("<Q", 200_005) + b'{"a":' + b"[" * 200_000, "nested too deep"),
    "half a surrogate pair": (struct.pack("<Q", 14) + b'{"\\ud800":{}}  ', "surrogates not allowed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path: Path, case: str) -> None:
    raw, message = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    found, problem = read_header(path)
    assert not found
    assert problem is not None
    assert problem.startswith(f"{path} ({len(raw):,} bytes) is no whole safetensors file: ")
    assert message in problem


B = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (
            {"a": GOOD, "b": {**B, "data_offsets": [4, 12]}},
            16,
            r"tensor 'b' overlaps another .*4\.\.12, expected 8",
        ),
        ({"a": GOOD, "b": {**B, "data_offsets": [12, 20]}}, 20, r"tensor 'b' leaves a hole before it"),
        ({"a": {**GOOD, "shape": [3]}}, 8, r"tensor 'a', F32 \[3\], cannot have 8 bytes"),
        ({"a": {**GOOD, "shape": [2**40, 2**40]}}, 8, r"cannot have 8 bytes"),
        ({"a": {**GOOD, "shape": [-1, -2]}}, 8, "tensor 'a' lacks a dtype, a shape or two data_offsets"),
        (
            {"a": {**GOOD, "shape": [0, 2**64], "data_offsets": [0, 0]}},
            0,
            "tensor 'a' lacks a dtype, a shape",
        ),
        ({"a": {**GOOD, "shape": [True, 2]}}, 8, "tensor 'a' lacks a dtype, a shape"),
        ({"a": {**GOOD, "shape": [-2]}}, 8, "tensor 'a' lacks a dtype, a shape or two data_offsets"),
        ({"a": {**GOOD, "dtype": "F33"}}, 8, "tensor 'a' has the unknown dtype 'F33'"),
        ({"a": 3}, 8, "tensor 'a' lacks a dtype"),
        ({"__metadata__": {"format": 3}}, 0, "__metadata__ is no object of texts"),
        ({"a": GOOD}, 7, r"it was cut off, by its header it has \d+ bytes"),
        ({"a": GOOD}, 9, r"behind its tensors, which end at byte \d+, more bytes follow"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, header: Any, data: int, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    _, problem = read_header(path)
    assert theirs(path) is None
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    """The library takes the last one; which one was meant, nobody knows."""
    text = f'{{"a": {json.dumps(GOOD)}, "a": {json.dumps(GOOD)}}}'.encode()
    _, problem = read_header(write(tmp_path / "x.safetensors", None, 8, raw=text))
    assert "its header has the key 'a' twice" in str(problem)


def test_a_file_that_was_cut_off_still_tells_its_tensors(tmp_path: Path) -> None:
    found, problem = read_header(write(tmp_path / "x.safetensors", {"a": GOOD}, 3))
    assert problem
    assert found["a"].shape == (2,)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    _, problem = read_header(tmp_path / "x.safetensors")
    assert "directory" in str(problem)
    assert scan(tmp_path).problems[0].code == "no-weights"
