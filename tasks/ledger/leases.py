"""Lanes and their shards: who may work on what, and what happens to the work of those that died.

A lane shows that it lives in two ways: a heartbeat in its row, for machines that vanish, and a session lock on
its id, which Postgres lets go the moment its process dies. Whoever finds a lane dead buries it: its shards get
a new epoch (so that a zombie can commit nothing more), its open intents become unknowns, its grants are closed.

What a lane holds in flight is in its row, too. It is lowered only once no more is in flight, by a heartbeat, and
raised only by what no other living lane holds (schemas/ceilings.py), one lane after the other. A dead lane's places
are free once it is buried.

Row locks are always taken in this order, or Postgres would find deadlocks: lanes by number, shards, the budget.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas import tables
from schemas.attempts import LaneId, RunId
from schemas.ceilings import TURN_S, take
from schemas.documents import Duplicate, InputFile, Shard
from schemas.fleets import Kept
from schemas.records import Lease
from tasks.ledger.budgets import settle_grants
from tasks.ledger.connection import Ledger, PassingFailure, cancellation_kept, explain
from tasks.ledger.rows import as_json

#: A lane that did not beat for so long is dead, in seconds; it fences itself well before.
DEAD_AFTER_S = 30.0
#: A lane whose session ended counts as dead after so long without a heartbeat, so that a restart of Postgres does
#: not cost living lanes their shards.
GRACE_S = 8.0
#: The event that says as what a lane is shown by whatever started it.
SHOWN_AS = "lane_shown"
#: Where session locks live among Postgres's advisory locks.
LOCK_SPACE = 0x4661
#: And where whoever raises what it holds keeps the other lanes of its run, or backfill, from doing so meanwhile.
HOLD_SPACE = 0x4662
#: The lanes `l` whose process holds its session lock; `:space` is LOCK_SPACE.
LIVING_LANE = """SELECT FROM lane l
    JOIN pg_locks k ON k.locktype = 'advisory' AND k.granted
        AND (k.classid, k.objid, k.objsubid) = (:space, l.lane_id, 2)
    JOIN pg_database b ON b.oid = k.database AND b.datname = current_database()"""

#: A connection whose session holds a lane's lock.
Session = AsyncConnection


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """How a lane shows that it lives, and when it counts as dead, in seconds.

    One that could not show its heartbeat for `fence_after_s` makes no more intents. A heartbeat that hangs is given
    up after `beat_within_s`, and what else a lane asks Postgres after `answer_within_s`, for another connection. What
    is asked once, before and after the work, has `once_within_s`: it may wait for another run's grants to be closed.
    Lanes that were asked for and have not come keep their share of what may be in flight for `comes_within_s`.
    """

    beat_every_s: float = 1.0
    fence_after_s: float = 20.0
    grace_s: float = GRACE_S
    dead_after_s: float = DEAD_AFTER_S
    answer_within_s: float = 30.0
    once_within_s: float = 600.0
    comes_within_s: float = 30.0

    @property
    def beat_within_s(self) -> float:
        return self.fence_after_s / 4


USUAL_TIMES = LeaseTimes()


@dataclass(frozen=True, slots=True)
class Orders:
    """What holds for the lanes of a run, as each hears with its heartbeat.

    `ceilings` are requests in flight by tier, of the whole run; of its `lanes` that have not ended this one is number
    `rank`, from 0. Of a run that is part of a backfill, both are about the lanes of all its runs, and `lanes` counts
    those that it has yet to start. By tier, `wanting` is how many other lanes have something to send there, and how
    many of those come before this one. `cap` is the budget's in pico units; it `is_overdrawn` where more than that is
    granted, since the cap was lowered. `turn` is whose turn it is where there are more lanes than places.
    """

    state: str
    ceilings: Mapping[str, int]
    cap: int
    is_overdrawn: bool
    lanes: int
    rank: int
    turn: int = field(default=0, compare=False)
    wanting: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClaimedShard:
    """A shard that this lane may work on, with its file and the duplicates that fall into it."""

    lease: Lease
    shard: Shard
    file: InputFile
    duplicates: dict[int, Duplicate]


_CLAIM = text("""
    UPDATE shard SET state = 'leased', lease_epoch = lease_epoch + 1, lane_id = :lane_id
    WHERE (run_id, shard_no) = (
        SELECT run_id, shard_no FROM shard
        WHERE run_id = :run_id AND (state = 'open' OR (state = 'leased' AND lane_id = :lane_id
              AND shard_no <> ALL(CAST(:working AS integer[]))))
        ORDER BY shard_no LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING shard_no, file_no, first_row, row_count, first_document_no, document_count, lease_epoch
""")

#: A lane that was buried may claim nothing: nobody would bury it a second time.
_LIVING = text("SELECT lane_id FROM lane WHERE lane_id = :lane_id AND ended_at IS NULL FOR SHARE")

_LOCK_LANES = text("""
    SELECT lane_id, ended_at IS NOT NULL AS has_ended FROM lane
    WHERE lane_id = ANY(:lanes) ORDER BY lane_id FOR NO KEY UPDATE
""")

_FINISH = text("""
    UPDATE shard s SET state = 'done'
    WHERE run_id = :run_id AND shard_no = :shard_no AND lease_epoch = :epoch AND lane_id = :lane_id
      AND state IN ('leased', 'done')
      AND (SELECT count(*) FROM document d WHERE d.run_id = s.run_id AND d.document_no >= s.first_document_no
           AND d.document_no < s.first_document_no + s.document_count) = s.document_count
""")

#: A document is due that waits for nothing any more: the lot drew it, or its run is certified (`Place.fate`).
_LET_WAIT = text("""
    UPDATE shard s SET state = 'held'
    WHERE run_id = :run_id AND shard_no = :shard_no AND lease_epoch = :epoch AND lane_id = :lane_id
      AND state IN ('leased', 'held') AND NOT EXISTS (SELECT FROM certified c WHERE c.run_id = s.run_id)
      AND (SELECT count(*) FROM document d WHERE d.run_id = s.run_id AND d.document_no >= s.first_document_no
           AND d.document_no < s.first_document_no + s.document_count)
        + (SELECT count(*) FROM held h WHERE h.run_id = s.run_id AND h.document_no >= s.first_document_no
           AND h.document_no < s.first_document_no + s.document_count
           AND NOT EXISTS (SELECT FROM document d WHERE d.run_id = h.run_id AND d.document_no = h.document_no)
           AND NOT EXISTS (SELECT FROM ranked k WHERE k.run_id = h.run_id AND k.document_no = h.document_no
                           AND k.is_sampled)) = s.document_count
""")

_FAIL = text("""
    UPDATE shard SET state = 'failed'
    WHERE run_id = :run_id AND shard_no = :shard_no AND lease_epoch = :epoch AND lane_id = :lane_id
      AND state IN ('leased', 'failed')
""")

#: Only under the lock that `_FAIL` holds: else a new owner's results would meet our dead letters.
_FAIL_DOCUMENTS = text("""
    WITH failed AS (
        INSERT INTO document (run_id, document_no, document_id, state, reason)
        SELECT s.run_id, n, '', 'dead_letter', :reason
        FROM shard s, generate_series(s.first_document_no, s.first_document_no + s.document_count - 1) n
        WHERE s.run_id = :run_id AND s.shard_no = :shard_no
        ON CONFLICT DO NOTHING RETURNING document_no
    )
    UPDATE lane SET done = done + f.documents, dead_letters = dead_letters + f.documents
    FROM (SELECT count(*) AS documents FROM failed) f WHERE lane_id = :lane_id
""")

_DEAD_LANES = text("""
    SELECT lane_id FROM lane
    WHERE run_id = :run_id AND ended_at IS NULL AND (
        heartbeat_at < clock_timestamp() - make_interval(secs => :dead_after)
        OR (heartbeat_at < clock_timestamp() - make_interval(secs => :grace)
            AND pg_try_advisory_xact_lock(:space, CAST(lane_id AS integer))))
    ORDER BY lane_id FOR NO KEY UPDATE SKIP LOCKED
""")

_FENCE = text("""
    UPDATE shard SET state = 'open', lease_epoch = lease_epoch + 1, lane_id = NULL
    WHERE run_id = :run_id AND lane_id = ANY(:lanes) AND state = 'leased'
    RETURNING shard_no
""")

#: Open intents can only be in shards that were not finished. The lanes count what is declared for them. Each shard's
#: intents are looked up by key, and each one's outcome: a join could be one of all pairs, where statistics are older
#: than the run.
_DECLARE_UNKNOWN = text("""
    WITH open AS MATERIALIZED (
        SELECT i.run_id, i.document_no, i.attempt_no, i.reserved, i.lane_id
        FROM shard s CROSS JOIN LATERAL (
            SELECT * FROM attempt_intent a WHERE a.run_id = s.run_id
            AND a.document_no BETWEEN s.first_document_no AND s.first_document_no + s.document_count - 1 OFFSET 0) i
        WHERE s.run_id = :run_id AND i.lane_id = ANY(:lanes)
          AND (s.shard_no = ANY(:shards) OR (s.state = 'failed' AND s.lane_id = ANY(:lanes)))
          AND (SELECT o.run_id FROM attempt_outcome o WHERE o.run_id = i.run_id
               AND o.document_no = i.document_no AND o.attempt_no = i.attempt_no) IS NULL
    ), declared AS (
        INSERT INTO attempt_unknown (run_id, document_no, attempt_no, bound, because)
        SELECT run_id, document_no, attempt_no, reserved, :because FROM open
        ON CONFLICT DO NOTHING RETURNING document_no, attempt_no, bound
    ), tally AS (
        SELECT lane_id, count(*) AS attempts, sum(bound) AS bounds
        FROM declared JOIN open USING (document_no, attempt_no) GROUP BY lane_id
    )
    UPDATE lane SET attempts = lane.attempts + t.attempts, bounds = lane.bounds + t.bounds
    FROM tally t WHERE lane.lane_id = t.lane_id
""")

#: One row of the run, one of its budget, and one for each lane that it has, or its backfill. Whoever wants a place
#: at a tier has that tier among its places, though it may hold none.
_BEAT = text(f"""
    WITH beating AS (
        UPDATE lane SET heartbeat_at = clock_timestamp(), in_flight = :in_flight, waiting_because = :waiting_because,
                        places = CAST(:places AS jsonb)
        WHERE lane_id = :lane_id AND ended_at IS NULL RETURNING run_id, lane_id
    )
    SELECT r.state, r.concurrency || r.limits AS ceilings, b.cap, b.granted > b.cap AS is_overdrawn,
           greatest(s.lanes, f.lanes) AS lanes, s.rank,
           CAST(extract(epoch FROM clock_timestamp()) AS bigint) / {TURN_S} AS turn, w.wanting
    FROM beating m JOIN run r USING (run_id) JOIN budget b USING (budget_id)
    LEFT JOIN backfill f ON f.backfill_id = r.backfill_id
    CROSS JOIN LATERAL (
        SELECT count(*) AS lanes, count(*) FILTER (WHERE l.lane_id < m.lane_id) AS rank
        FROM lane l
        WHERE l.ended_at IS NULL AND l.run_id IN (
            SELECT r.run_id UNION ALL SELECT o.run_id FROM run o WHERE o.backfill_id = r.backfill_id)) s
    CROSS JOIN LATERAL (
        SELECT coalesce(jsonb_object_agg(t.tier, jsonb_build_array(t.others, t.before)), '{{}}'::jsonb) AS wanting
        FROM (
            SELECT k.tier, count(*) AS others, count(*) FILTER (WHERE l.lane_id < m.lane_id) AS before
            FROM lane l CROSS JOIN LATERAL jsonb_object_keys(l.places) AS k(tier)
            WHERE l.ended_at IS NULL AND l.lane_id <> m.lane_id AND l.run_id IN (
                SELECT r.run_id UNION ALL SELECT o.run_id FROM run o WHERE o.backfill_id = r.backfill_id)
            GROUP BY k.tier) t) w
""")  # noqa: S608 (made of our own constants)

_HOLD_LOCK = text("""
    SELECT pg_try_advisory_xact_lock(:space, CAST(coalesce(-r.backfill_id, r.run_id) AS integer))
    FROM lane m JOIN run r USING (run_id) WHERE m.lane_id = :lane_id
""")

#: A statement of its own after the lock: it sees what the one before has raised.
_HELD = text("""
    WITH mine AS (SELECT r.run_id, r.backfill_id FROM lane m JOIN run r USING (run_id) WHERE m.lane_id = :lane_id)
    SELECT l.places, o.concurrency || o.limits FROM lane l JOIN run o USING (run_id)
    WHERE l.ended_at IS NULL AND l.lane_id <> :lane_id AND l.run_id IN (
        SELECT run_id FROM mine UNION ALL SELECT s.run_id FROM run s JOIN mine USING (backfill_id))
""")

_HOLD = text("""
    UPDATE lane SET places = places || CAST(:places AS jsonb) WHERE lane_id = :lane_id AND ended_at IS NULL
""")

_LEFT = text("""
    SELECT r.documents - (SELECT coalesce(sum(l.done), 0) FROM lane l WHERE l.run_id = r.run_id)
    FROM run r WHERE r.run_id = :run_id
""")


_SHOWN = text("""
    SELECT e.detail->>'shown_as', CASE
        WHEN l.ended_at IS NULL THEN 'alive' WHEN l.ended_because = 'died' THEN 'died' ELSE 'left' END
    FROM run_event e JOIN lane l ON l.run_id = e.run_id AND l.lane_id = CAST(e.detail->>'lane' AS bigint)
    WHERE e.run_id = :run_id AND e.kind = :kind ORDER BY l.lane_id
""")


async def register(ledger: Ledger, run_id: RunId) -> LaneId:
    """A new lane of a run, on this host and process."""
    row = {"run_id": run_id, "host": socket.gethostname(), "pid": os.getpid()}
    async with ledger.transaction("register_lane") as connection:
        inserted = await connection.execute(insert(tables.lane).values(row).returning(tables.lane.c.lane_id))
        return LaneId(inserted.scalar_one())


@asynccontextmanager
async def alive(
    ledger: Ledger, lane_id: LaneId, within_s: float = USUAL_TIMES.beat_within_s
) -> AsyncIterator[Session]:
    """A connection whose session holds the lane's lock for as long as it is open. Raises LedgerUnavailable.

    `within_s` is how many seconds it may take to open.
    """
    lock = {"space": LOCK_SPACE, "lane_id": lane_id}
    with cancellation_kept():
        try:
            async with AsyncExitStack() as opening:
                async with asyncio.timeout(within_s):  # TimeoutError is an OSError
                    session = await opening.enter_async_context(ledger.engine.connect())
                    await session.execute(text("SELECT pg_advisory_lock(:space, CAST(:lane_id AS integer))"), lock)
                    await session.commit()
                try:
                    yield session
                finally:
                    await session.invalidate()  # ends the session, and so the lock, whatever state it is in
        except (DBAPIError, OSError) as error:
            raise explain(error, ledger.url) from None
        except PoolTimeout:
            busy = "no connection to Postgres is free for the heartbeat: it may be slow or stuck"
            raise PassingFailure(busy) from None


async def beat(
    session: Session, lane_id: LaneId, in_flight: int, waiting: str | None, held: Mapping[str, int]
) -> Orders | None:
    """Show that the lane lives, what it waits for, and what it holds at most from now on, by tier.

    A tier that is not among those it holds, not even with 0, is one that it has nothing to send to.
    Returns what is ordered now; None if the lane was buried.
    """
    row = {"lane_id": lane_id, "in_flight": in_flight, "waiting_because": waiting, "places": as_json(dict(held))}
    told = (await session.execute(_BEAT, row)).one_or_none()
    await session.commit()
    return None if told is None else Orders(*told)


async def hold(
    session: Session, lane_id: LaneId, shares: Mapping[str, int], held: Mapping[str, int], ceilings: Mapping[str, int]
) -> dict[str, int]:
    """Raise what the lane holds to its shares, as far as no other lane holds that; returns what it holds then.

    `ceilings` are its run's. Of a backfill whose runs have several, the highest is that of all together. While
    another lane does the same nothing changes: it may be stuck, and the session has heartbeats to send.
    """
    if not (await session.execute(_HOLD_LOCK, {"space": HOLD_SPACE, "lane_id": lane_id})).scalar():
        await session.rollback()
        return dict(held)
    others = [(taken, theirs) for taken, theirs in await session.execute(_HELD, {"lane_id": lane_id})]
    most = {tier: max([ceiling, *(o.get(tier, 0) for _, o in others)]) for tier, ceiling in ceilings.items()}
    taken = take(shares, held, [taken for taken, _ in others], most)
    is_alive = (await session.execute(_HOLD, {"lane_id": lane_id, "places": as_json(taken)})).rowcount
    await session.commit()
    return taken if is_alive else dict(held)


async def claim(
    ledger: Ledger, run_id: RunId, lane_id: LaneId, working: Collection[int] | None = None
) -> ClaimedShard | None:
    """Lease the next open shard, with a new epoch. None: there is none right now, or the lane was buried.

    With the numbers of the shards it is `working` on, a lane also gets back one that it was given by a COMMIT whose
    answer was lost, which makes this safe to repeat.
    """
    async with ledger.transaction("claim") as connection:
        if (await connection.execute(_LIVING, {"lane_id": lane_id})).first() is None:
            return None
        known = None if working is None else list(working)
        key = {"run_id": run_id, "lane_id": lane_id, "working": known}
        row = (await connection.execute(_CLAIM, key)).one_or_none()
        if row is None:
            return None
        *shape, epoch = row
        shard = Shard(*shape)
        return ClaimedShard(
            Lease(shard.shard_no, epoch),
            shard,
            await _find_file(connection, run_id, shard.file_no),
            await _find_duplicates(connection, run_id, shard),
        )


async def finish(ledger: Ledger, run_id: RunId, lane_id: LaneId, lease: Lease) -> bool:
    """Mark a shard done; or held, where the documents that have not ended wait for their run's certificate.

    False if the lease is lost or something is left to do for a document of it. Safe to repeat.
    """
    async with ledger.transaction("finish") as connection:
        key = _key(run_id, lane_id, lease)
        if (await connection.execute(_FINISH, key)).rowcount:
            return True
        return bool((await connection.execute(_LET_WAIT, key)).rowcount)


async def fail(ledger: Ledger, run_id: RunId, lane_id: LaneId, lease: Lease, reason: str) -> bool:
    """Fail a shard whose file changed or cannot be read: what did not end becomes a dead letter (G1, G2).

    False if the lease is lost; then nothing is written. Safe to repeat.
    """
    key = _key(run_id, lane_id, lease)
    async with ledger.transaction("fail") as connection:
        await lock_lanes(connection, [lane_id])
        if not (await connection.execute(_FAIL, key)).rowcount:
            return False
        await connection.execute(_FAIL_DOCUMENTS, key | {"reason": reason})
        return True


async def leave(ledger: Ledger, run_id: RunId, lane_id: LaneId, because: str) -> None:
    """End a lane in good order: its shards are open again, its open intents unknown, its grants closed."""
    async with ledger.transaction("leave") as connection:
        await end_lanes(connection, run_id, [lane_id], because)


async def bury_dead(
    ledger: Ledger, run_id: RunId, *, grace_s: float = GRACE_S, dead_after_s: float = DEAD_AFTER_S
) -> int:
    """End the lanes whose machine or process is gone; returns how many."""
    limits = {"dead_after": dead_after_s, "grace": grace_s, "space": LOCK_SPACE}
    async with ledger.transaction("bury") as connection:
        rows = await connection.execute(_DEAD_LANES, {"run_id": run_id, **limits})
        dead = [LaneId(lane_id) for (lane_id,) in rows]
        if dead:
            await end_lanes(connection, run_id, dead, "died")
        return len(dead)


async def bury_superseded(ledger: Ledger, job: str | None = None) -> None:
    """End the dead lanes of superseded runs, a job's or all: nobody resumes those, and grants would stay open."""
    run = tables.run.c
    of_job = [] if job is None else [run.job == job]
    for run_id in await _find_with_lanes(ledger, *of_job, run.state == "superseded"):
        await bury_dead(ledger, run_id)


async def bury_sharing(
    ledger: Ledger, run_id: RunId, *, grace_s: float = GRACE_S, dead_after_s: float = DEAD_AFTER_S
) -> None:
    """End the dead lanes of the other runs that draw on this run's budget, as those of one backfill do.

    Their grants are waited for, or their places.
    """
    run = tables.run.c
    budget = select(run.budget_id).where(run.run_id == run_id).scalar_subquery()
    for other in await _find_with_lanes(ledger, run.budget_id == budget, run.run_id != run_id):
        await bury_dead(ledger, other, grace_s=grace_s, dead_after_s=dead_after_s)


async def _find_with_lanes(ledger: Ledger, *such: ColumnElement[bool]) -> list[RunId]:
    """Those runs whose lanes have not all ended."""
    run, lane = tables.run.c, tables.lane.c
    query = (
        select(run.run_id)
        .distinct()
        .join_from(tables.run, tables.lane, lane.run_id == run.run_id)
        .where(*such, lane.ended_at.is_(None))
    )
    async with ledger.transaction() as connection:
        return [RunId(run_id) for (run_id,) in await connection.execute(query)]


async def has_unfinished(ledger: Ledger, run_id: RunId) -> bool:
    """Whether any shard of the run is to be worked on, or is being."""
    shard = tables.shard.c
    query = select(shard.shard_no).where(shard.run_id == run_id, shard.state.in_(["open", "leased"])).limit(1)
    async with ledger.transaction() as connection:
        return (await connection.execute(query)).first() is not None


async def has_ended(ledger: Ledger, run_id: RunId) -> bool:
    """Whether every shard of the run is done or failed. Those that wait for a certificate will be worked on yet."""
    shard = tables.shard.c
    query = select(shard.shard_no).where(shard.run_id == run_id, shard.state.not_in(["done", "failed"])).limit(1)
    async with ledger.transaction() as connection:
        return (await connection.execute(query)).first() is None


async def find_left(ledger: Ledger, run_id: RunId) -> int:
    """How many documents of the run have not ended, by what its lanes have committed: one row per lane."""
    async with ledger.transaction() as connection:
        return int((await connection.execute(_LEFT, {"run_id": run_id})).scalar_one())


async def has_living(ledger: Ledger, run_id: RunId) -> bool:
    """Whether any lane of the run has not ended; those that died count until they are buried."""
    lane = tables.lane.c
    query = select(lane.lane_id).where(lane.run_id == run_id, lane.ended_at.is_(None)).limit(1)
    async with ledger.transaction() as connection:
        return (await connection.execute(query)).first() is not None


async def find_shown(ledger: Ledger, run_id: RunId) -> dict[str, Kept]:
    """How the lanes of a run stand that are shown elsewhere, by what they are shown as there.

    Of several that one flow run had, after Prefect started it again, the last one counts.
    """
    async with ledger.transaction() as connection:
        rows = await connection.execute(_SHOWN, {"run_id": run_id, "kind": SHOWN_AS})
        return {shown_as: Kept(kept) for shown_as, kept in rows}


async def lock_lanes(connection: AsyncConnection, lanes: Sequence[LaneId]) -> set[LaneId]:
    """Hold these lanes' rows until the transaction ends; returns those that have ended."""
    rows = await connection.execute(_LOCK_LANES, {"lanes": list(lanes)})
    return {LaneId(lane_id) for lane_id, has_ended in rows if has_ended}


async def end_lanes(connection: AsyncConnection, run_id: RunId, lanes: Sequence[LaneId], because: str) -> None:
    """End lanes: their shards are open again under a new epoch, open intents unknown, grants closed."""
    key = {"run_id": run_id, "lanes": list(lanes)}
    await lock_lanes(connection, lanes)
    await connection.execute(
        update(tables.lane)
        .where(tables.lane.c.lane_id.in_(lanes), tables.lane.c.ended_at.is_(None))
        .values(ended_at=text("clock_timestamp()"), ended_because=because, in_flight=0, waiting_because=None)
    )
    fenced = (await connection.execute(_FENCE, key)).scalars().all()  # waits for, then refuses, their last intents
    await connection.execute(_DECLARE_UNKNOWN, key | {"because": f"lane {because}", "shards": list(fenced)})
    await settle_grants(connection, run_id, lanes=lanes)


async def _find_file(connection: AsyncConnection, run_id: RunId, file_no: int) -> InputFile:
    f = tables.input_file.c
    row = (
        await connection.execute(
            select(f.file_no, f.path, f.size, f.sha256, f.rows, f.partition).where(
                f.run_id == run_id, f.file_no == file_no
            )
        )
    ).one()
    return InputFile(*row)


async def _find_duplicates(connection: AsyncConnection, run_id: RunId, shard: Shard) -> dict[int, Duplicate]:
    d = tables.duplicate.c
    last = shard.first_document_no + shard.document_count - 1
    rows = await connection.execute(
        select(d.document_no, d.of_document_no, d.is_same_text).where(
            d.run_id == run_id, d.document_no.between(shard.first_document_no, last)
        )
    )
    return {row.document_no: Duplicate(*row) for row in rows}


def _key(run_id: RunId, lane_id: LaneId, lease: Lease) -> dict[str, int]:
    return {"run_id": run_id, "lane_id": lane_id, "shard_no": lease.shard_no, "epoch": lease.epoch}
