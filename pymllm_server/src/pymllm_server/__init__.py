"""The HTTP side of pymllm: OpenAI's API, the historic /generate, health and administration."""

__version__ = "0.1.0"
