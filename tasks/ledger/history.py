"""What a job's earlier runs say about the next one: mean tokens and attempts per tier, for an estimate."""

from __future__ import annotations

from sqlalchemy import text

from schemas.estimates import MILLION, History, TierTokens
from tasks.ledger.connection import Ledger

#: How many of the job's newest runs count.
RUNS = 5

_TIERS = text("""
    WITH recent AS (
        SELECT run_id, state FROM run_cost
        WHERE job = :job AND is_simulated = :is_simulated AND attempts > 0 ORDER BY run_id DESC LIMIT :runs
    )
    SELECT a.tier, count(*) AS attempts, ceil(avg(a.hit))::bigint AS hit, ceil(avg(a.miss))::bigint AS miss,
           ceil(avg(a.output))::bigint AS output, s.runs, s.documents,
           EXISTS (SELECT FROM recent WHERE state IN ('running', 'paused')) AS is_partial
    FROM attempt a
    JOIN recent USING (run_id)
    CROSS JOIN (
        SELECT count(DISTINCT run_id) AS runs, count(DISTINCT (run_id, document_no)) AS documents
        FROM attempt JOIN recent USING (run_id) WHERE hit IS NOT NULL
    ) s
    WHERE a.hit IS NOT NULL
    GROUP BY a.tier, s.runs, s.documents
""")


async def find_history(ledger: Ledger, job: str, *, is_simulated: bool) -> History | None:
    """The job's last runs that were billed, simulated ones apart from real ones. None where there are none."""
    async with ledger.transaction() as connection:
        key = {"job": job, "is_simulated": is_simulated, "runs": RUNS}
        rows = (await connection.execute(_TIERS, key)).all()
    if not rows:
        return None
    tiers = tuple(
        TierTokens(row.tier, row.hit, row.miss, row.output, -(-row.attempts * MILLION // row.documents))
        for row in rows
    )
    return History(rows[0].runs, rows[0].documents, is_simulated, tiers, rows[0].is_partial)
