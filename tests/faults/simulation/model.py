"""A model of the ledger: what its SQL promises of a lane's calls, in plain Python and in memory.

Its methods are the functions of tasks.ledger without their first argument, and nothing in here can fail or wait.
The state machine (test_state_machine.py) holds it to the real SQL, call by call; so the simulation
(simulation.py) can let lanes work on it, thousands of times a minute.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from schemas.attempts import LaneId, RunId, Signal
from schemas.ceilings import TURN_S, take
from schemas.documents import Shard
from schemas.ladder import PastAttempt, Verdict
from schemas.records import DocumentState, Ending, Intent, Lease, Outcome, Record, ResultKey, StoredAnswer
from tasks.ledger.attempts import Fenced, PaidAnswer, Permit, Permitted, Reusable
from tasks.ledger.budgets import Grant, Room
from tasks.ledger.leases import DEAD_AFTER_S, GRACE_S, ClaimedShard, Orders
from tasks.ledger.runs import UNDER_WAY, LimitChange, Opening, Run, concurrency, policy

#: Run, document, attempt.
Key = tuple[int, int, int]
LONG_AGO = float("-inf")


class Fact(NamedTuple):
    """One thing that became durable, in the order of the commits."""

    what: str
    run_id: int
    key: int | Key | Lease | None = None
    lane_id: int | None = None


@dataclass
class ShardRow:
    """A shard and who works on it."""

    shard: Shard
    state: str = "open"
    epoch: int = 0
    lane_id: int | None = None

    @property
    def documents(self) -> range:
        first = self.shard.first_document_no
        return range(first, first + self.shard.document_count)


@dataclass
class LaneRow:
    """A lane. `has_session`: its process lives, as far as Postgres can tell."""

    run_id: int
    beat_at: float
    has_session: bool = False
    ended_because: str | None = None
    held: Mapping[str, int] = field(default_factory=dict)


@dataclass
class GrantRow:
    """A grant; the last of `closes` counts."""

    run_id: int
    budget_id: int
    lane_id: int
    amount: int
    closes: list[int] = field(default_factory=list)

    @property
    def booked(self) -> int:
        return self.closes[-1] if self.closes else self.amount


@dataclass
class BudgetRow:
    cap: int
    granted: int = 0


@dataclass
class RunRow:
    """A run, its shards, and the keys of its events."""

    opening: Opening
    budget_id: int
    shards: list[ShardRow]
    state: str = "running"
    reason: str | None = None
    limits: dict[str, int] = field(default_factory=dict)
    events: set[str] = field(default_factory=set)

    @property
    def ceilings(self) -> dict[str, int]:
        return {**concurrency(self.opening.job), **self.limits}

    @property
    def is_unfinished(self) -> bool:
        return any(row.state in ("open", "leased") for row in self.shards)


class Totals(NamedTuple):
    """A run's row of the view `run_cost`."""

    attempts: int
    cost: int
    unknown: int
    unknown_attempts: int
    results: int
    reused: int
    duplicates: int
    dead_letters: int


class Model:
    """All rows. `given` are the next numbers that identity columns give out, where somebody else decides them.

    It `was_crowded` where a lane was ever told of more lanes than places, or so many `lanes` were to come.
    """

    def __init__(self, clock: Callable[[], float] = lambda: 0.0, lanes: int = 0) -> None:
        self.clock, self.expected = clock, lanes
        self.was_crowded = False
        self.given: deque[int] = deque()
        self.numbers = count(1)
        self.runs: dict[int, RunRow] = {}
        self.budgets: dict[int, BudgetRow] = {}
        self.lanes: dict[int, LaneRow] = {}
        self.grants: dict[int, GrantRow] = {}
        self.intents: dict[Key, tuple[Intent, int]] = {}
        self.outcomes: dict[Key, Outcome] = {}
        self.unknowns: dict[Key, int] = {}
        self.answers: dict[Key, StoredAnswer] = {}
        self.documents: dict[tuple[int, int], Ending] = {}
        self.facts: list[Fact] = []

    # Runs.

    def open_run(self, opening: Opening) -> Run:
        unfinished = [n for n, row in self.runs.items() if _is_unfinished_of(row, opening)]
        same = [n for n in sorted(unfinished, reverse=True) if _identity(self.runs[n].opening) == _identity(opening)]
        for number in unfinished:
            if number not in same[:1]:
                self.runs[number].state = "superseded"
        if same:
            row = self.runs[same[0]]
            row.opening = opening
            row.state, row.reason, self.budgets[row.budget_id].cap = "running", None, opening.cap
            return self._read(same[0], is_resumed=True)
        run_id, budget_id = self._number(), self._number()
        self.budgets[budget_id] = BudgetRow(opening.cap)
        self.runs[run_id] = RunRow(opening, budget_id, [ShardRow(shard) for shard in opening.manifest.shards])
        return self._read(run_id)

    def find_run(self, run_id: RunId) -> Run:
        return self._read(run_id)

    def change_state(self, run_id: RunId, state: str, reason: str | None = None) -> bool:
        row = self.runs[run_id]
        if row.state not in ("running", "paused") or row.state == state:
            return False
        row.state, row.reason = state, reason
        return True

    def change_limits(self, run_id: RunId, limits: dict[str, int] | None) -> LimitChange | None:
        row = self.runs[run_id]
        if row.state not in UNDER_WAY:
            return None
        was = row.ceilings
        row.limits = {} if limits is None else {**row.limits, **limits}
        return LimitChange(row.ceilings, was)

    def change_cap(self, run_id: RunId, cap: int) -> int | None:
        row = self.runs[run_id]
        if row.state not in UNDER_WAY:
            return None
        budget = self.budgets[row.budget_id]
        was, budget.cap = budget.cap, cap
        return was

    def note(self, run_id: RunId, _kind: str, _detail: object, *, key: str) -> None:
        self.runs[run_id].events.add(key)

    def settle(self, run_id: RunId) -> str | None:
        row = self.runs[run_id]
        if row.is_unfinished:
            return None
        if row.state in ("running", "paused"):
            self._end_lanes(run_id, [n for n, lane in self.lanes.items() if lane.run_id == run_id], "run done")
            row.state, row.reason = "done", None
        return "sha256:" if row.state == "done" else None

    def _read(self, run_id: int, *, is_resumed: bool = False) -> Run:
        row = self.runs[run_id]
        opening, cap = row.opening, self.budgets[row.budget_id].cap
        return Run(
            RunId(run_id),
            opening.job.name,
            row.state,
            row.reason,
            opening.manifest.document_count,
            opening.currency,
            row.budget_id,
            cap,
            opening.is_simulated,
            is_resumed,
            ladder=tuple(tier.name for tier in opening.job.ladder),
            ceilings=row.ceilings,
            tolerance=opening.job.tolerance,
        )

    # Lanes and leases.

    def register(self, run_id: RunId) -> LaneId:
        number = self._number()
        self.lanes[number] = LaneRow(run_id, self.clock())
        return LaneId(number)

    def beat(self, lane_id: LaneId, _in_flight: int, _waiting: str | None, held: Mapping[str, int]) -> Orders | None:
        lane = self.lanes[lane_id]
        if lane.ended_because is not None:
            return None
        lane.beat_at, lane.held = self.clock(), dict(held)
        run = self.runs[lane.run_id]
        budget = self.budgets[run.budget_id]
        mates = [n for n, row in self.lanes.items() if row.run_id == lane.run_id and row.ended_because is None]
        self.was_crowded |= min(run.ceilings.values()) < max(len(mates), self.expected)
        rank = sum(number < lane_id for number in mates)
        wanting: dict[str, list[int]] = {}
        for number in (other for other in mates if other != lane_id):
            for tier in self.lanes[number].held:
                others, before = wanting.get(tier, (0, 0))
                wanting[tier] = [others + 1, before + (number < lane_id)]
        is_overdrawn, turn = budget.granted > budget.cap, int(self.clock()) // TURN_S
        return Orders(run.state, run.ceilings, budget.cap, is_overdrawn, len(mates), rank, turn, wanting)

    def hold(
        self, lane_id: LaneId, shares: Mapping[str, int], held: Mapping[str, int], ceilings: Mapping[str, int]
    ) -> dict[str, int]:
        lane = self.lanes[lane_id]
        living = [row for n, row in self.lanes.items() if row.ended_because is None and n != lane_id]
        others = [row for row in living if row.run_id == lane.run_id]
        theirs = [self.runs[row.run_id].ceilings for row in others]
        most = {tier: max([mine, *(each.get(tier, 0) for each in theirs)]) for tier, mine in ceilings.items()}
        taken = take(shares, held, [row.held for row in others], most)
        if lane.ended_because is not None:
            return dict(held)
        lane.held = lane.held | taken
        return dict(taken)

    def claim(self, run_id: RunId, lane_id: LaneId, working: Collection[int] | None = None) -> ClaimedShard | None:
        if self.lanes[lane_id].ended_because is not None:
            return None
        for row in self.runs[run_id].shards:
            is_mine = row.state == "leased" and row.lane_id == lane_id
            if row.state == "open" or (is_mine and working is not None and row.shard.shard_no not in working):
                row.state, row.epoch, row.lane_id = "leased", row.epoch + 1, lane_id
                lease = Lease(row.shard.shard_no, row.epoch)
                self.facts.append(Fact("claim", run_id, lease, lane_id))
                return self._claimed(run_id, row, lease)
        return None

    def finish(self, run_id: RunId, lane_id: LaneId, lease: Lease) -> bool:
        row = self._own(run_id, lane_id, lease, "done")
        if row is None or any((run_id, number) not in self.documents for number in row.documents):
            return False
        row.state = "done"
        return True

    def fail(self, run_id: RunId, lane_id: LaneId, lease: Lease, reason: str) -> bool:
        row = self._own(run_id, lane_id, lease, "failed")
        if row is None:
            return False
        row.state = "failed"
        for number in row.documents:
            ending = Ending(number, "", lease, DocumentState.DEAD_LETTER, reason=reason)
            self._end_document(run_id, lane_id, ending)
        return True

    def leave(self, run_id: RunId, lane_id: LaneId, because: str) -> None:
        self._end_lanes(run_id, [lane_id], because)

    def bury_dead(self, run_id: RunId, *, grace_s: float = GRACE_S, dead_after_s: float = DEAD_AFTER_S) -> int:
        dead = []
        for number, lane in self.lanes.items():
            silent_s = self.clock() - lane.beat_at
            is_gone = silent_s > dead_after_s or (silent_s > grace_s and not lane.has_session)
            if lane.run_id == run_id and lane.ended_because is None and is_gone:
                dead.append(number)
        self._end_lanes(run_id, dead, "died")
        return len(dead)

    def has_unfinished(self, run_id: RunId) -> bool:
        return self.runs[run_id].is_unfinished

    def has_living(self, run_id: RunId) -> bool:
        return any(lane.run_id == run_id and lane.ended_because is None for lane in self.lanes.values())

    def _own(self, run_id: int, lane_id: int, lease: Lease, end: str) -> ShardRow | None:
        """The shard, where the lane may bring it to this end."""
        row = self.runs[run_id].shards[lease.shard_no]
        is_held = (row.epoch, row.lane_id) == (lease.epoch, lane_id) and row.state in ("leased", end)
        return row if is_held else None

    def _claimed(self, run_id: int, row: ShardRow, lease: Lease) -> ClaimedShard:
        manifest = self.runs[run_id].opening.manifest
        duplicates = {d.document_no: d for d in manifest.duplicates if d.document_no in row.documents}
        return ClaimedShard(lease, row.shard, manifest.files[row.shard.file_no], duplicates)

    def _end_lanes(self, run_id: int, lanes: Sequence[int], because: str) -> None:
        fenced: list[int] = []
        for number in lanes:
            lane = self.lanes[number]
            lane.ended_because = lane.ended_because or because
        for row in self.runs[run_id].shards:
            if row.lane_id in lanes and row.state == "leased":
                row.state, row.epoch, row.lane_id = "open", row.epoch + 1, None
                self.facts.append(Fact("fence", run_id, Lease(row.shard.shard_no, row.epoch)))
            elif row.lane_id not in lanes or row.state != "failed":
                continue
            fenced += row.documents
        for key, (intent, lane_id) in self.intents.items():
            if key[0] == run_id and lane_id in lanes and key[1] in fenced and key not in self.outcomes:
                self.unknowns.setdefault(key, intent.reserved)
        self._settle_grants(run_id, lanes, [])

    # Attempts.

    def intend(self, run_id: RunId, lane_id: LaneId, intents: Sequence[Intent], reusable: Reusable) -> list[Permit]:
        held = self._held(run_id, lane_id)
        answered = self.find_results_now({intent.text_digest for intent in intents}, reusable)
        return [self._permit(run_id, lane_id, intent, held, answered) for intent in intents]

    def _permit(
        self, run_id: int, lane_id: int, intent: Intent, held: set[Lease], answered: dict[bytes, ResultKey]
    ) -> Permit:
        key = (run_id, intent.document_no, intent.attempt_no)
        if intent.lease not in held:
            return Fenced()
        if key in self.intents:
            is_mine = self.intents[key][1] == lane_id
            return Permitted() if is_mine else answered.get(intent.text_digest, Fenced())
        if intent.text_digest in answered:
            return answered[intent.text_digest]
        self.intents[key] = intent, lane_id
        self.facts.append(Fact("intent", run_id, key, lane_id))
        return Permitted()

    def record(self, run_id: RunId, lane_id: LaneId, records: Sequence[Record]) -> set[Lease]:
        held, is_new = self._held(run_id, lane_id), False
        for record in records:
            kept = record.ending is not None and record.ending.lease in held
            if record.outcome is not None:
                is_new |= self._append_outcome(run_id, lane_id, record, is_fenced=not kept)
            if record.ending is not None and kept:
                is_new |= self._end_document(run_id, lane_id, record.ending)
        if is_new and self.lanes[lane_id].ended_because is not None:
            self._settle_grants(run_id, [lane_id], [])
        return {record.ending.lease for record in records if record.ending is not None} - held

    def _append_outcome(self, run_id: int, lane_id: int, record: Record, *, is_fenced: bool) -> bool:
        outcome, ending = record.outcome, record.ending
        assert outcome is not None
        key = (run_id, outcome.document_no, outcome.attempt_no)
        if outcome.cost is None and outcome.bound is not None:
            self.unknowns.setdefault(key, outcome.bound)
        answer = outcome.answer
        if ending is not None and is_fenced and ending.state is DocumentState.RESULT:
            content = outcome.reply.content or ""
            answer = StoredAnswer(content, ending.answer, ending.confidence, ending.confidence_signal)
        if answer is not None:
            self.answers.setdefault(key, answer)
        if key in self.outcomes:
            return False
        self.outcomes[key] = outcome
        self.facts.append(Fact("outcome", run_id, key, lane_id))
        return True

    def _end_document(self, run_id: int, lane_id: int, ending: Ending) -> bool:
        if (run_id, ending.document_no) in self.documents:
            return False
        self.documents[run_id, ending.document_no] = ending
        self.facts.append(Fact("ending", run_id, ending.document_no, lane_id))
        return True

    def _held(self, run_id: int, lane_id: int) -> set[Lease]:
        shards = self.runs[run_id].shards
        return {Lease(r.shard.shard_no, r.epoch) for r in shards if r.lane_id == lane_id and r.state == "leased"}

    def find_results_now(self, digests: Collection[bytes], reusable: Reusable) -> dict[bytes, ResultKey]:
        found: dict[bytes, ResultKey] = {}
        for run_id, number in sorted(self.documents):
            ending, opening = self.documents[run_id, number], self.runs[run_id].opening
            is_answer = ending.state is DocumentState.RESULT and ending.answer is not None
            is_alike = (opening.job.prompt_version, opening.is_simulated) == (
                reusable.prompt_version,
                reusable.is_simulated,
            )
            is_asked = ending.text_digest is not None and ending.text_digest in digests
            if is_asked and is_answer and is_alike and _is_sure(ending, reusable):
                assert ending.text_digest is not None
                found.setdefault(ending.text_digest, ResultKey(run_id, number))
        return found

    def find_endings(self, run_id: RunId, first: int, last: int) -> set[int]:
        return {number for number in range(first, last + 1) if (run_id, number) in self.documents}

    def find_past_attempts(self, run_id: RunId, first: int, last: int) -> dict[int, list[PastAttempt]]:
        history: dict[int, list[PastAttempt]] = defaultdict(list)
        for key in sorted(self.intents):
            if key[0] == run_id and first <= key[1] <= last and key[:2] not in self.documents:
                outcome, (intent, _) = self.outcomes.get(key), self.intents[key]
                came_to = (outcome.reply.signal, outcome.verdict) if outcome else (Signal.LOST, None)
                history[key[1]].append(PastAttempt(key[2], intent.tier, intent.purpose, intent.reason, *came_to))
        return dict(history)

    def find_paid_answer(self, run_id: RunId, document_no: int, verdict: Verdict) -> PaidAnswer | None:
        for key in sorted(self.answers, reverse=True):
            outcome = self.outcomes.get(key)
            if key[:2] == (run_id, document_no) and outcome is not None and outcome.verdict is verdict:
                return PaidAnswer(self.intents[key][0].tier, key[2], self.answers[key])
        return None

    # Money.

    def open_grant(
        self,
        run_id: RunId,
        lane_id: LaneId,
        budget_id: int,
        *,
        need: int,
        want: int,
        known: Collection[int] | None = None,
    ) -> Grant | None:
        for number, grant in self.grants.items():
            is_forgotten = known is not None and number not in known and not grant.closes
            if is_forgotten and (grant.run_id, grant.lane_id) == (run_id, lane_id):
                return Grant(number, grant.amount)
        budget = self.budgets[budget_id]
        if budget.cap - budget.granted < need:
            return None
        amount = min(want, budget.cap - budget.granted)
        budget.granted += amount
        number = self._number()
        self.grants[number] = GrantRow(run_id, budget_id, lane_id, amount)
        return Grant(number, amount)

    def is_exhausted(self, budget_id: int, need: int) -> bool:
        budget = self.budgets[budget_id]
        return budget.cap - budget.granted < need and not any(
            grant.budget_id == budget_id and not grant.closes and self.lanes[grant.lane_id].ended_because is None
            for grant in self.grants.values()
        )

    def find_room(self, budget_id: int) -> Room:
        """Open attempts are not spent yet: what was reserved for them is held."""
        budget, spent = self.budgets[budget_id], 0
        for key, (intent, _) in self.intents.items():
            outcome = self.outcomes.get(key)
            is_known = outcome is not None and outcome.cost is not None
            if self.grants[intent.grant_id].budget_id == budget_id and (is_known or key in self.unknowns):
                spent += self.takes(key)
        return Room(budget.cap, spent, budget.granted - spent)

    def close_grants(self, run_id: RunId, grants: Sequence[int]) -> None:
        self._settle_grants(run_id, [], grants)

    def spent(self, grant_id: int) -> int:
        """What the attempts of a grant take out of it: cost, bound, or while open all that was reserved."""
        return sum(self.takes(key) for key, (intent, _) in self.intents.items() if intent.grant_id == grant_id)

    def takes(self, key: Key) -> int:
        outcome = self.outcomes.get(key)
        if outcome is not None and outcome.cost is not None:
            return outcome.cost
        return self.unknowns.get(key, self.intents[key][0].reserved)

    def billing(self, key: Key) -> str:
        """What the view `attempt` calls it."""
        outcome = self.outcomes.get(key)
        if outcome is not None and outcome.cost is not None:
            return "known"
        return "unknown" if outcome is not None or key in self.unknowns else "open"

    def _settle_grants(self, run_id: int, lanes: Sequence[int], grants: Sequence[int]) -> None:
        for number, grant in self.grants.items():
            if grant.run_id == run_id and (grant.lane_id in lanes or number in grants):
                booked, spent = grant.booked, self.spent(number)
                if not grant.closes or booked != spent:
                    grant.closes.append(spent)
                    self.budgets[grant.budget_id].granted += spent - booked

    def totals(self, run_id: int) -> Totals:
        """What the view `run_cost` must say."""
        keys = [key for key in self.intents if key[0] == run_id]
        known = [o.cost for k in keys if (o := self.outcomes.get(k)) is not None and o.cost is not None]
        states = [ending.state for (number, _), ending in self.documents.items() if number == run_id]
        taken = sum(self.takes(key) for key in keys)
        ends = [states.count(state) for state in ("result", "reused", "duplicate", "dead_letter")]  # type: ignore[arg-type]  # a StrEnum equals its value
        return Totals(len(keys), sum(known), taken - sum(known), len(keys) - len(known), *ends)

    def _number(self) -> int:
        return self.given.popleft() if self.given else next(self.numbers)


def _is_unfinished_of(row: RunRow, opening: Opening) -> bool:
    is_selected = (row.opening.job.name, row.opening.selection) == (opening.job.name, opening.selection)
    return is_selected and row.state in ("running", "paused")


def _identity(opening: Opening) -> tuple[Any, ...]:
    job = opening.job
    return job.prompt_version, policy(job), opening.manifest.digest, opening.currency, opening.is_simulated


def _is_sure(ending: Ending, reusable: Reusable) -> bool:
    is_last = ending.tier == reusable.last_tier
    if is_last or reusable.below is None:
        return is_last
    return ending.confidence is None or ending.confidence >= float(reusable.below)
