"""A state machine: the ledger's real SQL, call by call, against the model that the simulation trusts.

Hypothesis makes up a life of several lanes, with lost answers to COMMITs, silence, late and repeated replies, caps
that move and runs that are started again. Every call goes to Postgres and to the model, and both must answer the
same; after every step the rows and the views must say what the model says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as begin_at
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from schemas.attempts import Purpose, RunId, Signal
from schemas.documents import Duplicate
from schemas.ladder import Verdict
from schemas.records import DocumentState, Intent, Lease, Record, ResultKey, StoredAnswer
from tasks.ledger import attempts, budgets, leases, runs
from tasks.ledger.attempts import Permitted, Reusable
from tasks.ledger.connection import Ledger
from tasks.ledger.leases import ClaimedShard
from tasks.ledger.runs import Run
from tests.faults.simulation.model import LONG_AGO, Model, Totals
from tests.faults.summary import Tally
from tests.ledgers import BOOK, JOB, RESERVED, Hand, lane_ledger, make_manifest, opening, text_digest

DOCUMENTS, SHARD_ROWS = 7, 3
#: So few reservations that the cap is met in every example.
CAP = 12 * RESERVED
#: Examples and steps in each, in the short form and in the long one.
SHORT, LONG = (10, 20), (500, 50)
MODULES = (attempts, budgets, leases, runs)
#: Which lane, and which of its shards, documents and grants: counted on, and round again.
AT, WHICH = st.integers(0, 2), st.integers(0, 20)
#: What replies come to. A shaky result would not be reused.
KINDS = ("result", "shaky", "unsure", "lost", "free")
#: Whether the answer to a COMMIT arrives.
HEARS = st.sampled_from((True, True, True, False))


@dataclass
class Ground:
    """What all examples share: one loop, one database, one connection that sees everything."""

    runner: asyncio.Runner
    ledger: Ledger
    superuser: psycopg.Connection[Any]
    price_ids: dict[str, int]
    tally: Tally
    examples: Iterator[int] = field(default_factory=count)


@dataclass
class Laner:
    """A lane as its process sees itself; the ledger may know better."""

    hand: Hand
    claims: dict[int, ClaimedShard] = field(default_factory=dict)
    #: What is left of each grant it believes open.
    free: dict[int, int] = field(default_factory=dict)
    #: Intents that were permitted, of which no outcome was recorded.
    sent: dict[tuple[int, int], Intent] = field(default_factory=dict)

    def pick(self, which: int) -> ClaimedShard:
        return list(self.claims.values())[which % len(self.claims)]


class LedgerMachine(RuleBasedStateMachine):
    """One example: a job of its own, so that no other example's rows matter to it."""

    ground: Ground

    def __init__(self) -> None:
        super().__init__()
        number = next(self.ground.examples)
        self.job = replace(JOB, name=f"colours-{number}", prompt=f"Which colour? JSON. Example {number}.")
        self.model = Model()
        self.lanes: list[Laner] = []
        self.known_runs: list[Run] = []
        #: Calls that may be made again: their COMMIT went through, and its answer did not.
        self.past: list[Callable[[], None]] = []
        self.turns = count()
        self.cap = CAP
        self.caps: list[int] = []

    def both(self, name: str, *arguments: Any, born: int = 0, **named: Any) -> Any:
        """Ask Postgres and the model the same; both must answer the same. `born`: how many numbers it gives out."""
        real = self.real(name, *arguments, **named)
        if born and real is not None:
            self.model.given.extend(_numbers(real)[:born])
        assert _plain(getattr(self.model, name)(*arguments, **named)) == _plain(real), name
        self.model.given.clear()
        return real

    def real(self, name: str, *arguments: Any, **named: Any) -> Any:
        (function,) = {getattr(module, name) for module in MODULES if hasattr(module, name)}
        ask = partial(_in_session, function) if name in ("beat", "hold") else function
        return self.ground.runner.run(ask(self.ground.ledger, *arguments, **named))

    def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        cursor = self.ground.superuser.execute(query, values or None)
        return cursor.fetchall() if cursor.description else []

    @property
    def run(self) -> Run:
        return self.known_runs[-1]

    @property
    def run_id(self) -> RunId:
        return self.run.run_id

    @initialize()
    def start(self) -> None:
        """Two lanes at work: each has a shard, money, a paid answer, a lost one, and attempts in flight."""
        self.open_run()
        for at in range(2):
            self.join()
            self.claim(at, hears=True, is_repeated=False)
            self.open_grant(at, reservations=4, hears=False)
            self.open_grant(at, reservations=4, hears=True)
            self.intend(at, which=[1, 2, 7], hears=True, is_same_text=False)
            self.record(at, how_many=1, kind=("result", "shaky")[at])
            self.record(at, how_many=1, kind="lost")

    @rule(cap=st.sampled_from((CAP, CAP // 3, CAP // 2, 2 * CAP)))
    def open_run_again(self, cap: int) -> None:
        """The same command: it resumes the run, under another cap perhaps, or opens a second one once it is done."""
        self.cap = cap
        self.open_run()
        if not self.lanes:
            self.join()

    def open_run(self) -> None:
        manifest = make_manifest(DOCUMENTS, SHARD_ROWS, [Duplicate(5, 0, is_same_text=True)])
        run = self.both("open_run", opening(job=self.job, manifest=manifest, cap=self.cap), born=2)
        if self.known_runs and run.run_id != self.run_id:
            self.lanes.clear()
            self.past.clear()
            self.caps.clear()
        self.known_runs.append(run)
        self.caps.append(self.cap)

    @precondition(lambda self: len(self.lanes) < 3)
    @rule()
    def join(self) -> None:
        lane_id = self.both("register", self.run_id, born=1)
        self.lanes.append(Laner(Hand(self.ground.ledger, self.run, lane_id, self.ground.price_ids)))

    @rule(at=AT, is_repeated=st.booleans(), hears=HEARS)
    def claim(self, at: int, is_repeated: bool, hears: bool) -> None:
        """A lane that did not hear the answer claims again, with what it knows."""
        lane = self._lane(at)
        working = sorted(lane.claims) if is_repeated else None
        claimed = self.both("claim", self.run_id, lane.hand.lane_id, working)
        if claimed is not None and hears:
            lane.claims[claimed.shard.shard_no] = claimed

    @rule(at=AT, share=st.integers(0, 9), kept=st.integers(0, 9))
    def beat(self, at: int, share: int, kept: int) -> None:
        """And hold as many places as the others leave, of 8."""
        lane_id = self._lane(at).hand.lane_id
        held = {"flash": min(kept, self.model.lanes[lane_id].held.get("flash", 0))}
        self.both("beat", lane_id, 1, None, held)
        self.both("hold", lane_id, {"flash": share}, held, {"flash": 8})

    def _lane(self, at: int) -> Laner:
        return self.lanes[at % len(self.lanes)]

    @rule(at=AT)
    def fall_silent_and_be_buried(self, at: int) -> None:
        """The process goes on, and does not know."""
        lane_id = self._lane(at).hand.lane_id
        self.sql("UPDATE lane SET heartbeat_at = '-infinity' WHERE lane_id = %s", lane_id)
        self.model.lanes[lane_id].beat_at = LONG_AGO
        self.both("bury_dead", self.run_id, grace_s=1e6, dead_after_s=1e6)

    @rule(at=AT)
    def leave(self, at: int) -> None:
        self.both("leave", self.run_id, self._lane(at).hand.lane_id, "done")

    @rule(at=AT, reservations=st.integers(1, 6), hears=HEARS)
    def open_grant(self, at: int, reservations: int, hears: bool) -> None:
        """Asked again where the answer was lost, with the grants that the lane knows of."""
        lane = self._lane(at)
        need, want = RESERVED, reservations * RESERVED
        grant = self.both(
            "open_grant",
            self.run_id,
            lane.hand.lane_id,
            self.run.budget_id,
            need=need,
            want=want,
            known=sorted(lane.free),
            born=1,
        )
        if grant is not None and hears:
            lane.free[grant.grant_id] = grant.amount

    @rule(at=AT, which=st.lists(WHICH, min_size=1, max_size=4), hears=HEARS, is_same_text=st.booleans())
    def intend(self, at: int, which: list[int], hears: bool, is_same_text: bool) -> None:
        """A batch, under leases that may be lost, out of grants that the lane believes open."""
        lane = self._lane(at)
        batch = [i for n in which if (i := self._next_intent(n, lane, is_same_text)) is not None]
        if not batch:
            return
        permits = self._intend(lane, batch)
        sent = [intent for intent, permit in zip(batch, permits, strict=True) if permit == Permitted()]
        self.past.append(lambda: self._repeat_intend(lane, sent))
        if not hears:
            permits = self._intend(lane, batch)
        for intent, permit in zip(batch, permits, strict=True):
            if permit == Permitted() and (self.run_id, *_key(intent)) not in self.model.outcomes:
                lane.sent[_key(intent)] = intent
            else:  # refused, or answered already, and no lane sends that again
                lane.free[intent.grant_id] += intent.reserved

    def _intend(self, lane: Laner, batch: list[Intent]) -> Any:
        return self.both("intend", self.run_id, lane.hand.lane_id, batch, self.reusable)

    def _repeat_intend(self, lane: Laner, sent: list[Intent]) -> None:
        """What was permitted stays permitted while the lease holds, whatever was answered since."""
        for permit, intent in zip(self._intend(lane, sent), sent, strict=True):
            assert permit == Permitted() or intent.lease not in self._held(lane)

    def _held(self, lane: Laner) -> set[Lease]:
        return self.model._held(self.run_id, lane.hand.lane_id)

    def _next_intent(self, which: int, lane: Laner, is_same_text: bool) -> Intent | None:
        """The next attempt of some document of the lane's, as the lane sees it; None where it can make none."""
        funded = [number for number, free in lane.free.items() if free >= RESERVED]
        if not lane.claims or not funded:
            return None
        claimed = lane.pick(which)
        number = claimed.shard.first_document_no + which % claimed.shard.document_count
        tried = [key[2] for key in self.model.intents if key[:2] == (self.run_id, number)]
        lane.hand.grant_id = funded[which % len(funded)]
        lane.free[lane.hand.grant_id] -= RESERVED
        attempt_no = max(tried, default=0) + (which % 4 > 0) or 1  # sometimes one that was made already
        digest = text_digest(0 if is_same_text else number)
        tier = "pro" if which % 5 == 0 else "flash"
        reason = "low_confidence" if tier == "pro" else None
        meant = {"purpose": Purpose.RETRY if which % 3 == 0 else Purpose.ANSWER, "reason": reason}
        return lane.hand.intent(claimed.lease, number, attempt_no, tier, text_digest=digest, **meant)

    @property
    def reusable(self) -> Reusable:
        return Reusable(self.job.prompt_version, "pro", self.job.escalate.below)

    @rule(at=AT, how_many=st.integers(1, 3), kind=st.sampled_from(KINDS))
    def record(self, at: int, how_many: int, kind: str) -> None:
        """Replies to what a lane sent, whoever owns the shard by now; and then the same once more."""
        lane = self._lane(at)
        keys = sorted(lane.sent)[:how_many]
        records = [self._reply(lane, lane.sent.pop(key), kind) for key in keys]
        if not records:
            return
        self._record(lane, records)
        self.past.append(lambda: self._record(lane, records))
        self.past.append(lambda: self._load(lane, records))
        for key, record in zip(keys, records, strict=True):
            assert record.outcome is not None
            grant = self.model.intents[self.run_id, *key][0].grant_id
            used = record.outcome.cost if record.outcome.cost is not None else record.outcome.bound
            lane.free[grant] = lane.free.get(grant, 0) + RESERVED - (used or 0)

    def _load(self, lane: Laner, records: list[Record]) -> None:
        """As a resumed run does with what a lane that died left on disk."""
        for record in records:
            self._record(lane, [record])

    def _record(self, lane: Laner, records: list[Record]) -> None:
        self.both("record", self.run_id, lane.hand.lane_id, records)

    def _reply(self, lane: Laner, intent: Intent, kind: str) -> Record:
        hand, key = lane.hand, (intent.document_no, intent.attempt_no)
        ending = None
        match kind:
            case "result" | "shaky":
                outcome = hand.outcome(*key, tier=intent.tier)
                sure: dict[str, Any] = {
                    "text_digest": intent.text_digest,
                    "confidence": 0.9 if kind == "result" else 0.5,
                }
                ending = hand.result(intent.lease, *key, tier=intent.tier, **sure)
            case "unsure":
                unsure = StoredAnswer('{"colour":"red"}', {"colour": "red"}, 0.4, "logprobs")
                outcome = hand.outcome(*key, verdict=Verdict.LOW_CONFIDENCE, answer=unsure, tier=intent.tier)
            case "lost":
                outcome = hand.outcome(*key, signal=Signal.LOST, verdict=None, usage=None, tier=intent.tier)
            case _:
                outcome = hand.outcome(*key, signal=Signal.RATE_LIMITED, verdict=None, usage=None, tier=intent.tier)
        return Record(replace(outcome, is_escalated=intent.reason is not None), ending)

    @rule(at=AT, which=WHICH, state=st.sampled_from((DocumentState.DEAD_LETTER, DocumentState.DUPLICATE)))
    def end_without_attempt(self, at: int, which: int, state: DocumentState) -> None:
        lane = self._lane(at)
        if not lane.claims:
            return
        claimed = lane.pick(which)
        number = claimed.shard.first_document_no + which % claimed.shard.document_count
        of = ResultKey(self.run_id, 0) if state is DocumentState.DUPLICATE else None
        reason = "too_large" if of is None else None
        records = [Record(ending=lane.hand.ending(claimed.lease, number, state, of=of, reason=reason))]
        self._record(lane, records)
        self.past.append(lambda: self._record(lane, records))

    @rule(which=WHICH)
    def repeat_an_earlier_call(self, which: int) -> None:
        if self.past:
            self.past[-1 - which % len(self.past)]()

    @rule(at=AT)
    def close_spent_grants(self, at: int) -> None:
        """Those that nothing is reserved from."""
        lane = self._lane(at)
        busy = {intent.grant_id for intent in lane.sent.values()}
        grants = [number for number in lane.free if number not in busy]
        for number in grants:
            del lane.free[number]
        self.both("close_grants", self.run_id, grants)

    @rule(at=AT, which=WHICH, fails=st.sampled_from((False, False, True)), is_repeated=st.booleans())
    def close_shard(self, at: int, which: int, fails: bool, is_repeated: bool) -> None:
        lane = self._lane(at)
        if not lane.claims:
            return
        claimed = lane.pick(which)
        key = (self.run_id, lane.hand.lane_id, claimed.lease)
        for _ in range(1 + is_repeated):
            self.both("fail", *key, "input_changed") if fails else self.both("finish", *key)

    @rule(at=AT, which=WHICH)
    def end_all_of_a_shard(self, at: int, which: int) -> None:
        """As fast as a lane can: so that examples get to the end of runs."""
        lane = self._lane(at)
        if not lane.claims:
            return
        claimed = lane.pick(which)
        first, many = claimed.shard.first_document_no, claimed.shard.document_count
        dead = [
            Record(ending=lane.hand.ending(claimed.lease, n, DocumentState.DEAD_LETTER, reason="lost"))
            for n in range(first, first + many)
        ]
        self._record(lane, dead)
        self.both("finish", self.run_id, lane.hand.lane_id, claimed.lease)

    @rule(state=st.sampled_from(("paused", "running")))
    def change_state(self, state: str) -> None:
        self.both("change_state", self.run_id, state, "operator")

    @rule(limits=st.sampled_from(({"flash": 3}, {"pro": 40}, {"flash": 1, "pro": 1}, None)))
    def change_limits(self, limits: dict[str, int] | None) -> None:
        self.both("change_limits", self.run_id, limits)

    @rule(cap=st.sampled_from((CAP // 4, CAP, 2 * CAP)))
    def change_cap(self, cap: int) -> None:
        """As an operator does while lanes are at work; a run that is over keeps what it had."""
        if self.both("change_cap", self.run_id, cap) is not None:
            self.cap = cap
            self.caps.append(cap)

    @rule()
    def settle(self) -> None:
        self.both("settle", self.run_id)

    @invariant()
    def both_find_the_same(self) -> None:
        if not self.known_runs:
            return
        run_id = self.run_id
        self.both("find_past_attempts", run_id, 0, DOCUMENTS)
        others: tuple[tuple[Any, ...], ...] = (  # in turn: each is a question to Postgres
            ("find_endings", run_id, 0, DOCUMENTS),
            ("find_results_now", {text_digest(n) for n in range(DOCUMENTS)}, self.reusable),
            ("find_paid_answer", run_id, 1, Verdict.ACCEPTED),
            ("is_exhausted", self.run.budget_id, RESERVED),
            ("find_room", self.run.budget_id),
            ("has_unfinished", run_id),
            ("has_living", run_id),
        )
        self.both(*others[next(self.turns) % len(others)])

    @invariant()
    def rows_and_views_are_the_models(self) -> None:
        """Also append-only: the model forgets nothing, so a row that changed or went would differ from it."""
        if not self.known_runs:
            return
        run_id = self.run_id
        model = self.model
        rows = self.sql(ATTEMPTS, run_id)
        assert {(run_id, *row[:2]): (row[2:6], *row[6:]) for row in rows} == {
            key: ((lane_id, i.lease.epoch, i.grant_id, i.reserved), model.takes(key), model.billing(key))
            for key, (i, lane_id) in model.intents.items()
            if key[0] == run_id
        }
        ended = {n: str(e.state) for (r, n), e in model.documents.items() if r == run_id}
        assert dict(self.sql("SELECT document_no, state FROM document WHERE run_id = %s", run_id)) == ended
        (said,) = self.sql(TOTALS, run_id)
        assert Totals(*map(int, said)) == model.totals(run_id)
        shards = [(r.shard.shard_no, r.state, r.epoch, r.lane_id) for r in model.runs[run_id].shards]
        assert self.sql(SHARDS, run_id) == shards

    @invariant()
    def the_budget_holds(self) -> None:
        """By Postgres's own rows, whatever the model thinks."""
        if not self.known_runs:
            return
        ((granted, cap, held),) = self.sql(BUDGET, self.run.budget_id)
        assert granted == held == self.model.budgets[self.run.budget_id].granted
        assert cap == self.cap
        assert granted <= max(self.caps)
        assert not self.sql(OVERDRAWN, self.run_id)

    @invariant()
    def lanes_counted_what_the_rows_say(self) -> None:
        if self.known_runs:
            assert not self.sql(MISCOUNTED, self.run_id)

    def teardown(self) -> None:
        """Every lane leaves, claims in vain, and only then hears what it had in flight."""
        if not self.known_runs:
            return
        for at in range(len(self.lanes)):
            self.leave(at)
            self.claim(at, is_repeated=True, hears=False)
            self.record(at, how_many=3, kind="result")
            self.repeat_an_earlier_call(0)
        for number in range(DOCUMENTS):
            self.both("find_paid_answer", self.run_id, number, Verdict.ACCEPTED)
        for check in (
            self.rows_and_views_are_the_models,
            self.the_budget_holds,
            self.lanes_counted_what_the_rows_say,
        ):
            check()
        self.ground.tally.count("state machine: examples")


ATTEMPTS = """
    SELECT document_no, attempt_no, lane_id, epoch, grant_id, reserved,
           coalesce(cost_pico, unknown_pico) AS takes, billing FROM attempt WHERE run_id = %s
"""
TOTALS = """
    SELECT attempts, cost_pico, unknown_pico, unknown_attempts, results, reused, duplicates, dead_letters
    FROM run_cost WHERE run_id = %s
"""
SHARDS = "SELECT shard_no, state, lease_epoch, lane_id FROM shard WHERE run_id = %s ORDER BY shard_no"
BUDGET = """
    SELECT granted, cap, (SELECT coalesce(sum(coalesce((SELECT used FROM grant_close c WHERE c.grant_id = g.grant_id
                          ORDER BY close_no DESC LIMIT 1), amount)), 0)
                          FROM budget_grant g WHERE g.budget_id = b.budget_id)
    FROM budget b WHERE budget_id = %s
"""
OVERDRAWN = """
    SELECT grant_id, amount, sum(coalesce(cost_pico, unknown_pico)) FROM attempt JOIN budget_grant g USING (grant_id)
    WHERE g.run_id = %s GROUP BY grant_id, amount HAVING sum(coalesce(cost_pico, unknown_pico)) > amount
"""
#: A lane's counters are of finished attempts only, and of documents that it ended.
MISCOUNTED = """
    SELECT l.lane_id, l.attempts, l.cost, l.bounds, s.* FROM lane l
    LEFT JOIN (SELECT lane_id, count(*) AS attempts, coalesce(sum(cost_pico), 0) AS cost, sum(unknown_pico) AS bounds
               FROM attempt WHERE billing <> 'open' GROUP BY lane_id) s USING (lane_id)
    WHERE l.run_id = %s AND (l.attempts, l.cost, l.bounds)
          IS DISTINCT FROM (coalesce(s.attempts, 0), coalesce(s.cost, 0), coalesce(s.bounds, 0))
"""


def _key(intent: Intent) -> tuple[int, int]:
    return intent.document_no, intent.attempt_no


async def _in_session(ask: Callable[..., Awaitable[Any]], ledger: Ledger, *arguments: Any) -> Any:
    async with ledger.engine.connect() as session:
        return await ask(session, *arguments)


def _numbers(real: Any) -> list[int]:
    """The identities that an answer shows, in the order in which the model gives them out."""
    if isinstance(real, Run):
        return [real.run_id, real.budget_id]
    return [real if isinstance(real, int) else real.grant_id]


def _plain(answer: Any) -> Any:
    """Digests are for the proof; here it counts whether there is one."""
    return "sha256:" if isinstance(answer, str) and answer.startswith("sha256:") else answer


def play(url: str, tally: Tally, seed: int, examples: int, steps: int) -> None:
    """Play so many examples of so many steps. A failure prints the shortest life that leads to it, and the seed."""
    options = "-c search_path=farthing -c session_replication_role=replica"
    with asyncio.Runner() as runner, psycopg.connect(url, options=options, autocommit=True) as superuser:
        opened = lane_ledger(url, pool_size=2)
        ledger = runner.run(opened.__aenter__())
        try:
            price_ids = runner.run(runs.register_prices(ledger, BOOK.rows()))
            ground = Ground(runner, ledger, superuser, price_ids, tally)
            machine = type("Played", (LedgerMachine,), {"ground": ground})
            run_state_machine_as_test(
                begin_at(seed)(machine),
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=steps,
                    deadline=None,
                    database=None,
                    phases=(Phase.generate, Phase.shrink),
                    suppress_health_check=list(HealthCheck),
                ),
            )
        except Exception as error:
            error.add_note(f"make faults SEED={seed}")
            raise
        finally:
            runner.run(opened.__aexit__(None, None, None))


def test_the_sql_does_what_the_model_says(ledger_url: str, seed: int, tally: Tally) -> None:
    play(ledger_url, tally, seed, *SHORT)


@pytest.mark.long
def test_the_sql_does_what_the_model_says_through_long_lives(
    ledger_url: str, seed: int, scale: float, tally: Tally
) -> None:
    examples, steps = LONG
    play(ledger_url, tally, seed, max(1, int(examples * scale)), steps)
