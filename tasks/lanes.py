"""A lane: one process that claims shards, keeps documents climbing, and gives everything back when it leaves.

    claim a shard ── read it in blocks ── end what needs no attempt ── climb the rest ── finish the shard
         ▲                                                                  │
         └── as soon as every document of the shard is under way, the next one is claimed

Shards overlap, so that a slow last reply idles nothing. What stops a lane (the budget, the provider, a signal, an
order from another terminal) makes it drain: no new attempt, every reply in flight recorded, then it leaves. A lane
that cannot show its heartbeat for long drains by itself before others take its shards. Whoever interrupts it twice,
or once while Postgres is away, does not wait: what is in flight becomes unknown, and what came is on disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import structlog

from schemas.attempts import LaneId
from schemas.brakes import Breaker, RetryBudget
from schemas.ceilings import let_go, share
from schemas.errors import FarthingError, LedgerUnavailable
from schemas.jobs import Job, When
from schemas.off_peak import Open, Shut, guard_of, tariff_of
from schemas.pricing import PriceBook
from schemas.records import Intent, Record
from tasks.bulkhead import Bulkhead
from tasks.climbs import Climber
from tasks.completions import Completions
from tasks.drains import Draining, unless
from tasks.finish_by import Haste
from tasks.grants import Grants
from tasks.ledger import attempts, certification, leases, runs
from tasks.ledger.attempts import Permit, Reusable, Withheld
from tasks.ledger.connection import Ledger
from tasks.ledger.leases import USUAL_TIMES, ClaimedShard, LeaseTimes, Orders
from tasks.ledger.runs import Run
from tasks.limiter import Limiter
from tasks.off_peak import LOOK_AGAIN_LEAST_S, Gate, always
from tasks.patience import Patience
from tasks.priming import PRIMING, Primer
from tasks.shards import ShardWork
from tasks.spill import Spill
from tasks.telemetry import Telemetry
from tasks.waits import Waits
from tasks.watch import Watch
from tasks.writer import Writer

log = structlog.get_logger("farthing.lanes")

#: How long a lane tries to say goodbye; Postgres may be away, or busy with what a cancelled lane left it.
GOODBYE_S = 15.0
#: How long the work of a lane that gave up may take to end: it only has to let go of what it awaits.
LET_GO_S = 5.0
#: How long an interrupted lane that has nothing in flight waits for a Postgres that is away to come back.
INTERRUPTED_WAIT_S = 5.0
INTERRUPTED = "run the same command to go on"
#: The reason of a lane that did not say why it ended, and what to do next where that leaves something undone.
LANE_DIED = "lane_died"
DIED_ADVICE = f"a lane's process died and nobody finished its shards: {INTERRUPTED}"
#: What to do next where somebody else ended the run, by its state.
ADVICE = {
    "paused": INTERRUPTED,
    "superseded": "the job or its input changed, and a newer run took this one's place: see `farthing status`",
}
#: Documents in progress per place in flight: some wait for a retry, some for their turn.
PROGRESS_PER_PLACE = 1.5
#: How long a cache needs to build a prefix, in the provider's seconds.
BUILD_S = 2.0
#: Nothing but failures for so long: the provider is down. Down for so long: the run stops. In its seconds, which for
#: one that takes no time (a scale of 0) are ours.
DARK_S, GIVE_UP_S = 30.0, 600.0
#: How often a lane that is to be done by an instant looks how many documents are left, in the provider's seconds.
PACE_EVERY_S = 30.0
#: How often one attempt may find out whether an absent provider is back, in its seconds.
PROBE_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Ended:
    """Why a lane ended: `done` (nothing left to claim), or what made it drain, with what to do next."""

    reason: str
    advice: str = ""

    @property
    def is_done(self) -> bool:
        return self.reason == "done"


#: Shows a shard, by name, while its work is awaited: the flow makes it a Prefect task run.
Show = Callable[[str, Callable[[], Awaitable[None]]], Coroutine[Any, Any, None]]


async def show_nothing(_name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Just do the work."""
    await work()


@dataclass(frozen=True)
class LanePlan:
    """What a lane needs besides the run. `scale` is how fast the provider's world runs: 1 is real time.

    `random` draws the waits before retries; None: the system's, which no other machine shares.
    """

    job: Job
    run: Run
    book: PriceBook
    price_ids: dict[str, int]
    root: Path
    lanes: int = 1
    scale: float = 1.0
    clock_offset: timedelta = timedelta(0)
    show: Show = show_nothing
    times: LeaseTimes = USUAL_TIMES
    random: Random | None = None
    when: When = When.NOW
    #: Whether another machine may have opened the run: then a file that is another one here condemns no document.
    is_elsewhere: bool = False
    #: When the run is to be done, by the provider's clock; only of one that waits for off-peak prices.
    due: datetime | None = None

    @property
    def ceilings(self) -> dict[str, int]:
        """Requests in flight by tier, of all lanes together, as the run was found."""
        named = {tier.name: self.job.concurrency[tier.name] for tier in self.job.ladder}
        return {name: self.run.ceilings.get(name, ceiling) for name, ceiling in named.items()}


@dataclass
class Lane:
    """One lane of a run. `run_shards` works until nothing is left; `drain` asks it to stop in good order."""

    ledger: Ledger
    lane_id: LaneId
    completions: Completions
    bulkhead: Bulkhead
    plan: LanePlan
    spill: Spill | None = None
    telemetry: Telemetry | None = None
    climber: Climber = field(init=False)
    _slots: asyncio.Semaphore = field(init=False)
    #: So many documents may be in progress.
    _width: int = 0
    _ended: Ended | None = None
    _last_beat_s: float = field(init=False)
    #: When the last outage ended that was so long that others may look dead by it.
    _back_since_s: float = field(init=False)
    #: When it began, and whether it has had a place at the first tier: before, it claims nothing.
    _began_s: float = field(init=False)
    _has_place: asyncio.Event = field(default_factory=asyncio.Event)
    #: By tier: what the lane is to have in flight, and what it holds by the ledger, or less.
    _shares: dict[str, int] = field(default_factory=dict)
    _held: dict[str, int] = field(default_factory=dict)
    #: For questions that come before anything is sent: a lane that drains gives them up.
    _patience: Patience = field(init=False)
    #: The shards under way by number, each with its newest claim's task: a promise has one in each phase.
    _working: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    #: Set where the run is to be done by an instant.
    _haste: Haste | None = None
    _work: asyncio.Task[None] | None = None
    _is_interrupted: bool = False

    def __post_init__(self) -> None:
        plan, loop = self.plan, asyncio.get_running_loop()
        prefix_bytes = len(plan.job.prefix.encode())
        self._began_s = self._last_beat_s = self._back_since_s = loop.time()
        self.completions.offset = plan.clock_offset  # until the replies say otherwise
        self._patience = Patience()
        self._slots = asyncio.Semaphore(0)
        self.climber = Climber(
            job=plan.job,
            run=plan.run,
            book=plan.book,
            price_ids=plan.price_ids,
            completions=self.completions,
            grants=Grants(self.ledger, plan.run, self.lane_id, self._patience, may_bury=lambda: self._may_bury),
            intents=Writer(self._commit_intents, linger_s=0.005),
            records=Writer(self._commit_records, linger_s=0.02),
            limiters={name: Limiter(0, plan.lanes) for name in plan.ceilings},
            primers={name: Primer(prefix_bytes, BUILD_S * plan.scale) for name in plan.ceilings},
            waits=Waits(scale=plan.scale, random=plan.random),
            watch=Watch(self.ledger, plan.job, plan.run, plan.book, self.completions.now),
            now=self.completions.now,
            tick=loop.time,
            gate=self._make_gate(),
            breaker=Breaker(
                open_after_s=DARK_S * (plan.scale or 1.0),
                probe_every_s=PROBE_EVERY_S * plan.scale,
                give_up_after_s=GIVE_UP_S * (plan.scale or 1.0),
            ),
            retry_budget=RetryBudget(trickle_per_s=1 / max(plan.scale, 0.001)),
            telemetry=self.telemetry,
            draining=self._patience.draining,
        )
        if self.telemetry is not None:
            self.telemetry.watch(lambda: self.in_flight, self.climber.limiters)

    async def run_shards(self) -> Ended:
        """Work until no shard is left, or something makes the lane drain or give up. Leaves nothing in flight."""
        helpers = [
            asyncio.create_task(helper)
            for helper in (
                self.climber.intents.run(),
                self.climber.records.run(),
                self._beat(),
                self._let_in(),
                self._keep_on_disk(),
                self._give_back(),
                self._watch_pace(),
            )
        ]
        work = self._work = asyncio.create_task(self._work_shards())
        try:
            await asyncio.wait({work, *helpers}, return_when=asyncio.FIRST_COMPLETED)
            for helper in helpers:
                if helper.done():
                    helper.result()  # they never return: this raises what ended one
            if not work.cancelled():  # it is where the lane gave up
                work.result()
        except BaseExceptionGroup as group:
            raise _first_error(group) from group
        finally:
            with self.spill or nullcontext():  # closed even where a cancellation ends what is awaited here
                await _cancel(work)
                await self.climber.watch.close()
                await _cancel(*helpers)
                self._keep(self.climber.records.pending)
                await self._leave()
        return self._ended or Ended("done")

    def drain(self, reason: str, advice: str = "") -> None:
        """Make no new attempt; what is in flight is finished and recorded. The first reason counts."""
        if self._ended is None:
            log.info("lane draining", lane=self.lane_id, reason=reason)
            self._ended = Ended(reason, advice)
        self.climber.draining.set()

    def interrupt(self) -> None:
        """Drain; asked again, or after the operator paused the run, give up on what is in flight.

        A lane that drains for another reason has not been asked yet.
        """
        if self._is_interrupted or (self._ended is not None and self._ended.reason == "paused"):
            self.give_up(INTERRUPTED)
        self._is_interrupted = True
        self.drain("interrupted", INTERRUPTED)

    def give_up(self, advice: str) -> None:
        """Leave without waiting for replies or for Postgres: what is in flight becomes unknown."""
        log.warning("lane gives up", lane=self.lane_id, in_flight=self.in_flight)
        self._ended = Ended(self._ended.reason if self._ended else "interrupted", advice)
        self.climber.draining.set()
        if self._work is not None:
            self._work.cancel()

    @property
    def is_draining(self) -> bool:
        return self.climber.is_draining

    @property
    def in_flight(self) -> int:
        """Attempts on their way now, over all tiers."""
        return self.climber.in_flight

    def waiting_because(self) -> str | None:
        """Why the lane is not as fast as it could be, in words for people; None when it is."""
        climber = self.climber
        if trouble := climber.intents.trouble or climber.records.trouble or self._patience.trouble:
            return trouble
        if self._ended is not None:
            return f"draining ({self._ended.reason.replace('_', ' ')})"
        if shut := climber.gate.shut:
            return shut.because
        if self._shares and not self._has_place.is_set():
            return "waiting until other lanes leave room in flight for this one"
        if reason := climber.breaker.reason(climber.tick()):
            return reason
        if because := climber.grants.tight_because or self.bulkhead.trouble:
            return because
        if barred := [name for name, limiter in climber.limiters.items() if limiter.is_barred]:
            return f"what is for {' and '.join(barred)} waits until other lanes leave room in flight"
        cold = [name for name, primer in climber.primers.items() if primer.is_priming]
        if cold:
            others = "" if self.plan.job.ladder[0].name in cold else "; documents for it wait, the others go on"
            return f"{PRIMING} {' and '.join(cold)}{others}"
        if climber.backing_off:
            return f"{climber.backing_off} documents wait before a retry ({climber.last_failure})"
        return None

    def _make_gate(self) -> Gate:
        plan, completions = self.plan, self.completions
        tariff, guard = tariff_of(plan.job, plan.book, plan.run.currency), guard_of(plan.job)
        decide: Callable[[datetime], Open | Shut] = always
        if plan.due is not None:
            self._haste = Haste(tariff, guard, plan.due, completions.now, self._count_left, self._tell_of_peak)
            decide = self._haste.decide
        elif plan.when is When.OFF_PEAK:
            decide = partial(tariff.decide, guard=guard)
        return Gate(
            decide=decide,
            now=completions.now,
            ask_time=completions.correct_clock,
            draining=self._patience.draining,
            scale=plan.scale,
        )

    async def _count_left(self) -> int:
        return await self._patience.ask(leases.find_left, self.ledger, self.plan.run.run_id)

    async def _tell_of_peak(self, left: int | None) -> None:
        detail = {"lane": self.lane_id, "documents_left": left}
        key = f"buys_peak {self.lane_id} {left}"
        await self._patience.ask(partial(runs.note, key=key), self.ledger, self.plan.run.run_id, "buys_peak", detail)

    async def _watch_pace(self) -> None:
        if self._haste is not None:
            every_s = max(PACE_EVERY_S * self.plan.scale, LOOK_AGAIN_LEAST_S)
            with suppress(Draining):
                await self._haste.watch(every_s, lambda: self.climber.gate.shut is None)
        await asyncio.Event().wait()  # a helper does not return

    async def _work_shards(self) -> None:
        async with asyncio.TaskGroup() as shards:
            with suppress(Draining):
                await unless(self.climber.draining, self._has_place.wait())
                await self._start_shards(shards)

    async def _start_shards(self, shards: asyncio.TaskGroup) -> None:
        """Claim and start shards until none is left. Raises Draining."""
        while not self.climber.is_draining:
            key = (self.ledger, self.plan.run.run_id, self.lane_id)
            claimed = await self._patience.ask(leases.claim, *key, list(self._working))
            if claimed is not None:
                await self._start(claimed, shards)
            elif await self._patience.ask(leases.has_unfinished, self.ledger, self.plan.run.run_id):
                await self._pause()  # our own last shards, or another lane's: should it die, they come back
            elif not await self._begin_phase():
                return

    async def _begin_phase(self) -> bool:
        """Begin the next phase of a run that keeps a promise, or wait for who does. False: there is none."""
        if self.plan.job.promise is None:
            return False
        is_begun = await self._patience.ask(certification.advance, self.ledger, self.plan.run.run_id, self.plan.job)
        if is_begun is False:
            await self._pause()
        return is_begun is not None

    async def _start(self, claimed: ClaimedShard, shards: asyncio.TaskGroup) -> None:
        """Set a shard going; returns when every document of it is under way."""
        work = ShardWork(
            claimed,
            self.climber,
            self.ledger,
            self.bulkhead,
            self.plan.root,
            self._reusable,
            self._slots,
            self.drain,
            self._patience,
            self.plan.is_elsewhere,
        )
        number = claimed.shard.shard_no
        finish = work.finish if self.telemetry is None else partial(self.telemetry.shard, number, work.finish)
        task = shards.create_task(self.plan.show(f"shard-{number:05d}", finish))
        self._working[number] = task
        task.add_done_callback(partial(self._end_working, number))
        await work.started.wait()

    def _end_working(self, number: int, task: asyncio.Task[None]) -> None:
        """A task of an earlier phase may end late, in what shows it: the shard may be claimed anew by then."""
        if self._working.get(number) is task:
            del self._working[number]

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.climber.draining.wait(), self.plan.times.beat_every_s / 4)

    async def _commit_intents(self, intents: Sequence[Intent]) -> Sequence[Permit]:
        self._fence_if_silent()
        if self.is_draining:  # also when Postgres comes back after a drain began
            return [Withheld() for _ in intents]
        return await attempts.intend(self.ledger, self.plan.run.run_id, self.lane_id, intents, self._reusable)

    async def _commit_records(self, records: Sequence[Record]) -> Sequence[bool]:
        lost = await attempts.record(self.ledger, self.plan.run.run_id, self.lane_id, records)
        if self.telemetry is not None:
            endings = [record.ending for record in records if record.ending is not None]
            self.telemetry.see_endings([ending for ending in endings if ending.lease not in lost])
        return [record.lease is None or record.lease not in lost for record in records]

    async def _beat(self) -> None:
        """Show that the lane lives, hear orders, bury the dead; fence oneself when Postgres is away too long."""
        while True:
            try:
                async with leases.alive(self.ledger, self.lane_id, self.plan.times.beat_within_s) as session:
                    await self._beat_on(session)
            except FarthingError as error:
                log.warning("no heartbeat", lane=self.lane_id, silent_s=round(self._silent_s), error=str(error))
                self._fence_if_silent()
                await asyncio.sleep(self.plan.times.beat_every_s)

    @property
    def _silent_s(self) -> float:
        """Seconds since the last heartbeat."""
        return self.climber.tick() - self._last_beat_s

    def _fence_if_silent(self) -> None:
        """Drain where others may take this lane for dead soon."""
        if self._silent_s > self.plan.times.fence_after_s:
            self.drain("fenced", "Postgres was away too long: run the same command to go on")

    async def _beat_on(self, session: leases.Session) -> None:
        times = self.plan.times
        while True:
            async with asyncio.timeout(times.beat_within_s):  # TimeoutError is an OSError: the session is given up
                self._let_go()
                told = self.in_flight, self.waiting_because(), self._places
                orders = await leases.beat(session, self.lane_id, *told)
            if self._silent_s > max(times.grace_s - times.beat_every_s, 3 * times.beat_every_s):
                self._back_since_s = self.climber.tick()
            self._last_beat_s = self.climber.tick()
            if orders is None:
                self.drain("fenced", "another process took this lane for dead: run the same command to go on")
            else:
                self._obey(orders)
                async with asyncio.timeout(times.beat_within_s):
                    await self._take_places(session, orders)
            if self._may_bury:
                await self._bury_dead()
            await asyncio.sleep(times.beat_every_s)

    @property
    def _may_bury(self) -> bool:
        """Whether the lane may judge others. Back from an outage it lets them come back, too."""
        return self._last_beat_s - self._back_since_s >= self.plan.times.grace_s

    async def _bury_dead(self) -> None:
        times = self.plan.times
        bury = {"grace_s": times.grace_s, "dead_after_s": times.dead_after_s}
        try:
            async with asyncio.timeout(times.beat_within_s):
                await leases.bury_dead(self.ledger, self.plan.run.run_id, **bury)
                # Of a backfill's other runs nobody may be left to bury whoever holds what is missing here.
                if self._is_short and self.plan.run.backfill_id is not None:
                    await leases.bury_sharing(self.ledger, self.plan.run.run_id, **bury)
        except (TimeoutError, LedgerUnavailable) as error:  # the next heartbeat tries again
            log.warning("no dead lane could be buried", lane=self.lane_id, error=type(error).__name__)

    def _obey(self, orders: Orders) -> None:
        """Work as the run is to be worked on from now: not at all, with so much in flight, under this cap."""
        if orders.state != "running":
            self.drain(orders.state, ADVICE.get(orders.state, ""))
        lanes = max(self._expected, orders.lanes)
        ceilings = self._ceilings(orders)
        self._shares = {name: self._share(name, ceilings[name], lanes, orders) for name in self.plan.ceilings}
        self._allow(lanes)
        self.climber.grants.hear(orders.cap, is_overdrawn=orders.is_overdrawn)

    def _share(self, tier: str, ceiling: int, lanes: int, orders: Orders) -> int:
        """What the lane is to have in flight. Too few places for all are for those who have something to send."""
        if ceiling >= lanes:
            return share(ceiling, lanes, orders.rank)
        others, before = orders.wanting.get(tier, (0, 0))
        return share(ceiling, others + 1, before, orders.turn) if self._wants(tier) else 0

    def _wants(self, tier: str) -> bool:
        is_first = tier == self.plan.job.ladder[0].name
        return self.climber.limiters[tier].is_wanted or (is_first and not self._has_place.is_set())

    def _ceilings(self, orders: Orders) -> dict[str, int]:
        return {name: orders.ceilings.get(name, ceiling) for name, ceiling in self.plan.ceilings.items()}

    def _allow(self, lanes: int) -> None:
        """Begin no more than the lane is to have, and holds."""
        for name, limiter in self.climber.limiters.items():
            limiter.allow(min(self._shares[name], self._held.get(name, 0)), lanes)
        if self.climber.limiters[self.plan.job.ladder[0].name].ceiling:
            self._has_place.set()
        self._widen(sum(limiter.ceiling for limiter in self.climber.limiters.values()))

    def _let_go(self) -> None:
        """What the lane holds from here on: what it may not use, and is not in flight, is for the others.

        Once it drains it may use nothing: whoever is past the last look at that has a place, and counts as in flight.
        """
        limiters = self.climber.limiters
        allowed = {name: 0 if self.is_draining else limiter.ceiling for name, limiter in limiters.items()}
        self._held = let_go(self._held, allowed, {name: limiter.in_flight for name, limiter in limiters.items()})

    @property
    def _places(self) -> dict[str, int]:
        """What the lane holds, and 0 where it holds nothing and has something to send."""
        wanted = [] if self.is_draining else [name for name in self.plan.ceilings if self._wants(name)]
        return dict.fromkeys(wanted, 0) | {name: places for name, places in self._held.items() if places}

    @property
    def _is_short(self) -> bool:
        """Whether the lane is to have more than it holds."""
        return any(self._held.get(name, 0) < mine for name, mine in self._shares.items())

    async def _take_places(self, session: leases.Session, orders: Orders) -> None:
        """Hold what the lane is to have, as soon as others let go of it."""
        if self._is_short and not self.is_draining:
            ceilings = self._ceilings(orders)
            shares = {name: mine for name, mine in self._shares.items() if mine}
            self._held |= await leases.hold(session, self.lane_id, shares, self._held, ceilings)
            self._allow(max(self._expected, orders.lanes))

    async def _let_in(self) -> None:
        """Once the lane drains, nobody waits for a place: it may not get one any more, and none is sent."""
        await self.climber.draining.wait()
        for limiter in self.climber.limiters.values():
            limiter.open()
        await asyncio.Event().wait()  # a helper does not return

    @property
    def _expected(self) -> int:
        """How many lanes to leave room for, though some have yet to come: a backfill's orders count them anyway."""
        is_early = self.climber.tick() - self._began_s < self.plan.times.comes_within_s
        return self.plan.lanes if is_early and not self.plan.run.sharing else 0

    def _widen(self, in_flight: int) -> None:
        """Let documents be in progress for so many in flight. Where there are more, they wait: none is put back."""
        width = max(8, int(in_flight * PROGRESS_PER_PLACE))
        for _ in range(width - self._width):
            self._slots.release()
        self._width = max(width, self._width)

    async def _give_back(self) -> None:
        """Give money back that lies idle while documents back off, or while the last shards are another lane's."""
        while True:
            await asyncio.sleep(self.plan.times.beat_every_s)
            with suppress(Draining):
                await self.climber.grants.give_back()

    async def _keep_on_disk(self) -> None:
        """While the lane drains and Postgres is away, keep on disk what could not be recorded (tasks/spill.py)."""
        await self.climber.draining.wait()
        while True:
            records = self.climber.records
            self._keep(records.pending if records.trouble else [])
            if self._is_interrupted and self._waits_only_for_postgres:
                self.give_up(
                    f"Postgres is away, so what {len(records.pending)} documents came to waits on disk until the run "
                    "goes on: start Postgres, then run the same command"
                )
                await asyncio.Event().wait()  # a helper does not return
            await asyncio.sleep(self.plan.times.beat_every_s / 4)

    @property
    def _waits_only_for_postgres(self) -> bool:
        return bool(self.climber.records.pending) and not self.in_flight and self._silent_s > INTERRUPTED_WAIT_S

    def _keep(self, records: Sequence[Record]) -> None:
        if self.spill is not None:
            self.spill.keep(records)

    async def _leave(self) -> None:
        """Give everything back. If Postgres is away, whoever resumes the run does it for us."""
        reason = self._ended.reason if self._ended else "done"
        try:
            async with asyncio.timeout(GOODBYE_S):
                await leases.leave(self.ledger, self.plan.run.run_id, self.lane_id, reason)
        except (LedgerUnavailable, TimeoutError) as error:
            log.warning("lane could not say goodbye", lane=self.lane_id, error=str(error))

    @property
    def _reusable(self) -> Reusable:
        job, run = self.plan.job, self.plan.run
        policy = (job.ladder[-1].name, None if job.is_pilot else job.escalate.below)
        first = job.ladder[0].name
        rule = job.confidence.model_dump(mode="json") if job.is_pilot else None
        return Reusable(job.prompt_version, *policy, run.is_simulated, run.reuses, first, rule)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel these tasks and give them a moment to end, whatever they end in."""
    for task in tasks:
        task.cancel()
    ended, _ = await asyncio.wait(tasks, timeout=LET_GO_S)
    for task in ended:
        if not task.cancelled():
            task.exception()  # else asyncio complains that nobody asked


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to show of several at once: one of ours, if there is one."""
    ours, _ = group.split(FarthingError)
    error: BaseException = ours or group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
