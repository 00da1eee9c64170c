"""Orders: alone responsible for reading in a process of its own, for whoever is at the other end of a socket.

Arrow is C++, and a corrupt file can end the process that reads it. This one holds nothing that would be missed: it
keeps no ledger, writes no core dump, and is gone as soon as its owner is. That is for crashes, not against an attack
by a file: it has the user's rights, what object stores want, and its owner's ear.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from schemas.errors import FarthingError, Unforeseen
from schemas.readings import BLOCK_CHARACTERS, Block, More, Opened, Order, Raised, Reply
from tasks.documents import trail
from tasks.documents.draws import draw
from tasks.documents.planning import list_files, plan
from tasks.documents.reading import read_labels, read_shard

_PR_SET_PDEATHSIG = 1

_READINGS: Mapping[str, Callable[..., Iterable[Any]]] = {
    "list_files": list_files,
    "plan": lambda **arguments: [plan(**arguments)],
    "draw": lambda **arguments: [draw(**arguments)],
    "read_shard": read_shard,
    "read_labels": read_labels,
}


def serve(descriptor: int, owner: int) -> None:
    """Do what comes through the socket until its other end closes or `owner`, a process, is gone."""
    die_with(owner)
    with suppress(OSError):  # where the kernel has to choose whom to kill for memory, it is not Postgres
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold documents
    with socket.socket(fileno=descriptor) as line, line.makefile("rb") as orders, line.makefile("wb") as replies:
        trail.follow(lambda name: _send(replies, Opened(name)))
        with suppress(EOFError, ConnectionError):
            obey(orders, replies)


def obey(orders: BinaryIO, replies: BinaryIO) -> None:
    """Answer every order. Raises EOFError or ConnectionError when nobody gives any more."""
    _send(replies, Opened(""))
    rows: Iterator[Any] = iter(())
    most = 0
    while True:
        order = pickle.load(orders)  # noqa: S301 (from the process that started this one)
        if isinstance(order, Order):
            rows, most = _begin(order), order.rows
        else:
            assert isinstance(order, More)
        _send(replies, _answer(rows, most))


def die_with(owner: int) -> None:
    """End with the process that started this one, also in the middle of a read; where only Linux knows how."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:  # it was faster
        os._exit(1)


def take(rows: Iterable[Any], most: int) -> list[Any]:
    """The next rows: at most so many, and not much more than BLOCK_CHARACTERS."""
    block: list[Any] = []
    characters = 0
    for row in rows:
        block.append(row)
        characters += len(getattr(row, "text", ""))
        if len(block) >= most or characters >= BLOCK_CHARACTERS:
            break
    return block


def _begin(order: Order) -> Iterator[Any]:
    """The order's rows. Nothing is read before the first is asked for."""
    yield from _READINGS[order.what](**order.arguments)


def _answer(rows: Iterator[Any], most: int) -> Reply:
    try:
        return Block(take(rows, most))
    except FarthingError as error:
        return Raised(error)
    except Exception as error:  # a bug: it stops whoever asked, and condemns no file
        return Raised(Unforeseen.of(error))


def _send(replies: BinaryIO, reply: Reply) -> None:
    content = pickle.dumps(reply, pickle.HIGHEST_PROTOCOL)
    replies.write(len(content).to_bytes(8, "big"))
    replies.write(content)
    replies.flush()
