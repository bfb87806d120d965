"""Seconds from the command to a healthy server, by stage, and its memory; one JSON line a run.

usage: python benchmarks/startup.py [MODEL...] [--repeat 5] [-- SETTINGS...]

Where kernels compile at the first start, the first row of a model shows it and the later ones are of a warm cache.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

QUESTION = {"model": "default", "messages": [{"role": "user", "content": "你好,只回复:ok"}], "max_tokens": 8}


READY = re.compile(r"ready in \S+ s: (.+)$", re.MULTILINE)
"""The line that the server logs; see `pymllm_core.engine.status.StageTimes`."""


def main() -> None:
    argv, settings = sys.argv[1:], []
    if "--" in argv:
        place = argv.index("--")
        argv, settings = argv[:place], argv[place + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["demo"])
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args(argv)
    for model in args.models:
        for _ in range(args.repeat):
            print(json.dumps(measure(model, settings)), flush=True)


def measure(model: str, settings: list[str]) -> dict[str, object]:
    """One start, one answer, one stop. Raises SystemExit with the server's output where it does not start."""
    with tempfile.TemporaryFile() as log:
        return start(model, settings, log)


def start(model: str, settings: list[str], log: IO[bytes]) -> dict[str, object]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = [model, "--server.port", str(port), *settings]
    # As the console script does it, which lies nowhere where the packages are only on PYTHONPATH.
    command = [sys.executable, "-c", "from pymllm_core.cli import main; main()", "serve", *flags]
    begin = time.perf_counter()
    server = subprocess.Popen(command, stdout=log, stderr=log)
    listening = None
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                break
        except urllib.error.HTTPError:
            listening = listening or time.perf_counter() - begin
        except OSError:
            if server.poll() is not None:
                raise SystemExit(f"pymllm serve {' '.join(flags)} ended:\n{text(log)}") from None
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
    stages = READY.search(text(log))
    return {
        "test": "startup",
        "command": f"pymllm serve {model} {' '.join(settings)}".strip(),
        "listening_s": round(listening or ready, 2),
        "ready_s": round(ready, 2),
        "stages": stages
        and {
            name: float(seconds)
            for name, _, seconds in (part.rpartition(" ") for part in stages[1].split(", "))
        },
        "peak_rss_mb": int(status["VmHWM"].split()[0]) // 1024,
        "rss_anon_mb": int(status["RssAnon"].split()[0]) // 1024,
    }


def text(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


if __name__ == "__main__":
    main()
