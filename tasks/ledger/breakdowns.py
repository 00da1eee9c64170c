"""Breakdowns: attempts added up by Postgres, by every side that a report shows, and what single documents cost.

Each is one pass over the runs' rows, and what comes back does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import CursorResult, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.spending import Cell, Line, Side, Sums


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
class DocumentCosts:
    """What a document cost that was sent, in known pico units: of `documents`, half cost at most `p50_pico`.

    A document that was sent in several runs counts in each. `dearest` are those that may have cost most.
    """

    documents: int
    mean_pico: int
    p50_pico: int
    p95_pico: int
    max_pico: int
    dearest: tuple[DearDocument, ...]


#: For a transaction that reads all rows of one run. Where Postgres has not counted them yet, it takes the run for an
#: empty one and would compare all pairs of its rows; a hash join is linear.
HASHED = text("SET LOCAL enable_nestloop = off")

_SUMS = """
    coalesce(sum(attempts), 0) AS attempts, coalesce(sum(escalated), 0) AS escalated,
    coalesce(sum(attempts) FILTER (WHERE billing <> 'known'), 0) AS unknown_attempts,
    coalesce(sum(hit_tokens), 0) AS hit_tokens, coalesce(sum(miss_tokens), 0) AS miss_tokens,
    coalesce(sum(output_tokens), 0) AS output_tokens, coalesce(sum(reasoning_tokens), 0) AS reasoning_tokens,
    coalesce(sum(cost_pico), 0) AS cost_pico, coalesce(sum(unknown_pico), 0) AS unknown_pico,
    coalesce(sum(hit_pico), 0) AS hit_pico, coalesce(sum(miss_pico), 0) AS miss_pico,
    coalesce(sum(output_pico), 0) AS output_pico
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

_DOCUMENTS = text("""
    SELECT count(*) AS documents, coalesce(round(avg(cost_pico)), 0) AS mean_pico,
           coalesce((percentile_disc(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY cost_pico)), ARRAY[0, 0]) AS at_most,
           coalesce(max(cost_pico), 0) AS max_pico
    FROM document_spend WHERE run_id = ANY(:runs)
""")

_DEAREST = text("""
    SELECT s.run_id AS run, s.document_no, d.document_id, d.state, d.tier, d.reason, s.attempts, s.cost_pico,
           s.unknown_pico
    FROM (
        SELECT * FROM document_spend WHERE run_id = ANY(:runs)
        ORDER BY cost_pico + unknown_pico DESC, run_id, document_no LIMIT :top
    ) s
    LEFT JOIN LATERAL (
        SELECT document_id, state, tier, NULL AS reason FROM result r
        WHERE r.run_id = s.run_id AND r.document_no = s.document_no
        UNION ALL
        SELECT document_id, 'dead_letter', tier, reason FROM dead_letter x
        WHERE x.run_id = s.run_id AND x.document_no = s.document_no
    ) d ON true
    ORDER BY s.cost_pico + s.unknown_pico DESC, s.run_id, s.document_no
""")


async def ask(connection: AsyncConnection, query: TextClause, runs: Sequence[int], **key: Any) -> CursorResult[Any]:
    """The answer to a query about `run_id = ANY(:runs)`.

    A single run is asked for by equality: that is handed on to every table of a join, and so the run's rows are read
    by the index of each, however many other runs there are.
    """
    if len(runs) != 1:
        return await connection.execute(query, {"runs": list(runs), **key})
    return await connection.execute(text(query.text.replace("= ANY(:runs)", "= :run")), {"run": runs[0], **key})


async def read_cells(connection: AsyncConnection, runs: Sequence[int]) -> list[Cell]:
    """The spend of these runs, split as far as a summary needs it."""
    rows = (await ask(connection, _CELLS, runs)).mappings()
    return [
        Cell(row["tier"], row["purpose"], row["band"], row["signal"], row["verdict"], row["billing"], _sums(row))
        for row in rows
    ]


async def read_lines(connection: AsyncConnection, runs: Sequence[int], by: Sequence[Side]) -> tuple[Line, ...]:
    """The spend of these runs split by the sides `by`, in the order of their names. They add up to all of it."""
    names = ", ".join(_NAMED_BY[side] for side in by)
    numbers = ", ".join(str(number + 1) for number in range(len(by)))
    query = f"SELECT {names}, {_SUMS} FROM spend WHERE run_id = ANY(:runs) GROUP BY {numbers} ORDER BY {numbers}"  # noqa: S608 (ours)
    rows = (await ask(connection, text(query), runs)).all()
    return tuple(Line(tuple(map(str, row[: len(by)])), Sums(*map(int, row[len(by) :]))) for row in rows)


async def read_document_costs(connection: AsyncConnection, runs: Sequence[int], top: int) -> DocumentCosts:
    """What documents of these runs cost, with the `top` dearest of them."""
    found = (await ask(connection, _DOCUMENTS, runs)).one()
    dearest = (await ask(connection, _DEAREST, runs, top=top)).mappings()
    middle, high = map(int, found.at_most)
    return DocumentCosts(
        documents=found.documents,
        mean_pico=int(found.mean_pico),
        p50_pico=middle,
        p95_pico=high,
        max_pico=found.max_pico,
        dearest=tuple(DearDocument(**row) for row in dearest),
    )


def _sums(row: Any) -> Sums:
    return Sums(**{each.name: int(row[each.name]) for each in fields(Sums)})
