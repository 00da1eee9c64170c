"""A TCP proxy that hurts: what passes between a client and a server comes late, in pieces, in part or not at all.

It runs in a thread of its own, stands before whatever listens on a port, and may be told otherwise at any time. What
strikes is drawn from a seed, for each chunk of bytes that passes in a fault's direction.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Self

CHUNK = 1 << 16
#: The simple query by which psycopg commits, as it is on the wire.
COMMIT = b"Q\0\0\0\x0bCOMMIT\0"


class Kind(StrEnum):
    """What may happen to a chunk, or to the connection from that chunk on."""

    LATENCY = "latency"  # the chunk waits
    TRICKLE = "trickle"  # a few bytes at a time, with a pause after each
    SLICES = "slices"  # odd slices, one packet each
    CUT = "cut"  # both ends see the end of the stream
    RESET = "reset"  # both ends see a reset
    HALF_CLOSE = "half close"  # the receiver sees the end of the stream, the other direction goes on
    BLACK_HOLE = "black hole"  # nothing passes any more, and nobody is told
    LOST_ANSWER = "lost answer"  # the chunk passes, the answer to it is swallowed, and both ends see a reset


class Toward(StrEnum):
    """The direction in which bytes run."""

    SERVER = "server"
    CLIENT = "client"


@dataclass(frozen=True)
class Fault:
    """A kind of fault in one direction. It strikes `share` of the chunks that contain `holding`, or only the `nth`.

    `after` bytes pass before a cut, reset, half close or black hole. `seconds` is a latency, the pause of a trickle
    or how long a black hole lasts before it ends in a reset; `size` is the most bytes of a piece.
    """

    kind: Kind
    toward: Toward
    share: float = 1.0
    after: int = 0
    seconds: float = 0.002
    size: int = 64
    holding: bytes = b""
    nth: int | None = None

    def __str__(self) -> str:
        return f"{self.kind} toward {self.toward}"


class _Over(Exception):
    """The connection is over, by a reset or politely."""

    def __init__(self, *, is_reset: bool) -> None:
        self.is_reset = is_reset


@dataclass
class Proxy:
    """A proxy before a port of this machine, at `port` while the block lasts. `struck` counts by fault."""

    before: int
    seed: int = 0
    port: int = 0
    connections: int = 0
    met: Counter[Fault] = field(default_factory=Counter)
    struck: Counter[Fault] = field(default_factory=Counter)
    _faults: tuple[Fault, ...] = ()
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def play(self, *faults: Fault) -> None:
        """From now on these faults and no others; the first that strikes a chunk wins. What was hurt stays hurt."""
        self._faults = faults

    def choose(self, toward: Toward, chunk: bytes, chance: random.Random) -> Fault | None:
        """What strikes this chunk."""
        for fault in self._faults:
            if fault.toward is toward and fault.holding in chunk:
                self.met[fault] += 1
                if self.met[fault] == fault.nth if fault.nth else chance.random() < fault.share:
                    self.struck[fault] += 1
                    return fault
        return None

    def _call(self, work: Awaitable[None]) -> None:
        async def awaited() -> None:
            await work

        asyncio.run_coroutine_threadsafe(awaited(), self._loop).result(10)

    async def _listen(self) -> None:
        self._links: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=CHUNK, backlog=4096)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.current_task()
        assert link is not None
        self._links.add(link)
        link.add_done_callback(self._links.discard)
        self.connections += 1
        chance = random.Random(f"{self.seed}.{self.connections}")
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self.before, limit=CHUNK)
        except (OSError, asyncio.CancelledError):
            _end(writer, is_reset=True)
            return
        with suppress(
            asyncio.CancelledError
        ):  # the proxy closes: to be told to asyncio's streams it would be an error
            await _Link(self, chance, (reader, writer), upstream).run()


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class _Link:
    """One connection of a client, and the one to the server that stands for it."""

    proxy: Proxy
    chance: random.Random
    client: Ends
    server: Ends
    is_deaf: bool = False

    async def run(self) -> None:
        pumps = [
            asyncio.create_task(self._pump(self.client[0], self.server[1], Toward.SERVER)),
            asyncio.create_task(self._pump(self.server[0], self.client[1], Toward.CLIENT)),
        ]
        is_reset = False
        try:
            await asyncio.gather(*pumps)
        except _Over as over:
            is_reset = over.is_reset
        except OSError:
            is_reset = True  # one end was reset, and so is the other
        finally:
            for pump in pumps:
                pump.cancel()
            try:
                await asyncio.gather(*pumps, return_exceptions=True)
            finally:  # the proxy may close meanwhile
                _end(self.client[1], is_reset=is_reset)
                _end(self.server[1], is_reset=is_reset)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, toward: Toward) -> None:
        """Pass on until the stream ends, then its end too."""
        while chunk := await reader.read(CHUNK):
            if toward is Toward.CLIENT and self.is_deaf:
                raise _Over(is_reset=True)
            fault = self.proxy.choose(toward, chunk, self.chance)
            if fault is None:
                await _pass(writer, chunk)
            elif (bend := _BENDS.get(fault.kind)) is not None:
                await bend(fault, self.chance, writer, chunk)
            else:
                await self._break(fault, reader, writer, chunk)
        if writer.can_write_eof():
            writer.write_eof()

    async def _break(
        self, fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chunk: bytes
    ) -> None:
        """Let pass what may pass; then the connection, or this direction of it, is broken for good."""
        left = len(chunk) if fault.kind is Kind.LOST_ANSWER else fault.after
        while left > len(chunk):
            left -= len(chunk)
            await _pass(writer, chunk)
            if not (chunk := await reader.read(CHUNK)):
                return
        self.is_deaf = fault.kind is Kind.LOST_ANSWER
        await _pass(writer, chunk[:left])
        match fault.kind:
            case Kind.CUT | Kind.RESET:
                raise _Over(is_reset=fault.kind is Kind.RESET)
            case Kind.HALF_CLOSE:
                writer.write_eof()
                await _swallow(reader)
            case Kind.BLACK_HOLE:
                with suppress(TimeoutError):
                    async with asyncio.timeout(fault.seconds):
                        await _swallow(reader)
                raise _Over(is_reset=True)


async def _pass(writer: asyncio.StreamWriter, chunk: bytes) -> None:
    writer.write(chunk)
    await writer.drain()


async def _swallow(reader: asyncio.StreamReader) -> None:
    while await reader.read(CHUNK):
        pass


async def _delay(fault: Fault, chance: random.Random, writer: asyncio.StreamWriter, chunk: bytes) -> None:
    await asyncio.sleep(fault.seconds)
    await _pass(writer, chunk)


async def _trickle(fault: Fault, chance: random.Random, writer: asyncio.StreamWriter, chunk: bytes) -> None:
    for at in range(0, len(chunk), fault.size):
        await _pass(writer, chunk[at : at + fault.size])
        await asyncio.sleep(fault.seconds)


async def _slice(fault: Fault, chance: random.Random, writer: asyncio.StreamWriter, chunk: bytes) -> None:
    at = 0
    while at < len(chunk):
        size = chance.randint(1, fault.size)
        await _pass(writer, chunk[at : at + size])
        await asyncio.sleep(0)  # the next one is a packet of its own
        at += size


#: What changes only when, and in what pieces, a chunk arrives.
_BENDS: dict[Kind, Callable[[Fault, random.Random, asyncio.StreamWriter, bytes], Awaitable[None]]] = {
    Kind.LATENCY: _delay,
    Kind.TRICKLE: _trickle,
    Kind.SLICES: _slice,
}


def _end(writer: asyncio.StreamWriter, *, is_reset: bool) -> None:
    """Close one end: politely, after what was written, or by a reset."""
    if is_reset:
        peer = writer.get_extra_info("socket")
        with suppress(OSError):
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()
