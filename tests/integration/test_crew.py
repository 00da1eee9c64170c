"""Lanes in a cluster: how long a run waits for a slot, what it takes back, and how it ends where nobody comes.

The ledger is real. The cluster is played by hand; acceptance/test_engines.py has a real Dask and a real Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import pytest

from schemas.engines import Engine
from schemas.fleets import Absence
from tasks import crew
from tasks.crew import Crew
from tasks.lanes import INTERRUPTED, Ended
from tasks.ledger import leases, runs
from tasks.ledger.connection import Ledger
from tasks.ledger.runs import Run
from tasks.witness import Witness
from tests.ledgers import opening, sql

#: How long a run waits for a slot, in seconds.
WITHIN_S = 0.3


@dataclass
class Task:
    """A task of a cluster, as much of it as a crew uses. Nobody works on it but the test."""

    wrapped_future: Future[Ended] = field(default_factory=Future)
    task_run_id: UUID = field(default_factory=uuid4)

    def result(self, timeout: float | None = None) -> Ended:
        return self.wrapped_future.result(timeout)


@pytest.fixture
async def run(ledger: Ledger) -> Run:
    return await runs.open_run(ledger, opening())


@pytest.fixture
def tasks() -> list[Task]:
    return [Task(), Task()]


@pytest.fixture
def lanes(ledger: Ledger, run: Run, tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    monkeypatch.setattr(crew, "EVERY_S", 0.01)
    with ThreadPoolExecutor(2) as threads:  # hangs where a task is waited for after all
        yield Crew(Engine.DASK, Witness(ledger, run.run_id), Absence(WITHIN_S), threads)


async def watch(lanes: Crew, tasks: list[Task]) -> list[Ended | Exception]:
    for number, task in enumerate(tasks, start=1):
        lanes.add(number, task)  # type: ignore[arg-type]  # it is played by hand
    return await asyncio.wait_for(lanes.watch(), 30)


async def begin(ledger: Ledger, run: Run, task: Task) -> None:
    """The cluster had a slot: the lane is in the ledger."""
    lane_id = await leases.register(ledger, run.run_id)
    detail = {"lane": lane_id, "shown_as": str(task.task_run_id)}
    await runs.note(ledger, run.run_id, leases.SHOWN_AS, detail, key=str(lane_id))


async def test_where_no_slot_comes_free_the_lanes_are_taken_back_and_it_is_said_what_to_do(
    lanes: Crew, tasks: list[Task]
) -> None:
    first, second = await watch(lanes, tasks)
    assert first == second
    assert isinstance(first, Ended)
    assert first.reason == "no_slot"
    assert "no slot of the dask cluster" in first.advice
    assert "add workers to it" in first.advice
    assert all(each.wrapped_future.cancelled() for each in tasks)


async def test_while_a_lane_is_at_work_the_others_wait_for_a_slot_until_the_run_needs_none(
    ledger: Ledger, ledger_url: str, run: Run, lanes: Crew, tasks: list[Task]
) -> None:
    await begin(ledger, run, tasks[0])
    watching, since_s = asyncio.create_task(watch(lanes, tasks)), time.monotonic()
    await asyncio.sleep(3 * WITHIN_S)
    assert not any(each.wrapped_future.done() for each in tasks)
    sql(ledger_url, "UPDATE shard SET state = 'done'")
    tasks[0].wrapped_future.set_result(Ended("done"))
    assert await watching == [Ended("done"), Ended("done")]
    assert time.monotonic() - since_s > 3 * WITHIN_S
    assert tasks[1].wrapped_future.cancelled()


async def test_a_lane_that_has_left_is_waited_for_only_so_long(
    ledger: Ledger,
    ledger_url: str,
    run: Run,
    lanes: Crew,
    tasks: list[Task],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its process may end before it has told how it ended; Dask's do, interrupted."""
    monkeypatch.setattr(crew, "REPLY_WITHIN_S", WITHIN_S)
    for task in tasks:
        await begin(ledger, run, task)
        assert task.wrapped_future.set_running_or_notify_cancel()
    await runs.change_state(ledger, run.run_id, "paused", runs.INTERRUPTED)
    watching, since_s = asyncio.create_task(watch(lanes, tasks)), time.monotonic()
    await asyncio.sleep(2 * WITHIN_S)
    assert not watching.done(), "they drain"
    for (lane_id,) in sql(ledger_url, "SELECT lane_id FROM lane"):
        await leases.leave(ledger, run.run_id, lane_id, "paused")
    assert await watching == [Ended("paused", INTERRUPTED)] * 2
    assert time.monotonic() - since_s > 3 * WITHIN_S


async def test_a_pause_ends_the_wait_for_a_slot(ledger: Ledger, run: Run, lanes: Crew, tasks: list[Task]) -> None:
    """As by Ctrl-C: there is no lane to hear it."""
    lanes.absence.within_s = 60
    await runs.change_state(ledger, run.run_id, "paused", runs.INTERRUPTED)
    assert await watch(lanes, tasks) == [Ended("paused", INTERRUPTED)] * 2


async def test_asked_twice_to_end_it_waits_for_no_lane(
    ledger: Ledger, run: Run, lanes: Crew, tasks: list[Task]
) -> None:
    """Nor for the task of one that is at work, which no cluster cancels."""
    await runs.change_state(ledger, run.run_id, "paused", runs.INTERRUPTED)
    await begin(ledger, run, tasks[0])
    assert tasks[0].wrapped_future.set_running_or_notify_cancel()
    lanes.give_up()
    assert await watch(lanes, tasks) == [Ended(runs.INTERRUPTED, INTERRUPTED)] * 2
    assert [each.wrapped_future.cancelled() for each in tasks] == [False, True]


async def test_asked_once_while_no_pause_reaches_the_lanes_they_are_interrupted_and_waited_for(
    ledger: Ledger, run: Run, lanes: Crew, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Postgres is away: what is in flight is kept on disk. Asked again it waits for nobody."""
    told: list[object] = []
    monkeypatch.setattr(crew.engines, "interrupt", lambda _engine, task: told.append(task))
    await begin(ledger, run, tasks[0])
    assert tasks[0].wrapped_future.set_running_or_notify_cancel()
    lanes.give_up()
    watching = asyncio.create_task(watch(lanes, tasks))
    await asyncio.sleep(2 * WITHIN_S)
    assert (told, watching.done(), tasks[1].wrapped_future.cancelled()) == ([tasks[0]], False, True)
    lanes.give_up()
    assert await watching == [Ended(runs.INTERRUPTED, INTERRUPTED)] * 2


async def test_what_ended_a_lane_is_told_beside_how_another_ended(
    ledger: Ledger, run: Run, lanes: Crew, tasks: list[Task]
) -> None:
    tasks[0].wrapped_future.set_exception(error := ValueError())
    tasks[1].wrapped_future.set_result(Ended("budget", "raise it"))
    assert await watch(lanes, tasks) == [error, Ended("budget", "raise it")]
