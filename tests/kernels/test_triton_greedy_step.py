"""The end of a decode step by Triton, against the operation's definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_support import DEVICE, randn

from pymllm_core.nn.step_ops import DecodeState, TorchGreedyStep
from pymllm_kernels.triton import greedy_step
from pymllm_kernels.triton.greedy_step import TritonGreedyStep

PAGE_SIZE, PAGES, TURNS = 4, 6, 3


def make_state(rows: int, seed: int = 0) -> DecodeState:
    """Of two more rows than are used; every third row belongs to no sequence."""
    generator = torch.Generator().manual_seed(seed)
    room = rows + 2
    positions = torch.randint(0, PAGE_SIZE * PAGES - 8, (room,), generator=generator)
    steps = (torch.arange(room) % 3 != 1).int()
    return DecodeState(
        ids=torch.full((room,), -7).to(DEVICE),
        positions=positions.to(DEVICE),
        slots=torch.full((room,), -7).to(DEVICE),
        kv_lens=(positions + 1).int().to(DEVICE),
        steps=steps.to(DEVICE),
        page_table=torch.randperm(room * PAGES, generator=generator).int().view(room, PAGES).to(DEVICE),
        page_size=PAGE_SIZE,
        chosen=torch.full((TURNS, room), -7, pin_memory=DEVICE.type == "cuda"),
        turn=torch.zeros(1, dtype=torch.int32, device=DEVICE),
    )


def check(logits: Tensor, *, times: int = 1) -> list[list[int]]:
    """Compare all that a step leaves, `times` steps in a row; the tokens of each step."""
    rows = len(logits)
    ours, theirs = make_state(rows), make_state(rows)
    said = []
    for turn in range(times):
        TritonGreedyStep()(logits, ours)
        TorchGreedyStep()(logits, theirs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        for name in ("ids", "positions", "slots", "kv_lens", "steps", "page_table"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), (name, turn)
        assert ours.turn.item() == turn + 1
        said.append(ours.chosen[turn % TURNS, :rows].tolist())
        assert said[-1] == theirs.ids[:rows].tolist()
        assert (ours.chosen[turn % TURNS, rows:] == -7).all()
        logits = logits.roll(3, dims=1)
    return said


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("vocab", [1, 77, 2048, 5000])
def test_the_definition(rows: int, vocab: int) -> None:
    """Rows that lie apart, more turns than the host has room for."""
    logits = randn(rows + vocab, rows, vocab + 9, dtype=torch.float32)[:, :vocab]
    check(logits, times=TURNS + 2)


def test_many_rows_have_few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_step, "MAX_BESTS", 16)
    check(randn(1, 9, 7000, dtype=torch.float32))
    monkeypatch.setattr(greedy_step, "MAX_BESTS", 4)
    check(randn(2, 9, 7000, dtype=torch.float32))


def test_the_first_of_equal_logits() -> None:
    logits = torch.zeros((4, 6000), device=DEVICE)
    logits[1, [5999, 2050, 4000]] = 1.0
    logits[2, 17] = logits[2, 16] = 1e30
    logits[3] = float("-inf")
    assert check(logits) == [[0, 2050, 16, 0]]


def test_what_is_no_number_chooses_a_token_that_exists() -> None:
    logits = randn(0, 3, 300, dtype=torch.float32)
    logits[0] = float("nan")
    logits[1, 5], logits[1, 9] = float("nan"), 1e9
    state = make_state(3)
    TritonGreedyStep()(logits, state)
    assert state.ids[:2].tolist() == [0, 9]
    assert 0 <= int(state.ids[2]) < 300


def test_no_page_after_the_last_token() -> None:
    """A position behind the page table reads no page that is not there."""
    ours, theirs = make_state(2), make_state(2)
    for state in (ours, theirs):
        state.positions[:2] = PAGE_SIZE * PAGES - 1
    logits = randn(0, 2, 50, dtype=torch.float32)
    TritonGreedyStep()(logits, ours)
    TorchGreedyStep()(logits, theirs)
    assert torch.equal(ours.slots, theirs.slots)
    assert ours.positions[0] == PAGE_SIZE * PAGES


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 32, 256, 1000])
def test_the_vocabulary_of_qwen3(rows: int) -> None:
    check(randn(rows, rows, 151936, dtype=torch.float32)[:, :151669], times=TURNS + 2)


@pytest.mark.gpu
def test_replays_of_a_graph() -> None:
    """The host finds what each replay chose, without a copy."""
    logits = randn(0, 5, 9000, dtype=torch.float32)
    state, other = make_state(5), make_state(5)
    node = TritonGreedyStep()
    node(logits, make_state(5))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        node(logits, state)
    for turn in range(TURNS + 2):
        graph.replay()
        done = torch.cuda.Event()
        done.record()
        done.synchronize()
        TorchGreedyStep()(logits, other)
        assert state.chosen[turn % TURNS, :5].tolist() == other.ids[:5].tolist()
        assert torch.equal(state.slots, other.slots)
        logits.copy_(logits.roll(5, dims=1))
