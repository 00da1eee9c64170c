"""A simulated run: real lanes in virtual time, on a model of the ledger and before a provider, which fail by seed.

What is real: tasks.lanes, climbs, shards, grants, writer, limiter, priming, drains, patience, waits, watch, spill,
and the settling of a run. What stands in: the functions of tasks.ledger that they call (`Line`, on the model), the
door to the provider (`Door`, before a `Provider` with a bill of its own), what reads Parquet (`Pages`), and the
clock.

One seed draws everything: how many documents and lanes, what goes wrong how often and when. A lane is killed by a
timer or at its n-th durable step, before or after the COMMIT or the sending; its line is dead from then on, and the
next start takes over. When the faults stop, the run has to get done.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import SecretStr

from schemas.attempts import Call, LaneId, Reply, RunId
from schemas.documents import Document, Duplicate, InputFile, Shard, Unfit, UnfitDocument
from schemas.errors import InputChanged, InputUnavailable, LedgerUnavailable
from schemas.jobs import Job
from schemas.settings import Settings
from tasks import enrichment, spill
from tasks.lanes import Ended, Lane, LanePlan
from tasks.ledger import leases, runs
from tasks.ledger.leases import LeaseTimes
from tasks.ledger.runs import Run
from tasks.spill import Spill
from tests.faults.simulation.line import Line, name_of
from tests.faults.simulation.model import LONG_AGO, Model
from tests.faults.simulation.plan import Plan
from tests.faults.simulation.provider import Provider
from tests.faults.simulation.world import World
from tests.ledgers import BOOK, JOB, make_manifest, opening

TIMES = LeaseTimes(beat_every_s=4.0, fence_after_s=12.0, grace_s=6.0, dead_after_s=18.0, comes_within_s=math.inf)
#: The provider's world runs so much faster than the real one: waits of two minutes take six seconds.
SCALE = 0.05
#: A start that takes longer than this has hung; after the faults stopped, so many more have to be enough.
START_WITHIN_S, STARTS_WITHIN = 900.0, 8
#: The one run of a simulation.
RUN = RunId(1)
#: Documents that are read together.
BLOCK = 5


@dataclass
class Door:
    """One lane's door to the provider, in place of `Completions`."""

    provider: Provider
    line: Line
    offset: timedelta = timedelta(0)

    def now(self) -> datetime:
        return self.provider.world.now()

    async def correct_clock(self) -> None:
        """It is never off: all of this world has one clock."""

    async def complete(self, call: Call) -> Reply:
        await self.line.step("send")
        return await self.provider.answer(call, self.line.lane_id)


@dataclass
class Pages:
    """What a lane reads, in place of `Bulkhead`: blocks of a shard's documents, or a reason why not."""

    world: World
    #: Nothing is ever read for long.
    trouble: None = None

    async def read_shard(
        self, _input: object, file: InputFile, shard: Shard, *, root: Path
    ) -> AsyncIterator[list[Document | UnfitDocument]]:
        first, world = shard.first_document_no, self.world
        for start in range(first, first + shard.document_count, BLOCK):
            await asyncio.sleep(world.chance.uniform(0.01, 0.1))
            if world.happens(world.plan.damaged, "input changed"):
                raise InputChanged(f"{file.path} is another file now")
            if world.happens(world.plan.damaged, "input unavailable"):
                raise InputUnavailable("the disk does not answer")
            yield [self._document(n) for n in range(start, min(start + BLOCK, first + shard.document_count))]

    def _document(self, number: int) -> Document | UnfitDocument:
        if number in self.world.plan.unfit:
            return UnfitDocument(number, f"d{number}", Unfit.EMPTY_TEXT)
        return Document(number, f"d{number}", f"text {number}")


@dataclass
class Simulation:
    """One seed's run, from its first start to its end."""

    seed: int
    folder: Path
    plan: Plan = field(init=False)
    world: World = field(init=False)
    provider: Provider = field(init=False)
    job: Job = field(init=False)
    starts: int = 0
    ends: list[str] = field(default_factory=list)
    #: The cap is lowered and raised between starts; what was granted under a higher one stays granted.
    highest_cap: int = 0
    #: Of any tier, over all lanes.
    highest_ceiling: int = 0
    _lines: list[Line] = field(default_factory=list)
    _ghosts: list[asyncio.Task[Ended]] = field(default_factory=list)

    async def run(self) -> None:
        """Start again and again until the run is done. Raises AssertionError where it never is."""
        self._set_up()
        mishaps = asyncio.create_task(self._play_mishaps())
        calm_starts, cap = 0, self.plan.cap
        while True:
            self.highest_cap = max(self.highest_cap, cap)
            run = await self._insist(self._open, cap)
            ended = await self._start(run)
            run = await self._insist(self._settle, run, ended)
            self.ends.append("/".join(end.reason for end in ended))
            if run.state == "done":
                break
            calm_starts += self.world.is_calm
            assert calm_starts <= STARTS_WITHIN, f"{calm_starts} starts without a fault, and still {self.ends[-3:]}"
            if run.reason == "budget":
                cap *= 2
            elif self.world.happens(0.2, "cap changed"):
                cap = max(1, int(cap * self.world.chance.choice((0.5, 0.9, 1.5))))
            await asyncio.sleep(self.world.chance.uniform(0, 3))
        mishaps.cancel()
        for ghost in self._ghosts:
            with suppress(asyncio.CancelledError):
                await ghost
        await asyncio.gather(mishaps, return_exceptions=True)

    def _set_up(self) -> None:
        loop, chance = asyncio.get_running_loop(), Random(self.seed)
        self.plan = Plan.draw(chance)
        self.world = World(self.plan, chance, Model(loop.time, self.plan.lanes), loop.time)
        self.provider = Provider(self.world)
        prompt = JOB.prompt + (" Think of red, of green, and of blue." * 60 if self.plan.is_long_prefix else "")
        each = {tier.name: self.plan.concurrency for tier in JOB.ladder}
        self.highest_ceiling = self.plan.concurrency
        ladder = tuple(tier.model_copy(update={"deadline_s": 20.0, "max_tokens": 64}) for tier in JOB.ladder)
        self.job = replace(JOB, prompt=prompt, concurrency=each, ladder=ladder)

    async def _open(self, line: Line, cap: int) -> Run:
        """What enrichment.open_run does once it has read job and input."""
        twins = [Duplicate(n, n - 1, is_same_text=n % 2 == 0) for n in sorted(self.plan.twins)]
        manifest = make_manifest(self.plan.documents, self.plan.shard_rows, twins)
        run: Run = await runs.open_run(line, opening(job=self.job, manifest=manifest, cap=cap))  # type: ignore[arg-type]  # a Line for a Ledger
        await spill.load(line, run.run_id, self.folder)  # type: ignore[arg-type]  # the same
        await leases.bury_dead(line, run.run_id, grace_s=enrichment.GONE_AFTER_S)  # type: ignore[arg-type]  # the same
        return run

    async def _settle(self, line: Line, run: Run, ended: list[Ended]) -> Run:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(enrichment, "require_database", lambda _settings: line)
            return await enrichment.settle_run(SETTINGS, run, ended)

    async def _insist(self, ask: Callable[..., Any], *arguments: Any) -> Any:
        """As a user who starts the same command again."""
        while True:
            try:
                return await ask(Line(self.world), *arguments)
            except LedgerUnavailable:
                await asyncio.sleep(1)

    async def _start(self, run: Run) -> list[Ended]:
        """One start: some lanes, until all have ended or died."""
        self.starts += 1
        lanes = [asyncio.create_task(self._work(run)) for _ in range(self.plan.lanes)]
        _, hung = await asyncio.wait(lanes, timeout=START_WITHIN_S)
        waiting = [line.lane.waiting_because() for line in self._lines if line.lane is not None]
        assert not hung, f"{len(hung)} lanes hang, because {waiting}"
        return [end for lane in lanes if (end := lane.result()) is not None]

    async def _work(self, run: Run) -> Ended | None:
        """One lane; None where it was killed."""
        world, plan = self.world, self.plan
        doom = world.chance.choice((3, 10, 30, 100)) if world.happens(plan.doomed, "doomed") else None
        line = Line(world)
        await asyncio.sleep(world.chance.uniform(0, 10) if plan.are_strangers else 0)
        line.lane_id = await self._insist(lambda line: leases.register(line, run.run_id))
        line.doom = None if doom is None else world.chance.randrange(doom)
        make: Any = Lane  # which is annotated with what these stand in for
        lane: Lane = make(line, line.lane_id, Door(self.provider, line), Pages(world), self._lane_plan(run))
        line.lane = lane
        lane.spill = Spill(self.folder, await name_of(line, run.run_id), LaneId(line.lane_id))
        line.work = asyncio.create_task(lane.run_shards())
        self._lines.append(line)
        ends: set[asyncio.Future[Any]] = {line.work, line.death}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        self._lines.remove(line)
        if line.is_dead:
            self._ghosts.append(line.work)
            return None
        return Ended("interrupted") if line.work.cancelled() else line.work.result()

    def _lane_plan(self, run: Run) -> LanePlan:
        times = TIMES if self.plan.fences_itself or self.world.is_calm else replace(TIMES, fence_after_s=1e6)
        return LanePlan(
            job=self.job,
            run=run,
            book=BOOK,
            price_ids={price.name: number for number, price in enumerate(BOOK.rows())},
            root=self.folder,
            lanes=1 if self.plan.are_strangers else self.plan.lanes,
            scale=SCALE,
            times=times,
            random=self.world.chance,
        )

    async def _play_mishaps(self) -> None:
        world = self.world
        for at, kind in self.plan.mishaps:
            await asyncio.sleep(max(0.0, at - world.clock()))
            if self._lines:
                line = world.chance.choice(self._lines)
                world.faults[kind] += 1
                await self._befall(kind, line)
        await asyncio.sleep(max(0.0, self.plan.calm_after_s - world.clock()))
        world.is_calm = True

    async def _befall(self, kind: str, line: Line) -> None:
        world = self.world
        assert line.lane is not None
        assert line.work is not None
        match kind:
            case "kill":
                line.die()
            case "cut":
                line.cut_until = world.clock() + world.chance.uniform(1, 40)
                if world.chance.random() < 0.5:
                    world.model.lanes[line.lane_id].has_session = False
            case "interrupt":
                line.lane.drain("interrupted")
            case "interrupt_twice":
                line.lane.drain("interrupted")
                await asyncio.sleep(world.chance.uniform(0, 1))
                line.work.cancel()
            case "pause":
                world.model.change_state(RUN, "paused", "operator")
            case "limit" | "cap":
                self._steer(kind)
            case "bury":
                world.model.lanes[line.lane_id].beat_at = LONG_AGO
            case "storm":
                world.storm_until = world.clock() + world.chance.uniform(1, 10)

    def _steer(self, kind: str) -> None:
        """As an operator does from another terminal."""
        model, chance = self.world.model, self.world.chance
        if kind == "limit":
            each = {tier.name: chance.choice((1, 2, 5, 40)) for tier in JOB.ladder}
            change = model.change_limits(RUN, chance.choice((each, {"flash": 3}, None)))
            self.highest_ceiling = max([self.highest_ceiling, *(change.now.values() if change else ())])
        else:
            cap = model.budgets[model.runs[RUN].budget_id].cap
            cap = max(1, int(cap * chance.choice((0.1, 0.5, 2))))
            self.highest_cap = max(self.highest_cap, cap)
            model.change_cap(RUN, cap)


SETTINGS = Settings(database_url=SecretStr("postgresql://nobody@nowhere/nothing"))
