"""Processes of our own: started afresh, never forked, and joined to this one by a pair of sockets.

`multiprocessing`'s own start would import the program's main module again, and leave a third process that keeps
account of semaphores. Nobody else has the sockets' ends: whichever side ends, the other reads the end of the file.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

# Nothing is imported from the folder that the program was started in, which `-c` would search first.
_PROGRAM = (
    "import sys; sys.path[:] = filter(None, sys.path); from multiprocessing.connection import Connection; "
    "pipe = Connection({fd}); sys.path[:] = pipe.recv(); pipe.recv()(pipe)"
)


def start_child(main: Callable[[Any], None]) -> tuple[subprocess.Popen[bytes], Any]:
    """A process that runs `main`, a function of a module, with its end of the pipe; and this side's end.

    Both ends are `multiprocessing.connection.Connection`. The child does not see Ctrl-C and SIGTERM, which may be sent
    to it too, until `main` unblocks them (SIGNALS).
    """
    ours, theirs = socket.socketpair()
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    with theirs, _interrupts_blocked():
        process = subprocess.Popen(
            [sys.executable, *flags, "-c", _PROGRAM.format(fd=theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    pipe = Connection(ours.detach())
    # A child that died at once is found out by whoever reads from it.
    with contextlib.suppress(OSError):
        pipe.send(sys.path)
        pipe.send(main)
    return process, pipe


SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""A terminal sends the first to all of its group, a service manager the second: the parent decides what follows."""


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
