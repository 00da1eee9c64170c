"""Breakdowns: attempts added up by Postgres, by every side that a report shows, and what single documents cost.

What comes back does not grow with the number of attempts, and nor does what is read: of a run that is done, the views
have stored sums. Of any other they read the rows, once for each view.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.spending import Cell, Cost, Line, Side, Sums, at_most


@dataclass(frozen=True, slots=True)
class DearDocument:
    """A document among the dearest, with what became of it. `unknown_pico` is what it may have cost besides."""

    run: int
    document_no: int
    document_id: str | None
    state: str | None
    tier: str | None
    reason: str | None
    attempts: int
    cost_pico: int
    unknown_pico: int


@dataclass(frozen=True, slots=True)
class SlowDocument:
    """A document that waited long for replies, with what became of it; the time is of all its attempts together."""

    run: int
    document_no: int
    document_id: str | None
    state: str | None
    tier: str | None
    reason: str | None
    attempts: int
    waited_us: int


@dataclass(frozen=True, slots=True)
class DocumentCosts:
    """What a document cost that was sent, in known pico units: of `documents`, half cost at most `p50_pico`.

    A document that was sent in several runs counts in each. The bounds of the half and of 95 % are what one of the
    documents cost, and less than a hundredth too much; the mean and the most are exact. `dearest` are those that may
    have cost most.
    """

    documents: int
    mean_pico: int
    p50_pico: int
    p95_pico: int
    max_pico: int
    dearest: tuple[DearDocument, ...]


#: Of the dearest and the slowest documents of a run that is done so many are stored (migrations 0011 and 0013).
STORED_DEAREST = 50

_SUMS = """
    coalesce(sum(attempts), 0) AS attempts, coalesce(sum(escalated), 0) AS escalated,
    coalesce(sum(attempts) FILTER (WHERE billing <> 'known'), 0) AS unknown_attempts,
    coalesce(sum(hit_tokens), 0) AS hit_tokens, coalesce(sum(miss_tokens), 0) AS miss_tokens,
    coalesce(sum(output_tokens), 0) AS output_tokens, coalesce(sum(reasoning_tokens), 0) AS reasoning_tokens,
    coalesce(sum(cost_pico), 0) AS cost_pico, coalesce(sum(unknown_pico), 0) AS unknown_pico,
    coalesce(sum(hit_pico), 0) AS hit_pico, coalesce(sum(miss_pico), 0) AS miss_pico,
    coalesce(sum(output_pico), 0) AS output_pico, coalesce(sum(priced_tokens), 0) AS priced_tokens
"""

_CELLS = text(f"""
    SELECT tier, purpose, band, signal, verdict, billing, {_SUMS} FROM spend WHERE run_id = ANY(:runs)
    GROUP BY tier, purpose, band, signal, verdict, billing
""")  # noqa: S608 (made of our own constants)

#: What names a part of a spend. A run is ordered by its number.
_NAMED_BY = {
    Side.JOB: "job",
    Side.RUN: "run_id",
    Side.DAY: "day",
    Side.TIER: "tier",
    Side.MODEL: "model",
    Side.PURPOSE: "purpose",
    Side.HOURS: "coalesce(band, CASE billing WHEN 'known' THEN 'not billed' ELSE 'not known' END)",
}

#: Each cost stands for those with the same first three digits.
_COSTS = text("""
    SELECT max(at_most_pico) AS pico, sum(documents) AS documents FROM document_costs WHERE run_id = ANY(:runs)
    GROUP BY about_pico ORDER BY 1
""")

#: OFFSET 0 has Postgres add up one run after the other, each by its index, however many others there are.
_FEW = "SELECT * FROM dearest_document WHERE run_id = ANY(:runs)"
_MANY = """
    SELECT s.* FROM unnest(CAST(:runs AS bigint[])) AS one (run_id)
    CROSS JOIN LATERAL (SELECT * FROM document_spend d WHERE d.run_id = one.run_id OFFSET 0) s
"""
#: What became of a few documents, looked up one by one.
_FATES = text("""
    SELECT s.run_id, s.document_no, d.document_id, d.state, d.tier, d.reason
    FROM unnest(CAST(:runs AS bigint[]), CAST(:numbers AS bigint[])) AS s (run_id, document_no)
    LEFT JOIN LATERAL (
        SELECT document_id, state, tier, NULL AS reason FROM result r
        WHERE r.run_id = s.run_id AND r.document_no = s.document_no
        UNION ALL
        SELECT document_id, 'dead_letter', tier, reason FROM dead_letter x
        WHERE x.run_id = s.run_id AND x.document_no = s.document_no
    ) d ON true
""")
_DEAREST = """
    SELECT run_id AS run, document_no, attempts, cost_pico, unknown_pico FROM ({spent}) spent
    ORDER BY cost_pico + unknown_pico DESC, run_id, document_no LIMIT :top
"""


_FEW_SLOW = "SELECT * FROM slowest_document WHERE run_id = ANY(:runs)"
_MANY_SLOW = """
    SELECT s.* FROM unnest(CAST(:runs AS bigint[])) AS one (run_id)
    CROSS JOIN LATERAL (SELECT * FROM document_wait d WHERE d.run_id = one.run_id OFFSET 0) s
"""
_SLOWEST = """
    SELECT run_id AS run, document_no, attempts, waited_us FROM ({waited}) waited
    ORDER BY waited_us DESC, run_id, document_no LIMIT :top
"""


@asynccontextmanager
async def hashed(connection: AsyncConnection) -> AsyncIterator[None]:
    """For queries that read all rows of a run, and nothing else: what they join is hashed.

    Of a run that Postgres has not counted yet it believes that it has no rows, and would compare all pairs of them.
    Where few rows are looked up in many, this would read the many.
    """
    await connection.execute(text("SET LOCAL enable_nestloop = off"))
    yield
    await connection.execute(text("SET LOCAL enable_nestloop = on"))


async def read_cells(connection: AsyncConnection, runs: Sequence[int]) -> list[Cell]:
    """The spend of these runs, split as far as a summary needs it."""
    async with hashed(connection):
        rows = (await connection.execute(_CELLS, {"runs": runs})).mappings()
    return [
        Cell(row["tier"], row["purpose"], row["band"], row["signal"], row["verdict"], row["billing"], _sums(row))
        for row in rows
    ]


async def read_lines(connection: AsyncConnection, runs: Sequence[int], by: Sequence[Side]) -> tuple[Line, ...]:
    """The spend of these runs split by the sides `by`, in the order of their names. They add up to all of it."""
    names = ", ".join(_NAMED_BY[side] for side in by)
    numbers = ", ".join(str(number + 1) for number in range(len(by)))
    query = f"SELECT {names}, {_SUMS} FROM spend WHERE run_id = ANY(:runs) GROUP BY {numbers} ORDER BY {numbers}"  # noqa: S608 (ours)
    async with hashed(connection):
        rows = (await connection.execute(text(query), {"runs": runs})).all()
    return tuple(Line(tuple(map(str, row[: len(by)])), Sums(*map(int, row[len(by) :]))) for row in rows)


async def read_document_costs(
    connection: AsyncConnection, runs: Sequence[int], top: int, spent_pico: int
) -> DocumentCosts:
    """What documents of these runs cost, with the `top` dearest of them. All runs cost `spent_pico` that is known."""
    async with hashed(connection):
        costs = [Cost(pico, int(documents)) for pico, documents in await connection.execute(_COSTS, {"runs": runs})]
    documents = sum(cost.documents for cost in costs)
    return DocumentCosts(
        documents=documents,
        mean_pico=(2 * spent_pico + documents) // (2 * documents) if documents else 0,
        p50_pico=at_most(costs, 50),
        p95_pico=at_most(costs, 95),
        max_pico=at_most(costs, 100),
        dearest=await _read_dearest(connection, runs, top),
    )


async def _read_dearest(connection: AsyncConnection, runs: Sequence[int], top: int) -> tuple[DearDocument, ...]:
    query = _DEAREST.format(spent=_FEW if top <= STORED_DEAREST else _MANY)
    async with hashed(connection):
        rows = (await connection.execute(text(query), {"runs": runs, "top": top})).mappings().all()
    return tuple(DearDocument(**row) for row in await with_fates(connection, rows))


async def read_slowest(connection: AsyncConnection, runs: Sequence[int], top: int) -> tuple[SlowDocument, ...]:
    """The `top` documents of these runs that waited longest for replies."""
    if not top:
        return ()
    query = _SLOWEST.format(waited=_FEW_SLOW if top <= STORED_DEAREST else _MANY_SLOW)
    async with hashed(connection):
        rows = (await connection.execute(text(query), {"runs": runs, "top": top})).mappings().all()
    return tuple(SlowDocument(**row) for row in await with_fates(connection, rows))


async def with_fates(connection: AsyncConnection, rows: Sequence[RowMapping]) -> list[dict[str, Any]]:
    """These few documents, each a `run` and `document_no`, with what became of them."""
    key = {"runs": [row["run"] for row in rows], "numbers": [row["document_no"] for row in rows]}
    fates = {(run, number): fate for run, number, *fate in await connection.execute(_FATES, key)}
    names = ("document_id", "state", "tier", "reason")
    return [{**row, **dict(zip(names, fates[row["run"], row["document_no"]], strict=True))} for row in rows]


def _sums(row: Any) -> Sums:
    return Sums(**{each.name: int(row[each.name]) for each in fields(Sums)})
