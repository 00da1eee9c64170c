"""A run's attempts as `farthing whatif` prices them again: added up by Postgres, read from the auditor's views."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.errors import ConfigurationError
from schemas.money import Currency
from schemas.pricing import PriceBook
from schemas.whatif import Group, Past, RunTier
from tasks.ledger.breakdowns import hashed
from tasks.ledger.connection import Ledger
from tasks.ledger.spend import SNAPSHOT

_RUN = text("""
    SELECT job, currency, is_simulated, ladder, models, escalates_below FROM run_overview WHERE run_id = :run
""")

#: Where each document stands: on the rung of the first answer that is sure enough, else the highest that it got to.
#: One whose accepted answer is not sure enough would climb on. An answer that was held, or that a pilot went on from,
#: counts by its confidence, too. Only what was done up to where it stands is priced.
_STANDING = """
    SELECT document_no, least(top, enough) AS reached,
           enough IS NULL AND is_unsure AND top < cardinality(CAST(:ladder AS text[])) - 1 AS climbs
    FROM (
        SELECT a.document_no, max(array_position(CAST(:ladder AS text[]), a.tier) - 1) AS top,
               min(array_position(CAST(:ladder AS text[]), a.tier) - 1)
                   FILTER (WHERE a.verdict IN ('low_confidence', 'held', 'calibration')
                           AND coalesce(c.confidence >= :below, a.verdict <> 'low_confidence')) AS enough,
               bool_or(a.verdict IN ('accepted', 'held') AND coalesce(c.confidence < :below, false)) AS is_unsure
        FROM attempt a LEFT JOIN answer_confidence c USING (run_id, document_no, attempt_no)
        WHERE a.run_id = :run GROUP BY a.document_no
    ) weighed
"""
#: The same where nobody asks about a threshold.
_STOOD = """
    SELECT document_no, max(array_position(CAST(:ladder AS text[]), tier) - 1) AS reached, false AS climbs
    FROM attempt WHERE run_id = :run GROUP BY document_no
"""

#: Prices change on whole minutes, and with the length of a prompt only at `steps`.
_GROUPS = """
    SELECT rung, reached, climbs, model, minute, step, reserved_by, sum(entered) AS documents, sum(hit) AS hit,
           sum(miss) AS miss, sum(output) AS output, sum(cost_pico) AS cost_pico, sum(unknown_pico) AS unknown_pico
    FROM (
        SELECT array_position(CAST(:ladder AS text[]), a.tier) - 1 AS rung, s.reached, s.climbs,
               coalesce(a.served_model, split_part(a.reserved_price, '/', 1)) AS model,
               date_trunc('minute', coalesce(a.completed_at, a.intended_at)) AS minute,
               width_bucket(coalesce(a.hit::bigint + a.miss, 0), CAST(:steps AS bigint[])) AS step,
               a.reserved_price AS reserved_by, (a.purpose IN ('answer', 'priming'))::int AS entered,
               CASE billing WHEN 'known' THEN coalesce(a.hit, 0) ELSE 0 END AS hit,
               CASE billing WHEN 'known' THEN coalesce(a.miss, 0) ELSE 0 END AS miss,
               CASE billing WHEN 'known' THEN coalesce(a.output, 0) ELSE 0 END AS output,
               coalesce(a.cost_pico, 0) AS cost_pico, a.unknown_pico
        FROM attempt a JOIN ({standing}) s USING (document_no) WHERE a.run_id = :run
    ) made
    WHERE rung <= reached GROUP BY rung, reached, climbs, model, minute, step, reserved_by
"""
_WITH_THRESHOLD = text(_GROUPS.format(standing=_STANDING))
_AS_IT_WAS = text(_GROUPS.format(standing=_STOOD))


async def find_past(ledger: Ledger, run_id: int, book: PriceBook, below: Decimal | None = None) -> Past:
    """What a run did, as a threshold of `below` would have let it. Raises ConfigurationError for a run not there."""
    async with ledger.transaction() as connection:
        await connection.execute(SNAPSHOT)
        run = (await connection.execute(_RUN, {"run": run_id})).one_or_none()
        if run is None:
            raise ConfigurationError(f"there is no run {run_id}: `farthing audit` lists the runs of this ledger")
        # None of its own is asked about: then nobody stands elsewhere than in fact.
        wanted = None if below is None or below == run.escalates_below else below
        steps = sorted({price.above_tokens + 1 for price in book.rows() if price.above_tokens})
        key = {"run": run_id, "ladder": run.ladder, "steps": steps}
        async with hashed(connection):
            rows = await _read_groups(connection, key, wanted)
    return Past(
        run=run_id,
        job=run.job,
        currency=Currency(run.currency),
        is_simulated=run.is_simulated,
        tiers=tuple(RunTier(name, model) for name, model in zip(run.ladder, run.models, strict=True)),
        cost_pico=sum(int(row.cost_pico) for row in rows),
        unknown_pico=sum(int(row.unknown_pico) for row in rows),
        groups=tuple(_group(row, steps) for row in rows),
        below=wanted,
    )


async def _read_groups(connection: AsyncConnection, key: dict[str, Any], below: Decimal | None) -> Sequence[Row[Any]]:
    if below is None:
        return (await connection.execute(_AS_IT_WAS, key)).all()
    return (await connection.execute(_WITH_THRESHOLD, key | {"below": float(below)})).all()


def _group(row: Row[Any], steps: Sequence[int]) -> Group:
    return Group(
        rung=row.rung,
        reached=row.reached,
        climbs=row.climbs,
        model=row.model,
        minute=row.minute,
        prompt_tokens=steps[row.step - 1] if row.step else 0,
        reserved_by=row.reserved_by,
        documents=int(row.documents),
        hit=int(row.hit),
        miss=int(row.miss),
        output=int(row.output),
        unknown_pico=int(row.unknown_pico),
    )
