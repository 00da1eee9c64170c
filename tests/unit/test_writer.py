"""Group commit: items go together, wait out a Postgres that is away, and a poisoned one fails alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from tasks.ledger.connection import PassingFailure, PoisonValue
from tasks.writer import Writer

Commit = Callable[[Sequence[int]], "asyncio.Future[Sequence[int]]"]


class Store:
    """Squares numbers, refuses negative ones, and is away as often as it is told."""

    def __init__(self, away: int = 0) -> None:
        self.away = away
        self.batches: list[list[int]] = []

    async def commit(self, items: Sequence[int]) -> Sequence[int]:
        if self.away:
            self.away -= 1
            raise PassingFailure("Postgres is away")
        if any(item < 0 for item in items):
            raise PoisonValue("22P05")
        self.batches.append(list(items))
        return [item * item for item in items]


@asynccontextmanager
async def writing(store: Store, most: int = 500) -> AsyncIterator[Writer[int, int]]:
    writer: Writer[int, int] = Writer(store.commit, linger_s=0, most=most)
    task = asyncio.create_task(writer.run())
    try:
        yield writer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_is_put_at_the_same_moment_is_committed_together_and_answered_in_order() -> None:
    store = Store()
    async with writing(store) as writer:
        assert await asyncio.gather(*(writer.put(number) for number in range(5))) == [0, 1, 4, 9, 16]
    assert store.batches == [[0, 1, 2, 3, 4]]


async def test_no_batch_is_larger_than_most_and_nothing_is_left_behind() -> None:
    store = Store()
    async with writing(store, most=3) as writer:
        await asyncio.gather(*(writer.put(number) for number in range(8)))
    assert [len(batch) for batch in store.batches] == [3, 3, 2]


async def test_while_postgres_is_away_items_wait_and_the_writer_says_why() -> None:
    store = Store(away=1)
    async with writing(store) as writer:
        put = asyncio.create_task(writer.put(3))
        while writer.trouble is None:
            await asyncio.sleep(0)
        assert "away" in writer.trouble
        assert await put == 9
        assert writer.trouble is None


async def test_a_value_that_postgres_refuses_fails_alone() -> None:
    store = Store()
    async with writing(store) as writer:
        results = await asyncio.gather(*(writer.put(n) for n in (1, 2, -3, 4, 5)), return_exceptions=True)
    assert isinstance(results[2], PoisonValue)
    assert [result for result in results if not isinstance(result, PoisonValue)] == [1, 4, 16, 25]


async def test_an_error_that_no_rule_covers_reaches_everyone_who_waits_and_ends_the_writer() -> None:
    async def broken(_items: Sequence[int]) -> Sequence[int]:
        raise ZeroDivisionError

    writer: Writer[int, int] = Writer(broken, linger_s=0)
    task = asyncio.create_task(writer.run())
    with pytest.raises(ZeroDivisionError):
        await writer.put(1)
    with pytest.raises(ZeroDivisionError):
        await task
