"""The digests that a run is settled with: one over its rows, one over its answers, which may be purged later.

Columns are named one by one, so that a column of a later version changes no digest, nor does a line that only runs
of a later version have; instants are seconds and
confidences their bytes, so that no setting of a server does. Each is hashed in buckets of 10,000 documents, since one
string of them all would pass Postgres's limit of 1 GB.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.attempts import RunId

_BUCKETS = """
    , bucket AS (
        SELECT kind, document_no / 10000 AS bucket,
               sha256(convert_to(string_agg(line, chr(10) ORDER BY document_no, attempt_no), 'UTF8')) AS digest
        FROM line GROUP BY kind, bucket
    )
    SELECT 'sha256:' || encode(sha256(coalesce(string_agg(digest, '' ORDER BY kind, bucket), '')), 'hex') FROM bucket
"""

#: The run as it was opened, its attempts, its documents and their shards; answers have a digest of their own. Grants,
#: prices and the manifest are proven by sums, by the price book and by the manifest's digest.
_ROWS = text(
    """
    WITH line AS (
        SELECT 0 AS kind, 0::bigint AS document_no, 0 AS attempt_no,
               ROW(r.job, r.policy, r.selection, r.manifest_digest, r.documents, r.compared_fields, r.currency,
                   r.budget_id, r.is_simulated, extract(epoch FROM r.opened_at),
                   extract(epoch FROM CAST(:until AS timestamptz)), b.currency, v.prompt_version,
                   v.prefix, v.answer_schema, v.ladder, extract(epoch FROM v.created_at))::text AS line
        FROM run r JOIN budget b USING (budget_id) JOIN prompt_version v USING (prompt_version)
        WHERE run_id = :run_id
        UNION ALL
        SELECT 1, document_no, attempt_no,
               ROW(document_no, attempt_no, tier, purpose, reason, shard_no, epoch, lane_id, grant_id, price_id,
                   reserved, extract(epoch FROM intended_at))::text
        FROM attempt_intent WHERE run_id = :run_id AND intended_at <= :until
        UNION ALL
        SELECT 2, document_no, attempt_no,
               ROW(document_no, attempt_no, signal, verdict, http_status, finish_reason, extract(epoch FROM sent_at),
                   extract(epoch FROM completed_at), hit, miss, output, reasoning, price_id, cost, served_model,
                   fingerprint, provider_id, detail, extract(epoch FROM recorded_at))::text
        FROM attempt_outcome WHERE run_id = :run_id AND recorded_at <= :until
        UNION ALL
        SELECT 3, document_no, attempt_no,
               ROW(document_no, attempt_no, bound, because, extract(epoch FROM declared_at))::text
        FROM attempt_unknown WHERE run_id = :run_id AND declared_at <= :until
        UNION ALL
        SELECT 4, document_no, 0,
               ROW(document_no, document_id, encode(text_digest, 'hex'), state, reason, tier, attempt_no,
                   encode(float8send(confidence), 'hex'), confidence_signal, of_run_id, of_document_no,
                   extract(epoch FROM recorded_at))::text
        FROM document WHERE run_id = :run_id AND recorded_at <= :until
        UNION ALL
        SELECT 5, document_no, attempt_no,
               ROW(document_no, attempt_no, encode(float8send(confidence), 'hex'), confidence_signal)::text
        FROM answer JOIN attempt_outcome USING (run_id, document_no, attempt_no)
        WHERE run_id = :run_id AND recorded_at <= :until
        UNION ALL
        SELECT 6, document_no, 0, ROW(document_no, of_document_no, is_same_text)::text
        FROM duplicate WHERE run_id = :run_id
        UNION ALL
        SELECT 7, document_no, 0, ROW(document_no, label)::text FROM label WHERE run_id = :run_id
        UNION ALL
        SELECT 8, file_no, 0, ROW(file_no, partition)::text FROM input_file WHERE run_id = :run_id
        UNION ALL
        SELECT 9, 0, 0, ROW(backfill_id, reuses)::text
        FROM run WHERE run_id = :run_id AND num_nonnulls(backfill_id, reuses) > 0
        UNION ALL
        SELECT 10, document_no, 0,
               ROW(document_no, attempt_no, encode(float8send(confidence), 'hex'), of_run_id, of_document_no,
                   extract(epoch FROM recorded_at))::text
        FROM held WHERE run_id = :run_id AND recorded_at <= :until
        UNION ALL
        SELECT 11, document_no, 0, ROW(document_no, rank, is_sampled)::text FROM ranked WHERE run_id = :run_id
        UNION ALL
        SELECT 12, 0, 0,
               ROW(f.documents, f.piloted, f.size, f.allowance, f.fields, encode(f.salt, 'hex'),
                   encode(f.seed, 'hex'), f.order_digest, extract(epoch FROM f.frozen_at), c.findings, c.cut,
                   encode(float8send(c.score_at_cut), 'hex'), c.tail, c.served,
                   extract(epoch FROM c.certified_at))::text
        FROM frozen_order f LEFT JOIN certified c USING (run_id) WHERE f.run_id = :run_id
    )"""  # noqa: S608 (made of our own constants)
    + _BUCKETS
)

_ANSWERS = text(
    """
    WITH line AS (
        SELECT 1 AS kind, document_no, 0 AS attempt_no, ROW(document_no, answer)::text AS line
        FROM document WHERE run_id = :run_id AND recorded_at <= :until
        UNION ALL
        SELECT 2, document_no, attempt_no, ROW(document_no, attempt_no, content, answer)::text
        FROM answer JOIN attempt_outcome USING (run_id, document_no, attempt_no)
        WHERE run_id = :run_id AND recorded_at <= :until
    )"""  # noqa: S608 (made of our own constants)
    + _BUCKETS
)

#: A result always had an answer; a stored answer that was never valid has only its content.
_PURGED = text("""
    SELECT (SELECT count(*) FROM document WHERE run_id = :run_id AND state = 'result' AND answer IS NULL)
         + (SELECT count(*) FROM answer WHERE run_id = :run_id AND content = '' AND answer IS NULL)
""")


async def compute_digest(connection: AsyncConnection, run_id: RunId, until: datetime) -> str:
    """`sha256:` over the run's rows that were written by `until`; later ones are late facts, not changes."""
    return str((await connection.execute(_ROWS, {"run_id": run_id, "until": until})).scalar_one())


async def compute_answers_digest(connection: AsyncConnection, run_id: RunId, until: datetime) -> str:
    """`sha256:` over what was answered by `until`, accepted or not. Another one once an answer was purged."""
    return str((await connection.execute(_ANSWERS, {"run_id": run_id, "until": until})).scalar_one())


async def count_purged(connection: AsyncConnection, run_id: RunId) -> int:
    """Answers of the run that are blank, as retention leaves them."""
    return int((await connection.execute(_PURGED, {"run_id": run_id})).scalar_one())
