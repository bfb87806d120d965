"""Findings about tensors: what the model's graph needs against what the headers say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch

from pymllm_core.commands.base import human_bytes
from pymllm_core.engine.checkpoint import compare
from pymllm_core.lint.layers import LintBuilder
from pymllm_core.protocols.lint import Finding, StoredTensor
from pymllm_core.protocols.quant import WeightSlot

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def tensor_findings(
    builder: LintBuilder, tensors: Mapping[str, StoredTensor], explained: Iterable[str], *, whole: bool
) -> Iterator[Finding]:
    """What loading would refuse by names, shapes and dtypes, and what it does not read on purpose.

    explained: tensors and modules whose errors have been named already. whole: whether all files could be read.
    """
    known = set(explained)

    def new(name: str) -> bool:
        return name not in known and name.rpartition(".")[0] not in known

    slots = {slot.name: slot for node in builder.nodes for slot in node.slots() if new(slot.name)}
    found = compare(
        slots.values(),
        {name: tensor.shape for name, tensor in tensors.items() if new(name)},
        builder.ignored,
    )
    if found.missing:
        partly = "" if whole else "; they may be in the files that cannot be read"
        message = f"the model reads them, and no file holds them{partly}"
        yield _error(
            "missing-tensor", found.missing, message, "take the whole checkpoint, or mend config.json"
        )
    shapes: dict[str, list[WeightSlot]] = defaultdict(list)
    for slot in found.shapes:
        shapes[f"stored as {list(tensors[slot.name].shape)}, expected {list(slot.shape)}"].append(slot)
    for message, which in shapes.items():
        yield _error("wrong-shape", which, message, "config.json and the weights are of different models")
    if found.unused:
        message = "stored, and nothing in the model reads them; loading refuses what it does not understand"
        advice = "remove them, or mend config.json if it names another model or quantisation"
        yield Finding("error", "unused-tensor", tuple(found.unused), message, advice)
    yield from _dtypes(slots, tensors)
    yield from _notes(builder, tensors)


def _error(code: str, slots: list[WeightSlot], message: str, advice: str) -> Finding:
    return Finding("error", code, tuple(slot.name for slot in slots), message, advice)


def _dtypes(slots: Mapping[str, WeightSlot], tensors: Mapping[str, StoredTensor]) -> Iterator[Finding]:
    wrong: dict[str, list[WeightSlot]] = defaultdict(list)
    wide: dict[str, list[str]] = defaultdict(list)
    for name, slot in slots.items():
        if name not in tensors:
            continue
        stored = tensors[name].dtype
        dtype = _DTYPES.get(stored)
        if dtype is None or not slot.accepts(dtype):
            wrong[f"stored as {stored}, expected {_name(slot.dtype)}"].append(slot)
        elif stored in ("F32", "F64") and slot.name.endswith(".weight") and len(slot.shape) > 1:
            wide[f"stored as {stored}, computed in {_name(slot.dtype)}"].append(name)
    for message, which in wrong.items():
        advice = "is it quantised by a method that config.json does not name?"
        yield _error("wrong-dtype", which, message, advice)
    for message, names in wide.items():
        advice = "store weights in bfloat16: half of the file, and half of the bytes of a token where computed in it"
        yield Finding("note", "wide-weights", tuple(names), message, advice)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _notes(builder: LintBuilder, tensors: Mapping[str, StoredTensor]) -> Iterator[Finding]:
    for name in sorted(builder.ignored & tensors.keys()):
        size = human_bytes(tensors[name].num_bytes)
        message = f"stored ({size}), and not read: the head is tied to the embedding"
        advice = "it may be removed; if it is no copy of the embedding, tie_word_embeddings must be false"
        yield Finding("note", "tied-head-copy", (name,), message, advice)
    for layer in builder.split:
        names = tuple(part.name for part in layer.parts)
        message = (
            "run one by one instead of as one product: stored unlike one another, or columns reordered apart"
        )
        yield Finding("note", "unfused", names, message, "quantise them alike, without reordering columns")
