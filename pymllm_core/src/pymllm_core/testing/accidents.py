"""The toy model in whatever process it is loaded, and engines that come to grief there when they are told to."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pymllm_core import plugins
from pymllm_core.config import Settings
from pymllm_core.engine.loop import load_engine
from pymllm_core.engine.status import Progress, ProgressCallback

if TYPE_CHECKING:
    from pymllm_core.engine.engine import Engine
    from pymllm_core.plan import Plan

BURNS, KILLED, EXITS, HANGS = 201, 202, 203, 204
"""Prompts that begin with these tokens make a step raise, kill the process, end it with code 3, or never end."""


class Unknown(Exception):
    """An error that cannot be unpickled: it wants two arguments and keeps one."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


def load_toy(
    settings: Settings, progress: ProgressCallback, planned: Callable[[Plan], None], cancel: threading.Event
) -> Engine:
    """A `loop.Load` whose engine has accidents; no plugins but the core and the toy's."""
    progress(Progress("importing torch"))
    import torch

    from pymllm_core.testing.engines import TOY, registry_of

    torch.set_num_threads(1)
    found = registry_of(TOY)
    plugins.registry = lambda: found  # type: ignore[assignment]
    logging.getLogger("toy").info("the %s is loaded in process %d", "toy", os.getpid())
    logging.getLogger("toy").debug("nobody asked for this")
    engine = load_engine(settings, progress, planned, cancel)
    launch = engine.runner.launch

    def launch_or_not(batch: Any) -> Any:
        first = {chunk.sequence.tokens[0] for chunk in batch.chunks}
        if BURNS in first:
            raise RuntimeError("the device is on fire")
        if KILLED in first:
            os.kill(os.getpid(), signal.SIGKILL)
        if EXITS in first:
            os._exit(3)
        if HANGS in first:
            time.sleep(600)
        return launch(batch)

    engine.runner.launch = launch_or_not  # type: ignore[method-assign]
    return engine


def load_never(
    settings: Settings, progress: ProgressCallback, planned: Callable[[Plan], None], cancel: threading.Event
) -> Engine:
    """Hangs where nothing can interrupt it, as in an import."""
    progress(Progress("waiting", 1, 4))
    while True:
        time.sleep(600)


def load_and_fail(
    settings: Settings, progress: ProgressCallback, planned: Callable[[Plan], None], cancel: threading.Event
) -> Engine:
    """Raises what the model's name says."""
    errors = {"plain": ValueError("no luck"), "unknown": Unknown("no luck", 7)}
    raise errors[settings.server.model_path]
