"""Lanes and their shards: who may work on what, and what happens to the work of those that died.

A lane shows that it lives in two ways: a heartbeat in its row, for machines that vanish, and a session lock on
its id, which Postgres lets go the moment its process dies. Whoever finds a lane dead buries it: its shards get
a new epoch (so that a zombie can commit nothing more), its open intents become unknowns, its grants are closed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas import tables
from schemas.attempts import LaneId, RunId
from schemas.documents import Duplicate, InputFile, Shard
from schemas.records import Lease
from tasks.ledger.budgets import settle_grants
from tasks.ledger.connection import Ledger, explain

#: A lane that did not beat for so long is dead (seconds); it fences itself well before (`lanes.FENCE_AFTER_S`).
DEAD_AFTER_S = 30.0
#: Where session locks live among Postgres's advisory locks.
_LOCK_SPACE = 0x4661

#: A connection whose session holds a lane's lock.
Session = AsyncConnection


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
        SELECT run_id, shard_no FROM shard WHERE run_id = :run_id AND state = 'open'
        ORDER BY shard_no LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING shard_no, file_no, first_row, row_count, first_document_no, document_count, lease_epoch
""")

_FINISH = text("""
    UPDATE shard s SET state = 'done'
    WHERE run_id = :run_id AND shard_no = :shard_no AND lease_epoch = :epoch AND lane_id = :lane_id
      AND (SELECT count(*) FROM document d WHERE d.run_id = s.run_id AND d.document_no >= s.first_document_no
           AND d.document_no < s.first_document_no + s.document_count) = s.document_count
""")

_FAIL_DOCUMENTS = text("""
    INSERT INTO document (run_id, document_no, document_id, state, reason)
    SELECT s.run_id, n, '', 'dead_letter', :reason
    FROM shard s, generate_series(s.first_document_no, s.first_document_no + s.document_count - 1) n
    WHERE s.run_id = :run_id AND s.shard_no = :shard_no AND s.lease_epoch = :epoch AND s.lane_id = :lane_id
    ON CONFLICT DO NOTHING
""")

_DEAD_LANES = text("""
    SELECT lane_id FROM lane
    WHERE run_id = :run_id AND ended_at IS NULL AND (
        heartbeat_at < clock_timestamp() - make_interval(secs => :dead_after)
        OR (heartbeat_at < clock_timestamp() - make_interval(secs => :grace)
            AND pg_try_advisory_xact_lock(:space, CAST(lane_id AS integer))))
    FOR UPDATE SKIP LOCKED
""")

_FENCE = text("""
    UPDATE shard SET state = 'open', lease_epoch = lease_epoch + 1, lane_id = NULL
    WHERE run_id = :run_id AND lane_id = ANY(:lanes) AND state = 'leased'
""")

_DECLARE_UNKNOWN = text("""
    INSERT INTO attempt_unknown (run_id, document_no, attempt_no, bound, because)
    SELECT i.run_id, i.document_no, i.attempt_no, i.reserved, :because
    FROM attempt_intent i
    WHERE i.run_id = :run_id AND i.lane_id = ANY(:lanes)
      AND NOT EXISTS (SELECT FROM attempt_outcome o WHERE o.run_id = i.run_id
                      AND o.document_no = i.document_no AND o.attempt_no = i.attempt_no)
    ON CONFLICT DO NOTHING
""")

_BEAT = text("""
    UPDATE lane SET heartbeat_at = clock_timestamp(), in_flight = :in_flight, waiting_because = :waiting_because
    WHERE lane_id = :lane_id AND ended_at IS NULL
    RETURNING (SELECT state FROM run WHERE run.run_id = lane.run_id)
""")


async def register(ledger: Ledger, run_id: RunId) -> LaneId:
    """A new lane of a run, on this host and process."""
    row = {"run_id": run_id, "host": socket.gethostname(), "pid": os.getpid()}
    async with ledger.transaction() as connection:
        inserted = await connection.execute(insert(tables.lane).values(row).returning(tables.lane.c.lane_id))
        return LaneId(inserted.scalar_one())


@asynccontextmanager
async def alive(ledger: Ledger, lane_id: LaneId) -> AsyncIterator[Session]:
    """A connection whose session holds the lane's lock for as long as it is open."""
    lock = {"space": _LOCK_SPACE, "lane_id": lane_id}
    try:
        async with ledger.engine.connect() as session:
            await session.execute(text("SELECT pg_advisory_lock(:space, CAST(:lane_id AS integer))"), lock)
            await session.commit()
            try:
                yield session
            finally:
                await session.invalidate()  # ends the session, and so the lock, whatever state it is in
    except (DBAPIError, OSError) as error:
        raise explain(error, ledger.url) from None


async def beat(session: Session, lane_id: LaneId, in_flight: int, waiting: str | None) -> str | None:
    """Show that the lane lives, and what it waits for. Returns the run's state; None if the lane was buried."""
    row = {"lane_id": lane_id, "in_flight": in_flight, "waiting_because": waiting}
    state: str | None = (await session.execute(_BEAT, row)).scalar_one_or_none()
    await session.commit()
    return state


async def claim(ledger: Ledger, run_id: RunId, lane_id: LaneId) -> ClaimedShard | None:
    """Lease the next open shard, with a new epoch. None: there is none right now."""
    async with ledger.transaction() as connection:
        row = (await connection.execute(_CLAIM, {"run_id": run_id, "lane_id": lane_id})).one_or_none()
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
    """Mark a shard done. False if the lease is lost or a document of it has no terminal row."""
    async with ledger.transaction() as connection:
        return bool((await connection.execute(_FINISH, _key(run_id, lane_id, lease))).rowcount)


async def fail(ledger: Ledger, run_id: RunId, lane_id: LaneId, lease: Lease, reason: str) -> bool:
    """Fail a shard whose file changed or cannot be read: what did not end becomes a dead letter (G1, G2)."""
    key = _key(run_id, lane_id, lease)
    async with ledger.transaction() as connection:
        await connection.execute(_FAIL_DOCUMENTS, key | {"reason": reason})
        failed = await connection.execute(
            update(tables.shard)
            .where(
                tables.shard.c.run_id == run_id,
                tables.shard.c.shard_no == lease.shard_no,
                tables.shard.c.lease_epoch == lease.epoch,
                tables.shard.c.lane_id == lane_id,
            )
            .values(state="failed")
        )
        return bool(failed.rowcount)


async def leave(ledger: Ledger, run_id: RunId, lane_id: LaneId, because: str) -> None:
    """End a lane in good order: its shards are open again, its open intents unknown, its grants closed."""
    async with ledger.transaction() as connection:
        await _end(connection, run_id, [lane_id], because)


async def bury_dead(ledger: Ledger, run_id: RunId, *, grace_s: float = 10.0) -> int:
    """End the lanes whose machine or process is gone; returns how many.

    A session that ended counts after `grace_s` without a heartbeat, so that a Postgres restart does not cost a
    living lane its shards.
    """
    limits = {"dead_after": DEAD_AFTER_S, "grace": grace_s, "space": _LOCK_SPACE}
    async with ledger.transaction() as connection:
        rows = await connection.execute(_DEAD_LANES, {"run_id": run_id, **limits})
        dead = [LaneId(lane_id) for (lane_id,) in rows]
        if dead:
            await _end(connection, run_id, dead, "died")
        return len(dead)


async def has_unfinished(ledger: Ledger, run_id: RunId) -> bool:
    """Whether any shard of the run is neither done nor failed."""
    shard = tables.shard.c
    query = select(shard.shard_no).where(shard.run_id == run_id, shard.state.in_(["open", "leased"])).limit(1)
    async with ledger.transaction() as connection:
        return (await connection.execute(query)).first() is not None


async def _end(connection: AsyncConnection, run_id: RunId, lanes: list[LaneId], because: str) -> None:
    key = {"run_id": run_id, "lanes": lanes}
    await connection.execute(_FENCE, key)  # first: it waits for, and then refuses, their last intents
    await connection.execute(_DECLARE_UNKNOWN, key | {"because": f"lane {because}"})
    await connection.execute(
        update(tables.lane)
        .where(tables.lane.c.lane_id.in_(lanes), tables.lane.c.ended_at.is_(None))
        .values(ended_at=text("clock_timestamp()"), ended_because=because, in_flight=0, waiting_because=None)
    )
    await settle_grants(connection, run_id)


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
