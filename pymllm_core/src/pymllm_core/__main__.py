"""``python -m pymllm_core`` is ``pymllm``."""

from pymllm_core.cli import main

main()
