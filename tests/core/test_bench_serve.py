"""``pymllm bench serve``: its arithmetic by hand, its client against a server that does exactly what it is told."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pymllm_core import cli
from pymllm_core.bench import plot, workload
from pymllm_core.bench.client import LoadClient, Outcome
from pymllm_core.bench.load_report import meets, parse_objectives, report
from pymllm_core.bench.record import command_line
from pymllm_core.bench.workload import Ask, Range, arrivals, file_asks, random_asks
from pymllm_core.errors import ConfigError

FIRST, GAP, PIECES = 0.06, 0.02, 5


class Server:
    """Answers any POST with `PIECES` pieces: the first after `FIRST` seconds, the others `GAP` apart.

    A prompt that is a text names a misbehaviour instead. bodies: what was sent. most: requests at one time.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.now = self.most = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        async def close() -> None:
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lengths = [line for line in head.lower().splitlines() if line.startswith("content-length:")]
                body = await reader.readexactly(int(lengths[0].partition(":")[2])) if lengths else b""
                self.heads.append(head)
                self.now += 1
                self.most = max(self.most, self.now)
                try:
                    await self._answer(head.split()[1], json.loads(body or b"{}"), writer)
                finally:
                    self.now -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            return self._whole(writer, "200 OK", {"data": [{"id": "first"}, {"id": "second"}]})
        if path == "/server_info":
            return self._whole(writer, "404 Not Found", {})
        self.bodies.append(body)
        told = body.get("prompt") if isinstance(body.get("prompt"), str) else ""
        if told == "busy":
            return self._whole(writer, "429 Too Many", {"error": {"message": "the queue is full"}})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        await asyncio.sleep(FIRST)
        if told == "fails":
            writer.write(b'data: {"error": {"message": "out of pages"}}\n\n')
        elif told == "nonsense":
            writer.write(b"data: {no json\n\n")
        else:
            await self._pieces(writer, body, told)
        await writer.drain()
        writer.close()
        return None

    async def _pieces(self, writer: asyncio.StreamWriter, body: dict[str, Any], told: str) -> None:
        if "messages" in body:
            first, piece = {"delta": {"role": "assistant", "content": ""}}, {"delta": {"content": "é\u2028"}}
            writer.write(self._event({"choices": [first]}))
        else:
            piece = {"text": "" if told == "silent" else "é\u2028"}
        count = 2 if told == "cut" else PIECES
        for number in range(count):
            if number:
                await asyncio.sleep(GAP)
            reason = "length" if number == count - 1 else None
            writer.write(self._event({"choices": [{**piece, "finish_reason": reason}]}))
            await writer.drain()
        if told == "cut":
            return
        if told != "uncounted":
            tokens = 1 if told == "silent" else PIECES
            usage = {"prompt_tokens": len(body.get("prompt", "x")), "completion_tokens": tokens}
            writer.write(self._event({"choices": [], "usage": usage}))
        writer.write(b"data: [DONE]\n\n")

    @staticmethod
    def _event(body: dict[str, Any]) -> bytes:
        # Not escaped, as other servers do: U+2028 is no end of a line of an event stream.
        return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"

    @staticmethod
    def _whole(writer: asyncio.StreamWriter, status: str, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    started = Server()
    yield started
    started.stop()


@pytest.fixture
def server(shared_server: Server) -> Server:
    shared_server.bodies.clear()
    shared_server.heads.clear()
    shared_server.most = 0
    return shared_server


@pytest.fixture
def bench(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[dict[str, Any]], str, str]]:
    """Runs the command; (exit code, all rows so far, what it printed, what it complained of)."""
    rows = tmp_path / "rows.jsonl"

    def run(*argv: str) -> tuple[int, list[dict[str, Any]], str, str]:
        common = ["--url", server.url, "--result-filename", str(rows)]
        code = cli.run(["bench", "serve", *common, *argv])
        lines = rows.read_text().splitlines() if rows.exists() else []
        captured = capsys.readouterr()
        return code, [json.loads(line) for line in lines], captured.out, captured.err

    return run


# The arithmetic


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


# The workload


def test_random_prompts_are_seeded_and_within_their_ranges() -> None:
    asks = random_asks(300, Range(3, 6), Range.parse("2:4"), 150, seed=1)
    assert asks == random_asks(300, Range(3, 6), Range(2, 4), 150, seed=1)
    assert asks != random_asks(300, Range(3, 6), Range(2, 4), 150, seed=2)
    assert {len(ask.body["prompt"]) for ask in asks} == {3, 4, 5, 6}
    assert {ask.body["max_tokens"] for ask in asks} == {2, 3, 4}
    ids = {token for ask in asks for token in ask.body["prompt"]}
    assert (min(ids), max(ids)) == (100, 149)
    with pytest.raises(ConfigError, match="more than 100"):
        random_asks(1, Range(1, 1), Range(1, 1), 100, 0)


@pytest.mark.parametrize("text", ["0", "", "a", "5:4", "0:4", "4:", "1:2:3"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="allowed: a number such as 256"):
        Range.parse(text)


def test_arrivals_are_a_poisson_process() -> None:
    """10,000 exponential gaps: their mean is 1/rate within 4 standard errors, and so is their spread."""
    times = [time for time, _ in zip(arrivals(50.0, 7), range(10_001), strict=False)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert times[0] == 0.0
    assert mean == pytest.approx(1 / 50, rel=4 / 10_000**0.5)
    assert spread == pytest.approx(1 / 50, rel=8 / 10_000**0.5)


def test_a_dataset_is_read_and_repeated(tmp_path: Path) -> None:
    path = tmp_path / "asks.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    lines = [{"prompt": "a", "max_tokens": 3}, {"messages": chat}, {"prompt": [5, 6]}]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    asks = file_asks(path, 4, Range(9, 9), 0)
    assert asks == [
        Ask(workload.COMPLETIONS, {"max_tokens": 3, "prompt": "a"}),
        Ask(workload.CHAT, {"max_tokens": 9, "messages": chat}),
        Ask(workload.COMPLETIONS, {"max_tokens": 9, "prompt": [5, 6]}),
        asks[0],
    ]
    for line in ("[]", "{", '{"prompt": "a", "messages": []}', '{"text": "a"}', '{"prompt": "a", "n": 2}'):
        path.write_text(f'{{"prompt": "a"}}\n{line}\n')
        with pytest.raises(ConfigError, match=r"asks.jsonl, line 2: "):
            file_asks(path, 1, Range(9, 9), 0)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no line"):
        file_asks(path, 1, Range(9, 9), 0)
    with pytest.raises(ConfigError, match="cannot be read"):
        file_asks(tmp_path / "absent", 1, Range(9, 9), 0)


# The client, on the clock. A busy machine makes things later, never earlier: lower bounds are sharp.


def ask(server: Server, *asks: Ask) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with LoadClient(server.url, common={"model": "m"}) as client:
            return [await client.ask(one) for one in asks]

    return asyncio.run(run())


def test_times_are_those_of_the_server(server: Server) -> None:
    chat = Ask(workload.CHAT, {"messages": []})
    for found in ask(server, Ask(workload.COMPLETIONS, {"prompt": [1, 2, 3]}), chat):
        assert found.error is None
        assert len(found.pieces) == PIECES  # the chat's empty first delta is none
        assert FIRST - 0.002 <= found.ttft < FIRST + 5
        assert (PIECES - 1) * GAP - 0.005 <= sum(found.gaps) < (PIECES - 1) * GAP + 5
        assert found.tpot == pytest.approx(sum(found.gaps) / (PIECES - 1))
        assert found.e2e >= found.ttft + sum(found.gaps)
        assert found.output_tokens == PIECES
    assert server.bodies[0]["stream_options"] == {"include_usage": True}
    assert server.bodies[0]["model"] == "m"


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("busy", "HTTP 429: the queue is full"),
        ("fails", "in the stream: out of pages"),
        ("cut", "the stream ended before [DONE]"),
        ("uncounted", "the stream reported no usage"),
    ],
)
def test_what_goes_wrong_is_named(server: Server, prompt: str, error: str) -> None:
    (found,) = ask(server, Ask(workload.COMPLETIONS, {"prompt": prompt}))
    assert found.error == error
    assert found.ended > found.sent


def test_nonsense_is_an_error_and_silence_is_none(server: Server) -> None:
    nonsense, silent = ask(
        server,
        Ask(workload.COMPLETIONS, {"prompt": "nonsense"}),
        Ask(workload.COMPLETIONS, {"prompt": "silent"}),
    )
    assert nonsense.error is not None
    assert nonsense.error.startswith("an event is malformed: JSONDecodeError")
    # A token without text: it came with the end of the answer at the latest.
    assert silent.error is None
    assert len(silent.pieces) == 1
    assert silent.tpot is None


def test_nobody_there_is_an_error() -> None:
    async def run() -> Outcome:
        async with LoadClient("http://127.0.0.1:9", common={}) as client:
            return await client.ask(Ask(workload.COMPLETIONS, {}))

    assert asyncio.run(run()).error == "ConnectionRefusedError"


# The command


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
        (["--url", "http://127.0.0.1:9"], 1, "no server answers at http://127.0.0.1:9 (ConnectError"),
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
