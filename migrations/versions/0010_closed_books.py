"""What an export of the provider's console closes, and months whose books are closed.

Why: an unknown attempt is closed by a row of `cost_adjustment` that says, with its evidence, what the provider billed:
tokens of the three buckets times a price row, like any other cost. So it counts like one in every view, unless a reply
comes late, which knows better. A row without a price stays what it was, also one that
names an attempt, as was possible before: a correction beside the cost. `booked` is every
row of booked cost with the day it belongs to, `unsettled` what nobody knows the cost of. `month_close` keeps what a month
came to when it was closed. Who may write either is a role of its own, `farthing_bookkeeper`: a lane never corrects itself.
Code from before this migration runs on: it books no adjustment.
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"

TABLES = """
ALTER TABLE cost_adjustment
    ADD COLUMN price_id integer REFERENCES price,
    ADD COLUMN hit integer CHECK (hit >= 0),
    ADD COLUMN miss integer CHECK (miss >= 0),
    ADD COLUMN output integer CHECK (output >= 0),
    ADD COLUMN adjusted_by text;
ALTER TABLE cost_adjustment
    ALTER COLUMN adjusted_by SET DEFAULT session_user,
    ADD FOREIGN KEY (run_id, document_no, attempt_no) REFERENCES attempt_intent NOT VALID,
    ADD CHECK (num_nulls(document_no, attempt_no, price_id, hit, miss, output, billed_on) = 0
               OR num_nonnulls(attempt_no, price_id) = 0) NOT VALID;
DO $$
BEGIN -- not where a correction from before names an attempt, which no rule may stop now
    ALTER TABLE cost_adjustment VALIDATE CONSTRAINT cost_adjustment_check;
EXCEPTION WHEN check_violation THEN NULL;
END $$;
CREATE UNIQUE INDEX cost_adjustment_once ON cost_adjustment (run_id, document_no, attempt_no) WHERE price_id IS NOT NULL;
COMMENT ON TABLE cost_adjustment IS 'Booked cost that no reply told, with its evidence: rows are never edited. With a price: what
an unknown attempt was billed, tokens times a price row, once; a late reply overrides it. Without: a correction';
COMMENT ON COLUMN cost_adjustment.billed_on IS 'The UTC day that the provider billed it';
COMMENT ON COLUMN cost_adjustment.adjusted_by IS 'The login that wrote it; null: before that was kept';

CREATE TABLE month_close (
    month            date NOT NULL CHECK (extract(day FROM month) = 1),
    is_simulated     boolean NOT NULL,
    currency         text NOT NULL,
    attempts         bigint NOT NULL,
    cost             numeric NOT NULL,
    unknown_attempts bigint NOT NULL,
    unknown          numeric NOT NULL,
    runs             jsonb NOT NULL,
    digest           text NOT NULL,
    until            timestamptz NOT NULL,
    closed_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    closed_by        text NOT NULL DEFAULT session_user,
    PRIMARY KEY (month, is_simulated, currency)
);
COMMENT ON TABLE month_close IS 'What a UTC month came to when its books were closed, in pico units of one currency: booked rows,
their sum, the unknown and the most they can cost, the same by run, and a SHA-256 over all rows recorded by `until`';
"""

RIGHTS = """
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON month_close FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER append_only_all BEFORE TRUNCATE ON month_close FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
GRANT USAGE ON SCHEMA farthing TO farthing_bookkeeper;
GRANT SELECT ON ledger_version, price TO farthing_bookkeeper;
GRANT INSERT ON price TO farthing_bookkeeper;
GRANT INSERT (run_id, document_no, attempt_no, amount, evidence, billed_on, price_id, hit, miss, output)
    ON cost_adjustment TO farthing_bookkeeper;
GRANT INSERT (month, is_simulated, currency, attempts, cost, unknown_attempts, unknown, runs, digest, until)
    ON month_close TO farthing_bookkeeper;
"""

# Until it ends its transaction, nobody books cost: what is recorded by this instant is there for any later snapshot, and
# what is not has a later one. Lanes wait for it meanwhile, so it does not wait long itself.
QUIET = """
CREATE FUNCTION quiet_instant() RETURNS timestamptz LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM set_config('lock_timeout', '5s', true);
    LOCK TABLE farthing.attempt_outcome, farthing.cost_adjustment IN SHARE MODE;
    RETURN clock_timestamp();
END $$;
COMMENT ON FUNCTION quiet_instant() IS 'An instant at which nobody was writing booked cost. Ask in a transaction of its own';
REVOKE ALL ON FUNCTION quiet_instant() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION quiet_instant() TO farthing_bookkeeper;
"""

# Of an attempt without a known cost the adjustment counts. Its cost is then as known as any.
VIEWS = """
CREATE OR REPLACE VIEW attempt AS
SELECT i.run_id, i.document_no, i.attempt_no, r.job, r.currency, i.tier, i.purpose, i.reason, i.lane_id,
       i.grant_id, i.shard_no, i.epoch, i.reserved, i.intended_at, o.signal, o.verdict, o.http_status,
       o.finish_reason, o.sent_at, o.completed_at, coalesce(c.hit, o.hit) AS hit, coalesce(c.miss, o.miss) AS miss,
       coalesce(c.output, o.output) AS output, o.reasoning, o.served_model,
       o.fingerprint, o.provider_id, p.name AS price, p.band,
       CASE WHEN o.cost IS NOT NULL OR c.amount IS NOT NULL THEN 'known'
            WHEN o.signal IS NOT NULL OR u.bound IS NOT NULL THEN 'unknown'
            ELSE 'open' END AS billing,
       coalesce(o.cost, c.amount) AS cost_pico,
       CASE WHEN o.cost IS NULL AND c.amount IS NULL THEN coalesce(u.bound, i.reserved) ELSE 0 END AS unknown_pico,
       q.name AS reserved_price, c.billed_on, c.evidence
FROM attempt_intent i
JOIN run r USING (run_id)
LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
LEFT JOIN cost_adjustment c ON c.run_id = i.run_id AND c.document_no = i.document_no AND c.attempt_no = i.attempt_no
                           AND c.price_id IS NOT NULL AND o.cost IS NULL
LEFT JOIN price p ON p.price_id = coalesce(o.price_id, c.price_id)
LEFT JOIN price q ON q.price_id = i.price_id;
COMMENT ON VIEW attempt IS 'One row per HTTP request; unknown_pico is the most an unknown or open one can cost. With evidence:
an unknown one that an export closed; its tokens and cost are its share of what was billed on that day and not known';

CREATE OR REPLACE VIEW spend AS
SELECT i.run_id, r.job, r.currency,
       coalesce((o.completed_at AT TIME ZONE 'UTC')::date, c.billed_on, (i.intended_at AT TIME ZONE 'UTC')::date) AS day,
       i.tier, coalesce(o.served_model, q.model) AS model, i.purpose, p.band, o.signal, o.verdict,
       CASE WHEN o.cost IS NOT NULL OR c.amount IS NOT NULL THEN 'known'
            WHEN o.signal IS NOT NULL OR u.bound IS NOT NULL THEN 'unknown'
            ELSE 'open' END AS billing,
       count(*) AS attempts,
       count(*) FILTER (WHERE i.purpose IN ('answer', 'priming') AND i.reason IS NOT NULL) AS escalated,
       coalesce(sum(coalesce(c.hit, o.hit)), 0) AS hit_tokens, coalesce(sum(coalesce(c.miss, o.miss)), 0) AS miss_tokens,
       coalesce(sum(coalesce(c.output, o.output)), 0) AS output_tokens, coalesce(sum(o.reasoning), 0) AS reasoning_tokens,
       coalesce(sum(coalesce(o.cost, c.amount)), 0) AS cost_pico,
       coalesce(sum(coalesce(u.bound, i.reserved)) FILTER (WHERE o.cost IS NULL AND c.amount IS NULL), 0) AS unknown_pico,
       coalesce(sum(coalesce(c.hit, o.hit) * p.hit_pico), 0) AS hit_pico,
       coalesce(sum(coalesce(c.miss, o.miss) * p.miss_pico), 0) AS miss_pico,
       coalesce(sum(coalesce(c.output, o.output) * p.output_pico), 0) AS output_pico
FROM attempt_intent i
JOIN run r USING (run_id)
JOIN price q ON q.price_id = i.price_id
LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
LEFT JOIN cost_adjustment c ON c.run_id = i.run_id AND c.document_no = i.document_no AND c.attempt_no = i.attempt_no
                           AND c.price_id IS NOT NULL AND o.cost IS NULL
LEFT JOIN price p ON p.price_id = coalesce(o.price_id, c.price_id)
GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11;

CREATE OR REPLACE VIEW document_spend AS
SELECT i.run_id, i.document_no, count(*) AS attempts, coalesce(sum(coalesce(o.cost, c.amount)), 0)::bigint AS cost_pico,
       coalesce(sum(coalesce(u.bound, i.reserved)) FILTER (WHERE o.cost IS NULL AND c.amount IS NULL), 0)::bigint
           AS unknown_pico
FROM attempt_intent i
LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
LEFT JOIN cost_adjustment c ON c.run_id = i.run_id AND c.document_no = i.document_no AND c.attempt_no = i.attempt_no
                           AND c.price_id IS NOT NULL
GROUP BY i.run_id, i.document_no;

CREATE OR REPLACE VIEW escalation AS
SELECT e.run_id, r.job, r.currency, e.document_no, e.reason, e.tier AS to_tier, e.attempt_no, l.answer AS lower_answer,
       d.state, d.tier AS final_tier, d.answer AS final_answer, e.cost_pico, e.unknown_pico,
       d.state = 'result' AND d.tier = e.tier AS is_rescued,
       CASE WHEN l.answer IS NOT NULL AND d.answer IS NOT NULL THEN NOT EXISTS (
           SELECT FROM unnest(r.compared_fields) f WHERE l.answer -> f IS DISTINCT FROM d.answer -> f) END
           AS is_agreed,
       t.label IS NOT NULL AND l.answer ->> (r.policy ->> 'measure') = t.label AS was_right,
       t.label IS NOT NULL AND d.answer ->> (r.policy ->> 'measure') = t.label AS is_right,
       t.label IS NOT NULL AS has_label
FROM (
    SELECT i.run_id, i.document_no, i.attempt_no, i.tier, i.purpose, i.reason,
           coalesce(sum(coalesce(o.cost, c.amount)) OVER on_tier, 0) AS cost_pico,
           coalesce(sum(CASE WHEN o.cost IS NULL AND c.amount IS NULL THEN coalesce(u.bound, i.reserved) ELSE 0 END)
                    OVER on_tier, 0) AS unknown_pico
    FROM attempt_intent i
    JOIN run s USING (run_id)
    LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
    LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
    LEFT JOIN cost_adjustment c ON c.run_id = i.run_id AND c.document_no = i.document_no AND c.attempt_no = i.attempt_no
                           AND c.price_id IS NOT NULL
    WHERE i.tier <> s.policy -> 'ladder' ->> 0
    WINDOW on_tier AS (PARTITION BY i.run_id, i.document_no, i.tier)
) e
JOIN run r USING (run_id)
LEFT JOIN document d USING (run_id, document_no)
LEFT JOIN label t USING (run_id, document_no)
LEFT JOIN LATERAL (
    SELECT answer FROM answer x
    WHERE x.run_id = e.run_id AND x.document_no = e.document_no AND x.attempt_no < e.attempt_no
    ORDER BY x.attempt_no DESC LIMIT 1
) l ON true
WHERE e.purpose IN ('answer', 'priming') AND e.reason IS NOT NULL;

CREATE OR REPLACE VIEW job_cost_by_day AS
SELECT job, coalesce((completed_at AT TIME ZONE 'UTC')::date, billed_on) AS day, currency, band, tier, count(*) AS attempts,
       sum(cost_pico) AS cost_pico, sum(hit) AS hit_tokens, sum(miss) AS miss_tokens,
       sum(output) AS output_tokens
FROM attempt WHERE cost_pico > 0 GROUP BY job, day, currency, band, tier;

CREATE OR REPLACE VIEW run_cost AS
SELECT r.run_id, r.job, r.state, r.reason, r.currency, r.is_simulated, r.prompt_version, r.opened_at,
       r.finished_at, b.cap AS budget_pico, r.documents, d.results, d.reused, d.duplicates, d.dead_letters,
       coalesce(a.attempts, 0) AS attempts, coalesce(a.cost_pico, 0) AS cost_pico,
       coalesce(a.unknown_pico, 0) AS unknown_pico, coalesce(a.unknown_attempts, 0) AS unknown_attempts,
       coalesce(j.adjusted_pico, 0) AS adjusted_pico,
       coalesce(a.hit, 0) AS hit_tokens, coalesce(a.miss, 0) AS miss_tokens,
       coalesce(a.output, 0) AS output_tokens, coalesce(a.reasoning, 0) AS reasoning_tokens,
       coalesce(a.priming_pico, 0) AS priming_pico, coalesce(a.escalated, 0) AS escalated
FROM run r
JOIN budget b USING (budget_id)
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE state = 'result') AS results,
           count(*) FILTER (WHERE state = 'reused') AS reused,
           count(*) FILTER (WHERE state = 'duplicate') AS duplicates,
           count(*) FILTER (WHERE state = 'dead_letter') AS dead_letters
    FROM document WHERE run_id = r.run_id
) d
LEFT JOIN LATERAL (
    SELECT count(*) AS attempts, sum(cost_pico) AS cost_pico, sum(unknown_pico) AS unknown_pico,
           count(*) FILTER (WHERE billing <> 'known') AS unknown_attempts,
           sum(hit) AS hit, sum(miss) AS miss, sum(output) AS output, sum(reasoning) AS reasoning,
           sum(cost_pico) FILTER (WHERE purpose = 'priming') AS priming_pico,
           count(*) FILTER (WHERE purpose IN ('answer', 'priming') AND x.reason IS NOT NULL) AS escalated
    FROM attempt x WHERE x.run_id = r.run_id
) a ON true
LEFT JOIN LATERAL (
    SELECT sum(amount) AS adjusted_pico FROM cost_adjustment c WHERE c.run_id = r.run_id AND c.price_id IS NULL
) j ON true;

CREATE OR REPLACE VIEW run_overview AS
SELECT r.run_id, r.job, r.state, r.reason, r.currency, r.is_simulated, r.prompt_version, r.selection, r.documents,
       b.cap AS budget_pico, b.granted AS granted_pico, r.opened_at, r.finished_at, r.ledger_digest, r.budget_id,
       b.name AS budget_name, r.policy -> 'ladder' AS ladder, r.concurrency, r.concurrency || r.limits AS ceilings,
       r.backfill_id, a.adjusted_pico,
       (r.policy -> 'escalate' ->> 'below')::numeric AS escalates_below,
       (SELECT jsonb_path_query_array(v.ladder, '$[*].model') FROM prompt_version v
        WHERE v.prompt_version = r.prompt_version) AS models,
       coalesce(a.closed_pico, 0) AS closed_pico, coalesce(a.closed_bound_pico, 0) AS closed_bound_pico
FROM run r
JOIN budget b USING (budget_id)
CROSS JOIN LATERAL (
    SELECT sum(c.amount) FILTER (WHERE c.price_id IS NULL) AS adjusted_pico,
           sum(c.amount) FILTER (WHERE c.price_id IS NOT NULL AND o.cost IS NULL) AS closed_pico,
           sum(u.bound) FILTER (WHERE c.price_id IS NOT NULL AND o.cost IS NULL) AS closed_bound_pico
    FROM cost_adjustment c
    LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
    LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
    WHERE c.run_id = r.run_id
) a;

CREATE VIEW booked WITH (security_barrier = true) AS
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
       CASE WHEN c.price_id IS NULL THEN c.adjustment_id ELSE c.attempt_no END, coalesce(c.billed_on, (c.adjusted_at AT TIME ZONE 'UTC')::date),
       p.name, p.model, p.hit_pico, p.miss_pico, p.output_pico, c.hit, c.miss, c.output, c.amount,
       c.adjusted_at, CASE WHEN c.price_id IS NOT NULL AND o.cost IS NOT NULL THEN o.recorded_at END
FROM cost_adjustment c
JOIN run r USING (run_id)
JOIN prompt_version v USING (prompt_version)
LEFT JOIN price p USING (price_id)
LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no);
COMMENT ON VIEW booked IS 'Every row of booked cost with the UTC day it belongs to: what a reply told, what an export told of an
unknown attempt (until a late reply overrides it), and corrections';

CREATE VIEW unsettled WITH (security_barrier = true) AS
SELECT i.run_id, i.document_no, i.attempt_no, r.job, r.state, v.ladder -> 0 -> 'parameters' ->> 'user_id' AS user_id,
       r.currency, r.is_simulated, q.model, u.bound IS NULL AND o.signal IS NULL AS is_open,
       coalesce(u.bound, i.reserved) AS bound_pico,
       coalesce(o.completed_at, i.intended_at + coalesce(s.ahead, interval '0')) AS placed_at
FROM attempt_intent i
JOIN run r USING (run_id)
JOIN prompt_version v USING (prompt_version)
JOIN price q ON q.price_id = i.price_id
LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
LEFT JOIN cost_adjustment c ON c.run_id = i.run_id AND c.document_no = i.document_no AND c.attempt_no = i.attempt_no
                           AND c.price_id IS NOT NULL
LEFT JOIN LATERAL (
    SELECT x.sent_at - y.intended_at AS ahead
    FROM attempt_outcome x JOIN attempt_intent y USING (run_id, document_no, attempt_no)
    WHERE x.run_id = i.run_id ORDER BY x.document_no, x.attempt_no LIMIT 1
) s ON o.signal IS NULL
WHERE o.cost IS NULL AND c.amount IS NULL;
COMMENT ON VIEW unsettled IS 'Attempts that nobody knows the cost of, and about when they were, by the clock of the provider';

CREATE VIEW closed_month AS
SELECT month, is_simulated, currency, attempts, cost AS cost_pico, unknown_attempts, unknown AS unknown_pico, runs, digest,
       until, closed_at, closed_by
FROM month_close;
COMMENT ON VIEW closed_month IS 'Months whose books were closed: when, by whom, and what they came to then';

GRANT SELECT ON booked, unsettled, closed_month TO farthing_lane, farthing_auditor, farthing_bookkeeper;
GRANT SELECT ON run_overview TO farthing_bookkeeper;
"""


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    for part in (TABLES, RIGHTS, QUIET, VIEWS):
        op.execute(part)


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
