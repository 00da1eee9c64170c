"""The bulkhead: alone responsible for files being read in another process, so that a crash there is an error here.

Arrow is C++: a corrupt file can make it end the process (a wild pointer, an abort, all memory taken), and no `except`
sees that. So a lane, and whoever plans, has a process that reads for it (tasks/documents/orders.py) and hands over
blocks when asked: what is in memory is a block, on either side. Nothing here imports Arrow.

When that process dies, another begins the reading again and goes on after the last row that was handed over: some
deaths are an accident, and a machine short of memory has many. A file that kills two at the same row is told of with
its name. One that hangs can be left at any time.

This keeps crashes out, not code: whoever takes that process over through a file speaks to this one in pickles.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import structlog

from schemas.documents import Document, InputFile, Manifest, Shard, UnfitDocument
from schemas.errors import ConfigurationError, InputChanged, InputUnavailable, InputUnreadable, Problem
from schemas.jobs import Input
from schemas.readings import BLOCK, Block, More, Opened, Order, Raised, Reply
from schemas.samples import Design, Sample

log = structlog.get_logger("farthing.bulkhead")

#: What reads, as the arguments of a Python.
PROGRAM = ("-P", "-m", "tasks.documents")
#: How many processes in a row may die without a further row.
_DEATHS = 2
#: Waiting for a block is worth a word after so long.
SLOW_AFTER_S = 10.0
#: So many labels, or names of files, travel together; they are short.
_LABELS = 5000
#: How long a killed process may take to go. One that waits for a dead disk does not even hear that.
_GONE_WITHIN_S = 1.0
_BUFFER = 1024 * 1024
#: Not for the process that reads. What object stores want (AWS_, GOOGLE_) it needs.
_SECRETS = ("FARTHING_", "DEEPSEEK_", "PREFECT_", "OPENAI_", "OTEL_", "PG")


class Running(Protocol):
    """As much of `subprocess.Popen` as is needed of a process that reads."""

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def start(line: socket.socket) -> Running:
    """A process that reads for whoever holds the other end of `line`. Raises OSError where there can be none.

    Signals of a terminal or of a service's stop reach all its processes: this one must outlast a drain.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_SECRETS)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return subprocess.Popen(  # noqa: S603 (our own interpreter and program, two numbers)
            [sys.executable, *PROGRAM, str(line.fileno()), str(os.getpid())],
            env=environment,
            pass_fds=(line.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # the last words of an abort may quote a document
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ReaderDied(Exception):
    """The process that reads ended: `how`, and which file it had opened last, by its name in the manifest.

    An empty name: it had opened none yet.
    """

    def __init__(self, how: str, opened: str) -> None:
        super().__init__(how)
        self.how = how
        self.opened = opened

    @property
    def is_killed(self) -> bool:
        """By the kernel for want of memory, or by somebody: no corrupt file does that by itself."""
        return self.how == "SIGKILL"


@dataclass
class Bulkhead:
    """Reads files at a safe distance, one reading at a time. Use it as an asynchronous context."""

    _reader: _Reader | None = None
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: Since when the process has owed a block, on the loop's clock; None: it owes none.
    _asked_at: float | None = None

    async def __aenter__(self) -> Self:
        with suppress(OSError):  # there is another chance when it is needed
            self._reader = await _Reader.start()  # what it has to import takes it a while
        return self

    async def __aexit__(self, *_: object) -> None:
        self._give_up()

    @property
    def trouble(self) -> str | None:
        """What has been read for long, for people; None: nothing has."""
        if self._asked_at is None:
            return None
        seconds = asyncio.get_running_loop().time() - self._asked_at
        if seconds < SLOW_AFTER_S:
            return None
        opened = self._reader.opened if self._reader is not None else ""
        return f"reading {opened or 'the input'} for {seconds:.0f} s"

    async def list_files(self, input: Input, *, root: Path = Path(".")) -> list[str]:
        """What `tasks.documents.planning.list_files` returns and raises."""
        names: list[str] = []
        try:
            async with aclosing(self._read(Order("list_files", {"input": input, "root": root}, _LABELS))) as blocks:
                async for block in blocks:
                    names += block
        except ReaderDied as died:
            raise ConfigurationError(Problem("input.path", _explain(died))) from None
        except InputUnavailable as error:
            raise ConfigurationError(str(error)) from None
        return names

    async def plan(
        self,
        input: Input,
        *,
        shard_rows: int,
        partitions: Sequence[str] = (),
        limit: int | None = None,
        root: Path = Path("."),
    ) -> Manifest:
        """What `tasks.documents.plan` returns and raises; a file that ends whoever reads it is one more problem."""
        arguments = {"shard_rows": shard_rows, "partitions": tuple(partitions), "limit": limit, "root": root}
        try:
            async with aclosing(self._read(Order("plan", {"input": input, **arguments}))) as blocks:
                manifest: Manifest = (await anext(blocks))[0]
        except ReaderDied as died:
            raise ConfigurationError(Problem(died.opened or "input.path", _explain(died))) from None
        except (InputUnreadable, InputUnavailable) as error:
            raise ConfigurationError(str(error)) from None
        return manifest

    async def draw(self, input: Input, manifest: Manifest, design: Design, *, root: Path = Path(".")) -> Sample:
        """What `tasks.documents.draws.draw` returns and raises; a file that ends whoever reads it is one problem."""
        arguments = {"input": input, "manifest": manifest, "design": design, "root": root}
        try:
            async with aclosing(self._read(Order("draw", arguments))) as blocks:
                sample: Sample = (await anext(blocks))[0]
        except ReaderDied as died:
            raise ConfigurationError(Problem(died.opened or "input.path", _explain(died))) from None
        except (InputChanged, InputUnavailable) as error:
            raise ConfigurationError(str(error)) from None
        return sample

    async def read_shard(
        self, input: Input, file: InputFile, shard: Shard, *, root: Path = Path("."), rows: int = BLOCK
    ) -> AsyncGenerator[Sequence[Document | UnfitDocument], None]:
        """What `tasks.documents.read_shard` yields and raises, in blocks of at most so many `rows`.

        Raises InputUnreadable, too, where the shard ends whoever reads it, and InputUnavailable where it was killed.
        """
        order = Order("read_shard", {"input": input, "file": file, "shard": shard, "root": root}, rows)
        try:
            async with aclosing(self._read(order)) as blocks:
                async for block in blocks:
                    yield block
        except ReaderDied as died:
            place = f"{file.path}: rows {shard.first_row} to {shard.first_row + shard.row_count - 1}"
            if died.is_killed:
                raise _lacks_memory(place) from None
            raise InputUnreadable(f"{place}: {_explain(died)}, and start a new run") from None

    async def read_labels(
        self, input: Input, manifest: Manifest, *, root: Path = Path(".")
    ) -> AsyncGenerator[Sequence[tuple[int, str | None]], None]:
        """What `tasks.documents.read_labels` yields and raises, in blocks; InputUnreadable as `read_shard` does."""
        order = Order("read_labels", {"input": input, "manifest": manifest, "root": root}, _LABELS)
        try:
            async with aclosing(self._read(order)) as blocks:
                async for block in blocks:
                    yield block
        except ReaderDied as died:
            raise InputUnreadable(f"{died.opened or 'input.path'}: {_explain(died)}, and start a new run") from None

    async def _read(self, order: Order) -> AsyncGenerator[Sequence[Any], None]:
        """The order's blocks, from as many processes as it takes. Raises ReaderDied where that is too many."""
        given = seen = deaths = 0
        message: Order | More = order
        async with self._turn:
            while True:
                try:
                    rows = await self._ask(message)
                except ReaderDied as died:
                    deaths += 1
                    log.warning("a reading process died", how=died.how, file=died.opened, deaths=deaths)
                    if deaths == _DEATHS:
                        raise
                    message, seen = order, 0
                    continue
                if not rows:
                    return
                fresh = rows[max(0, given - seen) :]
                seen += len(rows)
                if fresh:
                    given, deaths = seen, 0  # a file that kills does so at the same row
                    yield fresh
                message = More()

    async def _ask(self, message: Order | More) -> Sequence[Any]:
        """The next block. Whoever gives up waiting for it gives up the process as well."""
        self._asked_at = asyncio.get_running_loop().time()
        try:
            if self._reader is None:
                self._reader = await _Reader.start()
            return await self._reader.ask(message)
        except OSError as error:
            self._give_up()
            raise _does_not_start(str(error.strerror)) from None
        except ReaderDied as died:
            is_started = self._reader is not None and self._reader.is_started
            self._give_up()
            if not is_started:
                raise _does_not_start(died.how) from None
            raise
        except asyncio.CancelledError:
            self._give_up()
            raise
        finally:
            self._asked_at = None

    def _give_up(self) -> None:
        if self._reader is not None:
            self._reader.end()
        self._reader = None


class _Reader:
    """One process that reads, and the line to it."""

    def __init__(self, process: Running, receiver: asyncio.StreamReader, sender: asyncio.StreamWriter) -> None:
        self._process = process
        self._receiver = receiver
        self._sender = sender
        #: The file that the order under way opened last, by its name in the manifest; "": none yet.
        self.opened = ""
        #: Whether it came so far that it could be asked.
        self.is_started = False

    @classmethod
    async def start(cls) -> Self:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = start(theirs)
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        return cls(process, *await asyncio.open_connection(sock=ours, limit=_BUFFER))

    async def ask(self, message: Order | More) -> Sequence[Any]:
        """What it answers. Raises ReaderDied, and what it raised itself."""
        if isinstance(message, Order):
            self.opened = ""
        try:
            self._sender.write(pickle.dumps(message))
            while True:
                match await self._receive():
                    case Opened(name):
                        self.opened, self.is_started = name, True
                    case Block(rows):
                        return rows
                    case Raised(error):
                        raise error
        except (asyncio.IncompleteReadError, ConnectionError):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GONE_WITHIN_S)  # its line is closed before it has its exit code
            raise ReaderDied(self.end(), self.opened) from None

    async def _receive(self) -> Reply:
        size = int.from_bytes(await self._receiver.readexactly(8), "big")
        content = await self._receiver.readexactly(size)
        reply: Reply = pickle.loads(content)  # noqa: S301 (as trusted as our own Arrow was: see above)
        return reply

    def end(self) -> str:
        """Make an end of it, if it has not come to one; returns how it ended, like `SIGSEGV`."""
        self._sender.close()
        self._process.kill()
        try:
            return _word(self._process.wait(_GONE_WITHIN_S))
        except subprocess.TimeoutExpired:
            return "it hangs"


def _word(code: int) -> str:
    """How a process ended, by its exit code as `subprocess` has it."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _explain(died: ReaderDied) -> str:
    why = "there was not enough memory, or " if died.is_killed else ""
    return f"reading it ended the reading process ({died.how}): {why}it is corrupt; write the file anew"


def _lacks_memory(place: str) -> InputUnavailable:
    return InputUnavailable(
        f"{place}: reading it ended the reading process (SIGKILL): there was not enough memory, or somebody killed "
        "it; free memory or use fewer lanes, then resume the run; if it happens again, write the file anew with "
        "smaller row groups, and start a new run"
    )


def _does_not_start(how: str) -> InputUnavailable:
    return InputUnavailable(
        f"the process that reads the input does not start ({how}): check this machine's memory and its limit of "
        "processes; then resume the run"
    )
