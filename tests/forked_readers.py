"""Reading processes that are forked instead of started: the same code at the other end, for milliseconds of CPU.

For tests whose subject is not the start of that process; tests/faults/test_bad_input.py starts real ones.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from tasks import bulkhead
from tasks.documents import orders, pins
from tasks.documents.shelf import Shelf

_CONTEXT = multiprocessing.get_context("fork")


class Forked:
    """A forked process, as much like `subprocess.Popen` as `tasks.bulkhead.Running` asks for."""

    def __init__(self, serve: Callable[[int, int], None], descriptor: int) -> None:
        self._process = _CONTEXT.Process(target=_read, args=(serve, descriptor, os.getpid()), daemon=True)
        self._process.start()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked reader", timeout or 0)
        return self._process.exitcode


@contextmanager
def forked_readers(serve: Callable[[int, int], None] = orders.serve) -> Iterator[None]:
    """Let `tasks.bulkhead` fork; `serve` is what the processes do."""
    usual, bulkhead.start = bulkhead.start, partial(_fork, serve)
    try:
        yield
    finally:
        bulkhead.start = usual


def _fork(serve: Callable[[int, int], None], line: socket.socket) -> Forked:
    return Forked(serve, line.fileno())


def _read(serve: Callable[[int, int], None], descriptor: int, owner: int) -> None:
    """Only the line stays open: a copy of anything else would hide that its owner closed it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pins._shelf = Shelf(size=4)  # or files that the owner has open would be used, and are closed in a moment
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, 4096)
    serve(descriptor, owner)
    os._exit(0)
