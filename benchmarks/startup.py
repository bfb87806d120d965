"""Seconds from the command to a healthy server, and its memory; one JSON line a run.

usage: python benchmarks/startup.py [MODEL] [--repeat 5] [-- SETTINGS...]
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

QUESTION = {"model": "default", "messages": [{"role": "user", "content": "你好,只回复:ok"}], "max_tokens": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    for _ in range(args.repeat):
        print(json.dumps(measure(args.model, args.settings)), flush=True)


def measure(model: str, settings: list[str]) -> dict[str, object]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        str(Path(sys.executable).parent / "pymllm"),
        "serve",
        model,
        "--server.port",
        str(port),
        *settings,
    ]
    begin = time.perf_counter()
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    listening = None
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                break
        except urllib.error.HTTPError:
            listening = listening or time.perf_counter() - begin
        except OSError:
            if server.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {server.returncode}") from None
        time.sleep(0.02)
    ready = time.perf_counter() - begin
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(QUESTION).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        json.load(answer)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{server.pid}/status").read_text().splitlines())
    server.send_signal(signal.SIGINT)
    server.wait()
    return {
        "test": "startup",
        "command": f"pymllm serve {model} {' '.join(settings)}".strip(),
        "listening_s": round(listening or ready, 2),
        "ready_s": round(ready, 2),
        "peak_rss_mb": int(status["VmHWM"].split()[0]) // 1024,
        "rss_anon_mb": int(status["RssAnon"].split()[0]) // 1024,
    }


if __name__ == "__main__":
    main()
