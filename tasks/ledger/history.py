"""What the ledger says about a job's next run, for an estimate: by earlier ones, or by a sample."""

from __future__ import annotations

from itertools import groupby

from sqlalchemy import RowMapping, text

from schemas.attempts import RunId
from schemas.estimates import History, PastRun, PastTier
from schemas.jobs import Job
from schemas.projections import Call, Polled
from schemas.samples import Sample
from tasks.ledger.connection import Ledger
from tasks.ledger.runs import Opening, identify

#: How many of the job's newest runs count.
RUNS = 5

#: The newest runs that were billed: those of this prompt before others, and those that are done before others. A
#: sample is left out: it has more long documents than there are.
_RECENT = """
    WITH known AS (
        SELECT o.run_id, o.prompt_version = :prompt_version AS is_same, o.state = 'done' AS is_done,
               (o.selection ->> 'limit')::bigint AS first_only,
               bool_or(o.prompt_version = :prompt_version) OVER () AS any_same,
               bool_or(o.state = 'done') OVER (PARTITION BY o.prompt_version = :prompt_version) AS any_done
        FROM run_overview o JOIN run_cost c USING (run_id)
        WHERE o.job = :job AND o.is_simulated = :is_simulated AND o.selection -> 'sample' IS NULL
          AND c.hit_tokens + c.miss_tokens > 0
    ), recent AS (
        SELECT run_id, is_same, is_done, first_only FROM known
        WHERE is_same = any_same AND is_done = any_done ORDER BY run_id DESC LIMIT :runs
    )
"""

_TIERS = text(f"""
    {_RECENT}
    SELECT a.run_id, r.is_same, r.is_done, r.first_only, a.tier,
           count(*) AS attempts,
           coalesce(avg(a.hit) FILTER (WHERE a.purpose <> 'priming'), avg(a.hit)) AS hit,
           coalesce(avg(a.miss) FILTER (WHERE a.purpose <> 'priming'), avg(a.miss)) AS miss,
           avg(a.output) AS output,
           avg(extract(epoch FROM a.completed_at - a.sent_at)) AS seconds
    FROM attempt a JOIN recent r USING (run_id)
    WHERE a.hit IS NOT NULL OR a.unknown_pico > 0
    GROUP BY a.run_id, r.is_same, r.is_done, r.first_only, a.tier
    HAVING count(a.hit) > 0
    ORDER BY a.run_id DESC
""")  # noqa: S608 (made of our own constants)

#: Of the documents that cost something, unless all are free, as at a price of nothing.
_SPREAD = text(f"""
    {_RECENT}
    SELECT run_id, coalesce(nullif(count(*) FILTER (WHERE is_paid), 0), count(*)) AS documents,
           var_samp(cost_pico) FILTER (WHERE is_paid) / nullif(avg(cost_pico) FILTER (WHERE is_paid), 0) ^ 2
               AS squared_spread
    FROM (SELECT *, cost_pico + unknown_pico > 0 AS is_paid FROM document_spend JOIN recent USING (run_id)) spent
    GROUP BY run_id
""")  # noqa: S608 (made of our own constants)

_SAMPLE = text("""
    SELECT run_id FROM run
    WHERE job = :job AND selection = CAST(:selection AS jsonb) AND state = 'done'
      AND prompt_version = :prompt_version AND policy = CAST(:policy AS jsonb)
      AND manifest_digest = :manifest_digest AND currency = :currency AND is_simulated = :is_simulated
    ORDER BY run_id DESC LIMIT 1
""")

#: The attempts behind each document, in this run or in the one whose answer it reuses.
_CALLS = text("""
    SELECT d.document_no, a.tier, a.purpose = 'priming' AS is_priming, coalesce(a.hit, 0) AS hit,
           coalesce(a.miss, 0) AS miss, coalesce(a.output, 0) AS output, a.unknown_pico,
           coalesce(extract(epoch FROM a.completed_at - a.sent_at) * 1000, 0)::bigint AS milliseconds
    FROM document d JOIN attempt a ON a.run_id = coalesce(d.of_run_id, d.run_id)
         AND a.document_no = coalesce(d.of_document_no, d.document_no)
    WHERE d.run_id = :run_id AND (a.hit IS NOT NULL OR a.unknown_pico > 0)
    ORDER BY d.document_no, a.attempt_no
""")

_PAID = text("SELECT cost_pico + unknown_pico AS paid, is_simulated FROM run_cost WHERE run_id = :run_id")


async def find_history(ledger: Ledger, job: Job, *, is_simulated: bool) -> History | None:
    """The job's last runs that were billed, simulated ones apart from real ones. None where there are none."""
    key = {
        "job": job.name,
        "prompt_version": job.prompt_version,
        "is_simulated": is_simulated,
        "runs": RUNS,
    }
    async with ledger.transaction() as connection:
        rows = (await connection.execute(_TIERS, key)).mappings().all()
        spreads = {row["run_id"]: row for row in (await connection.execute(_SPREAD, key)).mappings()}
    if not rows:
        return None
    runs = tuple(
        _past_run(spreads[run_id], list(mine)) for run_id, mine in groupby(rows, key=lambda row: row["run_id"])
    )
    return History(
        runs,
        is_simulated,
        is_partial=not rows[0]["is_done"],
        is_of_other_prompt=not rows[0]["is_same"],
    )


def _past_run(spread: RowMapping, tiers: list[RowMapping]) -> PastRun:
    return PastRun(
        spread["documents"],
        tuple(map(_past_tier, tiers)),
        squared_spread=float(spread["squared_spread"] or 0),
        limit=tiers[0]["first_only"],
    )


def _past_tier(row: RowMapping) -> PastTier:
    attempts = row["attempts"]
    hit, miss, output, seconds = (round(attempts * (row[name] or 0)) for name in ("hit", "miss", "output", "seconds"))
    return PastTier(row["tier"], attempts, hit, miss, output, seconds)


async def find_sample(ledger: Ledger, opening: Opening) -> RunId | None:
    """The newest run that has asked these very documents and is done. None: there is none."""
    async with ledger.transaction() as connection:
        return (await connection.execute(_SAMPLE, identify(opening))).scalar_one_or_none()


async def find_polled(ledger: Ledger, run_id: RunId, sample: Sample) -> Polled:
    """What the documents of a sample took, by the run that asked them, which is done."""
    async with ledger.transaction() as connection:
        rows = (await connection.execute(_CALLS, {"run_id": run_id})).mappings().all()
        paid = (await connection.execute(_PAID, {"run_id": run_id})).one()
    calls: list[list[Call]] = [[] for _ in sample.drawn]
    for row in rows:
        fields = dict(row)
        calls[fields.pop("document_no")].append(Call(**fields))
    return Polled(sample, tuple(map(tuple, calls)), run_id, int(paid.paid), paid.is_simulated)
