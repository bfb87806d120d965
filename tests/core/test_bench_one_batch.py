"""``pymllm bench one-batch``: what is run, what is written, and that its numbers fit each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pymllm_core import cli, plugins
from pymllm_core.bench import limits as limits_module
from pymllm_core.bench.limits import DeviceLimits
from pymllm_core.bench.static_batch import StaticBatch, time_batch
from pymllm_core.engine.batch import Batch
from pymllm_core.engine.runner import Launched, Runner
from pymllm_core.testing.checkpoints import write_toy
from pymllm_core.testing.engines import TOY, check_idle, complete, greedy, make_engine, registry_of

# The fields of the original's rows, in its order, with their types.
ORIGINAL = {
    "run_name": str,
    "batch_size": int,
    "input_len": int,
    "output_len": int,
    "prefill_latency": float,
    "prefill_throughput": float,
    "median_decode_latency": float,
    "median_decode_throughput": float,
    "total_latency": float,
    "overall_throughput": float,
    "device": str,
    "dtype": str,
    "cuda_graph": bool,
}
LIMITS = DeviceLimits(read=1e9, matrix={"float32": 1e10, "int8": 2e10}, measured="then")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("toy")
    write_toy(made, tokenizer=True)
    return made


@pytest.fixture
def bench(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
    """Runs the command on the toy model; (exit code, all rows of the file so far)."""
    found = registry_of(TOY)
    monkeypatch.setattr(plugins, "registry", lambda: found)
    monkeypatch.setattr("pymllm_core.bench.one_batch.device_limits", lambda *_, **__: LIMITS)
    torch.set_num_threads(1)
    rows = tmp_path / "new" / "rows.jsonl"

    def run(*argv: str) -> tuple[int, list[dict[str, Any]]]:
        model = ["--server.model_path", str(folder), "--server.device", "cpu", "--server.dtype", "float32"]
        code = cli.run(["bench", "one-batch", *model, "--result-filename", str(rows), *argv], found)
        lines = rows.read_text().splitlines() if rows.exists() else []
        return code, [json.loads(line) for line in lines]

    return run


def test_sweeps_all_combinations_and_appends(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ("--batch-size", "1", "3", "--input-len", "8", "20", "--output-len", "1", "4")
    code, rows = bench(*sweep, "--run-name", "first")
    assert code == 0
    sizes = [(row["batch_size"], row["input_len"], row["output_len"]) for row in rows]
    assert sizes == [(b, i, o) for b in (1, 3) for i in (8, 20) for o in (1, 4)]
    assert "8 row(s) appended to" in capsys.readouterr().out
    code, rows = bench("--input-len=8", "--output-len=2", "--run-name=second")
    assert [row["run_name"] for row in rows] == ["first"] * 8 + ["second"]


def test_fields_have_their_types_and_fit_each_other(bench: Any) -> None:
    _, rows = bench("--batch-size", "3", "--input-len", "20", "--output-len", "1", "5", "--repeat", "3")
    for row in rows:
        assert list(row)[: len(ORIGINAL)] == list(ORIGINAL)
        assert {name: type(row[name]) for name in ORIGINAL} == ORIGINAL
        assert row["prefill_throughput"] == pytest.approx(3 * 20 / row["prefill_latency"])
        tokens = 3 * (20 + row["output_len"])
        assert row["overall_throughput"] == pytest.approx(tokens / row["total_latency"])
        for stage, latency in (("prefill", "prefill_latency"), ("decode", "median_decode_latency")):
            if not row[latency]:
                continue
            moving = row[f"{stage}_bytes"] / LIMITS.read
            computing = row[f"{stage}_flops"] / LIMITS.matrix["float32"]
            assert row[f"{stage}_floor"] == pytest.approx(max(moving, computing))
            assert row[f"{stage}_bandwidth_share"] == pytest.approx(moving / row[latency])
            assert row[f"{stage}_matrix_share"] == pytest.approx(computing / row[latency])
        assert (row["device"], row["dtype"], row["cuda_graph"]) == ("cpu", "float32", False)
        assert row["versions"]["torch"]
        assert row["command"].startswith("pymllm bench one-batch")
        assert row["peak_memory_bytes"] > 50e6
    prefill_only, row = rows
    # The answer's only token comes from the prefill: nothing is decoded.
    assert prefill_only["median_decode_latency"] == prefill_only["median_decode_throughput"] == 0.0
    assert prefill_only["decode_bandwidth_share"] is None
    assert prefill_only["total_latency"] == prefill_only["prefill_latency"]
    assert row["median_decode_throughput"] == pytest.approx(3 / row["median_decode_latency"])
    assert row["median_decode_latency"] <= row["p90_decode_latency"] <= row["max_decode_latency"]
    assert row["prefill_latency"] < row["total_latency"]


def test_every_field_is_documented_and_nothing_else(bench: Any, repository: Path) -> None:
    _, (row,) = bench("--input-len", "8", "--output-len", "3")
    page = (repository / "docs" / "reference" / "bench-one-batch.md").read_text(encoding="utf-8")
    fields = page.partition("## Fields")[2]
    documented = [line.split("`")[1] for line in fields.splitlines() if line.startswith("| `")]
    assert documented == list(row)


class Recorder:
    """What a runner is asked to compute, and when its results are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[int, int, bool]] = []
        self.events: list[str] = []
        launch, read = Runner.launch, Launched.read

        def recorded(runner: Runner, batch: Batch) -> Launched:
            last = batch.chunks[-1]
            self.steps.append((len(batch.chunks), batch.num_tokens, last.from_device))
            self.events.append("launch")
            return launch(runner, batch)

        def recorded_read(launched: Launched) -> Any:
            self.events.append("read")
            return read(launched)

        monkeypatch.setattr(Runner, "launch", recorded)
        monkeypatch.setattr(Launched, "read", recorded_read)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("output_len", [1, 2, 5])
def test_one_prefill_then_the_decode_steps(
    folder: Path, overlap: bool, output_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(folder, overlap=overlap, max_total_tokens=512, max_prefill_tokens=64)
    recorder = Recorder(monkeypatch)
    logged: list[int] = []
    timing = time_batch(engine, [[1, 2, 3], [4, 5, 6]], output_len, lambda step, seconds: logged.append(step))
    assert recorder.steps == [(2, 6, False)] + [
        (2, 2, overlap and step > 0) for step in range(output_len - 1)
    ]
    assert len(timing.decodes) == output_len - 1
    assert logged == list(range(1, output_len))
    assert timing.total == timing.prefill + sum(timing.decodes)
    assert min([timing.prefill, *timing.decodes]) > 0
    decoding = recorder.events[2:]
    if overlap and output_len == 5:
        assert decoding == ["launch", *["launch", "read"] * 3, "read"]
    elif not overlap:
        assert decoding == ["launch", "read"] * (output_len - 1)
    check_idle(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_static_batch_says_what_the_engine_says(folder: Path, overlap: bool) -> None:
    """Same graph, same greedy choice: unlike prompts, one of them a single token, one longer than a page."""
    engine = make_engine(folder, overlap=overlap, max_total_tokens=1024)
    prompts = [[7], [3, 1, 4, 1, 5], list(range(40, 80))]
    expected = [list(answer.token_ids) for answer in complete(engine, prompts, greedy(6))]
    engine.flush_cache()
    with StaticBatch(engine, prompts, 6) as batch:
        batch.read(batch.prefill())
        for _ in range(5):
            batch.read(batch.decode())
        assert batch.generated == expected
    check_idle(engine)
    # The engine still serves afterwards.
    assert [list(a.token_ids) for a in complete(engine, prompts, greedy(6))] == expected


def test_sizes_that_do_not_fit_are_skipped_by_name(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--batch-size", "1", "2", "4", "--input-len", "30", "300", "--output-len", "2")
    code, rows = bench(*sizes, "--server.max_total_tokens", "64", "--server.max_running_requests", "2")
    assert code == 0
    assert [(row["batch_size"], row["input_len"]) for row in rows] == [(1, 30), (2, 30)]
    out = capsys.readouterr().out
    assert "skipped: 302 tokens a sequence, and context_length is 256" in out
    assert out.count("skipped: max_running_requests is 2") == 2
    code, rows = bench(
        "--batch-size", "3", "--input-len", "30", "--output-len", "2", "--server.max_total_tokens", "64"
    )
    assert code == 1
    captured = capsys.readouterr()
    assert "skipped: the KV pool needs 96 tokens, and max_total_tokens is 64" in captured.out
    assert "nothing was measured" in captured.err
    assert len(rows) == 2


def test_a_prefill_is_one_step_whatever_the_rounds_of_a_server(bench: Any, monkeypatch: Any) -> None:
    recorder = Recorder(monkeypatch)
    sizes = ("--batch-size", "2", "--input-len", "100", "--output-len", "2", "--skip-warmup")
    bench(*sizes, "--server.max_prefill_tokens", "16", "--server.chunked_prefill_size", "8")
    assert recorder.steps == [(2, 200, False), (2, 2, False)]


def test_prompts_are_seeded_and_decode_steps_logged(
    bench: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "pymllm_core.bench.one_batch.time_batch",
        lambda engine, prompts, output_len, *rest: (
            seen.append((prompts, output_len)),
            time_batch(engine, prompts, output_len, *rest),
        )[1],
    )
    bench("--input-len", "8", "16", "--output-len", "20", "--log-decode-step", "7")
    bench("--input-len", "8", "--output-len", "20", "--seed", "43")
    # Each setting is warmed up twice: what the first one compiles, the second captures.
    warm, again, first, _, _, second, _, _, other = seen
    assert warm == (first[0], 9)
    assert again == (first[0], 2)
    assert first[1] == 20
    assert [len(prompts) for prompts, _ in seen] == [1] * 9
    assert first[0][0] != second[0][0][:8]
    # The seed of a setting is the run's plus its number.
    assert other[0] != first[0]
    assert capsys.readouterr().out.count("decode step 7: ") == 2


def test_profiles_are_readable_traces(bench: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("PYMLLM_TORCH_PROFILER_DIR", str(tmp_path / "traces"))
    sizes = ("--input-len", "8", "--output-len", "9", "--run-name", "a b/c")
    bench(*sizes, "--profile", "--profile-steps", "2", "--profile-record-shapes")
    paths = sorted((tmp_path / "traces").iterdir())
    stem = "pymllm_profile_a_b_c_bs1_in8_out9"
    assert [path.name for path in paths] == [f"{stem}_decode_step4.trace.json", f"{stem}_prefill.trace.json"]
    events = [json.loads(path.read_text())["traceEvents"] for path in paths]
    names = [{event.get("name") for event in found} for found in events]
    assert {"decode step 4", "decode step 5"} <= names[0]
    assert not {"decode step 3", "decode step 6", "prefill"} & names[0]
    assert "prefill" in names[1]
    assert any("Input Dims" in event.get("args", {}) for event in events[1])
    out = capsys.readouterr().out
    assert all(f"trace: {path} (open it in https://ui.perfetto.dev)" in out for path in paths)
    bench(*sizes, "--profile", "--profile-stage", "decode", "--profile-start-step", "1", "--run-name", "d")
    assert (tmp_path / "traces" / "pymllm_profile_d_bs1_in8_out9_decode_step1.trace.json").exists()
    assert not (tmp_path / "traces" / "pymllm_profile_d_bs1_in8_out9_prefill.trace.json").exists()


def test_correct_prints_text_and_measures_nothing(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = bench("--correct", "--output-len", "6")
    out = capsys.readouterr().out
    assert code == 0
    assert rows == []
    assert out.count("served alone: the same") == 3
    assert "prompt: The capital of France is\nanswer: " in out
    assert bench("--correctness-test", "--prompt", "the end", "--output-len", "3")[0] == 0
    assert capsys.readouterr().out.startswith("prompt: the end\nanswer: ")


def test_the_model_may_be_an_argument_and_values_end_where_it_begins(
    bench: Any, folder: Path, monkeypatch: Any
) -> None:
    found = registry_of(TOY)
    argv = ["bench", "one-batch", "--input-len", "8", "9", str(folder), "--server.load_format", "dummy"]
    rows = folder / "rows.jsonl"
    assert cli.run([*argv, "--output-len", "2", "--result-filename", str(rows)], found) == 0
    assert [json.loads(line)["input_len"] for line in rows.read_text().splitlines()] == [8, 9]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--image", "x.png"], "--image is refused: no installed model takes images"),
        (["--prompt", "x"], "--prompt is for --correct"),
        (["--batch-size", "0"], "0 is not in the range x>=1"),
        (["--profile-activities", "TPU"], "'TPU' is not one of 'CPU', 'GPU'"),
        (["--profile", "--profile-start-step", "127"], "the longest answer has 127 decode steps"),
        (["--profile", "--profile-activities", "GPU"], "GPU records nothing here"),
        (["--inputlen", "8"], "there is no option --inputlen; did you mean --input-len?"),
        (["--server.prot", "8"], "there is no flag --server.prot; did you mean --server.port"),
    ],
)
def test_mistakes_are_named(
    argv: list[str], message: str, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = bench(*argv)
    assert code == 2
    assert rows == []
    assert message in capsys.readouterr().err


def test_limits_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pymllm_core.device import describe_cpu

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured: list[str] = []

    def matrix(_: torch.device, kind: str) -> float:
        measured.append(kind)
        return 1e12

    def read(_: torch.device) -> float:
        measured.append("read")
        return 1e9

    monkeypatch.setattr(limits_module, "measure_matrix", matrix)
    monkeypatch.setattr(limits_module, "measure_read", read)
    first = limits_module.device_limits(describe_cpu(), "bfloat16")
    assert measured == ["read", "bfloat16", "int8"]
    assert limits_module.device_limits(describe_cpu(), "bfloat16") == first
    # Another dtype adds its rate; another number of threads is another device.
    wider = limits_module.device_limits(describe_cpu(), "float32")
    assert measured[3:] == ["float32"]
    assert set(wider.matrix) == {"bfloat16", "int8", "float32"}
    limits_module.device_limits(describe_cpu(), "float32", again=True)
    assert measured[4:] == ["read", "float32", "int8"]
    (file,) = (tmp_path / "pymllm" / "limits").iterdir()
    file.write_text("no JSON")
    assert limits_module.device_limits(describe_cpu(), "bfloat16").read == 1e9
    assert measured[7:] == ["read", "bfloat16", "int8"]


def test_limits_are_of_the_right_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any CPU of the last decade reads 0.5 to 2000 GB/s, and multiplies float32 at 1 GFLOP/s to 100 TFLOP/s."""
    monkeypatch.setattr(limits_module, "_READ_BYTES", {"cpu": 64 << 20})
    monkeypatch.setattr(limits_module, "_MATRIX", {"cpu": 256})
    monkeypatch.setattr(limits_module, "_SECONDS", 0.02)
    assert 5e8 < limits_module.measure_read(torch.device("cpu")) < 2e12
    for kind in ("float32", "int8"):
        rate = limits_module.measure_matrix(torch.device("cpu"), kind)
        assert rate is not None
        assert 1e9 < rate < 1e14
