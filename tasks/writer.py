"""Group commit: what many documents want durable at the same moment goes to Postgres in one transaction.

Away or full, Postgres makes everyone here wait, and so nothing more is sent (G4); a value that it refuses is
found by halving and fails alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from tasks.ledger.connection import LedgerFull, PassingFailure, PoisonValue

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Waiting(Generic[Item, Answer]):
    item: Item
    done: asyncio.Future[Answer]


@dataclass
class Writer(Generic[Item, Answer]):
    """Commits items together: `commit` gets up to `most` of them and returns an answer for each, in order.

    `linger_s` is how long the first item waits for company. `trouble` says what keeps it from committing.
    """

    commit: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]]
    linger_s: float
    most: int = 500
    trouble: str | None = None
    _queue: list[_Waiting[Item, Answer]] = field(default_factory=list)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

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
            batch, self._queue = self._queue[: self.most], self._queue[self.most :]
            if not self._queue:
                self._arrived.clear()
            try:
                await self._settle(batch)
            except Exception as error:
                self._fail(batch, error)
                raise

    async def _settle(self, batch: list[_Waiting[Item, Answer]]) -> None:
        try:
            answers = await self._commit_surely([waiting.item for waiting in batch])
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

    async def _commit_surely(self, items: list[Item]) -> Sequence[Answer]:
        """Commit, again and again while Postgres is away: every append of the ledger is safe to repeat."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type((PassingFailure, LedgerFull)),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            before_sleep=self._remember_trouble,
            reraise=True,
        )
        answers: Sequence[Answer] = await retrying(self.commit, items)
        self.trouble = None
        return answers

    def _remember_trouble(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        self.trouble = str(state.outcome.exception())

    def _fail(self, batch: list[_Waiting[Item, Answer]], error: Exception) -> None:
        for waiting in batch:
            if not waiting.done.done():
                waiting.done.set_exception(error)
