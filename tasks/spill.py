"""The spill: replies that are here while Postgres is not, on this machine's disk until Postgres has them.

A lane that drains while its ledger is away writes what it could not record, fsynced, into a file of its own, so that
an impatient SIGKILL costs nothing. Whoever resumes the run on this machine records it. The lane holds a lock on
its file for as long as it lives: what is locked is not ours to load. Files hold answers, so they are private.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Self

import orjson
import structlog
from pydantic import TypeAdapter, ValidationError

from schemas.attempts import LaneId, RunId
from schemas.records import Record
from tasks.ledger import attempts, runs
from tasks.ledger.connection import Ledger, PoisonValue
from tasks.ledger.rows import storable

log = structlog.get_logger("farthing.spill")

_RECORD: TypeAdapter[Record] = TypeAdapter(Record)


@dataclass
class Spill:
    """One lane's file. It exists only while there is something in it."""

    folder: Path
    run: str
    lane_id: LaneId
    _file: IO[bytes] | None = None
    _kept: int = 0

    @classmethod
    async def of(cls, ledger: Ledger, folder: Path, run_id: RunId, lane_id: LaneId) -> Spill:
        """The spill of a lane of that run."""
        return cls(folder, await runs.find_mark(ledger, run_id), lane_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        return self.folder / f"{self.run}-lane-{self.lane_id}.jsonl"

    def keep(self, records: Sequence[Record]) -> None:
        """Make these, and only these, durable here; with none, the file goes. A disk that refuses is only logged."""
        try:
            if records:
                self._write(b"".join(map(_encode, records)))
            else:
                self._forget()
        except OSError as error:
            log.warning("replies cannot wait on disk", lane=self.lane_id, error=error.strerror)
            return
        if len(records) > self._kept:
            log.warning("replies wait on disk for Postgres", lane=self.lane_id, replies=len(records))
        self._kept = len(records)

    def _write(self, lines: bytes) -> None:
        """Replace what is there. Killed half-way, it leaves old lines after new ones, and both are true."""
        file = self._file or self._open()
        file.seek(0)
        file.write(lines)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())

    def close(self) -> None:
        """Let the file go, to be loaded by whoever resumes the run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever loads it holds it for a moment: not now, then
        except OSError:
            file.close()
            raise
        _sync_folder(self.folder)
        self._file = file
        return file

    def _forget(self) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self.close()


async def load(ledger: Ledger, run_id: RunId, folder: Path) -> int:
    """Record what dead lanes of the run left on this machine; returns how many replies that were.

    Each in a transaction of its own: some may have become durable after all, and those must count once.
    """
    loaded = 0
    for path in sorted(folder.glob(f"{await runs.find_mark(ledger, run_id)}-lane-*.jsonl")):
        with _claimed(path) as file:
            if file is None:
                continue  # its lane lives
            lane_id = LaneId(int(path.stem.rpartition("-")[2]))
            for record in _decode(file.read()):
                with suppress(PoisonValue):  # what Postgres refuses stays unknown
                    await attempts.record(ledger, run_id, lane_id, [record])
                loaded += 1
            path.unlink()
    if loaded:
        log.info("recorded replies that waited on disk", run=run_id, replies=loaded)
    return loaded


@contextmanager
def _claimed(path: Path) -> Iterator[IO[bytes] | None]:
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def _encode(record: Record) -> bytes:
    """One line; nothing where the answer cannot be written. Tokens have done their work, and bytes become hex."""
    outcome = record.outcome
    if outcome is not None:
        reply = outcome.reply
        content = None if reply.content is None else storable(reply.content)
        outcome = replace(outcome, reply=replace(reply, tokens=None, content=content))
    try:
        return orjson.dumps(replace(record, outcome=outcome), default=bytes.hex, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # a lone surrogate in an answer
        return b""


def _decode(raw: bytes) -> Iterator[Record]:
    """The whole lines; a torn last one was never promised to anyone."""
    for line in raw.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            continue
        try:
            record = _RECORD.validate_json(line)
        except ValidationError:
            log.warning("a line of the spill cannot be read: its attempt stays unknown")
            continue
        ending = record.ending
        if ending is not None and ending.text_digest is not None:
            ending = replace(ending, text_digest=bytes.fromhex(ending.text_digest.decode()))
        yield replace(record, ending=ending)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
