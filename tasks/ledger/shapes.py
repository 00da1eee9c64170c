"""Shapes: how a spend lies over time, over documents and over confidence, counted by Postgres into fixed buckets.

Only the report page asks. Of a run that is done these are stored; of any other each is one pass over its rows. What
comes back is a few hundred numbers, however many rows there are. They add up to what the audit of that snapshot says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import CursorResult, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.buckets import COST_EDGES, ORIGIN, pick_stride
from tasks.ledger.breakdowns import hashed


@dataclass(frozen=True, slots=True)
class Slice:
    """What the attempts of one tier came to that were begun in the stride from `begins`, by Postgres's clock."""

    begins: datetime
    tier: str
    attempts: int
    cost_pico: int
    unknown_pico: int
    hit_tokens: int
    miss_tokens: int


@dataclass(frozen=True, slots=True)
class Sureness:
    """How many valid answers a tier gave that were about this sure: the `part`-th of CONFIDENCES, from 0.

    `unsure` of them were below the threshold of their run.
    """

    tier: str
    part: int
    answers: int
    unsure: int


@dataclass(frozen=True)
class Shape:
    """How the spend of some runs lies. `costs` counts documents by the bucket of COST_EDGES that their cost is in.

    Bucket 0 is for those that cost nothing that is known. `threshold` is what an answer must be as sure as, where
    the runs have one in common.
    """

    first: datetime
    last: datetime
    stride: timedelta
    slices: tuple[Slice, ...]
    costs: dict[int, int]
    confidences: tuple[Sureness, ...]
    threshold: Decimal | None


_SPAN = text("""
    SELECT min(first) AS first, max(last) AS last,
           CASE WHEN count(DISTINCT escalates_below) = 1 THEN min(escalates_below) END AS threshold
    FROM run_span JOIN run_overview USING (run_id) WHERE run_id = ANY(:runs)
""")

_SLICES = text("""
    SELECT date_bin(CAST(:stride AS interval), begins, :origin) AS begins, tier,
           CAST(sum(attempts) AS bigint) AS attempts, sum(cost_pico) AS cost_pico, sum(unknown_pico) AS unknown_pico,
           sum(hit_tokens) AS hit_tokens, sum(miss_tokens) AS miss_tokens
    FROM spend_over_time WHERE run_id = ANY(:runs) GROUP BY 1, 2 ORDER BY 1, 2
""")

#: No edge has more than three digits, and so many of each cost are known there.
_COSTS = text("""
    SELECT width_bucket(about_pico, CAST(:edges AS bigint[])) AS bucket, CAST(sum(documents) AS bigint) AS documents
    FROM document_costs WHERE run_id = ANY(:runs) GROUP BY 1 ORDER BY 1
""")

_CONFIDENCES = text("""
    SELECT tier, part, CAST(sum(answers) AS bigint) AS answers, CAST(sum(unsure) AS bigint) AS unsure
    FROM confidence_spread WHERE run_id = ANY(:runs) GROUP BY 1, 2 ORDER BY 1, 2
""")


#: Postgres adds bigints up to numerics, which are whole.
_SUMMED = ("cost_pico", "unknown_pico", "hit_tokens", "miss_tokens")


async def _ask(connection: AsyncConnection, query: TextClause, runs: Sequence[int], **key: Any) -> CursorResult[Any]:
    """The answer to a query about `run_id = ANY(:runs)`.

    A single run is asked for by equality: that is handed on to every table of a join, and so the run's rows are read
    by the index of each, however many other runs there are.
    """
    if len(runs) != 1:
        return await connection.execute(query, {"runs": list(runs), **key})
    return await connection.execute(text(query.text.replace("= ANY(:runs)", "= :run")), {"run": runs[0], **key})


async def read_shape(connection: AsyncConnection, runs: Sequence[int]) -> Shape | None:
    """How the spend of these runs lies. None where there are no runs."""
    if not runs:
        return None
    span = (await _ask(connection, _SPAN, runs)).one()
    stride = pick_stride(span.first, span.last)
    async with hashed(connection):
        slices = (await _ask(connection, _SLICES, runs, stride=stride, origin=ORIGIN)).mappings()
        costs = await _ask(connection, _COSTS, runs, edges=list(COST_EDGES))
        confidences = (await _ask(connection, _CONFIDENCES, runs)).mappings()
    return Shape(
        first=span.first,
        last=span.last,
        stride=stride,
        slices=tuple(Slice(**row | {name: int(row[name]) for name in _SUMMED}) for row in map(dict, slices)),
        costs={row.bucket: row.documents for row in costs},
        confidences=tuple(Sureness(**row) for row in confidences),
        threshold=span.threshold,
    )
