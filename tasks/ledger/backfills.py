"""Backfills in the ledger: what a job's runs say of the input's files, and the one that a process works on.

Only one process at a time works on a job's backfills: it holds a session lock, which Postgres lets go the moment the
process dies. The lanes of a backfill's runs are ordinary ones; what they share is a budget and a ceiling.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import RowMapping, insert, select, text, update

from schemas import tables
from schemas.attempts import RunId
from schemas.backfills import Covered
from schemas.errors import BackfillAtWork
from schemas.money import Currency, Money
from tasks.ledger.budgets import WantedBudget, find_budget
from tasks.ledger.connection import Ledger
from tasks.ledger.leases import LIVING_LANE, LOCK_SPACE
from tasks.ledger.rows import as_json

#: A lane lives by its session lock here, not by its heartbeat: whoever was killed a moment ago works on nothing.
#: A sample is a few documents of everywhere. A run with a limit says nothing of a file that another one took whole.
_COVERED = text(f"""
    WITH held AS (
        SELECT DISTINCT ON (f.path) f.path, f.run_id, f.file_no, f.size, f.sha256, f.rows
        FROM run r JOIN input_file f USING (run_id)
        WHERE r.job = :job AND r.is_simulated = :is_simulated AND f.path = ANY(:paths)
          AND r.selection -> 'sample' IS NULL
        ORDER BY f.path, r.selection -> 'limit' <> 'null', f.run_id DESC
    )
    SELECT h.path, h.run_id, h.size, h.sha256, h.rows, r.prompt_version, r.policy, r.selection, r.backfill_id,
           r.state IN ('running', 'paused') AND EXISTS (
               {LIVING_LANE} WHERE l.run_id = h.run_id AND l.ended_at IS NULL) AS is_at_work,
           e.ended, e.dead, m.models
    FROM held h JOIN run r USING (run_id)
    CROSS JOIN LATERAL (
        SELECT count(*) AS ended, count(*) FILTER (WHERE d.state = 'dead_letter') AS dead
        FROM shard s JOIN document d ON d.run_id = s.run_id
            AND d.document_no BETWEEN s.first_document_no AND s.first_document_no + s.document_count - 1
        WHERE s.run_id = h.run_id AND s.file_no = h.file_no) e
    CROSS JOIN LATERAL (
        SELECT coalesce(jsonb_agg(jsonb_build_array(x.tier, x.served_model, x.results)), '[]') AS models FROM (
            SELECT p.tier, o.served_model, count(*) AS results
            FROM shard s JOIN document d ON d.run_id = s.run_id
                AND d.document_no BETWEEN s.first_document_no AND s.first_document_no + s.document_count - 1
            JOIN document p ON p.run_id = coalesce(d.of_run_id, d.run_id)
                AND p.document_no = coalesce(d.of_document_no, d.document_no)
            JOIN attempt_outcome o ON o.run_id = p.run_id AND o.document_no = p.document_no
                AND o.attempt_no = p.attempt_no
            WHERE s.run_id = h.run_id AND s.file_no = h.file_no AND d.state IN ('result', 'reused')
              AND o.served_model IS NOT NULL
            GROUP BY p.tier, o.served_model) x) m
""")  # noqa: S608 (made of our own constants)

_SERVED = text("""
    SELECT DISTINCT ON (i.tier) i.tier, o.served_model
    FROM run r JOIN attempt_intent i USING (run_id) JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
    WHERE r.job = :job AND r.is_simulated = :is_simulated AND r.prompt_version = :prompt_version
      AND o.served_model IS NOT NULL
    ORDER BY i.tier, o.completed_at DESC
""")

_UNFINISHED = text("""
    SELECT * FROM backfill
    WHERE job = :job AND is_simulated = :is_simulated AND asked = CAST(:asked AS jsonb) AND state <> 'done'
""")

_DONE = text("""
    SELECT DISTINCT selection -> 'partitions' ->> 0 FROM run WHERE backfill_id = :backfill_id AND state = 'done'
""")

#: For the same job and kind of money, whatever was asked: two that overlap would take each other's runs away.
_HOLD = text("SELECT pg_try_advisory_lock(hashtext('farthing backfill'), hashtext(CAST(:whose AS text)))")

_LAST_EVENT = text("""
    SELECT coalesce(max(e.event_id), 0) FROM run r JOIN run_event e USING (run_id) WHERE r.backfill_id = :backfill_id
""")

_OWN = text("""
    SELECT backfill_id FROM backfill
    WHERE job = :job AND is_simulated = :is_simulated AND host = :host AND pid = :pid ORDER BY opened_at DESC LIMIT 1
""")

#: Whoever holds the lock is alone: what still says that it is at work died at it.
_LEFT_BEHIND = text("""
    UPDATE backfill SET state = 'paused', reason = 'interrupted', lanes = 0
    WHERE job = :job AND is_simulated = :is_simulated AND state = 'running' AND backfill_id <> :backfill_id
""")

_AT_WORK = text("""
    SELECT backfill_id, host, pid FROM backfill
    WHERE job = :job AND is_simulated = :is_simulated AND state = 'running' ORDER BY backfill_id DESC LIMIT 1
""")

_CAP_CHANGED = text("""
    INSERT INTO run_event (run_id, kind, detail)
    SELECT max(run_id), 'cap_changed', CAST(:detail AS jsonb) FROM run WHERE backfill_id = :backfill_id
    HAVING max(run_id) IS NOT NULL
""")

_SERVED_MODELS = text("""
    SELECT e.detail ->> 'tier' AS tier, array_agg(e.detail ->> 'model' ORDER BY e.event_id) AS models
    FROM run r JOIN run_event e USING (run_id)
    WHERE r.backfill_id = :backfill_id AND e.kind = 'served_model' GROUP BY 1 ORDER BY 1
""")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the ledger says of a job: of each file that a run of it holds, and who served each tier last."""

    covered: Mapping[str, Covered]
    served: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A backfill that is to be opened or resumed, as it was `asked` for. `budget` is what its runs draw on.

    `budget_name` names the job's own shared budget, whose cap its file has `declared`. `keeps_cap`: nobody asks for
    another cap than holds already.
    """

    job: str
    is_simulated: bool
    asked: Mapping[str, Any]
    partitions: Sequence[str]
    documents: int
    budget: Money
    budget_name: str | None
    declared: int
    keeps_cap: bool
    lanes: int
    reuses: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Backfill:
    """A backfill as the ledger has it. `declared` is the cap that it was opened with; `done` are partitions with a
    finished run of it, and `reuses` says which model must have served a result that its runs reuse.
    """

    backfill_id: int
    job: str
    partitions: tuple[str, ...]
    documents: int
    budget_name: str
    declared: Money
    is_simulated: bool
    state: str
    reuses: Mapping[str, str] | None
    done: frozenset[str] = frozenset()

    @property
    def left(self) -> list[str]:
        return [name for name in self.partitions if name not in self.done]


async def find_evidence(
    ledger: Ledger, job: str, paths: Sequence[str], prompt_version: str, *, is_simulated: bool
) -> Evidence:
    """What is known of these files. Costs a look at every document of the runs that hold them."""
    key = {"job": job, "is_simulated": is_simulated}
    async with ledger.transaction() as connection:
        found = (await connection.execute(_COVERED, key | {"paths": list(paths), "space": LOCK_SPACE})).mappings()
        covered = {row["path"]: Covered(**{**row, "models": _by_tier(row["models"])}) for row in found}
        served = await connection.execute(_SERVED, key | {"prompt_version": prompt_version})
        return Evidence(covered, {tier: model for tier, model in served})


async def find_unfinished(
    ledger: Ledger, job: str, asked: Mapping[str, Any], *, is_simulated: bool
) -> Backfill | None:
    """The backfill that was asked for in the same words and is not done; None: there is none."""
    async with ledger.transaction() as connection:
        key = {"job": job, "is_simulated": is_simulated, "asked": as_json(dict(asked))}
        row = (await connection.execute(_UNFINISHED, key)).mappings().one_or_none()
        if row is None:
            return None
        done = (await connection.execute(_DONE, {"backfill_id": row["backfill_id"]})).scalars().all()
        return _backfill(row, done)


async def find_own(ledger: Ledger, job: str, *, is_simulated: bool) -> Backfill | None:
    """The backfill that this process opened or resumed last. None: it has none."""
    async with ledger.transaction() as connection:
        key = {"job": job, "is_simulated": is_simulated, "host": _host(), "pid": os.getpid()}
        backfill_id = (await connection.execute(_OWN, key)).scalar_one_or_none()
    return None if backfill_id is None else await find_backfill(ledger, backfill_id)


async def find_backfill(ledger: Ledger, backfill_id: int) -> Backfill:
    """The backfill of that number, which must be there."""
    async with ledger.transaction() as connection:
        query = select(tables.backfill).where(tables.backfill.c.backfill_id == backfill_id)
        row = (await connection.execute(query)).mappings().one()
        done = (await connection.execute(_DONE, {"backfill_id": backfill_id})).scalars().all()
        return _backfill(row, done)


@asynccontextmanager
async def held(ledger: Ledger, job: str, *, is_simulated: bool) -> AsyncIterator[None]:
    """Keep every other process from the job's backfills while the block lasts.

    Raises BackfillAtWork, which names the process that has it. If Postgres restarts meanwhile, another one may come
    in; the runs' leases then keep the two apart.
    """
    key = {"whose": f"{job} {'simulated' if is_simulated else 'real'}"}
    async with ledger.engine.connect() as session:
        is_ours = bool((await session.execute(_HOLD, key)).scalar_one())
        await session.commit()
        try:
            if not is_ours:
                raise BackfillAtWork(await _find_who_has_it(ledger, job, is_simulated))
            yield
        finally:
            await session.invalidate()  # ends the session, and so the lock


async def _find_who_has_it(ledger: Ledger, job: str, is_simulated: bool) -> str:
    async with ledger.transaction() as connection:
        row = (await connection.execute(_AT_WORK, {"job": job, "is_simulated": is_simulated})).one_or_none()
    whose = "another process" if row is None else f"process {row.pid} on {row.host}"
    which = "a backfill" if row is None else f"backfill {row.backfill_id}"
    return (
        f"{which} of {job} is at work in {whose}: nothing was started here; follow its runs with "
        f"`farthing status {job}`, or stop it with Ctrl-C where it runs, and run the same command again"
    )


async def open_backfill(ledger: Ledger, wanted: Wanted) -> Backfill:
    """Resume the unfinished backfill that was asked for in the same words, or open one with these partitions.

    Raises ConfigurationError where its budget cannot be had, as `find_budget`.
    """
    key = {"job": wanted.job, "is_simulated": wanted.is_simulated, "asked": as_json(dict(wanted.asked))}
    async with ledger.transaction("open_backfill") as connection:
        row = (await connection.execute(_UNFINISHED, key)).mappings().one_or_none()
        if row is None:
            made = insert(tables.backfill).values(_row(wanted)).returning(tables.backfill)
            row = (await connection.execute(made)).mappings().one()
        done = (await connection.execute(_DONE, {"backfill_id": row["backfill_id"]})).scalars().all()
        backfill = _backfill(row, done)
        at_work = {"state": "running", "reason": None, "lanes": wanted.lanes, "host": _host(), "pid": os.getpid()}
        mine = tables.backfill.c.backfill_id == backfill.backfill_id
        await connection.execute(update(tables.backfill).where(mine).values(at_work))
        whose = {"job": wanted.job, "is_simulated": wanted.is_simulated, "backfill_id": backfill.backfill_id}
        await connection.execute(_LEFT_BEHIND, whose)
        _, cap = await find_budget(connection, _wanted_budget(backfill, wanted))
        if not wanted.keeps_cap:
            change = {"backfill_id": backfill.backfill_id, "detail": as_json({"cap": cap})}
            await connection.execute(_CAP_CHANGED, change)
        return backfill


async def change_backfill(ledger: Ledger, backfill_id: int, **changes: Any) -> None:
    """Change its state, reason or lanes; with `done` comes the instant. Safe to repeat."""
    instant = {"finished_at": text("clock_timestamp()")} if changes.get("state") == "done" else {}
    async with ledger.transaction("change_backfill") as connection:
        mine = tables.backfill.c.backfill_id == backfill_id
        await connection.execute(update(tables.backfill).where(mine).values({**changes, **instant}))


async def find_states(ledger: Ledger, backfill_id: int) -> dict[RunId, str]:
    """The state of each of its runs, in the order they were opened."""
    run = tables.run.c
    query = select(run.run_id, run.state).where(run.backfill_id == backfill_id).order_by(run.run_id)
    async with ledger.transaction() as connection:
        return {RunId(run_id): state for run_id, state in await connection.execute(query)}


async def find_last_event(ledger: Ledger, backfill_id: int) -> int:
    """The newest event of any of its runs; 0 where there is none."""
    async with ledger.transaction() as connection:
        return int((await connection.execute(_LAST_EVENT, {"backfill_id": backfill_id})).scalar_one())


async def find_running(ledger: Ledger, backfill_id: int) -> list[RunId]:
    """Those of its runs that are not paused or over."""
    states = await find_states(ledger, backfill_id)
    return [run_id for run_id, state in states.items() if state == "running"]


async def find_drift(ledger: Ledger, backfill_id: int) -> dict[str, list[str]]:
    """Which models served a tier in its runs, in the order they came, where that is more than one."""
    async with ledger.transaction() as connection:
        rows = (await connection.execute(_SERVED_MODELS, {"backfill_id": backfill_id})).all()
    served = {tier: list(dict.fromkeys(models)) for tier, models in rows}
    return {tier: models for tier, models in served.items() if len(models) > 1}


def _row(wanted: Wanted) -> dict[str, Any]:
    return {
        "job": wanted.job,
        "is_simulated": wanted.is_simulated,
        "asked": dict(wanted.asked),
        "partitions": list(wanted.partitions),
        "documents": wanted.documents,
        "currency": wanted.budget.currency.value,
        "cap": wanted.budget.pico,
        "budget_name": wanted.budget_name,
        "state": "running",
    } | ({} if wanted.reuses is None else {"reuses": dict(wanted.reuses)})


def _backfill(row: RowMapping, done: Sequence[str]) -> Backfill:
    return Backfill(
        backfill_id=row["backfill_id"],
        job=row["job"],
        partitions=tuple(row["partitions"]),
        documents=row["documents"],
        budget_name=row["budget_name"] or f"backfill {row['backfill_id']}",  # no job file may say a name with a space
        declared=Money(row["cap"], Currency(row["currency"])),
        is_simulated=row["is_simulated"],
        state=row["state"],
        reuses=row["reuses"],
        done=frozenset(done),
    )


def _wanted_budget(backfill: Backfill, wanted: Wanted) -> WantedBudget:
    """The job's shared budget, as its file says, else one for this backfill, as it was when that was opened."""
    declared = wanted.declared if wanted.budget_name is not None else backfill.declared.pico
    return WantedBudget(
        backfill.budget_name,
        wanted.budget.currency,
        wanted.budget.pico,
        declared,
        wanted.is_simulated,
        wanted.keeps_cap,
    )


def _by_tier(models: Sequence[tuple[str, str, int]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for tier, model, results in models:
        found.setdefault(tier, {})[model] = results
    return found


def _host() -> str:
    return socket.gethostname()
