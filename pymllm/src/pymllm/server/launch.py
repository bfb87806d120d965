"""The historic entry point: ``python3 -m pymllm.server.launch --server.model_path MODEL ...``."""

from __future__ import annotations

from pymllm_server.launch import main

if __name__ == "__main__":
    raise SystemExit(main())
