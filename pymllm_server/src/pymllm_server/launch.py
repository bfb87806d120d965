"""``pymllm-server``, ``python -m pymllm.server.launch``, ``pymllm serve``: from flags to a running server."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from pymllm_core.config import Settings
from pymllm_core.errors import PymllmError
from pymllm_server.interface import Engine
from pymllm_server.listen import is_loopback, listen

if TYPE_CHECKING:
    from pymllm_server.serving import Server

logger = logging.getLogger(__name__)


def configure_logging(level: str) -> None:
    """Plain lines on stderr, uvicorn's among them."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    # Its lines on processes and start-up say nothing that ours do not.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))
    for noisy in ("asyncio", "httpcore", "httpx", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))


def make_engine(settings: Settings) -> Engine:
    """The real engine; imported here, so that wrong flags and busy ports are told without torch's delay."""
    from pymllm_core.engine.async_engine import AsyncEngine
    from pymllm_core.engine.status import process_began

    return AsyncEngine(settings, began=process_began())


def keep_what_is_there() -> None:
    """Collect garbage from now on, but never look at what the start has made.

    Modules and the model are hundreds of thousands of objects that stay: collections among them took a fifth of
    the imports' time, and would later hold up every request for 0.2 s at a time.
    """
    gc.freeze()
    gc.enable()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """What would interrupt does so at the end, when there is a server that can end in order; SIGTERM, too."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield
    finally:
        # Uvicorn hands the signal on after it has shut down; a server that was told to end has not failed.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def run(settings: Settings) -> int:
    """Serve until stopped; the exit code."""
    server_settings = settings.server
    gc.disable()  # until `keep_what_is_there`
    configure_logging(server_settings.log_level)
    try:
        sock = listen(server_settings.host, server_settings.port)
    except PymllmError as error:
        logger.log(logging.ERROR, "%s", error)  # a traceback would hide the message
        return 1
    keys = server_settings.api_key or server_settings.admin_api_key
    if not is_loopback(server_settings.host) and not keys:
        logger.warning(
            "listening on %s without a key: whoever reaches port %d can use the model; set --server.api_key",
            server_settings.host,
            server_settings.port,
        )
    failures: list[BaseException] = []
    server: Server | None = None

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        if server is not None:
            server.should_exit = True

    with sock:
        engine = make_engine(settings)
        with contextlib.suppress(KeyboardInterrupt):
            with _interrupts_held():
                engine.start()
                # Imported while the engine imports torch.
                from pymllm_server.app import create_app
                from pymllm_server.serving import Server

                app = create_app(engine, settings, on_ready=keep_what_is_there, on_failure=on_failure)
                server = Server(app)
            server.run(sockets=[sock])
        gc.enable()
    loading = engine.state == "loading"
    if not app.state.server.stop_engine():
        # The interpreter cannot end in order beside a thread that is still in torch.
        if loading:
            logger.info("stopped while loading")
        else:
            logger.error("the engine does not stop; ending the process")
        logging.shutdown()
        os._exit(0 if loading else 1)
    if failures:
        return 1
    logger.info("stopped")
    return 0


def main(argv: Sequence[str] | None = None, *, model: str | None = None) -> int:
    """Serve as the flags say; the exit code. model: goes before --server.model_path."""
    from pymllm_core.settings import load_settings_or_exit

    try:
        return run(load_settings_or_exit(sys.argv[1:] if argv is None else argv, model=model))
    except KeyboardInterrupt:
        return 130


# Its own --help is off, because the settings' help lists every flag that may follow.
@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.option("--host", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", help="Port to listen on (default 30000).")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="MODEL [FLAGS]...")
def serve(host: str | None, port: str | None, arguments: tuple[str, ...]) -> None:
    """Serve MODEL over HTTP. MODEL comes first; every flag --server.* and --quantization.* may follow."""
    flags = list(arguments)
    model = flags.pop(0) if flags and not flags[0].startswith("-") else None
    for name, value in (("host", host), ("port", port)):
        if value is not None:
            flags.append(f"--server.{name}={value}")
    raise SystemExit(main(flags, model=model))


if __name__ == "__main__":
    raise SystemExit(main())
