"""The command ``pymllm bench serve``, from its flags to rows, messages and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from load_server import FIRST, GAP, PIECES, Server

from pymllm_core.bench import plot


def test_a_sweep_over_concurrency(bench: Any, server: Server, tmp_path: Path) -> None:
    png = tmp_path / "x.png"
    code, rows, out, _ = bench(
        *("--concurrency", "1", "4", "--num-requests", "8", "--input-len", "5:9", "--plot", str(png)),
        *("--slo", "ttft:10000", "itl:10000", "--output-len", "7", "--api-key", "secret"),
    )
    assert code == 0
    one, four = rows
    assert (one["concurrency"], four["concurrency"], one["request_rate"]) == (1, 4, None)
    assert (one["max_in_flight"], four["max_in_flight"], server.most) == (1, 4, 4)
    for row in rows:
        assert (row["requests"], row["completed"], row["errors"], row["goodput_share"]) == (8, 8, {}, 1.0)
        assert row["output_tokens"] == 8 * PIECES
        assert row["goodput"] == pytest.approx(row["request_throughput"])
        assert row["request_throughput"] == pytest.approx(8 / row["duration"])
        assert row["output_throughput"] == pytest.approx(8 * PIECES / row["duration"])
        assert row["ttft_ms_mean"] >= 1e3 * FIRST - 2
        assert row["ttft_ms_p50"] <= row["ttft_ms_p90"] <= row["ttft_ms_p99"]
        assert row["model"] == "first"
        assert row["server"] is None
        assert 0 <= row["client_cpu_share"] < 5
    # One request takes at least 140 ms, and four of them run at once.
    assert one["duration"] >= 8 * (FIRST + 4 * GAP) - 0.02
    assert four["duration"] >= 2 * (FIRST + 4 * GAP) - 0.02
    assert "4 at once     8" in out
    assert len(server.bodies) == 2 + 8 + 8
    body = server.bodies[-1]
    assert (body["temperature"], body["max_tokens"], body["ignore_eos"]) == (0.0, 7, True)
    assert 5 <= len(body["prompt"]) <= 9
    assert any("authorization: bearer secret" in head.lower() for head in server.heads)
    assert png.read_bytes().startswith(b"\x89PNG")


def test_requests_arrive_by_rate_whatever_is_under_way(bench: Any, server: Server, tmp_path: Path) -> None:
    svg = tmp_path / "x.svg"
    code, (row,), out, _ = bench("--request-rate", "200", "--num-requests", "20", "--plot", str(svg))
    assert code == 0
    assert (row["request_rate"], row["concurrency"]) == (200.0, None)
    # 20 requests arrive within about 0.1 s, less than one of them takes.
    assert row["max_in_flight"] > 8
    assert row["max_late_ms"] >= 0
    assert "200/s" in out
    assert "<svg" in svg.read_text()


def test_a_dataset_and_failures(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "asks.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": "busy"}\n')
    code, (row,), out, _ = bench(
        "--dataset", str(path), "--num-requests", "4", "--extra-body", '{"top_p": 1}'
    )
    assert code == 0
    assert (row["completed"], row["errors"]) == (2, {"HTTP 429: the queue is full": 2})
    assert (row["dataset"], row["input_len"]) == (str(path), None)
    assert "  2 failed: HTTP 429: the queue is full" in out
    path.write_text('{"prompt": "busy"}\n')
    code, _, _, err = bench("--dataset", str(path))
    assert code == 1
    assert "no warm-up request was answered: HTTP 429: the queue is full" in err


def test_every_field_is_documented_and_nothing_else(bench: Any, repository: Path) -> None:
    _, (row,), _, _ = bench("--num-requests", "1")
    page = (repository / "docs" / "reference" / "bench-serve.md").read_text(encoding="utf-8")
    fields = page.partition("## Fields")[2]
    lines = [line.split(" | ")[0] for line in fields.splitlines() if line.startswith("| `")]
    documented = [name for line in lines for name in line.strip("| ").replace("`", "").split(", ")]
    assert documented == list(row)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--concurrency", "1", "--request-rate", "2"], 2, "exclude each other"),
        (["--slo", "ttft"], 2, "--slo ttft: allowed: NAME:MILLISECONDS"),
        (["--extra-body", "[]"], 2, "--extra-body: found '[]', allowed: a JSON object"),
        (["--input-len", "x"], 2, "found the length 'x'"),
        (["--plot", "x.gnu"], 2, "allowed: .png, .svg, .pdf"),
        (["--url", "http://127.0.0.1:9"], 1, "no server answers at http://127.0.0.1:9 (ClientConnectorError"),
    ],
)
def test_mistakes_are_named(bench: Any, argv: list[str], code: int, message: str) -> None:
    found, rows, _, err = bench(*argv)
    assert (found, rows) == (code, [])
    assert message in err


def test_plots_say_what_they_show(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pymllm_core.bench import plot_serve

    made: list[Any] = []
    monkeypatch.setattr(
        plot_serve, "save", lambda figure, path: (made.append(figure), plot.save(figure, path))
    )
    sizes = ("--num-requests", "4", "--slo", "ttft:50", "--plot", str(tmp_path / "x.png"))
    bench("--concurrency", "1", "2", *sizes)
    bench("--concurrency", "1", *sizes)
    curves, distributions = ([axes for axes in figure.axes if axes.get_title()] for figure in made)
    assert [axes.get_xlabel() for axes in curves] == ["requests under way"] * 3
    assert [axes.get_ylabel() for axes in curves] == ["tokens a second", "ms", "ms"]
    assert [axes.get_xlabel() for axes in distributions] == ["ms"] * 3
    for axes in (curves[1], distributions[0]):
        assert "limit 50 ms" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert "limit 50 ms" not in [text.get_text() for text in curves[2].get_legend().get_texts()]
