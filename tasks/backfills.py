"""Backfills: one run for each partition that is due, a few at a time, over one budget and one ceiling.

What is due is decided by whoever opens one, from the input and the ledger (schemas/backfills.py), and kept with it;
the same command goes on with what is left of that. Each partition is worked on in another process than this one, here
or wherever lanes work, which is started again if it dies. What stops a backfill (a signal, another model) pauses the
runs under way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol

import structlog

from schemas.announcements import exceeds, spell_dead_letters
from schemas.attempts import RunId
from schemas.backfills import (
    Drift,
    Now,
    Price,
    Standing,
    State,
    is_due,
    price,
    refuse_dear,
    split,
    stand,
)
from schemas.engines import Engine
from schemas.errors import FarthingError, LedgerUnavailable, ProviderStopped, Unforeseen, UnknownPrice
from schemas.jobs import Job
from schemas.money import Money
from schemas.pricing import PriceBook, load_price_book
from schemas.requests import BackfillRequest, RunRequest
from schemas.selection import choose_partitions, name_partitions
from schemas.settings import Settings
from tasks import enrichment, samples, telemetry
from tasks.bulkhead import Bulkhead
from tasks.completions import utc_now
from tasks.jobs import load_job
from tasks.lanes import INTERRUPTED, LANE_DIED, Ended
from tasks.ledger import backfills, budgets, runs, spend
from tasks.ledger.backfills import Backfill, Evidence, Wanted
from tasks.ledger.connection import Ledger
from tasks.ledger.history import find_history
from tasks.ledger.leases import USUAL_TIMES, LeaseTimes
from tasks.ledger.runs import Run

log = structlog.get_logger("farthing.backfills")

#: How often a partition's process is started: once, and again for each of three deaths.
MOST_STARTS = 4
#: What stops one run for these reasons stops the others as well.
FOR_ALL = frozenset({"budget", "provider", "key", "price", "no_worker", "no_slot"})
MODEL_CHANGED = "model_changed"
#: Connections of the process that starts the others: its lock, and what it asks.
CONNECTIONS = 3


@dataclass(frozen=True)
class Plan:
    """How the partitions stand, which of them are `due`, and what those may cost, of a budget with `room` left.

    `unfinished` is the backfill that goes on, `over` one of which nothing is left to do. `gone` are partitions of
    either that the input does not hold any more.
    """

    job: Job
    request: BackfillRequest
    standings: tuple[Standing, ...]
    due: tuple[Standing, ...]
    price: Price
    room: Money
    unfinished: Backfill | None
    over: Backfill | None
    gone: tuple[str, ...]
    now: Now

    @property
    def documents(self) -> int:
        """Of the partitions that are due."""
        return sum(each.documents for each in self.due)

    @property
    def expected(self) -> Money:
        return self.price.expected(self.request.hours(self.job))

    def refuse_dear(self) -> None:
        """Raises ConfigurationError where more is expected than may be spent."""
        refuse_dear(self.expected, self.request.most, self.room)


@dataclass(frozen=True, slots=True)
class PartitionEnded:
    """How the work on one partition ended: its run `done` or `paused`, or `failed` where no run came of it."""

    partition: str
    state: str
    reason: str | None = None
    run_id: int | None = None
    advice: str = INTERRUPTED


class WorkerDied(Exception):
    """The process that worked on a partition is gone."""


class Worker(Protocol):
    """A process that works on one partition after the other."""

    async def work(self, request: RunRequest) -> PartitionEnded:
        """Do a run to its end. Raises WorkerDied, after which it can do no other, and what the run raises."""


async def plan(
    request: BackfillRequest,
    job: Job,
    ledger: Ledger | None,
    book: PriceBook,
    now: datetime,
    *,
    is_simulated: bool,
    is_stand_in: bool = False,
) -> Plan:
    """What a backfill would do now. Reads every file of the partitions that are meant; sends and writes nothing.

    Without a ledger nothing was ever run. `is_stand_in`: what is asked about is not the sandbox's, as the ledger's
    runs are. Raises ConfigurationError with all that is wrong, and UnknownPrice.
    """
    key = job.input.partition
    async with Bulkhead() as bulkhead:
        paths = await bulkhead.list_files(job.input, root=request.root)
        chosen = choose_partitions(paths, key, wanted=request.partitions, first=request.first, last=request.last)
        manifest = await bulkhead.plan(job.input, shard_rows=job.shard_rows, partitions=chosen, root=request.root)
        sample = await samples.measure(job, manifest, bulkhead, request.root)
    partitions = split(manifest, name_partitions(paths, key))
    evidence, history, begun = Evidence({}, {}), None, None
    room = request.cap(job)
    if ledger is not None:
        found = [file.path for file in manifest.files]
        evidence = await backfills.find_evidence(
            ledger, job.name, found, job.prompt_version, is_simulated=is_simulated
        )
        history = await find_history(ledger, job, is_simulated=is_simulated)
        history = history and replace(history, is_stand_in=is_stand_in)
        begun = await backfills.find_unfinished(ledger, job.name, request.identity(), is_simulated=is_simulated)
        room = await _find_room(ledger, request, job, begun, is_simulated)
    is_over = begun is not None and set(begun.left).isdisjoint(chosen)
    unfinished = None if is_over else begun
    today = Now(job.prompt_version, runs.policy(job), request.run().selection(job), evidence.served)
    standings = [stand(each, evidence.covered, today) for each in partitions]
    due = _due(standings, request, unfinished)
    return Plan(
        job=job,
        request=request,
        standings=tuple(standings),
        due=tuple(due),
        price=price(job, due, sample, book, now, history),
        room=room,
        unfinished=unfinished,
        over=begun if is_over else None,
        gone=tuple(name for name in begun.left if name not in chosen) if begun else (),
        now=today,
    )


async def _find_room(
    ledger: Ledger, request: BackfillRequest, job: Job, unfinished: Backfill | None, is_simulated: bool
) -> Money:
    """What the budget has left: all of it where nobody has drawn on it. What lanes hold comes back."""
    name = unfinished.budget_name if unfinished else job.budget_name
    found = None if name is None else await budgets.find_named(ledger, name, is_simulated=is_simulated)
    if found is None:
        return request.cap(job)
    cap = request.cap(job).pico if request.budget else found.cap
    return Money(max(0, cap - found.spent), request.cap(job).currency)


def _due(standings: Iterable[Standing], request: BackfillRequest, unfinished: Backfill | None) -> list[Standing]:
    if unfinished is not None:
        left = [each for each in standings if each.partition in unfinished.left]
        mine = unfinished.backfill_id  # its own lanes may be draining still
        return [each for each in left if each.at_work is None or each.backfill_id == mine]
    return [each for each in standings if is_due(each, changed=request.changed, dead=request.dead)]


def coordinator_ledger(settings: Settings) -> AbstractAsyncContextManager[Ledger]:
    """The ledger as the process uses it that starts the others. Raises ConfigurationError and LedgerUnavailable."""
    return enrichment.lane_ledger(settings, USUAL_TIMES.once_within_s, pool_size=CONNECTIONS)


@asynccontextmanager
async def begun(request: BackfillRequest, settings: Settings) -> AsyncIterator[tuple[Plan, Backfill | None]]:
    """Check everything, then resume or open the backfill; no other process works on the job's while the block lasts.

    None: nothing is due. Raises BackfillAtWork where another process has it, and ConfigurationError where more is
    expected than may be spent.
    """
    job = load_job(request.job, request.root)
    async with (
        coordinator_ledger(settings) as ledger,
        backfills.held(ledger, job.name, is_simulated=settings.sandbox),
    ):
        found = await check(request, job, settings, ledger)
        found.refuse_dear()
        if found.over is not None:
            await backfills.change_backfill(ledger, found.over.backfill_id, state="done", reason=None, lanes=0)
        yield found, await backfills.open_backfill(ledger, _wanted(found, settings)) if found.due else None


async def check(request: BackfillRequest, job: Job, settings: Settings, ledger: Ledger) -> Plan:
    """What a backfill would do now, with all that can be wrong checked. Nothing is written or sent to the model."""
    book, run = load_price_book(settings.prices), request.run()
    async with enrichment.completions_for(job, settings) as completions:
        provider = await enrichment.ask_provider(completions, job, run, settings)
    now = utc_now() + provider.clock_offset
    enrichment.check_prices(job, book, provider.currency, now, run.hours(job))
    return await plan(request, job, ledger, book, now, is_simulated=settings.sandbox)


def _wanted(plan: Plan, settings: Settings) -> Wanted:
    request, job = plan.request, plan.job
    drifted = any(each.state is State.CHANGED_MODEL for each in plan.due)
    return Wanted(
        job=job.name,
        is_simulated=settings.sandbox,
        asked=request.identity(),
        partitions=[each.partition for each in plan.due],
        documents=plan.documents,
        budget=request.cap(job),
        budget_name=job.budget_name,
        declared=job.budget.pico,
        keeps_cap=request.budget is None,
        lanes=_announced(request, settings, min(request.parallel, len(plan.due))),
        reuses=plan.now.served if drifted else None,
    )


def _announced(request: BackfillRequest, settings: Settings, at_work: int) -> int:
    """For how many lanes room is left though they have not come: elsewhere nobody knows whether they will."""
    return at_work if request.engine(settings) is Engine.PROCESSES else 0


async def work_partition(request: RunRequest, settings: Settings, times: LeaseTimes = USUAL_TIMES) -> PartitionEnded:
    """One partition's run, in this process: open or resume it, work one lane, settle it."""
    run = await enrichment.open_run(request, settings, times)
    async with telemetry.traced(settings, run), enrichment.paused_if_cut_short(settings, run):
        ended = await enrichment.work_lane(request, settings, run, times=times)
    return await end_partition(request, settings, run, ended, times)


async def end_partition(
    request: RunRequest, settings: Settings, run: Run, ended: Ended, times: LeaseTimes = USUAL_TIMES
) -> PartitionEnded:
    """What a partition came to whose only lane ended so: its run is settled."""
    settled = await enrichment.settle_run(settings, run, [ended], times)
    reason = None if settled.state == "done" else settled.reason
    return PartitionEnded(request.partitions[0], settled.state, reason, settled.run_id, ended.advice or INTERRUPTED)


@dataclass(frozen=True, slots=True)
class Stopped:
    """Why no further partition is begun, and what to do next. `pauses` the runs under way, or lets them end."""

    reason: str
    advice: str
    pauses: bool = True


@dataclass
class BackfillWork:
    """The work on an open backfill, by processes that `start_worker` starts. `run` ends when none is left."""

    ledger: Ledger
    settings: Settings
    backfill: Backfill
    request: BackfillRequest
    due: Sequence[str]
    start_worker: Callable[[], Worker]
    times: LeaseTimes = USUAL_TIMES
    #: Has whoever works on a partition drain, and asked again give up; the ledger is away, or has not been enough.
    hand_on: Callable[[], object] = enrichment.terminate_lanes
    ended: dict[str, PartitionEnded] = field(default_factory=dict)
    stopped: Stopped | None = None
    #: Models by tier, where more than one served it.
    drift: dict[str, list[str]] = field(default_factory=dict)
    #: By how much its partitions have more dead letters than the job tolerates, in words.
    excess: str = ""
    _waiting: deque[str] = field(init=False)
    _at_work: int = 0
    _told_lanes: int = 0
    _is_interrupted: bool = False
    #: The lanes know that they are to drain: from the ledger, or from a signal while that was away.
    _have_lanes_heard: bool = False
    _woken: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._waiting = deque(self.due)
        self._at_work = min(self.request.parallel, len(self.due))
        self._told_lanes = _announced(self.request, self.settings, self._at_work)

    async def run(self) -> None:
        """Work until every partition has ended or something stops it, then say so in the ledger."""
        await self._look()
        with enrichment.on_signals(self.interrupt):
            watching = asyncio.create_task(self._watch())
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(self._at_work):
                        workers.create_task(self._work())
            except BaseException:
                await self._pause_all(runs.INTERRUPTED)
                raise
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
        await self._settle()

    def interrupt(self) -> None:
        """Pause what runs, whatever stopped it before; asked again, give up on what is in flight."""
        if self._is_interrupted:
            self.hand_on()
        self._is_interrupted = True
        self.stop(Stopped(runs.INTERRUPTED, INTERRUPTED))
        self.stopped = replace(self.stopped or Stopped(runs.INTERRUPTED, INTERRUPTED), pauses=True)
        self._woken.set()

    def stop(self, why: Stopped) -> None:
        """Begin no further partition. The first reason counts."""
        if self.stopped is None:
            log.info("backfill stopping", backfill=self.backfill.backfill_id, reason=why.reason)
            self.stopped = why
            self._woken.set()

    async def _work(self) -> None:
        """One process after the other, for one partition after the other."""
        worker: Worker | None = None
        try:
            while self._waiting and self.stopped is None:
                worker = await self._finish(self._waiting.popleft(), worker)
        finally:
            self._at_work -= 1

    async def _finish(self, name: str, worker: Worker | None) -> Worker | None:
        """Bring one partition to its end; returns the process that can take the next one."""
        for _ in range(MOST_STARTS):
            if self.stopped is not None:
                return worker
            worker = worker or self.start_worker()
            try:
                if await self._has_ended(name, worker):
                    return worker
                worker = None
                if name in (await backfills.find_backfill(self.ledger, self.backfill.backfill_id)).done:
                    return None  # it had come to the end, and a new run would try its dead letters again
            except Exception as error:
                self._take(PartitionEnded(name, "failed", _explain(error)))
                if isinstance(error, ProviderStopped | UnknownPrice | LedgerUnavailable):
                    self.stop(Stopped("failed", str(error), pauses=False))
                return worker
        died = f"its process died {MOST_STARTS} times: look at the memory there, then run the same command"
        self._take(PartitionEnded(name, "failed", died))
        return None

    async def _has_ended(self, name: str, worker: Worker) -> bool:
        """Work on the partition until its run ends; False: the process died before."""
        try:
            self._take(await worker.work(self.request.run(name, self.backfill.backfill_id)))
        except WorkerDied:
            log.warning("a partition's process died", partition=name)
            return False
        return True

    def _take(self, ended: PartitionEnded) -> None:
        self.ended[ended.partition] = ended
        if ended.state == "failed":
            log.warning("partition failed", partition=ended.partition, why=ended.reason)
        if ended.reason in FOR_ALL:
            self.stop(Stopped(ended.reason, ended.advice, pauses=False))
        elif ended.reason == runs.OPERATOR:
            self.stop(Stopped(ended.reason, f"`farthing pause` stopped a run of this backfill: {INTERRUPTED}"))

    async def _watch(self) -> None:
        while True:
            try:
                await self._look()
            except LedgerUnavailable as error:  # the lanes have their own patience with it
                log.warning("no look at the backfill", error=str(error))
                if self._is_interrupted and not self._have_lanes_heard:
                    self._have_lanes_heard = True
                    self.hand_on()  # once: a second signal would give up what is in flight
            try:
                async with asyncio.timeout(self.times.beat_every_s):
                    await self._woken.wait()
                self._woken.clear()
            except TimeoutError:
                pass

    async def _look(self) -> None:
        """See which models serve, pause what is to be paused, and say how many are at work."""
        await self._see_models()
        if self.stopped is not None and self.stopped.pauses:
            await self._pause_all(self.stopped.reason)
            self._have_lanes_heard = True
        if (lanes := _announced(self.request, self.settings, self._at_work)) != self._told_lanes:
            await backfills.change_backfill(self.ledger, self.backfill.backfill_id, lanes=lanes)
            self._told_lanes = lanes

    async def _see_models(self) -> None:
        drift = await backfills.find_drift(self.ledger, self.backfill.backfill_id)
        if drift == self.drift:
            return
        if self.request.when_model_changes is Drift.PAUSE:
            self.stop(Stopped(MODEL_CHANGED, spell_drift(drift)))
        log.warning("another model serves", backfill=self.backfill.backfill_id, models=drift)
        for run_id in (await backfills.find_running(self.ledger, self.backfill.backfill_id))[:1]:
            for tier, models in drift.items():
                key = f"model_changed {tier} {len(models)}"
                await runs.note(self.ledger, run_id, MODEL_CHANGED, {"tier": tier, "models": models}, key=key)
        self.drift = drift  # last: what Postgres did not take is tried again with the next look

    async def _pause_all(self, reason: str) -> None:
        """Pause every run of the backfill that runs; their lanes hear it with their next heartbeat, and drain."""
        for run_id in await backfills.find_running(self.ledger, self.backfill.backfill_id):
            await runs.change_state(self.ledger, run_id, "paused", reason)

    async def _settle(self) -> None:
        """Bury who died, and say how the backfill was left."""
        for run_id in await backfills.find_running(self.ledger, self.backfill.backfill_id):
            run = await runs.find_run(self.ledger, RunId(run_id))
            await enrichment.settle_run(self.settings, run, [Ended(LANE_DIED, INTERRUPTED)], self.times)
        self.backfill = await backfills.find_backfill(self.ledger, self.backfill.backfill_id)
        is_done = not set(self.backfill.left) & set(self.due)
        reason = None if is_done else self.stopped.reason if self.stopped else "unfinished"
        state = "done" if is_done else "paused"
        await backfills.change_backfill(self.ledger, self.backfill.backfill_id, state=state, reason=reason, lanes=0)
        self.backfill = replace(self.backfill, state=state)


async def find_excess(ledger: Ledger, job: Job, backfill_id: int) -> str:
    """In words, which partitions have more dead letters than the job tolerates; empty: none has."""
    spent = spend.by_partition(await spend.list_backfill(ledger, backfill_id))
    over = [each for each in spent if exceeds(each.dead_letters, each.documents, job.tolerance)]
    told = [
        f"{each.partition}: {spell_dead_letters(each.dead_letters, each.documents, job.tolerance)}" for each in over
    ]
    return "\n".join([*told, "`farthing backfill` with --dead tries them again"]) if told else ""


async def settle_unseen(job: str, settings: Settings, advice: str) -> dict[str, Any] | None:
    """The outcome of this process's own backfill, of which Prefect did not say how it ended. None: it had none."""
    async with coordinator_ledger(settings) as ledger:
        mine = await backfills.find_own(ledger, load_job(job).name, is_simulated=settings.sandbox)
        if mine is None:
            return None
        is_done = not mine.left
        state, reason = ("done", None) if is_done else ("paused", runs.INTERRUPTED)
        await backfills.change_backfill(ledger, mine.backfill_id, state=state, reason=reason, lanes=0)
    return {
        "backfill_id": mine.backfill_id,
        "state": state,
        "reason": reason,
        "advice": "" if is_done else advice,
        "failed": {},
        "gone": [],
        "drift": {},
    }


def _explain(error: Exception) -> str:
    """Ours are safe to show (G15); of others, their kind and where they came from."""
    return str(error if isinstance(error, FarthingError | Unforeseen) else Unforeseen.of(error))


def spell_drift(drift: dict[str, list[str]]) -> str:
    """What happened, and how to go on."""
    told = "; ".join(f"{tier} was served by {', then by '.join(models)}" for tier, models in drift.items())
    return (
        f"the provider serves another model: {told}; look at its results, then run the same command with "
        "--when-model-changes go-on, or later a backfill with --changed for what the other model answered"
    )


def outcome(plan: Plan, work: BackfillWork | None = None) -> dict[str, Any]:
    """What the flow returns: plain values, since Prefect hands them on. Without `work` nothing was due."""
    gone = list(plan.gone)
    if work is None:
        return {
            "backfill_id": None,
            "state": "done",
            "reason": None,
            "advice": "",
            "failed": {},
            "gone": gone,
            "drift": {},
        }
    failed = {each.partition: each.reason or each.state for each in work.ended.values() if each.state == "failed"}
    is_done = work.backfill.state == "done"
    return {
        "backfill_id": work.backfill.backfill_id,
        "state": work.backfill.state,
        "reason": None if is_done else work.stopped.reason if work.stopped else "unfinished",
        "advice": work.excess if is_done else work.stopped.advice if work.stopped else INTERRUPTED,
        "failed": failed,
        "gone": gone,
        "drift": work.drift,
    }
