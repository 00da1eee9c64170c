"""Patience: it asks again while Postgres is away, and a drain ends that where nothing is to be saved."""

from __future__ import annotations

import asyncio

import pytest

from tasks.drains import Draining, rest
from tasks.ledger.connection import PassingFailure
from tasks.patience import Patience


async def test_it_asks_until_there_is_an_answer_and_says_what_keeps_it() -> None:
    patience, troubles = Patience(), []

    async def ask() -> int:
        troubles.append(patience.trouble)
        if len(troubles) < 3:
            raise PassingFailure("Postgres is away")
        return 7

    assert await patience.ask(ask) == 7
    assert troubles == [None, "Postgres is away", "Postgres is away"]
    assert patience.trouble is None


async def test_a_drain_ends_the_asking_whether_it_comes_before_or_meanwhile() -> None:
    draining, asked = asyncio.Event(), 0

    async def ask() -> None:
        nonlocal asked
        asked += 1
        raise PassingFailure("Postgres is away")

    patience = Patience(draining)
    waiting = asyncio.create_task(patience.ask(ask))
    while not asked:
        await asyncio.sleep(0)
    draining.set()
    with pytest.raises(Draining):
        await asyncio.wait_for(waiting, 10)
    asked = 0
    with pytest.raises(Draining):
        await asyncio.wait_for(patience.ask(ask), 10)
    assert asked == 1


async def test_an_answer_that_comes_at_once_is_taken_in_a_drain_too() -> None:
    draining = asyncio.Event()
    draining.set()
    assert await Patience(draining).ask(asyncio.sleep, 0, "answer") == "answer"


async def test_a_rest_ends_by_itself_or_by_a_drain() -> None:
    draining = asyncio.Event()
    await rest(draining, 0.001)
    draining.set()
    with pytest.raises(Draining):
        await rest(draining, 3600)
