"""``pymllm bench serve`` from several client processes."""

from __future__ import annotations

from typing import Any

import pytest
from load_server import FIRST, GAP, PIECES, Server

from pymllm_core.bench.workload import Ask


@pytest.mark.parametrize("load", [("--concurrency", "4"), ("--request-rate", "300")])
def test_several_processes_share_the_requests(bench: Any, server: Server, load: tuple[str, str]) -> None:
    sizes = ("--num-requests", "9", "--input-len", "5", "--output-len", "7")
    code, (row,), _, _ = bench(*load, *sizes, "--processes", "2", "--warmup", "1")
    assert code == 0
    assert (row["client_processes"], row["requests"], row["completed"]) == (2, 9, 9)
    assert row["tokens_per_piece"] == 1.0
    assert row["output_tokens"] == 9 * PIECES
    if load[0] == "--concurrency":
        assert row["max_in_flight"] == server.most == 4
        assert row["duration"] >= 2 * (FIRST + 4 * GAP) - 0.02
    else:
        assert row["max_in_flight"] > 4
        assert row["max_late_ms"] >= 0
    assert 0 < row["client_cpu_share"] < 5
    # The same prompts as one process sends, each once.
    shared = sorted(body["prompt"] for body in server.bodies[1:])
    server.bodies.clear()
    bench(*load, *sizes, "--processes", "1", "--warmup", "1")
    assert shared == sorted(body["prompt"] for body in server.bodies[1:])
    assert len({str(prompt) for prompt in shared}) == 9


def test_shares_keep_their_times() -> None:
    from pymllm_core.bench.crowd import Share

    asks = tuple(Ask("/", {"prompt": [number]}) for number in range(11))
    whole = Share("url", None, 1.0, {}, asks, after=tuple(0.5 * number for number in range(11)))
    shares = whole.split(3)
    assert [len(share.asks) for share in shares] == [4, 4, 3]
    sent = [
        (ask.body["prompt"][0], after)
        for share in shares
        for ask, after in zip(share.asks, share.after, strict=True)
    ]
    assert sorted(sent) == [(number, 0.5 * number) for number in range(11)]
    closed = Share("url", None, 1.0, {}, asks, 8).split(3)
    assert [share.concurrency for share in closed] == [3, 3, 2]
    assert all(not share.after for share in closed)


def test_how_many_processes_a_load_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    from pymllm_core.bench.serve import Load, ServeOptions

    def count(cores: int, load: Load, processes: int | None = None) -> int:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores), raising=False)
        options = object.__new__(ServeOptions)
        object.__setattr__(options, "processes", processes)
        return options.processes_of(load)

    assert [count(16, Load(concurrency=n)) for n in (1, 8, 9, 64, 1000)] == [1, 1, 2, 8, 8]
    assert [count(2, Load(concurrency=n)) for n in (1, 64)] == [1, 1]
    assert count(1, Load(concurrency=64)) == 1
    assert [count(16, Load(rate=rate)) for rate in (0.5, 8.0, 40.0)] == [1, 1, 5]
    assert count(2, Load(concurrency=64), 6) == 6
    assert count(2, Load(concurrency=4), 6) == 4
    assert count(2, Load(rate=4.0), 6) == 6


def test_a_client_process_that_dies_is_told(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pymllm_core.bench import crowd

    start = crowd.start_child

    def start_and_kill(main: Any) -> Any:
        process, pipe = start(main)
        process.kill()
        process.wait()
        return process, pipe

    monkeypatch.setattr(crowd, "start_child", start_and_kill)
    code, _, _, err = bench("--concurrency", "2", "--processes", "2", "--num-requests", "4")
    assert code == 1
    assert "a client process died" in err
