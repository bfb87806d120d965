"""The figures of ``pymllm bench serve`` by hand, and the line that its rows keep."""

from __future__ import annotations

from typing import Any

import pytest

from pymllm_core.bench.client import Outcome
from pymllm_core.bench.load_report import meets, parse_objectives, report
from pymllm_core.bench.record import command_line
from pymllm_core.errors import ConfigError


def outcome(sent: float, *pieces: float, ended: float | None = None, **fields: Any) -> Outcome:
    tokens = {"input_tokens": 10, "output_tokens": len(pieces), **fields}
    return Outcome(sent, pieces=list(pieces), ended=ended or pieces[-1], **tokens)


def test_figures_by_hand() -> None:
    outcomes = [
        outcome(0.0, 0.1, 0.2, 0.4),  # ttft 100, gaps 100 and 200, tpot 150, e2e 400
        outcome(1.0, 1.3, 1.4),  # ttft 300, gap 100, tpot 100, e2e 400
        outcome(1.2, 1.4, ended=1.5, late=0.007),  # ttft 200, e2e 300; one token has no time a token
        Outcome(1.9, ended=2.0, error="HTTP 429: full"),
        Outcome(1.0, ended=1.1, error="HTTP 429: full"),
    ]
    row = report(outcomes, {"ttft": 250, "itl": 150})
    assert (row["requests"], row["completed"], row["errors"]) == (5, 3, {"HTTP 429: full": 2})
    assert row["duration"] == 2.0
    assert (row["input_tokens"], row["output_tokens"]) == (30, 6)
    assert (row["request_throughput"], row["output_throughput"]) == (1.5, 3.0)
    assert (row["input_throughput"], row["total_throughput"]) == (15.0, 18.0)
    # The first breaks itl, the second ttft, two were not answered: one of five is good.
    assert (row["goodput"], row["goodput_share"]) == (0.5, 0.2)
    assert row["ttft_ms_mean"] == pytest.approx(200)
    assert row["ttft_ms_p50"] == pytest.approx(200)
    assert row["ttft_ms_p90"] == pytest.approx(280)  # NumPy's default: 200 + 0.8 · 100
    assert row["itl_ms_p50"] == pytest.approx(100)
    assert row["itl_ms_p99"] == pytest.approx(198)
    assert row["tpot_ms_mean"] == pytest.approx(125)
    assert row["e2e_ms_mean"] == pytest.approx(1100 / 3)
    assert row["max_in_flight"] == 2
    assert row["max_late_ms"] == pytest.approx(7)


def test_nothing_answered_has_no_latencies() -> None:
    row = report([Outcome(0.0, ended=1.0, error="ConnectError")], {})
    assert row["ttft_ms_p50"] is row["goodput"] is row["goodput_share"] is row["slo"] is None
    assert row["request_throughput"] == 0.0


@pytest.mark.parametrize(
    ("objectives", "good"),
    [
        ({"ttft": 125}, True),
        ({"ttft": 124.9}, False),
        ({"itl": 250}, True),
        ({"itl": 249.9}, False),
        ({"tpot": 187.5}, True),
        ({"tpot": 187.4}, False),
        ({"e2e": 562.5}, True),
        ({"e2e": 562.4}, False),
        ({"ttft": 125, "e2e": 562.4}, False),
    ],
)
def test_every_limit_counts(objectives: dict[str, float], good: bool) -> None:
    """itl is the longest gap, tpot the mean of them. (Times are sums of powers of two, which are exact.)"""
    assert meets(outcome(0.0, 0.125, 0.25, 0.5, ended=0.5625), objectives) is good


def test_objectives_are_read() -> None:
    assert parse_objectives(["ttft:200", "itl:12.5"]) == {"ttft": 200.0, "itl": 12.5}
    for text in ("ttft", "ttft:", "ttft:x", "latency:5", "e2e:0", "e2e:-1", "e2e:nan"):
        with pytest.raises(ConfigError, match="allowed: NAME:MILLISECONDS"):
            parse_objectives([text])


def test_keys_do_not_get_into_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["pymllm", "bench", "serve", "--api-key", "a b", "--server.admin_api_key=c", "--x", "d e"]
    monkeypatch.setattr("sys.argv", argv)
    expected = "pymllm bench serve --api-key '***' '--server.admin_api_key=***' --x 'd e'"
    assert command_line("pymllm", "bench", "serve") == expected
    monkeypatch.setattr("sys.argv", ["bench_one_batch.py", "--x", "1"])
    assert command_line("pymllm", "bench", "one-batch") == "pymllm bench one-batch --x 1"
