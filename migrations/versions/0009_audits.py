"""Views that an audit reads once, however large the run.

Why: an audit of a run with millions of attempts went through all of them seven times, and through those of escalated
documents one by one. `spend` adds them up by everything that a report splits them by, in one pass; `document_spend` and
`ended` do the same for documents. `cache_efficiency` and `escalation` say what they said before, without a second pass,
and the former also why it was lost. For `farthing whatif`, `attempt` names the price that was reserved by,
`answer_confidence` how sure each answer was, and `run_overview` the ladder's models and the threshold. Nothing of a table
changes: code from before this migration runs on.
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"

VIEWS = """
CREATE OR REPLACE VIEW attempt AS
SELECT i.run_id, i.document_no, i.attempt_no, r.job, r.currency, i.tier, i.purpose, i.reason, i.lane_id,
       i.grant_id, i.shard_no, i.epoch, i.reserved, i.intended_at, o.signal, o.verdict, o.http_status,
       o.finish_reason, o.sent_at, o.completed_at, o.hit, o.miss, o.output, o.reasoning, o.served_model,
       o.fingerprint, o.provider_id, p.name AS price, p.band,
       CASE WHEN o.cost IS NOT NULL THEN 'known'
            WHEN o.signal IS NOT NULL OR u.bound IS NOT NULL THEN 'unknown'
            ELSE 'open' END AS billing,
       o.cost AS cost_pico,
       CASE WHEN o.cost IS NULL THEN coalesce(u.bound, i.reserved) ELSE 0 END AS unknown_pico,
       q.name AS reserved_price
FROM attempt_intent i
JOIN run r USING (run_id)
LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
LEFT JOIN price p ON p.price_id = o.price_id
LEFT JOIN price q ON q.price_id = i.price_id;

CREATE VIEW spend AS
SELECT i.run_id, r.job, r.currency, (coalesce(o.completed_at, i.intended_at) AT TIME ZONE 'UTC')::date AS day, i.tier,
       coalesce(o.served_model, q.model) AS model, i.purpose, p.band, o.signal, o.verdict,
       CASE WHEN o.cost IS NOT NULL THEN 'known'
            WHEN o.signal IS NOT NULL OR u.bound IS NOT NULL THEN 'unknown'
            ELSE 'open' END AS billing,
       count(*) AS attempts,
       count(*) FILTER (WHERE i.purpose IN ('answer', 'priming') AND i.reason IS NOT NULL) AS escalated,
       coalesce(sum(o.hit), 0) AS hit_tokens, coalesce(sum(o.miss), 0) AS miss_tokens,
       coalesce(sum(o.output), 0) AS output_tokens, coalesce(sum(o.reasoning), 0) AS reasoning_tokens,
       coalesce(sum(o.cost), 0) AS cost_pico,
       coalesce(sum(coalesce(u.bound, i.reserved)) FILTER (WHERE o.cost IS NULL), 0) AS unknown_pico,
       coalesce(sum(o.hit * p.hit_pico), 0) AS hit_pico, coalesce(sum(o.miss * p.miss_pico), 0) AS miss_pico,
       coalesce(sum(o.output * p.output_pico), 0) AS output_pico
FROM attempt_intent i
JOIN run r USING (run_id)
JOIN price q ON q.price_id = i.price_id
LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
LEFT JOIN price p ON p.price_id = o.price_id
GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11;
COMMENT ON VIEW spend IS 'Attempts added up by run, UTC day (of completion, else of the intent), tier, model (that served, else
that was asked), purpose, band of the price and what came of them; hit_pico, miss_pico and output_pico make up cost_pico';

CREATE VIEW ended AS
SELECT run_id, state, tier, reason, count(*) AS documents FROM document GROUP BY run_id, state, tier, reason;
COMMENT ON VIEW ended IS 'Documents that ended, by run, state, tier and reason';

CREATE VIEW document_spend AS
SELECT i.run_id, i.document_no, count(*) AS attempts, coalesce(sum(o.cost), 0)::bigint AS cost_pico,
       coalesce(sum(coalesce(u.bound, i.reserved)) FILTER (WHERE o.cost IS NULL), 0)::bigint AS unknown_pico
FROM attempt_intent i
LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
GROUP BY i.run_id, i.document_no;
COMMENT ON VIEW document_spend IS 'What each document that was sent cost, over all its attempts; document_cost has all, with their ids';

CREATE VIEW answer_confidence AS
SELECT run_id, document_no, attempt_no, confidence FROM answer WHERE confidence IS NOT NULL
UNION ALL
SELECT run_id, document_no, attempt_no, confidence FROM document WHERE state = 'result' AND confidence IS NOT NULL;
COMMENT ON VIEW answer_confidence IS 'How sure each valid answer was, accepted or not, where there is a number';

CREATE OR REPLACE VIEW cache_efficiency AS
SELECT run_id, job, tier, currency, prefix_tokens, sum(attempts)::bigint AS attempts,
       (sum(attempts) * prefix_tokens)::bigint AS expected_hit_tokens,
       sum(attempts * least(hit, prefix_tokens))::bigint AS real_hit_tokens,
       round(sum(attempts * least(hit, prefix_tokens)) / nullif(sum(attempts) * prefix_tokens, 0), 6) AS prefix_hit_rate,
       sum(attempts * hit)::bigint AS hit_tokens, sum(miss)::bigint AS miss_tokens,
       sum(attempts * (prefix_tokens - least(hit, prefix_tokens)) * (miss_pico - hit_pico)) AS lost_pico,
       sum(attempts * hit * (miss_pico - hit_pico)) AS saved_pico,
       coalesce(sum(attempts * prefix_tokens * (miss_pico - hit_pico)) FILTER (WHERE hit = 0), 0) AS lost_whole_pico
FROM (
    SELECT *, first_value(CASE WHEN hit > 0 THEN hit END)
                  OVER (PARTITION BY run_id, tier ORDER BY hit > 0 DESC, of_that_hit DESC, hit) AS prefix_tokens
    FROM (
        SELECT *, sum(attempts) OVER (PARTITION BY run_id, tier, hit) AS of_that_hit
        FROM (
            SELECT i.run_id, r.job, i.tier, r.currency, i.purpose = 'priming' AS is_priming, o.hit, c.hit_pico, c.miss_pico,
                   count(*) AS attempts, sum(o.miss) AS miss
            FROM attempt_outcome o
            JOIN attempt_intent i USING (run_id, document_no, attempt_no)
            JOIN run r USING (run_id)
            JOIN price c ON c.price_id = o.price_id
            WHERE o.hit IS NOT NULL
            GROUP BY i.run_id, r.job, i.tier, r.currency, i.purpose = 'priming', o.hit, c.hit_pico, c.miss_pico
        ) by_hit
    ) counted
) measured
WHERE NOT is_priming
GROUP BY run_id, job, tier, currency, prefix_tokens;
COMMENT ON VIEW cache_efficiency IS 'After priming: how much of the shared prefix hit, what misses lost and hits saved.
prefix_tokens is the commonest number of hit tokens; null prefix_tokens: nothing ever hit. lost_whole_pico is the part of
lost_pico that attempts lost which hit nothing';

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
           coalesce(sum(o.cost) OVER on_tier, 0) AS cost_pico,
           coalesce(sum(CASE WHEN o.cost IS NULL THEN coalesce(u.bound, i.reserved) ELSE 0 END) OVER on_tier, 0)
               AS unknown_pico
    FROM attempt_intent i
    JOIN run s USING (run_id)
    LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
    LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
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

CREATE OR REPLACE VIEW run_overview AS
SELECT r.run_id, r.job, r.state, r.reason, r.currency, r.is_simulated, r.prompt_version, r.selection, r.documents,
       b.cap AS budget_pico, b.granted AS granted_pico, r.opened_at, r.finished_at, r.ledger_digest, r.budget_id,
       b.name AS budget_name, r.policy -> 'ladder' AS ladder, r.concurrency, r.concurrency || r.limits AS ceilings,
       r.backfill_id, (SELECT sum(amount) FROM cost_adjustment c WHERE c.run_id = r.run_id) AS adjusted_pico,
       (r.policy -> 'escalate' ->> 'below')::numeric AS escalates_below,
       (SELECT jsonb_path_query_array(v.ladder, '$[*].model') FROM prompt_version v
        WHERE v.prompt_version = r.prompt_version) AS models
FROM run r JOIN budget b USING (budget_id);

GRANT SELECT ON spend, ended, document_spend, answer_confidence TO farthing_lane, farthing_auditor;
"""


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    op.execute(VIEWS)


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
