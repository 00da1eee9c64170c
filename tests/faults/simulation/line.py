"""A lane's line to the ledger, which fails and dies by chance, and where it takes the place of tasks.ledger."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from schemas.attempts import LaneId, RunId
from tasks import enrichment, spill
from tasks.lanes import Ended, Lane
from tasks.ledger import attempts, budgets, leases, runs
from tasks.ledger.connection import LedgerFull, PassingFailure, PoisonValue
from tests.faults.simulation.world import World


@dataclass
class Line:
    """One process's connection to the ledger, in place of `Ledger`; with the process it dies.

    `doom` is how many durable steps are left until then. `cut_until`: until then nothing comes through.
    """

    world: World
    lane_id: int = 0
    doom: int | None = None
    cut_until: float = 0.0
    lane: Lane | None = None
    work: asyncio.Task[Ended] | None = None
    death: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def is_dead(self) -> bool:
        return self.death.done()

    async def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        """One transaction: it may fail before its COMMIT, or its answer may be lost after it."""
        world = self.world
        await self.step(f"{name} before")
        self._watch_drain(name)
        await self._arrive(name)
        if name == "record":
            _refuse_poison(arguments[2])
        granted = self._granted(name, arguments)
        answer = getattr(world.model, name)(*arguments, **named)
        self._watch_cap(granted, self._granted(name, arguments))
        await self.step(f"{name} after")
        if world.chance.random() < 0.3:
            await asyncio.sleep(world.chance.uniform(0, 0.01))
        if self._is_cut or world.happens(world.plan.forgotten, "answer lost"):
            raise PassingFailure("the answer to a COMMIT was lost")
        return answer

    async def step(self, what: str) -> None:
        """A durable step is near: perhaps the last. Whoever is dead waits here for ever."""
        if self.doom is not None and not self.is_dead:
            self.doom -= 1
            if self.doom < 0:
                self.world.faults[f"killed at {what.split()[0]}"] += 1
                self.die()
        if self.is_dead:
            await asyncio.Event().wait()

    async def _arrive(self, name: str) -> None:
        world = self.world
        is_slow = world.happens(world.plan.slow, "slow ledger")
        await asyncio.sleep(world.chance.uniform(1, 6) if is_slow else world.chance.uniform(0.001, 0.02))
        if self._is_cut:
            await asyncio.sleep(self.cut_until - world.clock())
            if world.chance.random() < 0.5:
                raise PassingFailure("the connection was cut")
        if self.is_dead:
            await asyncio.Event().wait()
        if not world.is_calm and any(start <= world.clock() < end for start, end in world.plan.outages):
            world.faults["outage"] += 1
            raise LedgerFull("full") if world.plan.is_full and name != "beat" else PassingFailure("away")
        if world.happens(world.plan.refused, "refused before COMMIT"):
            raise PassingFailure("a race was lost")

    @property
    def _is_cut(self) -> bool:
        return self.world.clock() < self.cut_until

    def die(self) -> None:
        """As SIGKILL: nothing more is done, and the kernel closes what was open."""
        if not self.is_dead:
            self.death.set_result(None)
        if self.lane_id:
            self.world.model.lanes[self.lane_id].has_session = False
        if self.lane is not None and self.lane.spill is not None:
            self.lane.spill.close()
            self.lane.spill = None
        if self.work is not None:
            self.work.cancel()

    def _watch_drain(self, name: str) -> None:
        if name == "intend" and self.lane is not None and self.lane.is_draining:
            self.world.problems.append(f"lane {self.lane_id} asked for intents while it drained")

    def _granted(self, name: str, arguments: Sequence[Any]) -> tuple[int, int]:
        """How much is granted of the budget that a grant is asked of, and its cap."""
        if name != "open_grant":
            return 0, 0
        budget = self.world.model.budgets[arguments[2]]
        return budget.granted, budget.cap

    def _watch_cap(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        """Under a cap that was lowered in the meantime nothing is granted; what was before stays."""
        granted, cap = after
        if granted > cap and after != before:
            self.world.problems.append(f"{granted} granted of {cap}")


def _refuse_poison(records: Sequence[Any]) -> None:
    if any(record.outcome is not None and record.outcome.reply.provider_id == "poison" for record in records):
        raise PoisonValue("a value is refused")


@asynccontextmanager
async def alive(line: Line, lane_id: LaneId, within_s: float) -> AsyncIterator[Line]:
    """The session that holds the lane's lock."""
    row = line.world.model.lanes[lane_id]
    try:
        async with asyncio.timeout(within_s):
            await line._arrive("session")
        row.has_session = True
        yield line
    except OSError:
        raise PassingFailure("the heartbeat hung") from None
    finally:
        row.has_session = False


#: Every function of tasks.ledger that lanes and the settling of a run call with a Ledger.
SEAM = {
    attempts: ("intend", "record", "find_results_now", "find_endings", "find_past_attempts", "find_paid_answer"),
    budgets: ("open_grant", "is_exhausted", "find_room", "close_grants"),
    leases: (
        "register",
        "beat",
        "hold",
        "claim",
        "finish",
        "fail",
        "leave",
        "bury_dead",
        "has_unfinished",
        "has_living",
    ),
    runs: ("open_run", "find_run", "change_state", "note", "settle"),
}


async def _call(name: str, line: Line, *arguments: Any, **named: Any) -> Any:
    return await line.call(name, *arguments, **named)


async def name_of(_line: Line, run_id: RunId) -> str:
    return f"run-{run_id}-simulated"


async def no_sums(_line: Line, _job: str) -> None:
    """The model stores no sums: it has the rows."""


@contextmanager
def seams() -> Iterator[None]:
    """Let the product call `Line` where it would call Postgres."""
    with pytest.MonkeyPatch.context() as patch:
        for module, names in SEAM.items():
            for name in names:
                patch.setattr(module, name, partial(_call, name))
        patch.setattr(leases, "alive", alive)
        patch.setattr(spill.runs, "find_mark", name_of)
        patch.setattr(runs, "refresh_sums", no_sums)
        patch.setattr(os, "fsync", lambda _descriptor: None)
        patch.setattr(enrichment, "opened", _opened)
        yield


@asynccontextmanager
async def _opened(settings: Any, _role: object, **_size: int) -> AsyncIterator[Any]:
    """`settle_run` opens a ledger of its own; `require_database` hands it what stands for the database's URL."""
    yield settings
