"""Books that are read by their days, and what stays unknown by itself.

Why: reconciling read every attempt of the ledger, whatever days it was about. `attempt_outcome` is found by the UTC day
of its completion now, by an index of a few pages, since rows come in about that order. `unsettled` says what it said,
but goes out from what was declared unknown, from outcomes without a cost, which have an index, and from the lanes that
have not ended: only theirs can be open. And where a late reply shows that an export's sum was shared otherwise, what
the others' shares are off by is booked as a correction, a row of its own with tokens and a price: `closed_share` says
what they amount to. Sums of a run have the documents that waited longest, too, and how long each tier's attempts took;
a run that was summed before has none of the former, unless `document_wait` is asked. Nothing of a table changes for
code from before this migration, which runs on; but it locks `attempt_outcome` while it builds its indexes, minutes
where that is big, so pause runs first, or their lanes wait for it.
"""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"

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
    FROM (SELECT DISTINCT l.run_id FROM lane l WHERE l.ended_at IS NULL) l
    CROSS JOIN LATERAL (
        SELECT i.run_id, i.document_no, i.attempt_no
        FROM attempt_intent i
        LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
        LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
        WHERE i.run_id = l.run_id AND i.lane_id IN (SELECT lane_id FROM lane WHERE ended_at IS NULL)
          AND o.signal IS NULL AND u.bound IS NULL OFFSET 0) p
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

CORRECTIONS = """
ALTER TABLE cost_adjustment
    ADD COLUMN corrected_price_id integer REFERENCES price,
    DROP CONSTRAINT cost_adjustment_hit_check,
    DROP CONSTRAINT cost_adjustment_miss_check,
    DROP CONSTRAINT cost_adjustment_output_check;
ALTER TABLE cost_adjustment
    ADD CHECK (corrected_price_id IS NOT NULL OR least(hit, miss, output) >= 0),
    ADD CHECK (corrected_price_id IS NULL OR (num_nulls(hit, miss, output, billed_on) = 0
                                              AND num_nonnulls(document_no, attempt_no, price_id) = 0));
COMMENT ON COLUMN cost_adjustment.corrected_price_id IS 'Of a correction of what an export told: the price row that its
tokens, which may be negative, are times; null: of any other';
GRANT INSERT (corrected_price_id) ON cost_adjustment TO farthing_bookkeeper;

CREATE OR REPLACE VIEW booked WITH (security_barrier = true) AS
SELECT o.run_id, r.job, v.ladder -> 0 -> 'parameters' ->> 'user_id' AS user_id, r.currency, r.is_simulated,
       'reply' AS source, o.document_no, o.attempt_no::bigint AS row_no, (o.completed_at AT TIME ZONE 'UTC')::date AS day,
       p.name AS price, p.model, p.hit_pico, p.miss_pico, p.output_pico, o.hit, o.miss, o.output, o.cost AS cost_pico,
       o.recorded_at, NULL::timestamptz AS overridden_at
FROM attempt_outcome o
JOIN run r USING (run_id)
JOIN prompt_version v USING (prompt_version)
LEFT JOIN price p USING (price_id)
WHERE o.cost IS NOT NULL
UNION ALL
SELECT c.run_id, r.job, v.ladder -> 0 -> 'parameters' ->> 'user_id', r.currency, r.is_simulated,
       CASE WHEN c.price_id IS NULL THEN 'correction' ELSE 'export' END, coalesce(c.document_no, -1),
       CASE WHEN c.price_id IS NULL THEN c.adjustment_id ELSE c.attempt_no END,
       coalesce(c.billed_on, (c.adjusted_at AT TIME ZONE 'UTC')::date),
       p.name, p.model, p.hit_pico, p.miss_pico, p.output_pico, c.hit, c.miss, c.output, c.amount,
       c.adjusted_at, CASE WHEN c.price_id IS NOT NULL AND o.cost IS NOT NULL THEN o.recorded_at END
FROM cost_adjustment c
JOIN run r USING (run_id)
JOIN prompt_version v USING (prompt_version)
LEFT JOIN price p ON p.price_id = coalesce(c.price_id, c.corrected_price_id)
LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no);

CREATE VIEW closed_share WITH (security_barrier = true) AS
SELECT x.run_id, v.ladder -> 0 -> 'parameters' ->> 'user_id' AS user_id, r.currency, r.is_simulated, x.day,
       p.name AS price, sum(x.hit) AS hit, sum(x.miss) AS miss, sum(x.output) AS output, sum(x.bound) AS bound_pico,
       bool_or(x.is_overridden) AS is_overridden
FROM (
    SELECT c.run_id, c.billed_on AS day, c.price_id, c.hit * s.counts AS hit, c.miss * s.counts AS miss,
           c.output * s.counts AS output, coalesce(u.bound, i.reserved) * s.counts AS bound, s.counts = 0 AS is_overridden
    FROM cost_adjustment c
    JOIN attempt_intent i USING (run_id, document_no, attempt_no)
    LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
    LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
    CROSS JOIN LATERAL (SELECT (o.cost IS NULL)::int AS counts) s
    WHERE c.price_id IS NOT NULL
    UNION ALL
    SELECT c.run_id, c.billed_on, c.corrected_price_id, c.hit, c.miss, c.output, 0, false
    FROM cost_adjustment c WHERE c.corrected_price_id IS NOT NULL
) x
JOIN run r USING (run_id)
JOIN prompt_version v USING (prompt_version)
JOIN price p USING (price_id)
GROUP BY x.run_id, v.ladder -> 0 -> 'parameters' ->> 'user_id', r.currency, r.is_simulated, x.day, p.name;
GRANT SELECT ON closed_share TO farthing_lane, farthing_auditor, farthing_bookkeeper;
COMMENT ON VIEW closed_share IS 'What an export told of unknown attempts, by run, UTC day and price: what their shares amount
to with corrections, without those that a late reply overrode';
COMMENT ON COLUMN closed_share.run_id IS 'The run: one execution of a job';
COMMENT ON COLUMN closed_share.user_id IS 'What the provider tells usage apart by: one per job';
COMMENT ON COLUMN closed_share.currency IS 'USD or CNY; sums of two are never made';
COMMENT ON COLUMN closed_share.is_simulated IS 'Whether it is the sandbox''s: no real money';
COMMENT ON COLUMN closed_share.day IS 'The UTC day that it was billed';
COMMENT ON COLUMN closed_share.price IS 'The name of the price row';
COMMENT ON COLUMN closed_share.hit IS 'Prompt tokens that were in the provider''s cache';
COMMENT ON COLUMN closed_share.miss IS 'Prompt tokens that were not in the cache';
COMMENT ON COLUMN closed_share.output IS 'Tokens that the model wrote, reasoning included';
COMMENT ON COLUMN closed_share.bound_pico IS 'The most that those attempts can have cost which no reply has come of, in pico units';
COMMENT ON COLUMN closed_share.is_overridden IS 'Whether a late reply overrode one of the shares';
"""

#: Of the slowest documents of a run so many are kept.
SLOWEST = 50

# Both ends of each wait are on one clock.
WAITS = f"""
CREATE VIEW document_wait AS
SELECT i.run_id, i.document_no, count(*) AS attempts,
       (extract(epoch FROM sum(o.completed_at - o.sent_at)) * 1000000)::bigint AS waited_us
FROM attempt_intent i
LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
GROUP BY i.run_id, i.document_no HAVING count(o.completed_at) > 0;

CREATE VIEW tier_wait_by_rows AS
SELECT i.run_id, i.tier, count(*) AS attempts,
       (extract(epoch FROM sum(o.completed_at - o.sent_at)) * 1000000)::bigint AS waited_us
FROM attempt_intent i
JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
WHERE o.hit IS NOT NULL
GROUP BY i.run_id, i.tier;

ALTER TABLE run_sums ADD COLUMN slowest jsonb, ADD COLUMN waits jsonb;

CREATE OR REPLACE VIEW summed AS
SELECT s.run_id, s.late, s.spend, s.ended, s.cache_efficiency, s.off_peak_saving, s.escalation_yield, s.accuracy,
       s.cost_at_most, s.cost_documents, s.dearest, s.slowest, s.waits
FROM run_sums s WHERE s.late = (SELECT l.late FROM lateness l WHERE l.run_id = s.run_id);

CREATE VIEW slowest_document AS
SELECT s.run_id, x.document_no, x.attempts, x.waited_us
FROM summed s
CROSS JOIN LATERAL jsonb_to_recordset(s.slowest) AS x (document_no bigint, attempts bigint, waited_us bigint)
UNION ALL
SELECT u.run_id, x.document_no, x.attempts, x.waited_us
FROM unsummed u
CROSS JOIN LATERAL (SELECT * FROM document_wait v WHERE v.run_id = u.run_id
                    ORDER BY v.waited_us DESC, v.document_no LIMIT {SLOWEST}) x;

CREATE VIEW tier_wait AS
SELECT s.run_id, x.tier, x.attempts, x.waited_us
FROM summed s CROSS JOIN LATERAL jsonb_to_recordset(s.waits) AS x (tier text, attempts bigint, waited_us bigint)
UNION ALL
SELECT r.run_id, x.tier, x.attempts, x.waited_us
FROM run r
CROSS JOIN LATERAL (SELECT * FROM tier_wait_by_rows v WHERE v.run_id = r.run_id OFFSET 0) x
WHERE NOT EXISTS (SELECT FROM summed s WHERE s.run_id = r.run_id AND s.waits IS NOT NULL);

CREATE VIEW run_waits_by_rows AS
SELECT r.run_id,
       (SELECT coalesce(jsonb_agg(to_jsonb(x) - 'run_id' ORDER BY x.waited_us DESC, x.document_no), '[]')
        FROM (SELECT * FROM document_wait v WHERE v.run_id = r.run_id
              ORDER BY v.waited_us DESC, v.document_no LIMIT {SLOWEST}) x) AS slowest,
       (SELECT coalesce(jsonb_agg(to_jsonb(v) - 'run_id' ORDER BY v.tier), '[]')
        FROM tier_wait_by_rows v WHERE v.run_id = r.run_id) AS waits
FROM run r;

CREATE OR REPLACE FUNCTION sum_up(bigint) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET enable_nestloop = off AS $$
BEGIN
    IF EXISTS (SELECT FROM farthing.run r JOIN farthing.unsummed u USING (run_id) WHERE r.run_id = $1 AND r.state = 'done') THEN
        INSERT INTO farthing.run_sums (run_id, late, spend, ended, cache_efficiency, off_peak_saving, escalation_yield,
                                       accuracy, cost_at_most, cost_documents, dearest, slowest, waits)
        SELECT b.run_id, b.late, b.spend, b.ended, b.cache_efficiency, b.off_peak_saving, b.escalation_yield,
               b.accuracy, b.cost_at_most, b.cost_documents, b.dearest, w.slowest, w.waits
        FROM farthing.run_sums_by_rows b JOIN farthing.run_waits_by_rows w USING (run_id)
        WHERE b.run_id = $1 AND w.run_id = $1
        ON CONFLICT DO NOTHING;
    END IF;
END $$;

GRANT SELECT ON document_wait, tier_wait_by_rows, slowest_document, tier_wait, run_waits_by_rows
    TO farthing_lane, farthing_auditor;
COMMENT ON COLUMN run_sums.slowest IS 'The {SLOWEST} documents that waited longest; null: summed before that was kept';
COMMENT ON COLUMN run_sums.waits IS 'The run''s lines of tier_wait; null: read from the rows';
COMMENT ON COLUMN summed.slowest IS 'The {SLOWEST} documents that waited longest; null: summed before that was kept';
COMMENT ON COLUMN summed.waits IS 'The run''s lines of tier_wait; null: read from the rows';
COMMENT ON VIEW document_wait IS 'How long documents waited for replies, all attempts together';
COMMENT ON VIEW slowest_document IS 'The {SLOWEST} documents of each run that waited longest; document_wait has all. Of a run
that is done: as stored, and none where it was summed before that was';
COMMENT ON VIEW tier_wait IS 'How long attempts of a tier took that have tokens, together. Of a run that is done: as stored';
COMMENT ON VIEW tier_wait_by_rows IS 'tier_wait, added up from the rows';
COMMENT ON VIEW run_waits_by_rows IS 'What run_sums has of waits, added up from the rows';
COMMENT ON COLUMN run_waits_by_rows.run_id IS 'The run: one execution of a job';
COMMENT ON COLUMN run_waits_by_rows.slowest IS 'The {SLOWEST} documents that waited longest';
COMMENT ON COLUMN run_waits_by_rows.waits IS 'The run''s lines of tier_wait';
""" + "".join(
    f"COMMENT ON COLUMN {view}.{column} IS '{meaning}';"
    for view, key, key_meaning in (
        ("document_wait", "document_no", "The document, counted in the order of the input from 0"),
        ("slowest_document", "document_no", "The document, counted in the order of the input from 0"),
        ("tier_wait", "tier", "A step of the ladder"),
        ("tier_wait_by_rows", "tier", "A step of the ladder"),
    )
    for column, meaning in (
        ("run_id", "The run: one execution of a job"),
        (key, key_meaning),
        ("attempts", "How many attempts, which are HTTP requests"),
        ("waited_us", "From sending to the last byte, in microseconds"),
    )
)


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    for part in (INDEXES, UNSETTLED, CORRECTIONS, WAITS):
        op.execute(part)


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
