"""What the ledger says about a job's next run, for an estimate: by earlier ones, or by a sample.

Of earlier runs that are done it reads stored sums, in place of their rows.
"""

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
        FROM run_overview o
        WHERE o.job = :job AND o.is_simulated = :is_simulated AND o.selection -> 'sample' IS NULL
          AND EXISTS (SELECT FROM lane_progress l WHERE l.run_id = o.run_id AND l.hit_tokens + l.miss_tokens > 0)
    ), recent AS (
        SELECT run_id, is_same, is_done, first_only FROM known
        WHERE is_same = any_same AND is_done = any_done ORDER BY run_id DESC LIMIT :runs
    )
"""

#: An attempt that has tokens was booked by a price; one that may have been billed counts like those. Priming pays for
#: tokens that later attempts have from the cache, so it tells of their number only where there are no others.
_TIERS = text(f"""
    {_RECENT}
    SELECT s.run_id, s.is_same, s.is_done, s.first_only, s.tier, s.attempts,
           coalesce(s.hit / nullif(s.plain, 0), s.all_hit / s.told) AS hit,
           coalesce(s.miss / nullif(s.plain, 0), s.all_miss / s.told) AS miss,
           s.output / s.told AS output,
           w.waited_us / 1000000.0 / nullif(w.attempts, 0) AS seconds
    FROM (
        SELECT r.run_id, r.is_same, r.is_done, r.first_only, x.tier,
               sum(x.attempts) FILTER (WHERE x.band IS NOT NULL OR x.billing <> 'known') AS attempts,
               sum(x.attempts) FILTER (WHERE x.band IS NOT NULL) AS told,
               sum(x.attempts) FILTER (WHERE x.band IS NOT NULL AND x.purpose <> 'priming') AS plain,
               sum(x.hit_tokens) FILTER (WHERE x.purpose <> 'priming') AS hit,
               sum(x.miss_tokens) FILTER (WHERE x.purpose <> 'priming') AS miss,
               sum(x.hit_tokens) AS all_hit, sum(x.miss_tokens) AS all_miss, sum(x.output_tokens) AS output
        FROM recent r CROSS JOIN LATERAL (SELECT * FROM spend v WHERE v.run_id = r.run_id OFFSET 0) x
        GROUP BY r.run_id, r.is_same, r.is_done, r.first_only, x.tier
    ) s
    LEFT JOIN LATERAL (SELECT * FROM tier_wait v WHERE v.run_id = s.run_id AND v.tier = s.tier OFFSET 0) w ON true
    WHERE s.told > 0
    ORDER BY s.run_id DESC
""")  # noqa: S608 (made of our own constants)

#: Of the documents that cost something, unless all are free, as at a price of nothing. Costs with the same first
#: three digits are one cost here.
_SPREAD = text(f"""
    {_RECENT}
    SELECT run_id, CASE WHEN paid > 0 THEN paid ELSE documents END AS documents,
           CASE WHEN paid > 1 THEN (squares - total * total / paid) / (paid - 1) / (total / paid) ^ 2 END
               AS squared_spread
    FROM (
        SELECT r.run_id, sum(x.documents) AS documents,
               coalesce(sum(x.documents) FILTER (WHERE x.at_most_pico > 0), 0) AS paid,
               sum(x.documents * x.at_most_pico::numeric) AS total,
               sum(x.documents * x.at_most_pico::numeric ^ 2) AS squares
        FROM recent r CROSS JOIN LATERAL (SELECT * FROM document_costs v WHERE v.run_id = r.run_id OFFSET 0) x
        GROUP BY r.run_id
    ) spent
""")  # noqa: S608 (made of our own constants)

#: A pilot compares answers, and so does a variant of a job. Where some were blanked since, as retention does, it is
#: asked anew.
_SAMPLE = text("""
    SELECT run_id FROM run
    WHERE job = :job AND selection = CAST(:selection AS jsonb) AND state = 'done'
      AND prompt_version = :prompt_version AND policy = CAST(:policy AS jsonb)
      AND manifest_digest = :manifest_digest AND currency = :currency AND is_simulated = :is_simulated
      AND NOT (:compares_answers AND EXISTS (
          SELECT FROM document d JOIN document s ON s.run_id = coalesce(d.of_run_id, d.run_id)
               AND s.document_no = coalesce(d.of_document_no, d.document_no)
          WHERE d.run_id = run.run_id AND s.state = 'result' AND s.answer IS NULL))
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
        int(spread["documents"]),
        tuple(map(_past_tier, tiers)),
        squared_spread=float(spread["squared_spread"] or 0),
        limit=tiers[0]["first_only"],
    )


def _past_tier(row: RowMapping) -> PastTier:
    attempts = int(row["attempts"])
    hit, miss, output, seconds = (round(attempts * (row[name] or 0)) for name in ("hit", "miss", "output", "seconds"))
    return PastTier(row["tier"], attempts, hit, miss, output, seconds)


async def find_sample(ledger: Ledger, opening: Opening) -> RunId | None:
    """The newest run that has asked these very documents and is done. None: there is none."""
    key = identify(opening) | {"compares_answers": bool({"pilot", "variant"} & opening.selection.keys())}
    async with ledger.transaction() as connection:
        return (await connection.execute(_SAMPLE, key)).scalar_one_or_none()


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
