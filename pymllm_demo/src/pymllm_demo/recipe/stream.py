"""Training batches from worker processes: generated, rendered, tokenised and sorted by length.

A batch is right-padded rows of one of a few lengths, always of `TOKENS` tokens in all: the GPU sees
one shape, no row sees another dialogue, and causal attention needs no mask.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pymllm_demo.recipe import chat, data
from pymllm_demo.recipe.dialogue import Dialogue
from pymllm_demo.recipe.tokenizer import token_id

TOKENS = 49_152
LENGTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_CHUNK = 512


@dataclass(frozen=True)
class Batch:
    """Rows of input tokens; at the flat positions `where` the model is to predict `wanted`."""

    ids: NDArray[np.int16]
    where: NDArray[np.int32]
    wanted: NDArray[np.int16]


def encode(tokenizer: Tokenizer, dialogues: list[Dialogue]) -> Iterator[tuple[list[int], int]]:
    """Token ids of each dialogue, and how many of them are the prompt."""
    end = token_id(tokenizer, "<|im_end|>")
    prompts = tokenizer.encode_batch_fast([chat.prompt(dialogue) for dialogue in dialogues])
    wanted = tokenizer.encode_batch_fast([dialogue.completion() for dialogue in dialogues])
    for prompt, completion in zip(prompts, wanted, strict=True):
        yield [*prompt.ids, *completion.ids, end], len(prompt.ids)


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[Batch]:
    """An endless stream of batches of one worker."""
    source = data.dialogues(seed, "train")
    waiting: dict[int, list[tuple[list[int], int]]] = {length: [] for length in LENGTHS}
    while True:
        for ids, start in encode(tokenizer, [next(source) for _ in range(_CHUNK)]):
            if len(ids) - 1 > LENGTHS[-1]:
                continue
            length = next(length for length in LENGTHS if len(ids) - 1 <= length)
            rows = waiting[length]
            rows.append((ids, start))
            if len(rows) == TOKENS // length:
                yield _pack(rows, length)
                rows.clear()


def _pack(rows: list[tuple[list[int], int]], length: int) -> Batch:
    ids = np.zeros((len(rows), length), np.int16)
    where: list[int] = []
    wanted: list[int] = []
    for index, (row, start) in enumerate(rows):
        ids[index, : len(row) - 1] = row[:-1]
        where.extend(range(index * length + start - 1, index * length + len(row) - 1))
        wanted.extend(row[start:])
    return Batch(ids, np.array(where, np.int32), np.array(wanted, np.int16))


def _work(tokenizer_file: str, seed: int, queue: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for batch in batches(Tokenizer.from_file(tokenizer_file), seed):
        queue.put(batch)


class Workers:
    """Processes that keep a queue of batches filled."""

    def __init__(self, tokenizer_file: Path, count: int, seed: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._queue: Any = context.Queue(maxsize=8 * count)
        self._processes = [
            context.Process(
                target=_work, args=(str(tokenizer_file), seed * 1000 + index, self._queue), daemon=True
            )
            for index in range(count)
        ]
        for process in self._processes:
            process.start()

    def next(self) -> Batch:
        batch = self._queue.get(timeout=120)
        assert isinstance(batch, Batch)
        return batch

    def waiting(self) -> int:
        return int(self._queue.qsize())

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        self._queue.cancel_join_thread()
