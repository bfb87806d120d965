"""The one exception tree. A message says what was asked, what was found and what to do."""

from __future__ import annotations


class PymllmError(Exception):
    """Base of every error that pymllm raises on purpose."""


class ConfigError(PymllmError):
    """A setting is wrong, or several contradict each other or the machine."""


class PluginError(PymllmError):
    """A plugin could not be loaded, or two plugins claim the same name."""


class SelectionError(PymllmError):
    """No installed plugin can do what was asked; the message lists who was refused and why."""


class ModelNotFoundError(PymllmError):
    """No model source knows the name."""


class CheckpointError(PymllmError):
    """A model folder, config or weight file is missing something or is malformed."""


class MemoryPlanError(ConfigError):
    """The memory plan does not fit; the message has the numbers and the flag to change."""


class RequestError(PymllmError):
    """One request is at fault. `status` is the HTTP status, `param` the field to blame."""

    status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(RequestError):
    """`max_queued_requests` is reached; the client may retry later."""

    status = 429


class EngineError(PymllmError):
    """The engine failed or was stopped; requests in flight end with this."""
