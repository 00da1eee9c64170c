"""Group commit: what many documents want durable at the same moment goes to Postgres in one transaction.

Away or full, Postgres makes everyone here wait, and so nothing more is sent (G4); a value that it refuses is
found by halving and fails alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tasks.ledger.connection import PoisonValue
from tasks.patience import Patience

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Waiting(Generic[Item, Answer]):
    item: Item
    done: asyncio.Future[Answer]


@dataclass
class Writer(Generic[Item, Answer]):
    """Commits items together: `commit` gets up to `most` of them and returns an answer for each, in order.

    `linger_s` is how long the first item waits for company. `trouble` says what keeps it from committing; `patience`
    is without a draining lane's: what waits here was sent, or must be refused in order.
    """

    commit: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]]
    linger_s: float
    most: int = 500
    patience: Patience = field(default_factory=Patience)
    _queue: list[_Waiting[Item, Answer]] = field(default_factory=list)
    _batch: list[_Waiting[Item, Answer]] = field(default_factory=list)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def trouble(self) -> str | None:
        return self.patience.trouble

    @property
    def pending(self) -> list[Item]:
        """What is not known to be durable, in order."""
        return [waiting.item for waiting in (*self._batch, *self._queue)]

    async def put(self, item: Item) -> Answer:
        """Returns when the item is durable. Raises PoisonValue if Postgres refuses this very item."""
        waiting: _Waiting[Item, Answer] = _Waiting(item, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._arrived.set()
        return await waiting.done

    async def run(self) -> None:
        """Commit for ever; cancel it when nothing waits any more."""
        while True:
            await self._arrived.wait()
            await asyncio.sleep(self.linger_s)
            batch = self._batch = self._queue[: self.most]
            del self._queue[: self.most]
            if not self._queue:
                self._arrived.clear()
            try:
                await self._settle(batch)
            except Exception as error:
                self._fail(batch, error)
                raise
            self._batch = []

    async def _settle(self, batch: list[_Waiting[Item, Answer]]) -> None:
        try:
            answers = await self.patience.ask(self.commit, [waiting.item for waiting in batch])
        except PoisonValue as poison:
            if len(batch) == 1:
                self._fail(batch, poison)
                return
            middle = len(batch) // 2
            await self._settle(batch[:middle])
            await self._settle(batch[middle:])
            return
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.done.done():
                waiting.done.set_result(answer)

    def _fail(self, batch: list[_Waiting[Item, Answer]], error: Exception) -> None:
        for waiting in batch:
            if not waiting.done.done():
                waiting.done.set_exception(error)
