"""The certificate of a run, in the ledger: the frozen order with its sample, then the cut that follows from it.

    first answers ──▶ freeze ──▶ the sample goes to the last tier ──▶ certify ──▶ accepted, or to the last tier

Between two phases every shard is `held`, `done` or `failed`, and none can be claimed, so the rows that a phase rests
on stand still. Whichever lane finds them so begins the next phase, in one transaction and under a lock of the run's:
another one that asks meanwhile waits, and one that comes later finds it done. Killed before its COMMIT, nothing was
drawn and nothing sent; killed after it, the sample is in the ledger, and there is only that one.

The population of the theorem (docs/guarantee.md) is fixed by then: the documents whose first answer waits. Those that
climbed because their first answer was invalid, and those whose last-tier answer is reused, have the last tier's word
and cannot disagree with it: they count as a pilot does, among all documents and not among those drawn from. One
without any answer counts as no document. What ends later without an answer, of those that wait, stays among them; it
is a disagreement if it was drawn, and is never an accepted one. First answers, and so whether the last tier would
disagree, are settled before the lot is drawn. Nothing is assumed of the documents themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from secrets import token_bytes
from typing import Any

from sqlalchemy import Row, TextClause, insert, text
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas import tables
from schemas.agreement import Agreement
from schemas.attempts import RunId
from schemas.certificates import (
    WHOLE,
    Certificate,
    Finding,
    OrderDigest,
    Place,
    Subject,
    find_cut,
)
from schemas.certificates import certify as certify_sample
from schemas.errors import LedgerUnavailable
from schemas.jobs import Job
from schemas.promises import Plan, Promise, draw, plan
from schemas.records import ResultKey, StoredAnswer
from tasks.ledger.connection import Ledger
from tasks.ledger.rows import as_json
from tasks.ledger.runs import refresh_statistics

#: Where the locks of runs that begin a phase live among Postgres's advisory locks.
LOCK_SPACE = 0x4663
#: Rows that are fetched at once where all of a run's go by.
FETCHED = 10_000
#: The events that say how far a run's certificate is.
FROZEN, CERTIFIED = "frozen", "certified"


@dataclass(frozen=True, slots=True)
class HeldAnswer:
    """A document whose first answer waits: its place, and the answer where it is accepted and is the run's own."""

    place: Place
    of: ResultKey | None
    attempt_no: int | None
    stored: StoredAnswer | None


@dataclass(frozen=True, slots=True)
class Certification:
    """How far the certificate of a run is. Without a `certificate` the sample is not answered yet."""

    planned: Plan
    fields: tuple[str, ...]
    salt: bytes
    seed: bytes
    order: str
    certificate: Certificate | None


_LOCK = text("SELECT pg_try_advisory_xact_lock(:space, CAST(:run_id AS integer))")

_PHASE = text("""
    SELECT f.run_id IS NOT NULL AS is_frozen, c.run_id IS NOT NULL AS is_certified,
           EXISTS (SELECT FROM shard s WHERE s.run_id = r.run_id AND s.state IN ('open', 'leased')) AS is_at_work,
           r.documents
    FROM run r LEFT JOIN frozen_order f USING (run_id) LEFT JOIN certified c ON c.run_id = r.run_id
    WHERE r.run_id = :run_id
""")

_WAITING = """
    SELECT h.document_no, h.confidence FROM held h
    WHERE h.run_id = :run_id
      AND NOT EXISTS (SELECT FROM document d WHERE d.run_id = h.run_id AND d.document_no = h.document_no)
"""

_POPULATION = text(f"""
    SELECT (SELECT count(*) FROM ({_WAITING}) w) AS waiting,
           (SELECT count(*) FROM document WHERE run_id = :run_id AND state IN ('result', 'reused')) AS piloted
""")  # noqa: S608 (made of our own constants)

#: The order, as `schemas.certificates.freeze` has it of the documents' numbers.
BY_RANK = "confidence DESC NULLS LAST, sha256(CAST(:salt AS bytea) || convert_to(document_no::text, 'UTF8'))"

_RANK = text(f"""
    INSERT INTO ranked (run_id, document_no, rank, is_sampled)
    SELECT :run_id, o.document_no, o.rank, o.rank = ANY(CAST(:ranks AS bigint[]))
    FROM (SELECT document_no, row_number() OVER (ORDER BY {BY_RANK}) - 1 AS rank FROM ({_WAITING}) w) o
""")  # noqa: S608 (made of our own constants)

_ORDER = text("SELECT document_no FROM ranked WHERE run_id = :run_id ORDER BY rank")

_OPEN_SAMPLED = text("""
    UPDATE shard s SET state = 'open', lane_id = NULL
    WHERE run_id = :run_id AND state = 'held' AND EXISTS (
        SELECT FROM ranked k WHERE k.run_id = s.run_id AND k.is_sampled
        AND k.document_no BETWEEN s.first_document_no AND s.first_document_no + s.document_count - 1)
""")

_OPEN_HELD = text("UPDATE shard SET state = 'open', lane_id = NULL WHERE run_id = :run_id AND state = 'held'")

#: Only the last tier's own word counts as an answer of the last tier, also where it is an earlier result's.
_SAMPLE = text("""
    SELECT k.rank, CASE WHEN h.attempt_no IS NULL THEN e.answer ELSE a.answer END AS first,
           CASE WHEN d.state = 'result' AND d.tier = :last_tier THEN d.answer
                WHEN d.state = 'reused' AND s.tier = :last_tier THEN s.answer END AS last
    FROM ranked k
    JOIN held h USING (run_id, document_no)
    LEFT JOIN answer a ON a.run_id = h.run_id AND a.document_no = h.document_no AND a.attempt_no = h.attempt_no
    LEFT JOIN document e ON e.run_id = h.of_run_id AND e.document_no = h.of_document_no
    LEFT JOIN document d ON d.run_id = k.run_id AND d.document_no = k.document_no
    LEFT JOIN document s ON s.run_id = d.of_run_id AND s.document_no = d.of_document_no
    WHERE k.run_id = :run_id AND k.is_sampled ORDER BY k.rank
""")

_SCORE = text("""
    SELECT h.confidence FROM ranked k JOIN held h USING (run_id, document_no)
    WHERE k.run_id = :run_id AND k.rank = :cut
""")

#: Of the run's own answers, and of those that it reuses: first ones that wait or waited, and those that ended it.
SERVED = text("""
    WITH used AS (
        SELECT run_id, document_no, attempt_no FROM attempt_outcome
        WHERE run_id = :run_id AND verdict IN ('held', 'accepted')
        UNION ALL
        SELECT e.run_id, e.document_no, e.attempt_no FROM held h
        JOIN document e ON e.run_id = h.of_run_id AND e.document_no = h.of_document_no WHERE h.run_id = :run_id
        UNION ALL
        SELECT e.run_id, e.document_no, e.attempt_no FROM document d
        JOIN document e ON e.run_id = d.of_run_id AND e.document_no = d.of_document_no
        WHERE d.run_id = :run_id AND d.state = 'reused'
    )
    SELECT tier, array_agg(model ORDER BY model) AS models FROM (
        SELECT DISTINCT i.tier, o.served_model AS model FROM used
        JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
        JOIN attempt_intent i USING (run_id, document_no, attempt_no) WHERE o.served_model IS NOT NULL) s
    GROUP BY tier
""")

_HELD = text("""
    SELECT h.document_no, h.attempt_no, h.of_run_id, h.of_document_no, k.rank, k.is_sampled, c.cut,
           a.content, a.answer, a.confidence, a.confidence_signal
    FROM held h
    LEFT JOIN ranked k USING (run_id, document_no)
    LEFT JOIN certified c ON c.run_id = h.run_id
    LEFT JOIN answer a ON a.run_id = h.run_id AND a.document_no = h.document_no AND a.attempt_no = h.attempt_no
        AND k.rank < c.cut AND NOT k.is_sampled
    WHERE h.run_id = :run_id AND h.document_no BETWEEN :first AND :last
      AND NOT EXISTS (SELECT FROM document d WHERE d.run_id = h.run_id AND d.document_no = h.document_no)
""")

_EVENT = text("""
    INSERT INTO run_event (run_id, kind, detail, event_key)
    VALUES (:run_id, :kind, CAST(:detail AS jsonb), :kind) ON CONFLICT DO NOTHING
""")

_CERTIFICATION = text("""
    SELECT f.*, c.findings, c.cut, c.score_at_cut, c.tail, c.run_id IS NOT NULL AS is_certified,
           r.prompt_version, r.policy, v.ladder
    FROM frozen_order f
    JOIN run r USING (run_id)
    JOIN prompt_version v USING (prompt_version)
    LEFT JOIN certified c ON c.run_id = f.run_id
    WHERE f.run_id = :run_id
""")


async def advance(ledger: Ledger, run_id: RunId, job: Job) -> bool | None:
    """Begin the next phase of a run none of whose shards is at work. Safe to repeat, and at once from several lanes.

    None: there is none any more. False: not yet, since another lane is about to.
    """
    phase = await _find_phase(ledger, run_id)
    if phase.is_certified:
        return None
    if not await is_due_now(ledger, run_id, is_frozen=phase.is_frozen):
        return False
    with suppress(LedgerUnavailable):  # only what follows would be slower
        await refresh_statistics(ledger, phase.documents)
    begin = certify if phase.is_frozen else freeze
    return await begin(ledger, run_id, job)


async def freeze(ledger: Ledger, run_id: RunId, job: Job) -> bool:
    """Freeze the order, draw the sample and open the shards that hold it. False: it is not this lane's to do.

    A plan for millions of documents takes seconds: it is made before the transaction, and in a thread, so that
    heartbeats go on. It counts if it is about what there still is.
    """
    phase = await _find_phase(ledger, run_id)
    population = await _find_population(ledger, run_id, phase.documents)
    salt, seed = token_bytes(32), token_bytes(32)
    planned, ranks = await asyncio.to_thread(_plan, _promise(job), *population, seed)
    async with ledger.transaction("freeze", rows=phase.documents) as connection:
        is_due = await _is_due(connection, run_id, is_frozen=False)
        if not is_due or await _count_population(connection, run_id) != population:
            return False
        await connection.execute(_RANK, {"run_id": run_id, "salt": salt, "ranks": ranks})
        row = {
            "run_id": run_id,
            "documents": planned.documents,
            "piloted": planned.piloted,
            "size": planned.size,
            "allowance": planned.allowance,
            "fields": list(job.agreement.fields),
            "salt": salt,
            "seed": seed,
            "order_digest": await compute_order(connection, _ORDER, {"run_id": run_id}),
        }
        await connection.execute(insert(tables.frozen_order).values(row))
        await connection.execute(_OPEN_SAMPLED, {"run_id": run_id})
        told = {name: row[name] for name in ("documents", "piloted", "size", "allowance", "order_digest")}
        await _note(connection, run_id, FROZEN, told | {"allowed": planned.allowed})
        return True


async def certify(ledger: Ledger, run_id: RunId, job: Job) -> bool:
    """Compute the cut from what the sample came to, and open every shard that waits. False: as in `freeze`."""
    phase = await _find_phase(ledger, run_id)
    found = await _find_certification(ledger, run_id)
    risk = await asyncio.to_thread(lambda: found.planned.risk)
    async with ledger.transaction("certify", rows=phase.documents) as connection:
        if not await _is_due(connection, run_id, is_frozen=True):
            return False
        findings = await find_disagreements(connection, run_id, job.agreement, job.ladder[-1].name)
        subject = Subject(tuple(tier.model for tier in job.ladder), job.prompt_version)
        key = {"run_id": run_id, "cut": find_cut(found.planned, findings)}
        score = (await connection.execute(_SCORE, key)).scalar_one_or_none()
        made = certify_sample(found.planned, subject, found.order, found.seed, findings, score, risk)
        row = key | {
            "findings": {one.field: list(one.ranks) for one in made.findings},
            "score_at_cut": made.score_at_cut,
            "tail": made.tail,
            "served": {tier: models for tier, models in await connection.execute(SERVED, {"run_id": run_id})},
        }
        await connection.execute(insert(tables.certified).values(row))
        await connection.execute(_OPEN_HELD, {"run_id": run_id})
        told = {"cut": made.cut, "tail": str(made.tail), "order_digest": found.order}
        await _note(connection, run_id, CERTIFIED, told | {"disagreements": made.disagreements})
        return True


async def find_held(ledger: Ledger, run_id: RunId, first: int, last: int) -> dict[int, HeldAnswer]:
    """The documents in [first, last] whose first answer waits, by number. Those that have ended wait no more."""
    async with ledger.transaction() as connection:
        rows = (await connection.execute(_HELD, {"run_id": run_id, "first": first, "last": last})).all()
    return {
        row.document_no: HeldAnswer(
            Place(row.rank, bool(row.is_sampled), row.cut),
            ResultKey(row.of_run_id, row.of_document_no) if row.of_run_id is not None else None,
            row.attempt_no,
            StoredAnswer(row.content, row.answer, row.confidence, row.confidence_signal)
            if row.content is not None
            else None,
        )
        for row in rows
    }


async def read_certification(connection: AsyncConnection, run_id: int) -> Certification | None:
    """How far the certificate of the run is. None: its order is not frozen."""
    row = (await connection.execute(_CERTIFICATION, {"run_id": run_id})).one_or_none()
    if row is None:
        return None
    said = row.policy["escalate"]
    promise = Promise.parse(said["target"], said["delta"])
    planned = Plan(promise, row.documents, row.piloted, row.size, row.allowance)
    certificate = None
    if row.is_certified:
        subject = Subject(tuple(tier["model"] for tier in row.ladder), row.prompt_version)
        findings = (Finding(WHOLE, tuple(row.findings.get(WHOLE, ()))),)
        tail = None if row.tail is None else Decimal(row.tail)
        certificate = Certificate(
            planned, subject, row.order_digest, row.seed.hex(), findings, tail, row.cut, row.score_at_cut
        )
    return Certification(
        planned,
        tuple(row.fields),
        bytes(row.salt),
        bytes(row.seed),
        row.order_digest,
        certificate,
    )


async def find_disagreements(
    connection: AsyncConnection, run_id: int, agreement: Agreement, last_tier: str
) -> tuple[Finding, ...]:
    """What the sample came to: whole answers that differ. One without an answer of the last tier does, too."""
    key = {"run_id": run_id, "last_tier": last_tier}
    found = _stream(connection, _SAMPLE, key)
    return (Finding(WHOLE, tuple([rank async for rank, first, last in found if agreement.differing(first, last)])),)


async def compute_order(connection: AsyncConnection, query: TextClause, key: dict[str, Any]) -> str:
    """The digest of the document numbers that the query gives, in its order; a row at a time."""
    digest = OrderDigest()
    async for (number,) in _stream(connection, query, key):
        digest.add(str(number))
    return digest.name


async def _stream(connection: AsyncConnection, query: TextClause, key: dict[str, Any]) -> AsyncIterator[Any]:
    async with connection.stream(query, key, execution_options={"yield_per": FETCHED}) as rows:
        async for row in rows:
            yield row


def _plan(promise: Promise, waiting: int, piloted: int, seed: bytes) -> tuple[Plan, list[int]]:
    """The plan, and the ranks that the seed draws by it."""
    planned = plan(promise, waiting + piloted, piloted=piloted)
    return planned, list(draw(seed, planned.population, planned.size))


async def _count_population(connection: AsyncConnection, run_id: RunId) -> tuple[int, int]:
    """Documents whose first answer waits, and those that have the last tier's."""
    waiting, piloted = (await connection.execute(_POPULATION, {"run_id": run_id})).one()
    return waiting, piloted


async def _is_due(connection: AsyncConnection, run_id: RunId, *, is_frozen: bool) -> bool:
    """Whether this lane is to begin the phase: it has the lock, and all rows that it rests on stand still."""
    if not (await connection.execute(_LOCK, {"space": LOCK_SPACE, "run_id": run_id})).scalar_one():
        return False
    phase = (await connection.execute(_PHASE, {"run_id": run_id})).one()
    return phase.is_frozen is is_frozen and not phase.is_certified and not phase.is_at_work


async def is_due_now(ledger: Ledger, run_id: RunId, *, is_frozen: bool) -> bool:
    """As `_is_due`, asked beforehand: another lane may come between."""
    async with ledger.transaction() as connection:
        return await _is_due(connection, run_id, is_frozen=is_frozen)


async def _find_population(ledger: Ledger, run_id: RunId, documents: int) -> tuple[int, int]:
    async with ledger.transaction(rows=documents) as connection:
        return await _count_population(connection, run_id)


async def _find_certification(ledger: Ledger, run_id: RunId) -> Certification:
    async with ledger.transaction() as connection:
        found = await read_certification(connection, run_id)
    assert found is not None
    return found


async def _find_phase(ledger: Ledger, run_id: RunId) -> Row[Any]:
    async with ledger.transaction() as connection:
        return (await connection.execute(_PHASE, {"run_id": run_id})).one()


async def _note(connection: AsyncConnection, run_id: RunId, kind: str, detail: dict[str, Any]) -> None:
    await connection.execute(_EVENT, {"run_id": run_id, "kind": kind, "detail": as_json(detail)})


def _promise(job: Job) -> Promise:
    if job.promise is None:
        raise AssertionError("a run with a threshold has no certificate")
    return job.promise
