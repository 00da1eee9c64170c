"""Reading processes that come to grief at certain files: the stand-in for an Arrow that a corrupt file kills.

A file's name says what befalls whoever reads it, and when: `b-segv-reading.parquet`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tasks.documents import orders, trail
from tasks.documents.readers import Reader


def segv(_file: Path) -> None:
    """A real wild pointer."""
    ctypes.string_at(0)


def abort(_file: Path) -> None:
    os.abort()


def kill(_file: Path) -> None:
    """What the kernel does for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def leave(_file: Path) -> None:
    os._exit(7)


def bug(_file: Path) -> None:
    """Ours, not the file's."""
    raise ZeroDivisionError("what a document says")


def hang(_file: Path) -> None:
    """A file on a mount that is gone."""
    time.sleep(3600)


def accident(file: Path) -> None:
    """Dies the first time only."""
    mark = file.with_suffix(".seen")
    if not mark.exists():
        mark.touch()
        segv(file)


def remove(file: Path) -> None:
    file.unlink(missing_ok=True)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def replace(file: Path) -> None:
    """The same bytes, in another file: no longer the one that was planned on, for all we know in mid-read."""
    other = file.with_suffix(".other")
    other.write_bytes(file.read_bytes() + b"more")
    other.rename(file)


def rewrite(file: Path) -> None:
    """Other bytes of the same length, in place."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 3)
        opened.write(b"\0\0\0\0")


def become_folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir(exist_ok=True)


#: What a file can do to a reading process, and what can befall a file under it.
DEATHS: dict[str, Callable[[Path], None]] = {"segv": segv, "abort": abort, "leave": leave}
CHANGES: dict[str, Callable[[Path], None]] = {
    each.__name__: each for each in (remove, truncate, replace, rewrite, become_folder)
}
_ACTS = {**DEATHS, **CHANGES, "kill": kill, "bug": bug, "hang": hang, "accident": accident}


def serve(root: Path, descriptor: int, owner: int) -> None:
    """Serve as usual, but for the files below `root` whose names say otherwise."""
    trail.follow(lambda name: _opened.__setitem__(0, root / name))
    read = Reader.read

    def read_and_suffer(self: Reader, rows: range) -> Iterator[tuple[int, Any]]:
        for number, batch in enumerate(read(self, rows)):
            _suffer(_phase(self), rows.start, number)
            yield batch

    Reader.read = read_and_suffer  # type: ignore[method-assign]  # this process is for nothing else
    orders.serve(descriptor, owner)


#: The file that is being read.
_opened = [Path()]


def _phase(reader: Reader) -> str:
    if "text" in reader._columns:
        return "reading"
    return "planning" if "id" in reader._columns else "labelling"


def _suffer(phase: str, first_row: int, batch: int) -> None:
    """Act at the second shard of a file that is to be read, else at the first chance."""
    _, act, when = [*_opened[0].stem.split("-"), "", ""][:3]
    if act in _ACTS and when == phase and batch == 0 and (act not in CHANGES or first_row > 0):
        _ACTS[act](_opened[0])
