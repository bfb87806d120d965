"""Findings about the files: whether they are all there, whole, and agree with the index."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from pymllm_core.engine.headers import INDEX_NAME, Scan, read_json
from pymllm_core.errors import CheckpointError
from pymllm_core.protocols.lint import Finding

# As huggingface_hub, wget, curl and aria2 name what they have not finished.
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".tmp")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_AGAIN = "download or write it again"


def file_findings(folder: Path, scan: Scan, *, weights: bool) -> Iterator[Finding]:
    """Errors are those for which loading would stop; the rest is what loading does not look at.

    weights False: they were not fetched, so it is no error that none are there.
    """
    if not (weights or scan.files) and all(p.code in ("no-weights", "missing-file") for p in scan.problems):
        message = "the weights are not here, so only config.json was looked at"
        yield Finding("note", "weights-not-here", (str(folder),), message, "--download fetches them")
        return
    for problem in scan.problems:
        where = (problem.file or str(folder),)
        advice = "" if problem.message.endswith("again") else _ADVICE.get(problem.code, "")
        yield Finding("error", problem.code, where, problem.message, advice)
    present = {path.name for path in folder.iterdir()}
    if (folder / INDEX_NAME).is_file():
        yield from _against_index(folder, scan, present)
    elif missing := sorted(_missing_shards({file.name for file in scan.files}) - present):
        message = f"the other shards' names tell of {', '.join(missing)}, which is not there"
        yield Finding("error", "missing-file", tuple(missing), message, "download it")
    unfinished = sorted(name for name in present if name.endswith(UNFINISHED))
    if unfinished:
        message = "a download or writer seems not to have finished"
        yield Finding("warning", "unfinished-file", tuple(unfinished), message, "download again")


_ADVICE = {
    "missing-file": "download what is missing",
    "bad-index": _AGAIN,
    "duplicate-tensor": "remove one of the two, or the file that is left from another download",
    "no-weights": "download the weights, or give the folder that holds them",
}


def _against_index(folder: Path, scan: Scan, present: set[str]) -> Iterator[Finding]:
    """Differences that loading does not mind: it reads every tensor of every file that the index names."""
    try:
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    except CheckpointError:
        return  # said already
    if not isinstance(weight_map, Mapping):
        return
    damaged = {problem.file for problem in scan.problems}
    read = {file.name for file in scan.files}
    elsewhere: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, wanted in weight_map.items():
        stored = scan.tensors.get(name)
        found = stored.file.name if stored else "no file"
        if found != wanted and wanted in read and wanted not in damaged:
            elsewhere[str(wanted), found].append(name)
    for (wanted, found), names in elsewhere.items():
        message = f"{INDEX_NAME} has them in {wanted}, the headers in {found}"
        yield Finding("warning", "index-mismatch", tuple(names), message, f"{_AGAIN}: index and files differ")
    if unlisted := sorted(scan.tensors.keys() - weight_map.keys()):
        message = f"stored, but {INDEX_NAME} does not name them; loading reads them all the same"
        yield Finding("warning", "index-mismatch", tuple(unlisted), message, f"write {INDEX_NAME} again")
    if unread := sorted(
        name for name in present - read if name.endswith(".safetensors") and name not in damaged
    ):
        named = {str(value) for value in weight_map.values()}
        if unread := [name for name in unread if name not in named]:
            message = f"not read, because {INDEX_NAME} does not name it"
            yield Finding("note", "unread-file", tuple(unread), message, "remove it if it is left over")


def _missing_shards(names: set[str]) -> set[str]:
    """Names such as ``model-00002-of-00003.safetensors`` that others of their series promise."""
    series = {(found[1], found[3]) for name in names if (found := _SHARD.fullmatch(name))}
    return {
        f"{stem}-{number:05}-of-{count}.safetensors"
        for stem, count in series
        # A hostile name must not promise a hundred thousand files.
        for number in range(1, min(int(count), 1000) + 1)
    } - names
