"""The crew: lanes of a run that are tasks of a Dask or Ray cluster, watched until each has ended.

A cluster takes any number of tasks, begins as many as it has slots for, and says nothing of the others. The ledger
knows who has begun. So a run for which no slot comes free ends and says so, as one does that no worker comes for, and
lanes that nobody needs any more are taken back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Coroutine
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import structlog
from prefect.futures import PrefectWrappedFuture

from schemas.engines import Engine
from schemas.fleets import Absence, FleetSeen, Kept, LaneSeen, Shown
from tasks import engines
from tasks.lanes import INTERRUPTED, Ended
from tasks.ledger import runs
from tasks.witness import Witness

log = structlog.get_logger("farthing.crew")

EVERY_S = 1.0
#: So long the reply is waited for of a lane that has left, by the ledger: its process may have ended before it told.
REPLY_WITHIN_S = 10.0
#: A lane that works in another process.
Future = PrefectWrappedFuture[Coroutine[Any, Any, Ended], Any]


@dataclass
class Crew:
    """The lanes of one run by number: their `tasks` in the cluster, and what each came to, as it is `awaited`."""

    engine: Engine
    witness: Witness
    absence: Absence
    #: Where the cluster's replies are waited for, one thread for each lane.
    threads: Executor
    tasks: dict[int, Future] = field(default_factory=dict)
    awaited: dict[int, asyncio.Future[Ended | Exception]] = field(default_factory=dict)
    #: What is known here to be over, whatever comes of its task.
    _over: dict[int, Ended] = field(default_factory=dict)
    #: When it was first seen that a lane had left.
    _left_at: dict[int, float] = field(default_factory=dict)
    #: How often it was asked to end, and whether the lanes at work were told.
    _asks: int = 0
    _are_told: bool = False

    def add(self, number: int, task: Future) -> None:
        """Watch this lane, too."""
        self.tasks[number] = task
        self.awaited[number] = asyncio.get_running_loop().run_in_executor(self.threads, self._await, number)

    def give_up(self) -> None:
        """Have the lanes drain; asked again, or after the run was paused, which told them, wait for nobody."""
        self._asks += 1

    async def watch(self) -> list[Ended | Exception]:
        """Look on until every lane has ended or is not waited for any more; what each came to, by number."""
        try:
            await self._watch()
        except BaseException:
            await self._end(self._pending, Ended(runs.INTERRUPTED, INTERRUPTED), by_force=True)
            raise
        return [self._over.get(number) or awaited.result() for number, awaited in sorted(self.awaited.items())]

    async def _watch(self) -> None:
        while self._pending:
            await self.witness.look()
            seen = FleetSeen([self._see(number) for number in self.tasks], self.witness.is_run_over)
            is_absent = self.absence.is_over(time.monotonic(), is_at_work=seen.is_at_work)
            if self._asks > 1 or (self._asks and self.witness.is_run_over):
                await self._end(self._pending, Ended(runs.INTERRUPTED, INTERRUPTED), by_force=True)
            elif unneeded := [*seen.late, *self._silent()]:
                await self._end(unneeded, self.witness.unneeded)
            elif is_absent:
                await self._end(seen.waiting, Ended("no_slot", self._explain_wait()))
            elif self._asks and not self._are_told:
                await self._end(seen.waiting, Ended(runs.INTERRUPTED, INTERRUPTED))
                await self._tell()
            else:
                await asyncio.wait(self.awaited.values(), timeout=EVERY_S, return_when=asyncio.FIRST_EXCEPTION)

    @property
    def _pending(self) -> list[int]:
        return [each for each, awaited in self.awaited.items() if each not in self._over and not awaited.done()]

    def _see(self, number: int) -> LaneSeen:
        """Of one that died the cluster begins the task again, if it has a slot."""
        kept = self.witness.of(self.tasks[number].task_run_id)
        has_begun = kept in (Kept.ALIVE, Kept.LEFT)
        is_over = number not in self._pending
        return LaneSeen(number, Shown.OVER if is_over else Shown.WORKING if has_begun else Shown.WAITING, kept)

    def _silent(self) -> list[int]:
        """Lanes that left long ago, and whose replies have not come: what they did is on the ledger."""
        now = time.monotonic()
        left = [each for each in self._pending if self.witness.of(self.tasks[each].task_run_id) is Kept.LEFT]
        return [each for each in left if now - self._left_at.setdefault(each, now) > REPLY_WITHIN_S]

    async def _end(self, numbers: Collection[int], ended: Ended, *, by_force: bool = False) -> None:
        """Take these back, and wait for them no more, whether the cluster could take them back or not."""
        self._over |= dict.fromkeys(numbers, ended)  # first: one who is interrupted below waits for none of them
        for number in numbers:
            try:
                await asyncio.to_thread(engines.take_back, self.engine, self.tasks[number], by_force=by_force)
            except Exception as error:  # a cluster that does not answer has nothing to take back
                log.warning("a lane is not taken back", lane=number, error=type(error).__name__)

    async def _tell(self) -> None:
        """Interrupt the lanes at work: Postgres is away, from which they would hear of a pause."""
        self._are_told = True
        for number in self._pending:
            try:
                await asyncio.to_thread(engines.interrupt, self.engine, self.tasks[number])
            except Exception as error:
                log.warning("a lane is not interrupted", lane=number, error=type(error).__name__)

    def _await(self, number: int) -> Ended | Exception:
        """How the lane ended. A task that is at work may go on after it was taken back: nobody waits for it then."""
        while number not in self._over:
            with suppress(TimeoutError):
                return await_lane(self.tasks[number], EVERY_S)
        return self._over[number]

    def _explain_wait(self) -> str:
        return (
            f"no slot of the {self.engine} cluster came free for a lane within {self.absence.within_s:g} s: end what "
            f"else works there, or add workers to it; then {INTERRUPTED}"
        )


def await_lane(task: Future, within_s: float | None = None) -> Ended | Exception:
    """How the lane ended, or what ended it: its shards are taken over by the others. Raises TimeoutError."""
    try:
        return cast(Ended, task.result(timeout=within_s))
    except TimeoutError:
        raise
    except Exception as error:
        log.warning("a lane's process ended", error=type(error).__name__)
        return error
