"""A tiny trained model that shows pymllm at work without a download."""

from __future__ import annotations
