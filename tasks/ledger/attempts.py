"""Intents, outcomes and endings: the appends that a lane makes, each in one short transaction.

`intend` is the gate of G4, G5 and G10: what it permits is durable, still leased, and not answered already.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas import tables
from schemas.attempts import LaneId, Purpose, RunId, Signal
from schemas.ladder import PastAttempt, Verdict
from schemas.records import DocumentState, Ending, Held, Intent, Lease, Outcome, Record, ResultKey, StoredAnswer
from tasks.ledger.budgets import settle_grants
from tasks.ledger.connection import Ledger
from tasks.ledger.leases import lock_lanes
from tasks.ledger.rows import append, as_json, storable


@dataclass(frozen=True, slots=True)
class Reusable:
    """Which earlier results count as answers: same prompt version, and sure enough for today's policy.

    Without a threshold (`below`) only the last tier's do: that a result was accepted in another run, by a threshold
    or by a certificate, says nothing here, since a promise is about the documents of this run. What the first tier
    said there it would say here, too, so such an answer is taken for one of `first_tier`, and waits like any other.

    Simulated answers count for simulated runs only, and real ones for real runs. `models` says by tier which model
    must have served them; None, or a tier that is not in it: any. `confidence` is the rule of a job that confidences
    must have been measured by, for a pilot, which compares them; None: any.
    """

    prompt_version: str
    last_tier: str
    below: Decimal | None
    is_simulated: bool = False
    models: Mapping[str, str] | None = None
    first_tier: str = ""
    confidence: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Permitted:
    """The intent is durable: the request may leave."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """Another lane owns the shard: nothing may be sent for it from here."""


@dataclass(frozen=True, slots=True)
class PaidAnswer:
    """A stored answer with the attempt that it came from."""

    tier: str
    attempt_no: int
    stored: StoredAnswer


@dataclass(frozen=True, slots=True)
class FirstAnswer:
    """A result of the first tier in some run, with its confidence."""

    of: ResultKey
    confidence: float | None


@dataclass(frozen=True, slots=True)
class Withheld:
    """The lane drains: no intent was made, nothing may be sent."""


Permit = Permitted | Fenced | Withheld | ResultKey

_LEASES = text("""
    SELECT shard_no, lease_epoch FROM shard
    WHERE run_id = :run_id AND lane_id = :lane_id AND shard_no = ANY(:shards) AND state = 'leased'
    FOR SHARE
""")

_SAME_QUESTION = """d.text_digest = ANY(:digests) AND d.state = 'result' AND d.answer IS NOT NULL
      AND r.prompt_version = :prompt_version AND r.is_simulated = :is_simulated
      AND coalesce(r.policy -> 'confidence' = CAST(:confidence AS jsonb), true)
      AND (CAST(:models AS jsonb) ->> d.tier IS NULL OR EXISTS (
          SELECT FROM attempt_outcome o
          WHERE o.run_id = d.run_id AND o.document_no = d.document_no AND o.attempt_no = d.attempt_no
            AND o.served_model = CAST(:models AS jsonb) ->> d.tier))"""

_REUSABLE = text(f"""
    SELECT d.text_digest, min(d.run_id) AS run_id, min(d.document_no) AS document_no
    FROM document d JOIN run r USING (run_id)
    WHERE {_SAME_QUESTION} AND (d.tier = :last_tier OR CAST(:below AS float) IS NOT NULL
                                AND (d.confidence IS NULL OR d.confidence >= :below))
    GROUP BY d.text_digest, d.run_id
    ORDER BY d.run_id
""")  # noqa: S608 (made of our own constants)

_FIRST_ANSWERS = text(f"""
    SELECT DISTINCT ON (d.text_digest) d.text_digest, d.run_id, d.document_no, d.confidence
    FROM document d JOIN run r USING (run_id)
    WHERE {_SAME_QUESTION} AND d.tier = :first_tier
    ORDER BY d.text_digest, d.run_id, d.document_no
""")  # noqa: S608 (made of our own constants)

_MINE = text("""
    SELECT document_no, attempt_no FROM attempt_intent
    WHERE run_id = :run_id AND lane_id = :lane_id AND document_no = ANY(:documents)
""")

_PAST_ATTEMPTS = text("""
    SELECT i.document_no, i.attempt_no, i.tier, i.purpose, i.reason, coalesce(o.signal, 'lost') AS signal, o.verdict
    FROM attempt_intent i
    LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
    WHERE i.run_id = :run_id AND i.document_no BETWEEN :first AND :last
      AND NOT EXISTS (SELECT FROM document d WHERE d.run_id = i.run_id AND d.document_no = i.document_no)
    ORDER BY i.document_no, i.attempt_no
""")

_ENDED = text("""
    SELECT document_no FROM document WHERE run_id = :run_id AND document_no BETWEEN :first AND :last
""")

_PAID_ANSWER = text("""
    SELECT i.tier, attempt_no, a.content, a.answer, a.confidence, a.confidence_signal
    FROM answer a
    JOIN attempt_intent i USING (run_id, document_no, attempt_no)
    JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
    WHERE run_id = :run_id AND document_no = :document_no AND o.verdict = :verdict ORDER BY attempt_no DESC LIMIT 1
""")

#: Of these attempts, those that were declared unknown when their lane was ended, and so counted.
_DECLARED = text("""
    SELECT count(*), coalesce(sum(bound), 0) FROM attempt_unknown
    WHERE run_id = :run_id AND (document_no, attempt_no) IN (SELECT * FROM unnest(
        CAST(:documents AS bigint[]), CAST(:attempts AS smallint[])))
""")

_COUNT = text(f"""
    UPDATE lane SET {", ".join(f"{name} = {name} + :{name}" for name in tables.LANE_COUNTERS)}
    WHERE lane_id = :lane_id
""")  # noqa: S608 (names come from our own table)

_INTENT_COLUMNS = (
    "run_id",
    "document_no",
    "attempt_no",
    "tier",
    "purpose",
    "reason",
    "shard_no",
    "epoch",
    "lane_id",
    "grant_id",
    "price_id",
    "reserved",
)
_OUTCOME_COLUMNS = (
    "run_id",
    "document_no",
    "attempt_no",
    "signal",
    "verdict",
    "http_status",
    "finish_reason",
    "sent_at",
    "completed_at",
    "hit",
    "miss",
    "output",
    "reasoning",
    "price_id",
    "cost",
    "served_model",
    "fingerprint",
    "provider_id",
    "detail",
)
_UNKNOWN_COLUMNS = ("run_id", "document_no", "attempt_no", "bound", "because")
_ANSWER_COLUMNS = (
    "run_id",
    "document_no",
    "attempt_no",
    "content",
    "answer",
    "confidence",
    "confidence_signal",
)
_HELD_COLUMNS = ("run_id", "document_no", "attempt_no", "confidence", "of_run_id", "of_document_no")
_ENDING_COLUMNS = (
    "run_id",
    "document_no",
    "document_id",
    "text_digest",
    "state",
    "reason",
    "tier",
    "attempt_no",
    "answer",
    "confidence",
    "confidence_signal",
    "of_run_id",
    "of_document_no",
)


async def intend(
    ledger: Ledger, run_id: RunId, lane_id: LaneId, intents: Sequence[Intent], reusable: Reusable
) -> list[Permit]:
    """Make intents durable; one permit for each, in order.

    In one transaction: the shards' epochs are checked under a lock that a new owner has to wait for, texts
    that have a committed result since are taken out, the rest is appended.
    """
    async with ledger.transaction("intend") as connection:
        held = await _held_leases(connection, run_id, lane_id, {intent.lease.shard_no for intent in intents})
        digests = {intent.text_digest for intent in intents}
        answered = await find_results(connection, digests, reusable)
        permits = [_permit(intent, held, answered) for intent in intents]
        if any(isinstance(permit, ResultKey) for permit in permits):
            permits = await _keep_durable(connection, run_id, lane_id, intents, permits)
        rows = [
            _intent_row(run_id, lane_id, i) for i, p in zip(intents, permits, strict=True) if isinstance(p, Permitted)
        ]
        if rows and await append(connection, tables.attempt_intent, _INTENT_COLUMNS, rows) < len(rows):
            mine = await _mine(connection, run_id, lane_id, [intent.document_no for intent in intents])
            permits = [
                p if not isinstance(p, Permitted) or (i.document_no, i.attempt_no) in mine else Fenced()
                for i, p in zip(intents, permits, strict=True)
            ]
    return permits


async def record(ledger: Ledger, run_id: RunId, lane_id: LaneId, records: Sequence[Record]) -> set[Lease]:
    """Make outcomes, endings and what is held durable; returns the leases that turned out to be lost.

    Outcomes are facts and always appended. The others need the lease: without it, only the outcome and the
    paid answer are kept, and the shard's new owner finds them.

    Safe to repeat, with all records or with one at a time; the lane's counters do not take a mixture of records that
    are durable and others that are new.
    """
    async with ledger.transaction("record") as connection:
        has_ended = lane_id in await lock_lanes(connection, [lane_id])
        endings = [record.ending for record in records if record.ending is not None]
        leases = {record.lease for record in records if record.lease is not None}
        held = await _held_leases(connection, run_id, lane_id, {lease.shard_no for lease in leases})
        kept = [ending for ending in endings if ending.lease in held]
        waiting = [record.held for record in records if record.held is not None and record.held.lease in held]
        outcomes = [_with_fenced_answer(record, held) for record in records if record.outcome is not None]
        declared = await _find_declared(connection, run_id, outcomes) if has_ended else (0, 0)
        appended = await _append_outcomes(connection, run_id, outcomes)
        if kept:
            rows = [_ending_row(run_id, ending) for ending in kept]
            appended += await append(connection, tables.document, _ENDING_COLUMNS, rows)
        if waiting:
            rows = [_held_row(run_id, one) for one in waiting]
            appended += await append(connection, tables.held, _HELD_COLUMNS, rows)
        if appended:  # nothing new: this is the repetition of a commit whose answer was lost
            await connection.execute(_COUNT, _counts(outcomes, kept, waiting, declared) | {"lane_id": lane_id})
            if has_ended:  # its grants were closed by the bounds of what is known now
                await settle_grants(connection, run_id, lanes=[lane_id])
    return leases - held


async def find_results(
    connection: AsyncConnection, digests: Collection[bytes], reusable: Reusable
) -> dict[bytes, ResultKey]:
    """Committed results by text digest; of several the oldest run's."""
    if not digests:
        return {}
    asked = _question(digests, reusable) | {
        "last_tier": reusable.last_tier,
        "below": None if reusable.below is None else float(reusable.below),
    }
    rows = await connection.execute(_REUSABLE, asked)
    found: dict[bytes, ResultKey] = {}
    for digest, run_id, document_no in rows:
        found.setdefault(bytes(digest), ResultKey(run_id, document_no))
    return found


async def find_results_now(ledger: Ledger, digests: Collection[bytes], reusable: Reusable) -> dict[bytes, ResultKey]:
    """`find_results` in a transaction of its own."""
    async with ledger.transaction() as connection:
        return await find_results(connection, digests, reusable)


async def find_first_answers(
    ledger: Ledger, digests: Collection[bytes], reusable: Reusable
) -> dict[bytes, FirstAnswer]:
    """What the first tier said of these texts in any run, and was accepted there by the policy of then."""
    if not digests:
        return {}
    async with ledger.transaction() as connection:
        asked = _question(digests, reusable) | {"first_tier": reusable.first_tier}
        rows = await connection.execute(_FIRST_ANSWERS, asked)
        return {
            bytes(digest): FirstAnswer(ResultKey(run_id, number), confidence)
            for digest, run_id, number, confidence in rows
        }


def _question(digests: Collection[bytes], reusable: Reusable) -> dict[str, object]:
    return {
        "digests": list(digests),
        "prompt_version": reusable.prompt_version,
        "is_simulated": reusable.is_simulated,
        "models": as_json(reusable.models),
        "confidence": as_json(reusable.confidence),
    }


async def find_endings(ledger: Ledger, run_id: RunId, first: int, last: int) -> set[int]:
    """Numbers of the documents in [first, last] that already ended."""
    async with ledger.transaction() as connection:
        rows = await connection.execute(_ENDED, {"run_id": run_id, "first": first, "last": last})
        return {number for (number,) in rows}


async def find_past_attempts(ledger: Ledger, run_id: RunId, first: int, last: int) -> dict[int, list[PastAttempt]]:
    """Past attempts of the documents in [first, last] that did not end, in order."""
    async with ledger.transaction() as connection:
        rows = await connection.execute(_PAST_ATTEMPTS, {"run_id": run_id, "first": first, "last": last})
        history: dict[int, list[PastAttempt]] = defaultdict(list)
        for number, attempt_no, tier, purpose, reason, signal, verdict in rows:
            came_to = Signal(signal), Verdict(verdict) if verdict else None
            history[number].append(PastAttempt(attempt_no, tier, Purpose(purpose), reason, *came_to))
        return dict(history)


async def find_paid_answer(ledger: Ledger, run_id: RunId, document_no: int, verdict: Verdict) -> PaidAnswer | None:
    """The latest answer of that verdict that was paid for and is not a result."""
    async with ledger.transaction() as connection:
        key = {"run_id": run_id, "document_no": document_no, "verdict": verdict.value}
        row = (await connection.execute(_PAID_ANSWER, key)).one_or_none()
        return PaidAnswer(row[0], row[1], StoredAnswer(*row[2:])) if row else None


async def _held_leases(
    connection: AsyncConnection, run_id: RunId, lane_id: LaneId, shards: Collection[int]
) -> set[Lease]:
    if not shards:
        return set()
    rows = await connection.execute(_LEASES, {"run_id": run_id, "lane_id": lane_id, "shards": sorted(shards)})
    return {Lease(shard_no, epoch) for shard_no, epoch in rows}


async def _mine(
    connection: AsyncConnection, run_id: RunId, lane_id: LaneId, documents: list[int]
) -> set[tuple[int, int]]:
    rows = await connection.execute(_MINE, {"run_id": run_id, "lane_id": lane_id, "documents": documents})
    return {(number, attempt_no) for number, attempt_no in rows}


async def _keep_durable(
    connection: AsyncConnection, run_id: RunId, lane_id: LaneId, intents: Sequence[Intent], permits: list[Permit]
) -> list[Permit]:
    """Permit what a commit whose answer was lost has made durable, though its text was answered since."""
    mine = await _mine(connection, run_id, lane_id, [intent.document_no for intent in intents])
    return [
        Permitted() if isinstance(p, ResultKey) and (i.document_no, i.attempt_no) in mine else p
        for i, p in zip(intents, permits, strict=True)
    ]


async def _find_declared(connection: AsyncConnection, run_id: RunId, outcomes: Sequence[Outcome]) -> tuple[int, int]:
    """How many of these attempts were declared unknown when the lane ended, and the sum of their bounds."""
    numbers = {"documents": [o.document_no for o in outcomes], "attempts": [o.attempt_no for o in outcomes]}
    row = (await connection.execute(_DECLARED, {"run_id": run_id, **numbers})).one()
    return int(row[0]), int(row[1])


def _permit(intent: Intent, held: set[Lease], answered: dict[bytes, ResultKey]) -> Permit:
    if intent.lease not in held:
        return Fenced()
    if intent.text_digest in answered:
        return answered[intent.text_digest]
    return Permitted()


def _intent_row(run_id: RunId, lane_id: LaneId, intent: Intent) -> tuple[object, ...]:
    return (
        run_id,
        intent.document_no,
        intent.attempt_no,
        intent.tier,
        intent.purpose.value,
        intent.reason,
        intent.lease.shard_no,
        intent.lease.epoch,
        lane_id,
        intent.grant_id,
        intent.price_id,
        intent.reserved,
    )


def _with_fenced_answer(record: Record, held: set[Lease]) -> Outcome:
    """The outcome; where its document's result cannot be committed, with the answer that was paid for."""
    outcome, ending = record.outcome, record.ending
    assert outcome is not None
    if ending is None or ending.lease in held or ending.state is not DocumentState.RESULT:
        return outcome
    answer = StoredAnswer(outcome.reply.content or "", ending.answer, ending.confidence, ending.confidence_signal)
    return Outcome(
        outcome.document_no,
        outcome.attempt_no,
        outcome.reply,
        outcome.verdict,
        outcome.price_id,
        outcome.cost,
        outcome.bound,
        outcome.is_escalated,
        answer,
    )


async def _append_outcomes(connection: AsyncConnection, run_id: RunId, outcomes: Sequence[Outcome]) -> int:
    if not outcomes:
        return 0
    appended = await append(
        connection, tables.attempt_outcome, _OUTCOME_COLUMNS, [_outcome_row(run_id, o) for o in outcomes]
    )
    unknowns = [
        (run_id, o.document_no, o.attempt_no, o.bound, o.reply.signal.value) for o in outcomes if o.cost is None
    ]
    if unknowns:
        await append(connection, tables.attempt_unknown, _UNKNOWN_COLUMNS, unknowns)
    answers = [_answer_row(run_id, o, o.answer) for o in outcomes if o.answer is not None]
    if answers:
        await append(connection, tables.answer, _ANSWER_COLUMNS, answers)
    return appended


def _outcome_row(run_id: RunId, outcome: Outcome) -> tuple[object, ...]:
    reply, usage = outcome.reply, outcome.reply.usage
    return (
        run_id,
        outcome.document_no,
        outcome.attempt_no,
        reply.signal.value,
        outcome.verdict.value if outcome.verdict else None,
        reply.http_status,
        _text(reply.finish_reason),
        reply.sent_at,
        reply.completed_at,
        usage.hit if usage else None,
        usage.miss if usage else None,
        usage.output if usage else None,
        usage.reasoning if usage else None,
        outcome.price_id,
        outcome.cost,
        _text(reply.served_model),
        _text(reply.fingerprint),
        _text(reply.provider_id),
        _text(reply.detail),
    )


def _text(said: str | None) -> str | None:
    """What the provider said, as Postgres can hold it; null where it said nothing."""
    return storable(said) if said else None


def _answer_row(run_id: RunId, outcome: Outcome, answer: StoredAnswer) -> tuple[object, ...]:
    return (
        run_id,
        outcome.document_no,
        outcome.attempt_no,
        storable(answer.content),
        as_json(answer.answer),
        answer.confidence,
        answer.confidence_signal,
    )


def _ending_row(run_id: RunId, ending: Ending) -> tuple[object, ...]:
    return (
        run_id,
        ending.document_no,
        storable(ending.document_id),
        ending.text_digest,
        ending.state.value,
        ending.reason,
        ending.tier,
        ending.attempt_no,
        as_json(ending.answer),
        ending.confidence,
        ending.confidence_signal,
        ending.of.run_id if ending.of else None,
        ending.of.document_no if ending.of else None,
    )


def _held_row(run_id: RunId, held: Held) -> tuple[object, ...]:
    of = (held.of.run_id, held.of.document_no) if held.of else (None, None)
    return (run_id, held.document_no, held.attempt_no, held.confidence, *of)


def _counts(
    outcomes: Sequence[Outcome], endings: Sequence[Ending], waiting: Sequence[Held], declared: tuple[int, int]
) -> dict[str, int]:
    """What these rows add to the lane's counters (`schemas.tables.LANE_COUNTERS`), which have `declared` already."""
    counted, bounds = declared
    usages = [outcome.reply.usage for outcome in outcomes if outcome.reply.usage is not None]
    states = [ending.state for ending in endings]
    return {
        "done": len(endings),
        "results": states.count(DocumentState.RESULT),
        "dead_letters": states.count(DocumentState.DEAD_LETTER),
        "reused": states.count(DocumentState.REUSED),
        "escalated": sum(outcome.is_escalated for outcome in outcomes),
        "attempts": len(outcomes) - counted,
        "cost": sum(outcome.cost or 0 for outcome in outcomes),
        "bounds": sum(outcome.bound or 0 for outcome in outcomes if outcome.cost is None) - bounds,
        "hit": sum(usage.hit for usage in usages),
        "miss": sum(usage.miss for usage in usages),
        "output": sum(usage.output for usage in usages),
        "held": len(waiting),
    }
