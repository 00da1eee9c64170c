"""What the ledger says of variants of a job: what became of the sampled documents in each, and what they cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any

from sqlalchemy import RowMapping, text

from schemas.attempts import RunId
from schemas.comparisons import Result, Variant
from schemas.errors import ConfigurationError
from schemas.jobs import Job
from schemas.money import Currency
from tasks.ledger.connection import Ledger
from tasks.ledger.runs import Opening, find_run, identify

#: The documents of `sampled`, the run of the job as it stands, in another run: by their text, since an older run may
#: number them otherwise, and of several with one text by their id.
_FOUND = """
    WITH found AS MATERIALIZED (
        SELECT DISTINCT ON (d.document_no) d.document_no AS number, coalesce(o.of_run_id, o.run_id) AS run_id,
               coalesce(o.of_document_no, o.document_no) AS document_no
        FROM document d JOIN document o ON o.text_digest = d.text_digest
        WHERE d.run_id = :sampled AND o.run_id = :run_id AND o.state <> 'duplicate'
        ORDER BY d.document_no, o.document_id = d.document_id DESC, o.document_no
    )
"""

#: A result that was blanked since, as retention does, is not known.
_RESULTS = text(f"""
    {_FOUND}
    SELECT d.document_no, t.label IS NOT NULL AS has_label, s.answer, s.answer ->> :measure = t.label AS is_right,
           s.document_no IS NOT NULL AND (s.state <> 'result' OR s.answer IS NOT NULL) AS is_known
    FROM document d
    LEFT JOIN label t USING (run_id, document_no)
    LEFT JOIN found f ON f.number = d.document_no
    LEFT JOIN document s ON s.run_id = f.run_id AND s.document_no = f.document_no
    WHERE d.run_id = :sampled ORDER BY d.document_no
""")  # noqa: S608 (made of our own constants)

_CALLS = text(f"""
    {_FOUND}
    SELECT f.number, a.tier, a.purpose = 'priming' AS is_priming, a.hit, a.miss, a.cost_pico, a.sent_at,
           a.completed_at, a.band, p.miss_pico - p.hit_pico AS saved_pico
    FROM found f JOIN attempt a USING (run_id, document_no) LEFT JOIN price p ON p.name = a.price
    ORDER BY f.number, a.attempt_no
""")  # noqa: S608 (made of our own constants)

_PAID = text("SELECT cost_pico + unknown_pico AS paid FROM run_cost WHERE run_id = :run_id")

_SPENT = text("""
    SELECT coalesce(sum(c.cost_pico + c.unknown_pico), 0)::bigint FROM run r JOIN run_cost c USING (run_id)
    WHERE r.job = :job AND r.selection = CAST(:selection AS jsonb) AND r.prompt_version = :prompt_version
      AND r.policy = CAST(:policy AS jsonb) AND r.manifest_digest = :manifest_digest AND r.currency = :currency
      AND r.is_simulated = :is_simulated
""")

_SHARED = text("""
    SELECT count(DISTINCT text_digest) FROM document
    WHERE run_id = :run_id AND text_digest = ANY(:digests) AND state <> 'duplicate'
""")


async def find_spent(ledger: Ledger, opening: Opening) -> int:
    """What all runs of one variant on one sample have cost, with what may have been billed, in pico units."""
    async with ledger.transaction() as connection:
        return int((await connection.execute(_SPENT, identify(opening))).scalar_one())


async def find_shared_count(ledger: Ledger, run_id: RunId, digests: Sequence[bytes]) -> int:
    """Of these texts, how many a run has had to its end."""
    async with ledger.transaction() as connection:
        asked = {"run_id": run_id, "digests": list(digests)}
        return int((await connection.execute(_SHARED, asked)).scalar_one())


async def require_comparable(
    ledger: Ledger, run_id: RunId, job: Job, currency: Currency, *, is_simulated: bool
) -> None:
    """Raises ConfigurationError where that run is none to compare this job with."""
    run = await find_run(ledger, run_id)
    if run.job != job.name:
        raise ConfigurationError(
            f"--against: run {run_id} is of {run.job}, not of {job.name}; name one of {job.name}"
        )
    if run.is_simulated != is_simulated:
        raise ConfigurationError(f"--against: run {run_id} or this comparison is the sandbox's, the other is not")
    if run.currency is not currency:
        raise ConfigurationError(f"--against: run {run_id} was paid in {run.currency}; sums are never converted")


async def find_variant(ledger: Ledger, name: str, run_id: RunId, sampled: RunId, job: Job) -> Variant:
    """What the documents of the run `sampled` came to in another one, or in itself."""
    key = {"run_id": run_id, "sampled": sampled}
    async with ledger.transaction() as connection:
        rows = (await connection.execute(_RESULTS, key | {"measure": job.measure or ""})).mappings().all()
        calls = (await connection.execute(_CALLS, key)).mappings().all()
        paid = (await connection.execute(_PAID, {"run_id": run_id})).scalar_one()
    made: dict[int, list[RowMapping]] = defaultdict(list)
    for call in calls:
        made[call["number"]].append(call)
    usual = _usual_hits(calls)
    results = tuple(_result(row, made[row["document_no"]], usual) if row["is_known"] else None for row in rows)
    return Variant(name, run_id, results, int(paid), frozenset(call["band"] for call in calls if call["band"]))


def _usual_hits(calls: Sequence[RowMapping]) -> dict[str, int]:
    """By tier, the tokens that an attempt usually has from the cache."""
    hits: dict[str, list[int]] = defaultdict(list)
    for call in calls:
        if call["hit"] is not None and not call["is_priming"]:
            hits[call["tier"]].append(call["hit"])
    return {tier: median_low(found) for tier, found in hits.items()}


def _result(row: RowMapping, calls: Sequence[RowMapping], usual: Mapping[str, int]) -> Result:
    costs = [_warm_cost(call, usual) for call in calls]
    known = [cost for cost in costs if cost is not None]
    told = [call for call in calls if call["hit"] is not None and not call["is_priming"]]
    tokens = sum(call["hit"] + call["miss"] for call in told)
    return Result(
        answer=row["answer"],
        is_right=bool(row["is_right"]) if row["has_label"] else None,
        pico=sum(known) if known and len(known) == len(costs) else None,
        cached=sum(call["hit"] for call in told) / tokens if tokens else None,
        seconds=_seconds(calls),
    )


def _warm_cost(call: RowMapping, usual: Mapping[str, int]) -> int | None:
    """What the attempt cost; one that primed the cache, as if the prefix had been there: it is paid once."""
    cost: int | None = call["cost_pico"]
    if cost is None or not call["is_priming"] or call["hit"] is None:
        return cost
    warm = min(usual.get(call["tier"], 0), call["hit"] + call["miss"])
    return int(cost - max(0, warm - call["hit"]) * (call["saved_pico"] or 0))


def _seconds(calls: Sequence[RowMapping]) -> float | None:
    """From the first attempt that was sent to the last reply; None where nobody knows when one of them came."""
    times: list[tuple[Any, Any]] = [(call["sent_at"], call["completed_at"]) for call in calls]
    if not times or any(None in pair for pair in times) or any(call["is_priming"] for call in calls):
        return None
    first, last = min(sent for sent, _ in times), max(done for _, done in times)
    return float((last - first).total_seconds())
