"""Backfills over a real ledger, an emulated provider and real processes: states, one bill, and what stops them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sandbox.bill import bill_path
from sandbox.latency import Latency, Pace, Wait
from sandbox.tariff import FLASH
from schemas.attempts import LaneId
from schemas.backfills import Standing, State
from schemas.errors import BackfillAtWork, ConfigurationError, LedgerUnavailable
from schemas.jobs import Job
from schemas.money import Currency, Money
from schemas.pricing import load_price_book
from schemas.requests import BackfillRequest, RunRequest
from schemas.settings import Settings
from tasks import backfills, enrichment
from tasks.backfills import BackfillWork, PartitionEnded, Plan, Stopped, WorkerDied
from tasks.jobs import load_job
from tasks.lanes import LANE_DIED, Ended
from tasks.ledger import leases, runs, spend
from tasks.ledger.backfills import Wanted, change_backfill, find_backfill, open_backfill
from tasks.ledger.connection import Ledger
from tasks.ledger.proof import prove
from tasks.ledger.runs import Run
from tasks.partitions import Elsewhere
from tasks.steps import ignore_interrupts
from tests import partition_worker
from tests.faults.checker import Beside, check
from tests.faults.stage import CONTEXT
from tests.ledgers import CAP, JOB, opening, sql
from tests.partition_worker import TIMES
from tests.world import World, make_world

DAYS = [f"2026-01-0{number}" for number in range(1, 7)]
DOCUMENTS = 20
#: Requests in flight at each tier, as the job says.
CEILING = 6
NOW = datetime(2026, 9, 26, 0, 10, tzinfo=UTC)
Capture = pytest.CaptureFixture[str]
#: Every answer is taken as it comes, so that a document is one attempt.
SURE = ("below: 0.6", "below: 0")


@pytest.fixture(scope="module")
def warm() -> None:
    """The server that workers are forked from takes seconds to come up, in which no event loop should wait for it."""
    first = CONTEXT.Process(target=ignore_interrupts)
    first.start()
    first.join()


@pytest.fixture
async def world(tmp_path: Path, ledger_url: str) -> AsyncIterator[World]:
    async with make_world(tmp_path, ledger_url) as made:
        change_job(
            made,
            ("input: {path: documents.parquet, id: id, text: text}", PARTITIONED),
            ("concurrency: 16", f"concurrency: {CEILING}"),
            ("shard_rows: 20", "shard_rows: 5"),
            SURE,
        )
        for day in DAYS:
            write_day(made, day)
        yield made


PARTITIONED = "input: {path: 'data/**/*.parquet', id: id, text: text, partition: day}"


def change_job(world: World, *changes: tuple[str, str]) -> None:
    path = world.root / "jobs" / "colours" / "job.yaml"
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def write_day(world: World, day: str, changed: int = 0, documents: int = DOCUMENTS) -> None:
    """A day's documents, of which the first few are others than they were."""
    folder = world.root / "data" / f"day={day}"
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"{day}: document {n} is about a colour{' now' * (n < changed)}" for n in range(documents)]
    pq.write_table(pa.table({"id": [f"{day}-{n}" for n in range(documents)], "text": texts}), folder / "a.parquet")


@dataclass
class Worker:
    """A process as a backfill wants one."""

    settings: Settings
    pool: ProcessPoolExecutor

    async def work(self, request: RunRequest) -> PartitionEnded:
        try:
            return await asyncio.wrap_future(self.pool.submit(partition_worker.work, request, self.settings))
        except BrokenProcessPool:
            raise WorkerDied from None


@dataclass
class Here:
    """This process in place of another, which costs a test no start."""

    settings: Settings

    async def work(self, request: RunRequest) -> PartitionEnded:
        return await backfills.work_partition(request, self.settings, TIMES)


@dataclass
class Machine(Elsewhere):
    """Lanes as those of another machine, which are in this process."""

    async def work(self, request: RunRequest) -> PartitionEnded:
        if (found := await self.have_worked(request)) is None:
            raise WorkerDied
        return found


@dataclass
class Alone:
    """The one lane of a run elsewhere, or what keeps it from beginning."""

    request: RunRequest
    run: Run
    settings: Settings
    hindered: Ended | Exception | None = None
    is_given_up: bool = False

    async def watch(self) -> list[Ended | Exception]:
        if self.is_given_up:
            return [Ended(runs.INTERRUPTED)]
        if self.hindered is not None:
            return [self.hindered]
        (asked,) = await enrichment.ask_lanes(self.request, self.settings, self.run)
        return [await enrichment.work_elsewhere(asked, self.settings)]

    def give_up(self) -> None:
        self.is_given_up = True


def machine(world: World, *hindrances: Ended | Exception) -> Machine:
    """Whose first lanes end in these ways before they have begun."""
    left = list(hindrances)

    @asynccontextmanager
    async def engage(request: RunRequest, run: Run) -> AsyncIterator[Alone]:
        yield Alone(request, run, world.settings, left.pop(0) if left else None)

    return Machine(world.settings, engage)


@dataclass
class Crew:
    """A backfill at work, from the outside; here, or as usual in processes of their own."""

    world: World
    asked: dict[str, Any]
    plan: Plan | None = None
    work: BackfillWork | None = None
    is_here: bool = False
    elsewhere: Machine | None = None
    started: list[Worker | Here] = field(default_factory=list)

    @property
    def states(self) -> dict[str, str]:
        assert self.work is not None
        return {name: ended.state for name, ended in self.work.ended.items()}

    async def run(self) -> Crew:
        """Work until it ends, as the flow does."""
        settings = self.world.settings
        request = BackfillRequest(job="colours", root=self.world.root, **self.asked)
        async with backfills.begun(request, settings) as (self.plan, opened):
            if opened is None:
                return self
            async with backfills.coordinator_ledger(settings) as ledger:
                with ExitStack() as pools:
                    due = [each.partition for each in self.plan.due]
                    self.work = BackfillWork(
                        ledger, settings, opened, request, due, lambda: self._start(pools), TIMES
                    )
                    await self.work.run()
        return self

    def _start(self, pools: ExitStack) -> Worker | Here | Machine:
        if self.elsewhere is not None:
            return self.elsewhere
        if self.is_here:
            self.started.append(Here(self.world.settings))
            return self.started[-1]
        pool = ProcessPoolExecutor(1, mp_context=CONTEXT, initializer=ignore_interrupts)
        self.started.append(Worker(self.world.settings, pools.enter_context(pool)))
        return self.started[-1]


async def backfill(world: World, **asked: Any) -> Crew:
    return await Crew(world, asked, is_here=True).run()


async def look(world: World, **asked: Any) -> dict[str, Standing]:
    """How the partitions stand."""
    return {each.partition: each for each in (await plan(world, **asked)).standings}


async def plan(world: World, **asked: Any) -> Plan:
    request = BackfillRequest(job="colours", root=world.root, **asked)
    async with backfills.coordinator_ledger(world.settings) as ledger:
        return await backfills.plan(request, job_of(world), ledger, load_price_book(), NOW, is_simulated=True)


def job_of(world: World) -> Job:
    return load_job("colours", world.root)


async def until(holds: Callable[[], bool]) -> None:
    """Wait for it; what never comes fails the test."""
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.02)


class Clock(Latency):
    """As the provider's, and how many seconds it worked in all."""

    worked_s = 0.0

    def draw(self, model: str, output_tokens: int) -> Wait:
        wait = super().draw(model, output_tokens)
        self.worked_s += wait.working
        return wait


def take_time(world: World, reply_s: float) -> Clock:
    """A reply takes so long at the median."""
    clock = Clock(Pace(1.0, reply_s=reply_s), seed=1)
    world.server.house.latency = clock
    return clock


def billed(world: World) -> int:
    return sum(world.bill().values())


def paid(world: World) -> int:
    """Documents of a run that were billed, however often: a blank reply is billed, and asked for again."""
    return len({key.rpartition(".")[0] for key in world.bill()})


def known(world: World) -> int:
    return int(world.value("SELECT coalesce(sum(cost_pico), 0) FROM attempt"))


async def assert_proved(world: World) -> None:
    async with backfills.coordinator_ledger(world.settings) as ledger:
        for (run_id,) in world.sql("SELECT run_id FROM run"):
            proof = await prove(ledger, run_id, load_price_book())
            assert proof.proved, [found.violations for found in proof.evidence.values() if found.violations]


async def test_a_partition_stands_as_the_newest_run_left_it_whichever_that_was(world: World) -> None:
    first, second, third, *_ = DAYS
    assert {each.state for each in (await look(world)).values()} == {State.NEVER_RUN}
    await world.run(partitions=(first,))
    await world.run(partitions=(second,), limit=3)
    seen = await look(world)
    assert (seen[first].state, seen[first].to_send) == (State.DONE, 0)
    assert (seen[second].words, seen[second].to_send) == ("unfinished (3 of 20)", 17)
    assert seen[third].state is State.NEVER_RUN
    await world.run()  # all of the input
    await world.run(partitions=(second,), limit=2)  # says nothing of the partition, which is done
    assert {each.state for each in (await look(world)).values()} == {State.DONE}
    write_day(world, third, changed=2)
    assert (await look(world, partitions=(third,)))[third].state is State.CHANGED_TEXT
    change_job(world, ("below: 0", "below: 0.1"))
    assert (await look(world, first=first, last=first))[first].state is State.CHANGED_PROMPT


async def test_what_another_run_works_on_is_left_to_it(world: World) -> None:
    take_time(world, 2.0)
    run = await world.open()
    working = asyncio.create_task(world.work(run))
    await until(lambda: world.value("SELECT count(*) FROM attempt_intent") > 0)
    seen = await plan(world)
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    assert {each.at_work for each in seen.standings} == {run.run_id}
    assert seen.due == ()
    assert (await plan(world)).due != ()


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    ("partitions", "documents", "reply_s", "most"),
    [(6, DOCUMENTS, 0.2, None), pytest.param(30, 3 * DOCUMENTS, 1.0, 1.15, marks=pytest.mark.long)],
)
async def test_partitions_over_three_processes_one_killed_cost_one_pass_and_what_was_in_flight(
    world: World,
    partitions: int,
    documents: int,
    reply_s: float,
    most: float | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And take at most so many times as long as the provider needs where the whole ceiling is always in use."""
    days = [f"2026-01-{number:02}" for number in range(1, partitions + 1)]
    for day in days:
        write_day(world, day, documents=documents)
    clock = take_time(world, reply_s)
    crew = Crew(world, {"parallel": 3})
    began = time.monotonic()
    running = asyncio.create_task(crew.run())
    await until(lambda: world.value("SELECT count(*) FROM lane WHERE attempts > 2") >= 3)
    os.kill(world.value("SELECT pid FROM lane WHERE attempts > 2 AND ended_at IS NULL LIMIT 1"), signal.SIGKILL)
    await asyncio.wait_for(running, 900)
    took_s, ideal_s = time.monotonic() - began, clock.worked_s / CEILING
    with capsys.disabled():
        print(f"\n{partitions} partitions: {took_s:.1f} s, {took_s / ideal_s:.3f} of the ideal {ideal_s:.1f} s")
    assert most is None or took_s <= most * ideal_s
    assert crew.states == dict.fromkeys(days, "done")
    assert len(crew.started) == 4
    assert world.sql("SELECT state, lanes, finished_at IS NOT NULL FROM backfill") == [("done", 0, True)]
    assert world.value("SELECT count(*) FROM document WHERE state = 'result'") == partitions * documents
    assert world.value("SELECT count(*) FROM lane WHERE ended_because = 'died'") == 1
    lost = world.value("SELECT count(*) FROM attempt WHERE billing = 'unknown'")
    assert lost <= CEILING
    assert check(world.database_url, bill_path(world.root), Beside(root=world.root)) == []
    assert known(world) <= billed(world) <= known(world) + world.value("SELECT sum(unknown_pico) FROM attempt")
    assert world.server.house.account.peak[FLASH] <= CEILING
    assert world.sql("SELECT DISTINCT name, cap FROM budget JOIN run USING (budget_id)") == [("backfill 1", 10**12)]
    await assert_proved(world)
    again = await backfill(world, parallel=3)
    assert (again.work, again.plan and again.plan.due) == (None, ())


@pytest.mark.long
async def test_the_last_partition_has_the_whole_ceiling_for_itself(world: World) -> None:
    take_time(world, 0.5)
    small = world.root / "data" / f"day={DAYS[1]}" / "a.parquet"
    pq.write_table(pq.read_table(small).slice(0, 1), small)
    crew = await backfill(world, parallel=2, last=DAYS[1])
    assert set(crew.states.values()) == {"done"}
    assert world.server.house.account.peak[FLASH] == CEILING


@pytest.mark.usefixtures("warm")
async def test_an_interrupted_backfill_pauses_its_runs_and_the_same_request_goes_on_with_what_is_left(
    world: World,
) -> None:
    take_time(world, 0.3)
    crew = Crew(world, {"parallel": 2, "last": DAYS[3]})
    running = asyncio.create_task(crew.run())
    await until(lambda: world.value("SELECT count(*) FROM run WHERE state = 'done'") >= 1)
    with pytest.raises(BackfillAtWork, match=rf"backfill 1 of colours is at work in process {os.getpid()} on "):
        await backfill(world, last=DAYS[3])
    assert crew.work is not None
    crew.work.interrupt()
    await asyncio.wait_for(running, 60)
    assert world.sql("SELECT state, reason FROM backfill") == [("paused", "interrupted")]
    assert world.value("SELECT count(*) FROM run WHERE state = 'running'") == 0
    assert world.value("SELECT count(*) FROM lane WHERE ended_at IS NULL") == 0
    before = known(world)
    take_time(world, 0.0)
    again = await backfill(world, last=DAYS[3])
    assert again.plan is not None
    assert again.plan.unfinished is not None
    assert 0 < len(again.plan.due) < 4
    assert world.value("SELECT count(*) FROM backfill") == 1
    assert known(world) == billed(world) > before
    assert paid(world) == 4 * DOCUMENTS
    assert {name: each.state for name, each in (await look(world)).items()} == {
        day: State.DONE if day <= DAYS[3] else State.NEVER_RUN for day in DAYS
    }


@dataclass
class Doomed(Here):
    """Its first partition's lane takes all places and dies, and nobody comes for that run again."""

    async def work(self, request: RunRequest) -> PartitionEnded:
        if request.partitions[0] != DAYS[0]:
            return await super().work(request)
        run = await enrichment.open_run(request, self.settings)
        async with enrichment.lane_ledger(self.settings, 30) as ledger:
            lane_id = await leases.register(ledger, run.run_id)
            async with leases.alive(ledger, lane_id) as session:
                held = await leases.hold(session, lane_id, run.ceilings, {}, run.ceilings)
        assert held == run.ceilings
        raise ChildProcessError


async def test_places_of_a_dead_lane_of_a_run_that_nobody_works_on_are_for_the_others(world: World) -> None:
    class Ill(Crew):
        def _start(self, pools: ExitStack) -> Here:
            return Doomed(world.settings)

    crew = Ill(world, {"last": DAYS[1], "parallel": 1})
    await asyncio.wait_for(crew.run(), 30)
    assert crew.states == {DAYS[0]: "failed", DAYS[1]: "done"}


@pytest.mark.long
async def test_a_partition_that_fails_is_told_of_and_the_others_go_on(world: World) -> None:
    class Careless(Crew):
        def _start(self, pools: ExitStack) -> Worker | Here:
            (world.root / "data" / f"day={DAYS[1]}" / "a.parquet").write_bytes(b"no Parquet")
            return super()._start(pools)

    crew = await Careless(world, {"last": DAYS[2], "parallel": 1}, is_here=True).run()
    assert crew.states == {DAYS[0]: "done", DAYS[1]: "failed", DAYS[2]: "done"}
    assert crew.work is not None
    said = backfills.outcome(crew.plan, crew.work)  # type: ignore[arg-type]  # it was planned
    assert "is not a readable Parquet file" in said["failed"][DAYS[1]]
    assert (said["state"], said["reason"]) == ("paused", "unfinished")


@pytest.mark.long
async def test_dead_letters_are_tried_again_and_nothing_else_is_paid_for(world: World) -> None:
    world.plan_mishaps({"kind": "content_filter", "first": 2})
    await backfill(world, last=DAYS[0], parallel=1)
    assert (await look(world, last=DAYS[0]))[DAYS[0]].words == "dead letters (2)"
    assert (await backfill(world, last=DAYS[0])).work is None
    world.plan_mishaps()
    before = paid(world)
    crew = await backfill(world, last=DAYS[0], dead=True)
    assert crew.plan is not None
    assert [each.to_send for each in crew.plan.due] == [2]
    assert paid(world) == before + 2
    assert (await look(world, last=DAYS[0]))[DAYS[0]].state is State.DONE
    await assert_proved(world)


async def test_of_a_changed_partition_only_the_documents_that_changed_are_paid_for(world: World) -> None:
    await backfill(world, last=DAYS[1])
    write_day(world, DAYS[0], changed=3)
    assert (await backfill(world, last=DAYS[1])).work is None
    before = paid(world)
    crew = await backfill(world, last=DAYS[1], changed=True)
    assert crew.states == {DAYS[0]: "done"}
    assert paid(world) == before + 3


#: What is asked for as deepseek-flash is served by the model that this is an alias of.
NEW_MODEL = {"kind": "served_model"}


async def test_a_model_that_changes_pauses_the_backfill_until_somebody_says_go_on(world: World) -> None:
    take_time(world, 0.1)
    crew = Crew(world, {"parallel": 1, "last": DAYS[2]}, is_here=True)
    running = asyncio.create_task(crew.run())
    await until(lambda: world.value("SELECT count(*) FROM run WHERE state = 'done'") >= 1)
    world.plan_mishaps(NEW_MODEL)
    await asyncio.wait_for(running, 60)
    assert world.sql("SELECT state, reason FROM backfill") == [("paused", "model_changed")]
    assert crew.work is not None
    assert crew.work.drift == {"flash": ["deepseek-flash", "deepseek-v4-flash"]}
    assert crew.plan is not None
    assert "--when-model-changes go-on" in backfills.outcome(crew.plan, crew.work)["advice"]
    before = paid(world)
    again = await backfill(world, parallel=1, last=DAYS[2])
    assert (again.states, paid(world)) == ({}, before)
    on = await backfill(world, parallel=1, last=DAYS[2], when_model_changes="go-on")
    assert set(on.states.values()) == {"done"}
    assert world.value("SELECT count(*) FROM run_event WHERE kind = 'model_changed'") == 1
    assert paid(world) == 3 * DOCUMENTS


@pytest.mark.long
async def test_after_a_change_of_model_the_other_model_s_results_are_not_reused(world: World) -> None:
    await backfill(world, last=DAYS[0])
    world.plan_mishaps(NEW_MODEL)
    await backfill(world, first=DAYS[1], last=DAYS[1])
    seen = await look(world, last=DAYS[1])
    assert (seen[DAYS[0]].state, seen[DAYS[0]].to_send) == (State.CHANGED_MODEL, DOCUMENTS)
    assert seen[DAYS[1]].state is State.DONE
    before = paid(world)
    crew = await backfill(world, last=DAYS[1], changed=True)
    assert crew.states == {DAYS[0]: "done"}
    assert paid(world) == before + DOCUMENTS
    assert {each.state for each in (await look(world, last=DAYS[1])).values()} == {State.DONE}
    await assert_proved(world)


async def test_a_budget_that_is_too_small_starts_nothing_and_one_is_shared_by_all(world: World) -> None:
    with pytest.raises(ConfigurationError, match="is expected and the budget has"):
        await backfill(world, budget="0.0000001 USD")
    assert world.value("SELECT count(*) FROM backfill") == 0
    change_job(world, ("budget: 1 USD", "budget: {cap: 1 USD, name: january}"))
    await backfill(world, last=DAYS[1])
    assert world.sql("SELECT DISTINCT b.name FROM run JOIN budget b USING (budget_id)") == [("january",)]
    async with backfills.coordinator_ledger(world.settings) as ledger:
        spent = spend.by_partition(await spend.list_backfill(ledger, 1))
        audits = [await spend.audit(ledger, run=run_id) for (run_id,) in world.sql("SELECT run_id FROM run")]
    assert sum(each.cost_pico for each in spent) == sum(audit.cost_pico for audit in audits) == billed(world)


def wanted(job: str = JOB.name, **changes: Any) -> Wanted:
    usual: dict[str, Any] = {"asked": {"dead": False}, "partitions": ["1", "2"], "documents": 12}
    usual |= {"budget": JOB.budget, "budget_name": None, "declared": CAP, "keeps_cap": True, "lanes": 3}
    return Wanted(job=job, is_simulated=False, **usual | changes)


async def test_a_lane_shares_the_ceiling_with_the_lanes_of_all_its_backfill_s_runs(ledger: Ledger) -> None:
    opened = await open_backfill(ledger, wanted())
    parts = [
        await runs.open_run(ledger, opening(backfill_id=opened.backfill_id, selection={"partitions": [name]}))
        for name in opened.partitions
    ]
    other = await runs.open_run(ledger, opening(job=replace(JOB, name="other")))
    lanes = [await leases.register(ledger, run.run_id) for run in (*parts, other)]

    async def hear(lane_id: LaneId) -> tuple[int, int]:
        async with leases.alive(ledger, lane_id) as session:
            orders = await leases.beat(session, lane_id, 0, None, {})
        assert orders is not None
        return orders.lanes, orders.rank

    assert [run.sharing for run in (*parts, other)] == [3, 3, 0]
    assert [await hear(lane) for lane in lanes] == [(3, 0), (3, 1), (1, 0)]
    await change_backfill(ledger, opened.backfill_id, lanes=1)
    assert [await hear(lane) for lane in lanes] == [(2, 0), (2, 1), (1, 0)]


async def test_the_same_words_find_the_same_backfill_until_it_is_done_and_other_words_another(ledger: Ledger) -> None:
    first = await open_backfill(ledger, wanted())
    again = await open_backfill(ledger, wanted(partitions=["3"]))
    assert (again.backfill_id, again.partitions) == (first.backfill_id, ("1", "2"))
    other = await open_backfill(ledger, wanted(asked={"dead": True}))
    left_behind = await find_backfill(ledger, first.backfill_id)  # whoever had it died, else its lock were held
    assert (left_behind.state, other.state) == ("paused", "running")
    await change_backfill(ledger, first.backfill_id, state="done")
    third = await open_backfill(ledger, wanted(partitions=["3"]))
    assert len({first.backfill_id, other.backfill_id, third.backfill_id}) == 3
    assert third.partitions == ("3",)


async def test_a_resumed_backfill_keeps_its_cap_until_another_is_asked_for(ledger: Ledger, ledger_url: str) -> None:
    opened = await open_backfill(ledger, wanted())
    await runs.open_run(ledger, opening(backfill_id=opened.backfill_id))
    await open_backfill(ledger, wanted(budget=Money(CAP * 2, Currency.USD)))
    assert sql(ledger_url, "SELECT cap FROM budget WHERE name = 'backfill 1'") == [(CAP,)]
    await open_backfill(ledger, wanted(budget=Money(CAP * 2, Currency.USD), keeps_cap=False))
    assert sql(ledger_url, "SELECT cap FROM budget WHERE name = 'backfill 1'") == [(CAP * 2,)]
    assert sql(ledger_url, "SELECT detail FROM run_event WHERE kind = 'cap_changed'") == [({"cap": CAP * 2},)]


@pytest.fixture
async def idle(ledger: Ledger) -> BackfillWork:
    """A backfill of which nothing is begun; `signals` are what its processes are sent."""
    signals.clear()
    opened = await open_backfill(ledger, wanted())
    request = BackfillRequest(job="colours")
    start, hand_on = lambda: Here(Settings()), lambda: signals.append("SIGTERM")
    return BackfillWork(ledger, Settings(), opened, request, [], start, TIMES, hand_on)


signals: list[str] = []


def test_an_interrupt_pauses_what_another_reason_lets_end_and_the_second_one_gives_up(idle: BackfillWork) -> None:
    idle.stop(Stopped("failed", "no price", pauses=False))
    idle.interrupt()
    assert (idle.stopped, signals) == (Stopped("failed", "no price", pauses=True), [])
    idle.interrupt()
    assert signals == ["SIGTERM"]


async def test_while_postgres_is_away_lanes_are_told_once_to_drain_and_not_to_give_up(
    idle: BackfillWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> None:
        raise LedgerUnavailable("Postgres is away")

    monkeypatch.setattr(backfills.backfills, "find_drift", away)
    idle.interrupt()
    watching = asyncio.create_task(idle._watch())
    await asyncio.sleep(5 * TIMES.beat_every_s)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert signals == ["SIGTERM"]


@pytest.mark.parametrize("death", [Ended(LANE_DIED), ChildProcessError()])
async def test_partitions_that_lanes_elsewhere_work_on_are_done_for_one_pass_though_one_of_them_dies(
    world: World, death: Ended | Exception
) -> None:
    """The lanes of a fleet, and those of a crew. No room is left for one that may never come."""
    take_time(world, 0.1)
    asked = {"parallel": 2, "last": DAYS[2], "lanes_on": "workers"}
    crew = Crew(world, asked, elsewhere=machine(world, death))
    running = asyncio.create_task(crew.run())
    await until(lambda: world.value("SELECT count(*) FROM lane WHERE attempts > 0") > 0)
    assert world.value("SELECT lanes FROM backfill") == 0
    await asyncio.wait_for(running, 120)
    assert crew.states == dict.fromkeys(DAYS[:3], "done")
    assert world.sql("SELECT state FROM backfill") == [("done",)]
    assert world.value("SELECT count(*) FROM attempt") == 3 * DOCUMENTS == len(world.bill())
    assert world.server.house.account.peak[FLASH] <= CEILING
    assert world.sql("SELECT count(DISTINCT budget_id), count(*) FROM run") == [(1, 3)]


async def test_where_nobody_comes_for_a_partition_the_backfill_pauses_and_says_what_to_start(world: World) -> None:
    absent = [Ended("no_worker", "start one")] * 2
    crew = await Crew(world, {"parallel": 2, "lanes_on": "workers"}, elsewhere=machine(world, *absent)).run()
    assert crew.plan is not None
    said = backfills.outcome(crew.plan, crew.work)
    assert (said["state"], said["reason"], said["advice"]) == ("paused", "no_worker", "start one")
    assert world.bill() == {}


async def test_a_team_that_begins_after_it_was_asked_to_give_up_does_so(world: World) -> None:
    elsewhere = machine(world)
    elsewhere.give_up()
    crew = await Crew(world, {"parallel": 1, "last": DAYS[0], "lanes_on": "workers"}, elsewhere=elsewhere).run()
    assert crew.states == {DAYS[0]: "paused"}
    assert world.bill() == {}


async def test_an_error_of_a_lane_elsewhere_leaves_no_run_that_looks_at_work(world: World) -> None:
    request = BackfillRequest(job="colours", root=world.root).run(DAYS[0])
    with pytest.raises(ConfigurationError, match="no key"):
        await machine(world, ConfigurationError("no key")).have_worked(request)
    assert world.sql("SELECT state FROM run") == [("paused",)]


async def test_a_machine_that_is_not_set_up_for_it_fails_its_partition_and_the_others_go_on(world: World) -> None:
    unfit = Ended("lane_failed", "its price book is another")
    crew = Crew(world, {"parallel": 1, "last": DAYS[1], "lanes_on": "workers"}, elsewhere=machine(world, unfit))
    await crew.run()
    assert crew.plan is not None
    said = backfills.outcome(crew.plan, crew.work)
    assert (said["state"], said["failed"]) == ("paused", {DAYS[0]: "its price book is another"})
    assert crew.states == {DAYS[0]: "failed", DAYS[1]: "done"}


async def test_a_model_that_changes_stops_a_backfill_though_postgres_takes_no_note_of_it(
    idle: BackfillWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def other(*_: object) -> dict[str, list[str]]:
        return {"flash": ["one", "other"]}

    async def away(*_: object) -> list[int]:
        raise LedgerUnavailable("Postgres is away")

    monkeypatch.setattr(backfills.backfills, "find_drift", other)
    monkeypatch.setattr(backfills.backfills, "find_running", away)
    with pytest.raises(LedgerUnavailable):
        await idle._look()
    assert idle.stopped is not None
    assert (idle.stopped.reason, idle.drift) == ("model_changed", {})
