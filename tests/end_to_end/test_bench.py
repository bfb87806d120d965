"""The benchmarks in processes of their own: the historic entry point, and a server under load."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx


def test_the_manuals_command(tmp_path: Path) -> None:
    out = tmp_path / "OUT.jsonl"
    flags = (
        "--server.model_path demo --server.tokenizer_path demo --server.load_format safetensors "
        "--server.dtype float16 --server.mem_fraction_static 0.1 --server.max_running_requests 1 "
        "--server.max_total_tokens 2048 --server.disable_radix_cache --server.log_level info --run-name NAME "
        "--batch-size 1 --input-len 256 512 1024 --output-len 8 --limits off"
    )
    command = [sys.executable, "-m", "pymllm.bench_one_batch", *flags.split(), "--result-filename", str(out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["run_name"], row["input_len"], row["dtype"]) for row in rows] == [
        ("NAME", length, "float16") for length in (256, 512, 1024)
    ]
    assert rows[0]["command"] == f"pymllm bench one-batch {flags} --result-filename {out}"
    assert rows[0]["read_bandwidth"] is None


def test_a_load_test_of_the_demo(tmp_path: Path) -> None:
    """The real server in a process of its own, loaded by the real client in another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    python, url = [sys.executable, "-m", "pymllm_core"], f"http://127.0.0.1:{port}"
    out = tmp_path / "rows.jsonl"
    asks = tmp_path / "asks.jsonl"
    asks.write_text('{"messages": [{"role": "user", "content": "Hello!"}]}\n{"prompt": "One, two,"}\n')
    flags = ["--url", url, "--num-requests", "6", "--result-filename", str(out)]
    lengths = ["--input-len", "20:40", "--output-len", "5:9", "--slo", "ttft:60000"]
    command = [*python, "serve", "demo", "--server.port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stderr=log, env=environment)
    try:
        wait(url, server)
        for arguments in ([*lengths, "--concurrency", "3"], [*lengths, "--request-rate", "50"]):
            done = subprocess.run([*python, "bench", "serve", *flags, *arguments], timeout=120, check=False)
            assert done.returncode == 0
        done = subprocess.run(
            [*python, "bench", "serve", *flags, "--dataset", str(asks), "--output-len", "6"],
            timeout=120,
            check=False,
        )
        assert done.returncode == 0
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
    closed, opened, dataset = (json.loads(line) for line in out.read_text().splitlines())
    for row in (closed, opened):
        assert (row["completed"], row["errors"], row["goodput_share"]) == (6, {}, 1.0)
        # The server computes exactly what was asked for, whatever the model has to say.
        assert 6 * 20 <= row["input_tokens"] <= 6 * 40
        assert 6 * 5 <= row["output_tokens"] <= 6 * 9
        assert row["server"]["attention"]
        assert row["server"]["settings"]["server"]["model_path"] == "demo"
        assert row["ttft_ms_p50"] <= row["e2e_ms_p50"]
    assert (closed["max_in_flight"], closed["model"]) == (3, "demo")
    assert (dataset["completed"], dataset["errors"]) == (6, {})


def wait(url: str, server: subprocess.Popen[bytes]) -> None:
    """Until the server is healthy."""
    deadline = time.monotonic() + 90
    while True:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert server.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server did not become healthy in time"
        time.sleep(0.1)
