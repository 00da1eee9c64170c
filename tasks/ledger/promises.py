"""Whether a run kept its promise by the rule: its certificate, recomputed from the ledger's rows (G18).

The order is made again from what was held, the sample from its seed, the disagreements from the answers, the cut from
these. A certificate is about the models that it was made with: one tier that two models served voids it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.agreement import Agreement
from schemas.certificates import Subject, check
from schemas.promises import draw
from tasks.ledger.certification import (
    BY_RANK,
    SERVED,
    Certification,
    compute_order,
    find_disagreements,
    read_certification,
)

SAYS = "the certificate follows from its order, seed and sample, and what was accepted is what it allows"
#: Rows that break it, in words that name them. Parameters: `run_id`, `salt`, `last_tier`.
BROKEN = (
    """
    SELECT format('document %s.%s: keeps its first answer, and %s', d.run_id, d.document_no,
                  CASE WHEN k.rank IS NULL THEN 'has no place in the order'
                       WHEN c.cut IS NULL THEN 'nothing is certified'
                       WHEN k.is_sampled THEN 'was drawn'
                       WHEN k.rank >= c.cut THEN format('its rank %s is not above the cut at %s', k.rank, c.cut)
                       ELSE 'another one was certified' END)
    FROM document d
    LEFT JOIN document s ON d.state = 'reused' AND s.run_id = d.of_run_id AND s.document_no = d.of_document_no
    LEFT JOIN held h ON h.run_id = d.run_id AND h.document_no = d.document_no
    LEFT JOIN ranked k ON k.run_id = d.run_id AND k.document_no = d.document_no
    LEFT JOIN certified c ON c.run_id = d.run_id
    WHERE d.run_id = :run_id AND d.state IN ('result', 'reused') AND coalesce(d.tier, s.tier) <> :last_tier
      AND (k.rank IS NULL OR c.cut IS NULL OR k.is_sampled OR k.rank >= c.cut
           OR (d.attempt_no, d.of_run_id, d.of_document_no) IS DISTINCT FROM
              (h.attempt_no, h.of_run_id, h.of_document_no))
    """,
    f"""
    SELECT format('ranked %s.%s: has rank %s, and its confidence says %s', run_id, document_no, rank, due)
    FROM (SELECT k.run_id, k.document_no, k.rank, row_number() OVER (ORDER BY {BY_RANK}) - 1 AS due
          FROM ranked k LEFT JOIN held USING (run_id, document_no) WHERE k.run_id = :run_id) r
    WHERE rank <> due
    """,  # noqa: S608 (made of our own constants)
    """
    SELECT format('held %s.%s: has no place in the order, and did not end before that', h.run_id, h.document_no)
    FROM held h
    JOIN frozen_order f USING (run_id)
    LEFT JOIN ranked k USING (run_id, document_no)
    LEFT JOIN document d USING (run_id, document_no)
    WHERE h.run_id = :run_id AND k.rank IS NULL AND d.state IS DISTINCT FROM 'dead_letter'
    """,
    """
    SELECT format('ranked %s.%s: no answer was held for it', k.run_id, k.document_no)
    FROM ranked k LEFT JOIN held h USING (run_id, document_no)
    WHERE k.run_id = :run_id AND h.run_id IS NULL
    """,
    """
    SELECT format('attempt_intent %s.%s.%s: intended before %s', i.run_id, i.document_no, i.attempt_no,
                  CASE i.reason WHEN 'certified_sample' THEN 'the order was frozen' ELSE 'the run was certified' END)
    FROM attempt_intent i
    LEFT JOIN frozen_order f USING (run_id)
    LEFT JOIN certified c USING (run_id)
    WHERE i.run_id = :run_id AND i.purpose IN ('answer', 'priming') AND CASE i.reason
        WHEN 'certified_sample' THEN f.run_id IS NULL OR i.intended_at < f.frozen_at AND age(i.xmin) > age(f.xmin)
        WHEN 'not_certified' THEN c.run_id IS NULL OR i.intended_at < c.certified_at AND age(i.xmin) > age(c.xmin)
        ELSE false END
    """,
)

_ORDER = text(f"""
    SELECT k.document_no FROM ranked k JOIN held USING (run_id, document_no)
    WHERE k.run_id = :run_id ORDER BY {BY_RANK}
""")  # noqa: S608 (made of our own constants)

#: Documents with an answer and no place in the order. None comes once it is frozen: what waits then has a place.
_PILOTED = text("""
    SELECT count(*) FROM document d LEFT JOIN ranked k USING (run_id, document_no)
    WHERE d.run_id = :run_id AND d.state IN ('result', 'reused') AND k.rank IS NULL
""")
_RANKED = text("SELECT count(*) FROM ranked WHERE run_id = :run_id")
_SAMPLED = text("SELECT rank FROM ranked WHERE run_id = :run_id AND is_sampled ORDER BY rank")
_PURGED = text("""
    SELECT count(*) FROM ranked k JOIN held h USING (run_id, document_no)
    LEFT JOIN answer a ON a.run_id = h.run_id AND a.document_no = h.document_no AND a.attempt_no = h.attempt_no
    LEFT JOIN document e ON e.run_id = h.of_run_id AND e.document_no = h.of_document_no
    LEFT JOIN document d ON d.run_id = k.run_id AND d.document_no = k.document_no
    WHERE k.run_id = :run_id AND k.is_sampled
      AND (coalesce(a.answer, e.answer) IS NULL OR d.state = 'result' AND d.answer IS NULL)
""")


async def count_ranked(connection: AsyncConnection, run_id: int) -> int:
    """The documents that the certificate decides about."""
    return int((await connection.execute(_RANKED, {"run_id": run_id})).scalar_one())


async def find_broken(connection: AsyncConnection, run_id: int, run: Row[Any]) -> AsyncIterator[str]:
    """What of the run's certificate does not follow from its rows, besides `BROKEN`: before it is frozen, nothing."""
    found = await read_certification(connection, run_id)
    if found is None:
        return
    for what in [
        *await _check_order(connection, run_id, found),
        *await _check_certificate(connection, run_id, run, found),
    ]:
        yield f"certificate {run_id}: {what}"


async def find_salt(connection: AsyncConnection, run_id: int) -> bytes:
    """What orders ties in the run; nothing before there is an order."""
    found = await read_certification(connection, run_id)
    return b"" if found is None else found.salt


async def _check_order(connection: AsyncConnection, run_id: int, found: Certification) -> list[str]:
    planned, broken = found.planned, list[str]()
    ranked = await count_ranked(connection, run_id)
    if ranked != planned.population:
        broken.append(f"{ranked} documents have a place in the order, and it was planned for {planned.population}")
    piloted = (await connection.execute(_PILOTED, {"run_id": run_id})).scalar_one()
    if piloted != planned.piloted:
        broken.append(f"{piloted} documents without a place have an answer, and it was planned for {planned.piloted}")
    due = draw(found.seed, planned.population, planned.size)
    if tuple((await connection.execute(_SAMPLED, {"run_id": run_id})).scalars()) != due:
        broken.append("its sample is not the one that the seed draws")
    return broken


async def _check_certificate(
    connection: AsyncConnection, run_id: int, run: Row[Any], found: Certification
) -> list[str]:
    order = await compute_order(connection, _ORDER, {"run_id": run_id, "salt": found.salt})
    certificate = found.certificate
    if certificate is None:
        return [] if order == found.order else [f"the order is {order}, and {found.order} was frozen"]
    subject = Subject(tuple(tier["model"] for tier in run.ladder), run.prompt_version)
    broken = check(certificate, order, subject)
    if not (await connection.execute(_PURGED, {"run_id": run_id})).scalar_one():
        agreement = Agreement.from_json(run.policy["match"])
        answers = await find_disagreements(connection, run_id, agreement, run.policy["ladder"][-1])
        if answers != certificate.findings:
            broken.append("its disagreements are not those of the answers")
    served = {tier: models for tier, models in await connection.execute(SERVED, {"run_id": run_id})}
    return [*broken, *_find_void(served)]


def _find_void(served: dict[str, list[str]]) -> Iterator[str]:
    for tier, models in sorted(served.items()):
        if len(models) > 1:
            yield f"void: {tier} was served by {' and '.join(models)}, and a promise is about one; start a new run"
