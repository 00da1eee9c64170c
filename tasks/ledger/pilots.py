"""What the ledger says of a pilot: both answers of each of its documents, and what they cost."""

from __future__ import annotations

from sqlalchemy import RowMapping, text

from schemas.attempts import RunId
from schemas.jobs import Job
from schemas.money import Currency
from schemas.pilots import Pair, Pilot
from tasks.ledger.connection import Ledger

#: Both answers of each document, in this run or in the one whose result it reuses. Of several first answers, as of a
#: repair, the last one that is valid counts. Priming was paid once for all, and is nobody's cost. Where a cost is not
#: known, it is null for the tier.
_PAIRS = text("""
    SELECT d.document_no, f.answer AS first, f.confidence, f.is_repaired, f.hit + f.miss AS prompt_tokens,
           f.output AS output_tokens, f.reasoning AS reasoning_tokens, l.answer AS last,
           c.first_pico, c.last_pico, t.label IS NOT NULL AS has_label,
           coalesce(f.answer ->> :measure = t.label, false) AS is_first_right,
           coalesce(l.answer ->> :measure = t.label, false) AS is_last_right
    FROM document d
    CROSS JOIN LATERAL (SELECT coalesce(d.of_run_id, d.run_id) AS run_id,
                               coalesce(d.of_document_no, d.document_no) AS document_no) s
    LEFT JOIN label t ON t.run_id = d.run_id AND t.document_no = d.document_no
    LEFT JOIN document l ON l.run_id = s.run_id AND l.document_no = s.document_no AND l.state = 'result'
                        AND l.tier = :last_tier
    LEFT JOIN LATERAL (
        SELECT x.answer, x.confidence, a.hit, a.miss, a.output, a.reasoning,
               EXISTS (SELECT FROM attempt r WHERE r.run_id = s.run_id AND r.document_no = s.document_no
                       AND r.tier = :first_tier AND r.purpose = 'repair') AS is_repaired
        FROM answer x JOIN attempt a USING (run_id, document_no, attempt_no)
        WHERE x.run_id = s.run_id AND x.document_no = s.document_no AND a.tier = :first_tier AND x.answer IS NOT NULL
        ORDER BY x.attempt_no DESC LIMIT 1
    ) f ON true
    CROSS JOIN LATERAL (
        SELECT CASE WHEN bool_and(billing = 'known') FILTER (WHERE tier = :first_tier)
                    THEN sum(cost_pico) FILTER (WHERE tier = :first_tier) END AS first_pico,
               CASE WHEN bool_and(billing = 'known') FILTER (WHERE tier = :last_tier)
                    THEN sum(cost_pico) FILTER (WHERE tier = :last_tier) END AS last_pico
        FROM attempt WHERE run_id = s.run_id AND document_no = s.document_no AND purpose <> 'priming'
    ) c
    WHERE d.run_id = :run_id ORDER BY d.document_no
""")

_PAID = text("SELECT cost_pico + unknown_pico AS paid, currency, is_simulated FROM run_cost WHERE run_id = :run_id")


async def find_pilot(ledger: Ledger, run_id: RunId, job: Job, documents: int) -> Pilot:
    """What the documents of a pilot, drawn of so many, were answered. Its run is done."""
    key = {
        "run_id": run_id,
        "first_tier": job.ladder[0].name,
        "last_tier": job.ladder[-1].name,
        "measure": job.measure or "",
    }
    async with ledger.transaction() as connection:
        rows = (await connection.execute(_PAIRS, key)).mappings().all()
        paid = (await connection.execute(_PAID, {"run_id": run_id})).one()
    return Pilot(
        run_id, tuple(map(_pair, rows)), documents, int(paid.paid), Currency(paid.currency), paid.is_simulated
    )


def _pair(row: RowMapping) -> Pair:
    has_label = row["has_label"]
    return Pair(
        first=row["first"],
        last=row["last"],
        confidence=row["confidence"],
        is_repaired=bool(row["is_repaired"]),
        prompt_tokens=row["prompt_tokens"],
        output_tokens=row["output_tokens"],
        reasoning_tokens=row["reasoning_tokens"],
        first_pico=None if row["first_pico"] is None else int(row["first_pico"]),
        last_pico=None if row["last_pico"] is None else int(row["last_pico"]),
        is_first_right=row["is_first_right"] if has_label else None,
        is_last_right=row["is_last_right"] if has_label else None,
    )
