"""Runs: opened or resumed, watched, paused and settled; and the price rows they book by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from sqlalchemy import ColumnElement, func, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas import tables
from schemas.attempts import LaneId, RunId
from schemas.documents import Manifest
from schemas.errors import ConfigurationError, LedgerUnavailable
from schemas.jobs import Job
from schemas.money import Currency
from schemas.pricing import Price
from tasks.ledger.budgets import WantedBudget, find_budget
from tasks.ledger.connection import Ledger
from tasks.ledger.digests import compute_answers_digest, compute_digest
from tasks.ledger.leases import LIVING_LANE, LOCK_SPACE, end_lanes, lock_lanes
from tasks.ledger.rows import append, as_json


@dataclass(frozen=True, slots=True)
class Opening:
    """What a run is bound to. `selection` says which part of the input.

    `cap` is the budget of a new run in pico units. One that is resumed gets it too, unless `keeps_cap`: nobody asked
    for another budget now, so the last one that somebody set holds. `backfill_id` is the backfill that it is a part
    of, and `reuses` as in `Run`.

    A run that was begun by itself may become a part of one while its lanes are still at work: until they have let go
    of what they hold above their share, all lanes together may have more in flight than the ceiling.
    """

    job: Job
    manifest: Manifest
    selection: Mapping[str, Any]
    currency: Currency
    cap: int
    is_simulated: bool
    keeps_cap: bool = False
    backfill_id: int | None = None
    reuses: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A run as the ledger has it. `ceilings` are requests in flight by tier: the job's, and what was said instead.

    One that is part of a backfill shares them with its other runs, over `sharing` lanes together. `reuses`: by tier,
    the model that must have served a result that is reused; None: any.
    `tolerance` is the share of documents that may end as dead letters.
    """

    run_id: RunId
    job: str
    state: str
    reason: str | None
    documents: int
    currency: Currency
    budget_id: int
    cap: int
    is_simulated: bool
    is_resumed: bool = False
    budget_name: str | None = None
    ladder: tuple[str, ...] = ()
    ceilings: Mapping[str, int] = field(default_factory=dict)
    backfill_id: int | None = None
    sharing: int = 0
    reuses: Mapping[str, str] | None = None
    tolerance: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class LimitChange:
    """Requests in flight by tier, over all lanes of a run: what holds from now on, and what did before."""

    now: Mapping[str, int]
    was: Mapping[str, int]


#: `is_same_work`: it would send the same. `is_at_work`: a lane of it holds its session lock.
_UNFINISHED = text(f"""
    SELECT run_id, is_same_work AND is_same_budget AS is_same,
           is_same_work AND NOT is_same_budget AND EXISTS (
               {LIVING_LANE} WHERE l.run_id = found.run_id AND l.ended_at IS NULL) AS is_at_work
    FROM (
        SELECT run_id,
               prompt_version = :prompt_version AND policy = CAST(:policy AS jsonb)
               AND manifest_digest = :manifest_digest AND currency = :currency
               AND is_simulated = :is_simulated AS is_same_work,
               reuses IS NOT DISTINCT FROM CAST(:reuses AS jsonb)
               AND (SELECT b.name FROM budget b WHERE b.budget_id = run.budget_id)
                   IS NOT DISTINCT FROM CAST(:budget_name AS text) AS is_same_budget
        FROM run
        WHERE job = :job AND selection = CAST(:selection AS jsonb) AND state IN ('running', 'paused')
    ) found
    ORDER BY run_id DESC
""")  # noqa: S608 (made of our own constants)

#: From so many on, comparing all pairs of a run's rows takes longer than counting them.
MANY_DOCUMENTS = 1000
#: The event that says that all labels of a run came.
LABELLED = "labelled"

_OPENED = text("SELECT extract(epoch FROM opened_at)::text, manifest_digest FROM run WHERE run_id = :run_id")

_IS_JOB = text("""
    SELECT prompt_version = :prompt_version AND policy = CAST(:policy AS jsonb) FROM run WHERE run_id = :run_id
""")

_LANES = text("SELECT lane_id FROM lane WHERE run_id = :run_id")

_LEFT = text("SELECT shard_no FROM shard WHERE run_id = :run_id AND state NOT IN ('done', 'failed') LIMIT 1")

_STATE = text("SELECT state, ledger_digest FROM run WHERE run_id = :run_id FOR NO KEY UPDATE")

_CAP = text("""
    SELECT b.budget_id, b.cap FROM budget b JOIN run r USING (budget_id) WHERE r.run_id = :run_id
    FOR NO KEY UPDATE OF b
""")

_EVENT = text("""
    INSERT INTO run_event (run_id, kind, detail, event_key)
    VALUES (:run_id, :kind, CAST(:detail AS jsonb), :key) ON CONFLICT DO NOTHING
""")

_STEERED = text("""
    SELECT state, concurrency, limits, concurrency || limits AS ceilings FROM run WHERE run_id = :run_id
    FOR NO KEY UPDATE
""")

#: The states of a run that is not over. Of one that is, nothing can be changed.
UNDER_WAY = ("running", "paused")
#: Why a run is paused where somebody asked for it from elsewhere, and by Ctrl-C, SIGTERM or Prefect's Cancel.
OPERATOR, INTERRUPTED = "operator", "interrupted"

SUM_UP = text("SELECT sum_up(:run_id)")

_UNSUMMED = text("""
    SELECT r.run_id, r.documents FROM run r JOIN unsummed u USING (run_id)
    WHERE r.job = :job AND r.state = 'done' ORDER BY r.run_id
""")

_LOCK_JOB = text("SELECT pg_advisory_xact_lock(hashtext('farthing job ' || :job))")


async def open_run(ledger: Ledger, opening: Opening) -> Run:
    """Resume the unfinished run of the same job, selection, input, prompt and policy, or open a new one.

    An unfinished run of that selection which no longer matches (its prompt, policy or files changed, or it draws on
    another budget) is marked `superseded`: what it paid for stays on the ledger, and its results are reused where
    they still apply. Raises ConfigurationError where the job's shared budget is not as its other jobs say, and where
    somebody works on the same documents under another budget: what that has in flight would be paid for twice.
    """
    rows = len(opening.manifest.shards) + len(opening.manifest.duplicates)
    async with ledger.transaction("open_run", rows=rows) as connection:
        await connection.execute(_LOCK_JOB, {"job": opening.job.name})
        unfinished = (
            await connection.execute(
                _UNFINISHED,
                identify(opening)
                | {"budget_name": opening.job.budget_name, "reuses": as_json(opening.reuses), "space": LOCK_SPACE},
            )
        ).all()
        if at_work := [found.run_id for found in unfinished if found.is_at_work]:
            raise ConfigurationError(
                f"run {at_work[0]} of {opening.job.name} is at work on the same documents under another budget, such "
                f"as a backfill's: let it end, or `farthing pause {at_work[0]}`, and try again"
            )
        same = [found.run_id for found in unfinished if found.is_same]
        for run_id in [found.run_id for found in unfinished if found.run_id not in same[:1]]:
            await _change_state(connection, run_id, "superseded", "the job or its input changed")
        run_id = same[0] if same else await _insert_run(connection, opening)
        if same:
            await _resume(connection, run_id, opening)
        return await _read(connection, RunId(run_id), is_resumed=bool(same))


async def find_run(ledger: Ledger, run_id: RunId) -> Run:
    """Raises ConfigurationError where there is no such run."""
    async with ledger.transaction() as connection:
        return await _read(connection, run_id)


async def find_mark(ledger: Ledger, run_id: RunId) -> str:
    """What only this run of this ledger is called: another database may have a run of the same number."""
    async with ledger.transaction() as connection:
        opened = (await connection.execute(_OPENED, {"run_id": run_id})).one()
    return f"run-{run_id}-{hashlib.sha256(repr(tuple(opened)).encode()).hexdigest()[:16]}"


async def is_of(ledger: Ledger, run_id: RunId, job: Job) -> bool:
    """Whether the run was opened with this very job: the same would be sent, and judged alike."""
    asked = {"run_id": run_id, "prompt_version": job.prompt_version, "policy": json.dumps(policy(job))}
    async with ledger.transaction() as connection:
        return bool((await connection.execute(_IS_JOB, asked)).scalar_one())


async def list_paths(ledger: Ledger, run_id: RunId) -> list[str]:
    """The names of the run's files, as its manifest has them."""
    file = tables.input_file.c
    async with ledger.transaction() as connection:
        query = select(file.path).where(file.run_id == run_id).order_by(file.file_no)
        return list((await connection.execute(query)).scalars())


async def change_state(ledger: Ledger, run_id: RunId, state: str, reason: str | None = None) -> bool:
    """Pause a run that is running, or the other way round, with an event that says so.

    False: there was nothing to change. A run that is done or superseded stays so, whoever asks.
    """
    async with ledger.transaction("change_state") as connection:
        return await _change_state(connection, run_id, state, reason)


async def change_limits(ledger: Ledger, run_id: RunId, limits: Mapping[str, int] | None) -> LimitChange | None:
    """Let so many requests of the run be in flight by tier, with an event that says so; other tiers keep theirs.

    Its lanes hear it with their next heartbeat, and whoever resumes the run is bound by it, too. None for `limits`:
    what the job says holds again. Returns None for a run that is over. Safe to repeat.
    """
    async with ledger.transaction("change_limits") as connection:
        found = (await connection.execute(_STEERED, {"run_id": run_id})).one()
        if found.state not in UNDER_WAY:
            return None
        kept = {} if limits is None else {**found.limits, **limits}
        change = LimitChange({**found.concurrency, **kept}, found.ceilings)
        await connection.execute(update(tables.run).where(tables.run.c.run_id == run_id).values(limits=kept))
        if change.now != change.was:
            await _note(connection, run_id, "limit_changed", {"now": change.now, "was": change.was})
        return change


async def change_cap(ledger: Ledger, run_id: RunId, cap: int) -> int | None:
    """Give the run's budget another cap, in pico units, with an event that says so; returns what it was.

    It is the same for all who share the budget. What is granted already stays so until the lanes hear of it. Returns
    None for a run that is over. Safe to repeat.
    """
    async with ledger.transaction("change_cap") as connection:
        found = (await connection.execute(_STEERED, {"run_id": run_id})).one()
        return await _change_cap(connection, run_id, cap) if found.state in UNDER_WAY else None


async def note(ledger: Ledger, run_id: RunId, kind: str, detail: Mapping[str, Any], *, key: str) -> None:
    """Append an event. `detail` must be fit to be shown: no document text, no API key (G15).

    Safe to repeat: a run has at most one event of each `key`, and the first to come counts.
    """
    async with ledger.transaction("note") as connection:
        await _note(connection, run_id, kind, detail, key)


async def refresh_statistics(ledger: Ledger, documents: int) -> None:
    """Have Postgres count again if a run of so many documents is large, before something reads all of it.

    Autovacuum comes later. Of a run that it has not counted Postgres believes that it has no rows, and compares
    all pairs of them.
    """
    if documents >= MANY_DOCUMENTS:
        async with ledger.transaction(rows=documents) as connection:
            await connection.execute(text("SELECT analyze_ledger()"))


async def refresh_sums(ledger: Ledger, job: str) -> None:
    """Add up the job's done runs again that a late reply came to, or a correction: audits read their rows since.

    Each in a transaction of its own. Safe to repeat.
    """
    async with ledger.transaction() as connection:
        unsummed = (await connection.execute(_UNSUMMED, {"job": job})).all()
    for run_id, documents in unsummed:
        async with ledger.transaction(rows=documents) as connection:
            await connection.execute(SUM_UP, {"run_id": run_id})


async def settle(ledger: Ledger, run_id: RunId) -> str | None:
    """Finish a run whose shards have all ended: `done`, with a digest and sums of its rows. None if some have not.

    Lanes that are still there are ended, since nothing is left for them, and every grant is closed: before the
    digest, which may take minutes, so that other runs on the same budget do not wait for it. Whoever writes to the
    run later does, so the digest's instant divides its rows exactly. Safe to repeat.
    """
    run = await find_run(ledger, run_id)
    async with ledger.transaction("close_run") as connection:
        lanes = await _lock_all_lanes(connection, run_id)
        if (await connection.execute(_LEFT, {"run_id": run_id})).first():
            return None
        if run.state in UNDER_WAY:
            await end_lanes(connection, run_id, lanes, "run done")
    if run.state in UNDER_WAY:
        with suppress(LedgerUnavailable):  # only what follows would be slower
            await refresh_statistics(ledger, run.documents)
    async with ledger.transaction("settle", rows=run.documents) as connection:
        await _lock_all_lanes(connection, run_id)
        state, digest = (await connection.execute(_STATE, {"run_id": run_id})).one()
        if state not in UNDER_WAY:
            await connection.execute(SUM_UP, {"run_id": run_id})  # anew, if a reply came since
            return digest if state == "done" else None
        until = (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
        digest = await compute_digest(connection, run_id, until)
        await connection.execute(
            update(tables.run)
            .where(tables.run.c.run_id == run_id)
            .values(state="done", reason=None, ledger_digest=digest, finished_at=until)
        )
        await connection.execute(SUM_UP, {"run_id": run_id})
        answers = await compute_answers_digest(connection, run_id, until)
        await _note(connection, run_id, "done", {"ledger_digest": digest, "answers_digest": answers})
        return str(digest)


async def _lock_all_lanes(connection: AsyncConnection, run_id: RunId) -> list[LaneId]:
    """Every lane that the run ever had, its row held until the transaction ends."""
    lanes = [LaneId(lane.lane_id) for lane in await connection.execute(_LANES, {"run_id": run_id})]
    await lock_lanes(connection, lanes)
    return lanes


async def register_prices(ledger: Ledger, prices: Iterable[Price]) -> dict[str, int]:
    """Make sure these price rows are in the ledger; returns their ids by name.

    Raises ConfigurationError where the ledger has a row of that name with other amounts: attempts were booked by it.
    """
    rows = [
        {
            "name": price.name,
            "model": price.model,
            "currency": price.currency.value,
            "band": price.band.value,
            "valid_from": price.valid_from,
            "hit_pico": price.hit_pico,
            "miss_pico": price.miss_pico,
            "output_pico": price.output_pico,
        }
        for price in prices
    ]
    async with ledger.transaction("register_prices") as connection:
        if rows:
            await connection.execute(upsert(tables.price).on_conflict_do_nothing(), rows)
        found = {row["name"]: row for row in (await connection.execute(select(tables.price))).mappings()}
        changed = [row["name"] for row in rows if any(found[row["name"]][key] != value for key, value in row.items())]
        if changed:
            raise ConfigurationError(*(_explain_changed_price(str(name)) for name in changed))
        return {name: row["price_id"] for name, row in found.items()}


def _explain_changed_price(name: str) -> str:
    return (
        f"prices: {name} is not what the ledger booked by; a price row never changes: put it back, and add a [[row]] "
        "with its own valid_from for the new price"
    )


async def add_labels(ledger: Ledger, run_id: RunId, blocks: AsyncIterable[Sequence[tuple[int, str]]]) -> None:
    """Keep what experts say about the run's documents, to measure results against. Safe to repeat.

    Each block in a transaction of its own: between two of them it waits for files, which may be far away.
    """
    columns, labels = ("run_id", "document_no", "label"), 0
    async for block in blocks:
        async with ledger.transaction("add_labels") as connection:
            rows = ((run_id, number, label) for number, label in block)
            await append(connection, tables.label, columns, rows)
        labels += len(block)
    await note(ledger, run_id, LABELLED, {"labels": labels}, key=LABELLED)


async def has_labels(ledger: Ledger, run_id: RunId) -> bool:
    """Whether all labels of this run are in the ledger."""
    event = tables.run_event.c
    async with ledger.transaction() as connection:
        query = select(event.run_id).where(event.run_id == run_id, event.event_key == LABELLED)
        return (await connection.execute(query)).first() is not None


def identify(opening: Opening) -> dict[str, Any]:
    return {
        "job": opening.job.name,
        "prompt_version": opening.job.prompt_version,
        "policy": json.dumps(policy(opening.job)),
        "selection": json.dumps(dict(opening.selection)),
        "manifest_digest": opening.manifest.digest,
        "currency": opening.currency.value,
        "is_simulated": opening.is_simulated,
    }


def policy(job: Job) -> dict[str, Any]:
    """The decisions a run is bound to, besides its prompt version: JSON values only."""
    return {
        "ladder": [tier.name for tier in job.ladder],
        "escalate": {"pilot": True} if job.is_pilot else job.escalate.model_dump(mode="json", exclude_none=True),
        "confidence": job.confidence.model_dump(mode="json"),
        "measure": job.measure,
        "tolerance": str(job.tolerance),
    } | ({} if job.promise is None else {"match": job.agreement.to_json()})


async def _insert_run(connection: AsyncConnection, opening: Opening) -> int:
    job = opening.job
    await connection.execute(upsert(tables.prompt_version).on_conflict_do_nothing(), [_prompt_version(job)])
    budget_id, cap = await find_budget(connection, _wanted_budget(opening))
    row = identify(opening) | {
        "concurrency": concurrency(job),
        "policy": policy(job),
        "selection": dict(opening.selection),
        "state": "running",
        "documents": opening.manifest.document_count,
        "compared_fields": list(job.agreement.fields),
        "budget_id": budget_id,
        "backfill_id": opening.backfill_id,
    }
    if opening.reuses is not None:
        row["reuses"] = dict(opening.reuses)
    run_id = int(
        (await connection.execute(insert(tables.run).values(row).returning(tables.run.c.run_id))).scalar_one()
    )
    await _insert_manifest(connection, run_id, opening.manifest)
    await _note(connection, run_id, "opened", {"documents": opening.manifest.document_count, "cap": cap})
    return run_id


async def _insert_manifest(connection: AsyncConnection, run_id: int, manifest: Manifest) -> None:
    files = [
        {
            "run_id": run_id,
            "file_no": file.file_no,
            "path": file.path,
            "size": file.size,
            "sha256": file.sha256,
            "rows": file.rows,
            "partition": file.partition,
        }
        for file in manifest.files
    ]
    if files:
        await connection.execute(insert(tables.input_file), files)
    shard_columns = ("shard_no", "file_no", "first_row", "row_count", "first_document_no", "document_count")
    shards = ((run_id, *(getattr(shard, name) for name in shard_columns)) for shard in manifest.shards)
    await append(connection, tables.shard, ("run_id", *shard_columns), shards)
    duplicates = ((run_id, d.document_no, d.of_document_no, d.is_same_text) for d in manifest.duplicates)
    await append(
        connection, tables.duplicate, ("run_id", "document_no", "of_document_no", "is_same_text"), duplicates
    )


def _prompt_version(job: Job) -> dict[str, Any]:
    return {
        "prompt_version": job.prompt_version,
        "prefix": job.prefix,
        "answer_schema": job.answer.schema,
        "ladder": [{"model": tier.model, "parameters": tier.parameters(job.user_id)} for tier in job.ladder],
    }


def concurrency(job: Job) -> dict[str, int]:
    """Requests in flight by tier, as the job says, in the order of its ladder."""
    return {tier.name: job.concurrency[tier.name] for tier in job.ladder}


def _wanted_budget(opening: Opening) -> WantedBudget:
    job = opening.job
    return WantedBudget(
        job.budget_name, opening.currency, opening.cap, job.budget.pico, opening.is_simulated, opening.keeps_cap
    )


async def _resume(connection: AsyncConnection, run_id: int, opening: Opening) -> None:
    """Let it run again, with another cap if one is asked for. The event says how far it was."""
    done = select(func.coalesce(func.sum(tables.lane.c.done), 0)).where(tables.lane.c.run_id == run_id)
    ended = int((await connection.execute(done)).scalar_one())
    await _change_state(connection, run_id, "running", None, kind="resumed", detail={"documents": ended})
    said: dict[str, Any] = {"concurrency": concurrency(opening.job)}
    if opening.backfill_id is not None:  # a run that was begun by itself, on the same shared budget, becomes a part
        said["backfill_id"] = opening.backfill_id
    await connection.execute(update(tables.run).where(tables.run.c.run_id == run_id).values(said))
    if not opening.keeps_cap:
        await _change_cap(connection, run_id, opening.cap)
    if opening.job.budget_name is not None:
        await find_budget(connection, _wanted_budget(opening))  # raises where this job does not agree with others


async def _change_cap(connection: AsyncConnection, run_id: int, cap: int) -> int:
    """Returns what the cap was. One that is as asked for is no event."""
    budget_id, was = (await connection.execute(_CAP, {"run_id": run_id})).one()
    if cap != was:
        await connection.execute(update(tables.budget).where(tables.budget.c.budget_id == budget_id).values(cap=cap))
        await _note(connection, run_id, "cap_changed", {"cap": cap, "was": was})
    return int(was)


async def _change_state(
    connection: AsyncConnection,
    run_id: int,
    state: str,
    reason: str | None,
    *,
    kind: str | None = None,
    detail: Mapping[str, Any] | None = None,
) -> bool:
    """In one statement, so that whoever reads, decides and writes at the same moment changes nothing twice."""
    run = tables.run.c
    moves: list[ColumnElement[bool]] = [run.state.in_(UNDER_WAY)]
    if kind != "resumed":  # a run whose process died is still `running`, and resuming it is worth an event
        moves.append(run.state != state)
    changed = await connection.execute(
        update(tables.run).where(run.run_id == run_id, *moves).values(state=state, reason=reason)
    )
    if changed.rowcount:
        await _note(connection, run_id, kind or state, {**({"reason": reason} if reason else {}), **(detail or {})})
    return bool(changed.rowcount)


async def _note(
    connection: AsyncConnection, run_id: int, kind: str, detail: Mapping[str, Any], key: str | None = None
) -> None:
    row = {"run_id": run_id, "kind": kind, "detail": as_json(dict(detail)), "key": key}
    await connection.execute(_EVENT, row)


async def _read(connection: AsyncConnection, run_id: RunId, *, is_resumed: bool = False) -> Run:
    r, b = tables.run.c, tables.budget.c
    found = (
        await connection.execute(
            select(
                *(r.job, r.state, r.reason, r.documents, r.currency, r.budget_id, b.cap, r.is_simulated, b.name),
                r.policy["ladder"].label("ladder"),
                r.policy["tolerance"].astext.label("tolerance"),
                r.concurrency.op("||")(r.limits).label("ceilings"),
                *(r.backfill_id, r.reuses, func.coalesce(tables.backfill.c.lanes, 0).label("sharing")),
            )
            .join_from(tables.run, tables.budget, r.budget_id == b.budget_id)
            .outerjoin(tables.backfill, tables.backfill.c.backfill_id == r.backfill_id)
            .where(r.run_id == run_id)
        )
    ).one_or_none()
    if found is None:
        raise ConfigurationError(f"there is no run {run_id}: `farthing audit` lists the runs of this ledger")
    return Run(
        run_id=run_id,
        job=found.job,
        state=found.state,
        reason=found.reason,
        documents=found.documents,
        currency=Currency(found.currency),
        budget_id=found.budget_id,
        cap=found.cap,
        is_simulated=found.is_simulated,
        is_resumed=is_resumed,
        budget_name=found.name,
        ladder=tuple(found.ladder),
        ceilings=found.ceilings,
        backfill_id=found.backfill_id,
        sharing=found.sharing,
        reuses=found.reuses,
        tolerance=Decimal(found.tolerance),
    )
