"""Books that are read by their days, and what stays unknown by itself.

Why: reconciling read every attempt of the ledger, whatever days it was about. `attempt_outcome` is found by the UTC day
of its completion now, by an index of a few pages, since rows come in about that order. `unsettled` says what it said,
but goes out from what was declared unknown, from outcomes without a cost, which have an index, and from the lanes that
have not ended: only theirs can be open. Nothing of a table changes for code from before this migration, which runs on.
"""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0011"

# Autovacuum adds what came to it, a megabyte of rows at a time; what it has not added yet is read.
INDEXES = """
CREATE INDEX attempt_outcome_by_day ON attempt_outcome USING brin (((completed_at AT TIME ZONE 'UTC')::date))
    WITH (autosummarize = on);
CREATE INDEX run_event_balance ON run_event (happened_at) WHERE kind = 'balance';
CREATE INDEX attempt_outcome_uncosted ON attempt_outcome (run_id) WHERE cost IS NULL;
"""

# OFFSET 0 keeps a subquery what it is: a probe by the whole key for each attempt that is left.
UNSETTLED = """
CREATE OR REPLACE VIEW unsettled WITH (security_barrier = true) AS
SELECT i.run_id, i.document_no, i.attempt_no, r.job, r.state, v.ladder -> 0 -> 'parameters' ->> 'user_id' AS user_id,
       r.currency, r.is_simulated, q.model, x.is_open, coalesce(x.bound, i.reserved) AS bound_pico,
       coalesce(x.completed_at, i.intended_at + coalesce(s.ahead, interval '0')) AS placed_at
FROM (
    SELECT u.run_id, u.document_no, u.attempt_no, false AS is_open, u.bound, o.completed_at, o.signal
    FROM attempt_unknown u
    LEFT JOIN LATERAL (SELECT o.signal, o.completed_at, o.cost FROM attempt_outcome o WHERE o.run_id = u.run_id
                       AND o.document_no = u.document_no AND o.attempt_no = u.attempt_no OFFSET 0) o ON true
    WHERE o.cost IS NULL
    UNION ALL
    SELECT o.run_id, o.document_no, o.attempt_no, false, NULL, o.completed_at, o.signal
    FROM attempt_outcome o
    WHERE o.cost IS NULL
      AND NOT EXISTS (SELECT FROM attempt_unknown u WHERE u.run_id = o.run_id AND u.document_no = o.document_no
                      AND u.attempt_no = o.attempt_no)
    UNION ALL
    SELECT p.run_id, p.document_no, p.attempt_no, true, NULL, NULL, NULL
    FROM lane l
    CROSS JOIN LATERAL (
        SELECT i.run_id, i.document_no, i.attempt_no
        FROM attempt_intent i
        LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
        LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
        WHERE i.run_id = l.run_id AND i.lane_id = l.lane_id AND o.signal IS NULL AND u.bound IS NULL OFFSET 0) p
    WHERE l.ended_at IS NULL
) x
CROSS JOIN LATERAL (SELECT i.* FROM attempt_intent i WHERE i.run_id = x.run_id AND i.document_no = x.document_no
                    AND i.attempt_no = x.attempt_no OFFSET 0) i
JOIN run r ON r.run_id = i.run_id
JOIN prompt_version v USING (prompt_version)
JOIN price q ON q.price_id = i.price_id
LEFT JOIN LATERAL (
    SELECT x.sent_at - y.intended_at AS ahead
    FROM attempt_outcome x JOIN attempt_intent y USING (run_id, document_no, attempt_no)
    WHERE x.run_id = i.run_id ORDER BY x.document_no, x.attempt_no LIMIT 1
) s ON x.signal IS NULL
WHERE NOT EXISTS (SELECT FROM cost_adjustment c WHERE c.run_id = i.run_id AND c.document_no = i.document_no
                  AND c.attempt_no = i.attempt_no AND c.price_id IS NOT NULL);
"""


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    for part in (INDEXES, UNSETTLED):
        op.execute(part)


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
