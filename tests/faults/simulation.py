"""A simulated run: real lanes in virtual time, on a model of the ledger and before a provider, both of which fail by seed.

What is real: tasks.lanes, climbs, shards, grants, writer, limiter, priming, drains, patience, waits, watch, spill, and
the settling of a run. What stands in: the functions of tasks.ledger that they call (`Line`, on the model), the door
to the model (`Door`, before a `Provider` with a bill of its own), the reading of Parquet, and the clock.

One seed draws everything: how many documents and lanes, what goes wrong how often and when. A lane is killed by a
timer or at its n-th durable step, before or after the COMMIT or the sending; its line is dead from then on, and the
next start takes over. When the faults stop, the run has to get done.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import SecretStr

from sandbox.tariff import charge_at
from schemas.attempts import Call, LaneId, Reply, RunId, Signal, Token, Usage
from schemas.documents import Document, Duplicate, InputFile, Shard, Unfit, UnfitDocument
from schemas.errors import InputChanged, InputUnavailable, LedgerUnavailable
from schemas.jobs import Job
from schemas.settings import Settings
from tasks import enrichment, shards, spill
from tasks.lanes import Ended, Lane, LanePlan
from tasks.ledger import attempts, budgets, leases, runs
from tasks.ledger.connection import LedgerFull, PassingFailure, PoisonValue
from tasks.ledger.leases import LeaseTimes
from tasks.ledger.runs import Opening, Run
from tasks.spill import Spill
from tests.faults.model import LONG_AGO, Key, Model
from tests.ledgers import BOOK, JOB, make_manifest, opening

COLOURS = ("red", "green", "blue", "black", "white")
TIMES = LeaseTimes(beat_every_s=4.0, fence_after_s=12.0, grace_s=6.0, dead_after_s=18.0)
#: The provider's world runs so much faster than the real one: waits of two minutes take six seconds.
SCALE = 0.05
#: A start that takes longer than this has hung; after the faults stopped, so many more have to be enough.
START_WITHIN_S, STARTS_WITHIN = 900.0, 8
#: Instants to begin at: off-peak for hours, a little before a peak begins or ends, in mid-peak.
BEGINNINGS = tuple(
    datetime.fromisoformat(instant).replace(tzinfo=UTC)
    for instant in ("2026-09-26 00:10", "2026-09-24 00:59", "2026-09-24 03:59", "2026-09-24 02:00")
)
#: What a tier may answer, besides well, with the share of seeds in which it does.
REPLIES = {
    "unsure": 0.7,
    "invalid": 0.4,
    "blank": 0.3,
    "truncated": 0.3,
    "interrupted": 0.3,
    "interrupted_unbilled": 0.2,
    "refused": 0.2,
    "refused_unread": 0.2,
    "rate_limited": 0.4,
    "unavailable": 0.4,
    "failed": 0.3,
    "not_sent": 0.3,
    "lost": 0.4,
    "slow": 0.2,
    "malformed": 0.2,
    "rejected": 0.15,
    "unauthorised": 0.04,
    "no_balance": 0.08,
    "other_model": 0.15,
    "foreign_model": 0.04,
    "unmetered": 0.1,
    "impossible_usage": 0.05,
    "too_much_output": 0.05,
    "poisonous": 0.1,
}
#: How a seed's share of an ill is drawn: mostly little, sometimes nearly always.
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Plan:
    """All that a seed has drawn before anything begins. Shares are of replies, or of calls to the ledger."""

    documents: int
    shard_rows: int
    lanes: int
    concurrency: int
    cap: int
    is_long_prefix: bool
    begins_at: datetime
    calm_after_s: float
    replies: dict[str, float]
    refused: float
    forgotten: float
    slow: float
    outages: tuple[tuple[float, float], ...]
    is_full: bool
    mishaps: tuple[tuple[float, str], ...]
    doomed: float
    fences_itself: bool
    unfit: frozenset[int]
    twins: frozenset[int]
    damaged: float

    @classmethod
    def draw(cls, chance: Random) -> Plan:
        documents = chance.choice((1, 4, 8, 12, 25))
        calm_after_s = chance.uniform(5, 60)
        kinds = ("kill", "cut", "interrupt", "interrupt_twice", "pause", "bury", "storm")
        mishaps = ((chance.uniform(0, calm_after_s), chance.choice(kinds)) for _ in range(chance.choice((0, 1, 2, 4))))
        outages = ((at := chance.uniform(0, calm_after_s), at + chance.uniform(1, 25)) for _ in range(chance.choice((0, 0, 1, 2))))
        return cls(
            documents=documents,
            shard_rows=chance.choice((3, 7, 30)),
            lanes=chance.choice((1, 1, 2, 3)),
            concurrency=chance.choice((1, 3, 8, 20)),
            cap=int(10 ** chance.uniform(8.5, 10.5)) if chance.random() < 0.3 else 10**12,
            is_long_prefix=chance.random() < 0.5,
            begins_at=chance.choice(BEGINNINGS),
            calm_after_s=calm_after_s,
            replies={name: chance.choice(SHARES) for name, often in REPLIES.items() if chance.random() < often},
            refused=chance.choice((0, 0, 0.02, 0.1, 0.3)),
            forgotten=chance.choice((0, 0, 0.02, 0.1, 0.3)),
            slow=chance.choice((0, 0, 0.05, 0.2)),
            outages=tuple(outages),
            is_full=chance.random() < 0.3,
            mishaps=tuple(sorted(mishaps)),
            doomed=chance.choice((0, 0, 0.3, 0.8)),
            fences_itself=chance.random() < 0.7,
            unfit=frozenset(n for n in range(documents) if chance.random() < 0.05),
            twins=frozenset(n for n in range(1, documents) if chance.random() < 0.05),
            damaged=chance.choice((0, 0, 0, 0, 0.1)),
        )


@dataclass
class World:
    """What everything in one simulation shares. `problems` are what the simulation itself saw go wrong."""

    plan: Plan
    chance: Random
    model: Model
    clock: Callable[[], float]
    is_calm: bool = False
    problems: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    lines: list[Line] = field(default_factory=list)
    #: In a storm, until this instant, the provider refuses nearly everything.
    storm_until: float = 0.0

    def now(self) -> datetime:
        return self.plan.begins_at + timedelta(seconds=self.clock())

    def happens(self, share: float, what: str) -> bool:
        """Whether this fault strikes now."""
        if self.is_calm or self.chance.random() >= share:
            return False
        self.faults[what] += 1
        return True


@dataclass(frozen=True, slots=True)
class Charged:
    """One line of the bill: what the provider charges for an attempt, by its own tariff."""

    cost: int
    at: float
    lane_id: int


@dataclass
class Provider:
    """The provider: its replies by chance, its own bill, and how many of each lane's requests it has at once."""

    world: World
    bill: dict[Key, Charged] = field(default_factory=dict)
    sent: dict[Key, float] = field(default_factory=dict)
    in_flight: Counter[tuple[int, str]] = field(default_factory=Counter)
    peaks: Counter[tuple[int, str]] = field(default_factory=Counter)
    #: Requests by model that had the prefix: the third hits.
    warmed: Counter[str] = field(default_factory=Counter)

    async def answer(self, call: Call, line: Line) -> Reply:
        key = _key(call.attempt_key)
        self._admit(key, line)
        place = (line.lane_id, call.model)
        self.in_flight[place] += 1
        self.peaks[place] = max(self.peaks[place], self.in_flight[place])
        try:
            return await self._reply(call, key, line)
        finally:
            self.in_flight[place] -= 1

    def _admit(self, key: Key, line: Line) -> None:
        """Note a request, and whether it may be here at all (G4)."""
        if key in self.sent:
            self.world.problems.append(f"attempt {key} was sent twice")
        self.sent[key] = self.world.clock()
        intent = self.world.model.intents.get(key)
        if intent is None or intent[1] != line.lane_id:
            self.world.problems.append(f"attempt {key} was sent by lane {line.lane_id} without an intent of its own")

    async def _reply(self, call: Call, key: Key, line: Line) -> Reply:
        chance, clock = self.world.chance, self.world.clock
        kind, latency_s = self._choose(), min(0.2 + chance.expovariate(2), call.deadline_s)
        usage = self._count(call, chance)
        sent_at, ended_at = self.world.now(), self.world.now() + timedelta(seconds=latency_s)
        model = {"other_model": "deepseek-v4-pro", "foreign_model": "gpt-5.5"}.get(kind, call.model)
        if kind == "too_much_output":
            usage = replace(usage, output=_allowed(call) + 1)
        if kind in BILLED or (kind in PERHAPS_BILLED and chance.random() < 0.5):
            cost = 0 if model == "gpt-5.5" else _charge(model, usage, ended_at)
            self.bill[key] = Charged(cost, clock(), line.lane_id)
        await asyncio.sleep(call.deadline_s if kind == "slow" else latency_s)
        return make_reply(kind, key, usage, model, sent_at, ended_at, chance)

    def _choose(self) -> str:
        world = self.world
        if world.clock() < world.storm_until and world.chance.random() < 0.9:
            return "rate_limited"
        for kind, share in world.plan.replies.items():
            if world.happens(share, kind):
                return kind
        return "good"

    def _count(self, call: Call, chance: Random) -> Usage:
        """Tokens: a quarter of the bytes, the prefix from the cache once two requests had it."""
        total = sum(len(message.content.encode()) for message in call.messages) // 4 + 8
        prefix = len(call.messages[0].content.encode()) // 4 // 128 * 128
        self.warmed[call.model] += 1
        hit = prefix if self.warmed[call.model] > 2 else 0
        return Usage(hit, total - hit, chance.randint(4, min(20, _allowed(call))))


#: Replies of a model that did its work; and those after which nobody can tell.
BILLED = frozenset(
    {"good", "unsure", "invalid", "blank", "truncated", "interrupted", "refused", "other_model", "foreign_model",
     "unmetered", "impossible_usage", "too_much_output", "poisonous"}
)
PERHAPS_BILLED = frozenset({"failed", "lost", "slow", "malformed"})
#: Replies without usage: signal and HTTP status.
BARE = {
    "interrupted_unbilled": (Signal.INTERRUPTED, 200),
    "refused_unread": (Signal.REFUSED, 400),
    "rate_limited": (Signal.RATE_LIMITED, 429),
    "unavailable": (Signal.UNAVAILABLE, 503),
    "failed": (Signal.FAILED, 504),
    "not_sent": (Signal.NOT_SENT, None),
    "lost": (Signal.LOST, None),
    "slow": (Signal.LOST, None),
    "malformed": (Signal.MALFORMED, 200),
    "rejected": (Signal.REJECTED, 400),
    "unauthorised": (Signal.UNAUTHORISED, 401),
    "no_balance": (Signal.NO_BALANCE, 402),
}
SIGNALS = {
    "blank": Signal.BLANK,
    "truncated": Signal.TRUNCATED,
    "interrupted": Signal.INTERRUPTED,
    "refused": Signal.REFUSED,
}


def make_reply(
    kind: str, key: Key, usage: Usage, model: str, sent_at: datetime, ended_at: datetime, chance: Random
) -> Reply:
    """What tasks.completions would make of such a reply."""
    if kind in BARE:
        signal, status = BARE[kind]
        reply = Reply(signal, sent_at, ended_at, http_status=status)
        if kind == "rate_limited":
            ceiling, wait_s = chance.choice((None, 2, 5)), chance.choice((None, 3.0))
            return replace(reply, ceiling=ceiling, retry_after_s=wait_s)
        return reply
    content = '{"colour":"%s"}' % COLOURS[key[1] % len(COLOURS)]
    if kind == "invalid":
        content = content.replace("colour", "color")
    logprob = -3.0 if kind == "unsure" else -0.001
    has_usage = kind not in ("unmetered", "impossible_usage")
    return Reply(
        SIGNALS.get(kind, Signal.ANSWERED),
        sent_at,
        ended_at,
        http_status=200,
        content=None if kind in SIGNALS else content,
        tokens=None if kind in SIGNALS else tuple(Token(piece, logprob) for piece in _pieces(content)),
        usage=usage if has_usage else None,
        usage_fault="hit + miss is not the prompt" if kind == "impossible_usage" else None,
        served_model=model,
        provider_id="poison" if kind == "poisonous" else "fine",
    )


def _pieces(content: str) -> list[str]:
    head, colour, tail = content.partition(content.split('"')[3])
    return [head, colour, tail]


def _charge(model: str, usage: Usage, instant: datetime) -> int:
    return charge_at(model, "USD", instant).price.cost(usage.hit, usage.miss, usage.output)


def _allowed(call: Call) -> int:
    allowed = call.parameters["max_tokens"]
    assert isinstance(allowed, int)
    return allowed


def _key(name: str) -> Key:
    run_id, number, attempt_no = map(int, name.split("."))
    return run_id, number, attempt_no


@dataclass
class Door:
    """One lane's door to the provider, in place of `Completions`."""

    provider: Provider
    line: Line
    offset: timedelta = timedelta(0)

    def now(self) -> datetime:
        return self.provider.world.now()

    async def complete(self, call: Call) -> Reply:
        await self.line.step("send")
        return await self.provider.answer(call, self.line)


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
        answer = getattr(world.model, name)(*arguments, **named)
        await self.step(f"{name} after")
        if name == "open_grant" and answer is not None:
            self._watch_cap(arguments[2])
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

    def _watch_cap(self, budget_id: int) -> None:
        budget = self.world.model.budgets[budget_id]
        if budget.granted > budget.cap:
            self.world.problems.append(f"{budget.granted} granted of {budget.cap}")


def _refuse_poison(records: Sequence[Any]) -> None:
    if any(record.outcome is not None and record.outcome.reply.provider_id == "poison" for record in records):
        raise PoisonValue("a value is refused")


@asynccontextmanager
async def alive(line: Line, lane_id: LaneId) -> AsyncIterator[Line]:
    """The session that holds the lane's lock."""
    row = line.world.model.lanes[lane_id]
    try:
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
    budgets: ("open_grant", "is_money_out", "close_grants"),
    leases: ("register", "beat", "claim", "finish", "fail", "leave", "bury_dead", "has_unfinished", "has_living"),
    runs: ("open_run", "find_run", "change_state", "note", "settle"),
}


async def _call(name: str, line: Line, *arguments: Any, **named: Any) -> Any:
    return await line.call(name, *arguments, **named)


async def _name(_line: Line, run_id: RunId) -> str:
    return f"run-{run_id}-simulated"


@contextmanager
def seams() -> Iterator[None]:
    """Let the product call `Line` where it would call Postgres."""
    with pytest.MonkeyPatch.context() as patch:
        for module, names in SEAM.items():
            for name in names:
                patch.setattr(module, name, partial(_call, name))
        patch.setattr(leases, "alive", alive)
        patch.setattr(spill, "_find_name", _name)
        patch.setattr(spill.os, "fsync", lambda _descriptor: None)
        patch.setattr(shards.documents, "read_shard", lambda _input, file, shard, root: root(file, shard))
        patch.setattr(enrichment, "opened", _opened)
        yield


@asynccontextmanager
async def _opened(settings: Any, _role: object, **_size: int) -> AsyncIterator[Any]:
    """`settle_run` opens a ledger of its own; `require_database` hands it what stands for the database's URL."""
    yield settings


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
        self.world = World(self.plan, chance, Model(loop.time), loop.time)
        self.provider = Provider(self.world)
        prompt = JOB.prompt + (" Think of red, of green, and of blue." * 60 if self.plan.is_long_prefix else "")
        each = {tier.name: self.plan.concurrency for tier in JOB.ladder}
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
        assert not hung, f"{len(hung)} lanes hang, because {[line.lane.waiting_because() for line in self.world.lines if line.lane]}"
        return [end for lane in lanes if (end := lane.result()) is not None]

    async def _work(self, run: Run) -> Ended | None:
        """One lane; None where it was killed."""
        world, plan = self.world, self.plan
        doom = world.chance.choice((3, 10, 30, 100)) if world.happens(plan.doomed, "doomed") else None
        line = Line(world)
        line.lane_id = await self._insist(lambda line: leases.register(line, run.run_id))
        line.doom = None if doom is None else world.chance.randrange(doom)
        line.lane = lane = Lane(line, LaneId(line.lane_id), Door(self.provider, line), self._lane_plan(run))  # type: ignore[arg-type]  # stand-ins
        lane.spill = Spill(self.folder, await _name(line, run.run_id), LaneId(line.lane_id))
        line.work = asyncio.create_task(lane.run_shards())
        world.lines.append(line)
        await asyncio.wait({line.work, line.death}, return_when=asyncio.FIRST_COMPLETED)
        world.lines.remove(line)
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
            root=self._read,  # type: ignore[arg-type]  # read_shard's stand-in calls it
            lanes=self.plan.lanes,
            scale=SCALE,
            times=replace(times, fence_after_s=times.fence_after_s),
            random=self.world.chance,
        )

    def _read(self, _file: InputFile, shard: Shard) -> Iterator[Document | UnfitDocument]:
        if self.world.happens(self.plan.damaged, "input changed"):
            raise InputChanged("it is another file now")
        if self.world.happens(self.plan.damaged, "input unavailable"):
            raise InputUnavailable("no disk")
        for number in range(shard.first_document_no, shard.first_document_no + shard.document_count):
            if number in self.plan.unfit:
                yield UnfitDocument(number, f"d{number}", Unfit.EMPTY_TEXT)
            else:
                yield Document(number, f"d{number}", f"text {number}")

    async def _play_mishaps(self) -> None:
        world = self.world
        for at, kind in self.plan.mishaps:
            await asyncio.sleep(max(0.0, at - world.clock()))
            if world.lines:
                line = world.chance.choice(world.lines)
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
                world.model.change_state(RunId(world.model.lanes[line.lane_id].run_id), "paused", "operator")
            case "bury":
                world.model.lanes[line.lane_id].beat_at = LONG_AGO
            case "storm":
                world.storm_until = world.clock() + world.chance.uniform(1, 10)


SETTINGS = Settings(database_url=SecretStr("postgresql://nobody@nowhere/nothing"))
