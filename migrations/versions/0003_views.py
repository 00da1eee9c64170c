"""The views an auditor reads.

Why: cost per run, document, day and tier must be plain SQL, with unknowns as unknowns. Sums are `numeric`,
exact; `_pico` columns are pico units (1e-12) of the run's currency. `unpriced` alone shows columns that no other view
shows for all rows, so it is a barrier: a reader's own function never sees the rows it leaves out.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"

VIEWS = """
CREATE VIEW attempt AS
SELECT i.run_id, i.document_no, i.attempt_no, r.job, r.currency, i.tier, i.purpose, i.reason, i.lane_id,
       i.grant_id, i.shard_no, i.epoch, i.reserved, i.intended_at, o.signal, o.verdict, o.http_status,
       o.finish_reason, o.sent_at, o.completed_at, o.hit, o.miss, o.output, o.reasoning, o.served_model,
       o.fingerprint, o.provider_id, p.name AS price, p.band,
       CASE WHEN o.cost IS NOT NULL THEN 'known'
            WHEN o.signal IS NOT NULL OR u.bound IS NOT NULL THEN 'unknown'
            ELSE 'open' END AS billing,
       o.cost AS cost_pico,
       CASE WHEN o.cost IS NULL THEN coalesce(u.bound, i.reserved) ELSE 0 END AS unknown_pico
FROM attempt_intent i
JOIN run r USING (run_id)
LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
LEFT JOIN price p ON p.price_id = o.price_id;
COMMENT ON VIEW attempt IS 'One row per HTTP request; unknown_pico is the most an unknown or open one can cost';

CREATE VIEW result AS
SELECT d.run_id, d.document_no, d.document_id, d.state, coalesce(d.tier, s.tier) AS tier,
       coalesce(d.answer, s.answer) AS answer, coalesce(d.confidence, s.confidence) AS confidence,
       coalesce(d.confidence_signal, s.confidence_signal) AS confidence_signal,
       coalesce(d.of_run_id, d.run_id) AS answered_in_run, d.recorded_at
FROM document d
LEFT JOIN document s ON d.state = 'reused' AND s.run_id = d.of_run_id AND s.document_no = d.of_document_no
WHERE d.state IN ('result', 'reused');
COMMENT ON VIEW result IS 'What was accepted for each document, answers reused from earlier runs included';

CREATE VIEW dead_letter AS
SELECT run_id, document_no, document_id, reason, tier, recorded_at FROM document WHERE state = 'dead_letter';
COMMENT ON VIEW dead_letter IS 'Documents that ended without a result, and why';

CREATE VIEW run_cost AS
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
    SELECT sum(amount) AS adjusted_pico FROM cost_adjustment c WHERE c.run_id = r.run_id
) j ON true;
COMMENT ON VIEW run_cost IS 'One row per run: documents by state, attempts, tokens and cost';

CREATE VIEW tier_cost AS
SELECT a.run_id, a.job, a.tier, a.currency, count(*) AS attempts,
       coalesce(sum(a.cost_pico), 0) AS cost_pico, sum(a.unknown_pico) AS unknown_pico,
       coalesce(sum(a.hit), 0) AS hit_tokens, coalesce(sum(a.miss), 0) AS miss_tokens,
       coalesce(sum(a.output), 0) AS output_tokens,
       (SELECT count(*) FROM document d
        WHERE d.run_id = a.run_id AND d.tier = a.tier AND d.state = 'result') AS results
FROM attempt a GROUP BY a.run_id, a.job, a.tier, a.currency;
COMMENT ON VIEW tier_cost IS 'Cost and tokens per run and tier, and the documents whose result is from there';

CREATE VIEW document_cost AS
SELECT d.run_id, d.document_no, d.document_id, d.state, d.reason, d.tier, count(a.attempt_no) AS attempts,
       coalesce(sum(a.cost_pico), 0) AS cost_pico, coalesce(sum(a.unknown_pico), 0) AS unknown_pico
FROM document d LEFT JOIN attempt a USING (run_id, document_no)
GROUP BY d.run_id, d.document_no, d.document_id, d.state, d.reason, d.tier;
COMMENT ON VIEW document_cost IS 'What each document cost, over all its attempts';

CREATE VIEW job_cost_by_day AS
SELECT job, (completed_at AT TIME ZONE 'UTC')::date AS day, currency, band, tier, count(*) AS attempts,
       sum(cost_pico) AS cost_pico, sum(hit) AS hit_tokens, sum(miss) AS miss_tokens,
       sum(output) AS output_tokens
FROM attempt WHERE cost_pico > 0 GROUP BY job, day, currency, band, tier;
COMMENT ON VIEW job_cost_by_day IS 'Known cost per job, UTC day, band and tier';

CREATE VIEW cache_efficiency AS
WITH prefix AS (
    SELECT run_id, tier, mode() WITHIN GROUP (ORDER BY hit) AS tokens
    FROM attempt WHERE hit > 0 GROUP BY run_id, tier
)
SELECT a.run_id, a.job, a.tier, a.currency, p.tokens AS prefix_tokens, count(*) AS attempts,
       count(*) * p.tokens AS expected_hit_tokens, sum(least(a.hit, p.tokens)) AS real_hit_tokens,
       round(sum(least(a.hit, p.tokens))::numeric / nullif(count(*) * p.tokens, 0), 6) AS prefix_hit_rate,
       sum(a.hit) AS hit_tokens, sum(a.miss) AS miss_tokens,
       sum((p.tokens - least(a.hit, p.tokens)) * (c.miss_pico - c.hit_pico)) AS lost_pico,
       sum(a.hit * (c.miss_pico - c.hit_pico)) AS saved_pico
FROM attempt a
JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
JOIN price c ON c.price_id = o.price_id
LEFT JOIN prefix p ON p.run_id = a.run_id AND p.tier = a.tier
WHERE a.hit IS NOT NULL AND a.purpose <> 'priming'
GROUP BY a.run_id, a.job, a.tier, a.currency, p.tokens;
COMMENT ON VIEW cache_efficiency IS 'After priming: how much of the shared prefix hit, what misses lost and hits saved.
prefix_tokens is the commonest number of hit tokens; null prefix_tokens: nothing ever hit';

CREATE VIEW escalation AS
SELECT e.run_id, e.job, e.currency, e.document_no, e.reason, e.tier AS to_tier, e.attempt_no, l.answer AS lower_answer,
       d.state, d.tier AS final_tier, d.answer AS final_answer, s.cost_pico, s.unknown_pico,
       d.state = 'result' AND d.tier = e.tier AS is_rescued,
       CASE WHEN l.answer IS NOT NULL AND d.answer IS NOT NULL THEN NOT EXISTS (
           SELECT FROM unnest(r.compared_fields) f WHERE l.answer -> f IS DISTINCT FROM d.answer -> f) END
           AS is_agreed,
       t.label IS NOT NULL AND l.answer ->> (r.policy ->> 'measure') = t.label AS was_right,
       t.label IS NOT NULL AND d.answer ->> (r.policy ->> 'measure') = t.label AS is_right,
       t.label IS NOT NULL AS has_label
FROM attempt e
JOIN run r USING (run_id)
LEFT JOIN document d USING (run_id, document_no)
LEFT JOIN label t USING (run_id, document_no)
LEFT JOIN LATERAL (
    SELECT answer FROM answer x
    WHERE x.run_id = e.run_id AND x.document_no = e.document_no AND x.attempt_no < e.attempt_no
    ORDER BY x.attempt_no DESC LIMIT 1
) l ON true
CROSS JOIN LATERAL (
    SELECT coalesce(sum(cost_pico), 0) AS cost_pico, coalesce(sum(unknown_pico), 0) AS unknown_pico
    FROM attempt y
    WHERE y.run_id = e.run_id AND y.document_no = e.document_no AND y.tier = e.tier
) s
WHERE e.purpose IN ('answer', 'priming') AND e.reason IS NOT NULL;
COMMENT ON VIEW escalation IS 'One row per document and step up the ladder: why, what the lower tier said, what came of it';

CREATE VIEW escalation_yield AS
SELECT run_id, job, currency, to_tier, reason, count(*) AS escalated, count(*) FILTER (WHERE is_rescued) AS rescued,
       count(*) FILTER (WHERE is_agreed) AS agreed, count(*) FILTER (WHERE is_agreed = false) AS changed,
       count(*) FILTER (WHERE has_label) AS labelled, count(*) FILTER (WHERE was_right) AS right_before,
       count(*) FILTER (WHERE is_right) AS right_after,
       sum(cost_pico) AS cost_pico, sum(unknown_pico) AS unknown_pico
FROM escalation GROUP BY run_id, job, currency, to_tier, reason;
COMMENT ON VIEW escalation_yield IS 'What escalation bought: rescued results, changed answers, and against labels where known';

CREATE VIEW accuracy AS
SELECT d.run_id, r.job, d.tier, count(*) AS labelled,
       count(*) FILTER (WHERE d.answer ->> (r.policy ->> 'measure') = t.label) AS correct
FROM result d JOIN run r USING (run_id) JOIN label t USING (run_id, document_no)
WHERE r.policy ->> 'measure' IS NOT NULL
GROUP BY d.run_id, r.job, d.tier;
COMMENT ON VIEW accuracy IS 'Results that equal the expert label, per run and tier, where the input has labels';

CREATE VIEW waste AS
SELECT run_id, job, currency, tier, purpose, coalesce(signal, 'no reply') AS signal, verdict, billing, count(*) AS attempts,
       coalesce(sum(cost_pico), 0) AS cost_pico, sum(unknown_pico) AS unknown_pico
FROM attempt
WHERE signal IS DISTINCT FROM 'answered' OR verdict = 'invalid_answer'
GROUP BY run_id, job, currency, tier, purpose, signal, verdict, billing;
COMMENT ON VIEW waste IS 'Attempts that bought no usable answer: failed, unknown, invalid';

CREATE VIEW unpriced WITH (security_barrier = true) AS
SELECT o.* FROM attempt_outcome o
LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
WHERE o.cost IS NULL AND u.bound IS NULL;
COMMENT ON VIEW unpriced IS 'Must be empty: outcomes with neither a cost nor a bound';

CREATE VIEW run_overview AS
SELECT r.run_id, r.job, r.state, r.reason, r.currency, r.is_simulated, r.prompt_version, r.selection, r.documents,
       b.cap AS budget_pico, b.granted AS granted_pico, r.opened_at, r.finished_at, r.ledger_digest, r.budget_id,
       b.name AS budget_name
FROM run r JOIN budget b USING (budget_id);
COMMENT ON VIEW run_overview IS 'The runs, without counting anything';

CREATE VIEW lane_progress AS
SELECT lane_id, run_id, host, pid, started_at, heartbeat_at, ended_at, ended_because, in_flight, waiting_because,
       done, results, dead_letters, reused, escalated, attempts, cost AS cost_pico, bounds AS unknown_pico,
       hit AS hit_tokens, miss AS miss_tokens, output AS output_tokens
FROM lane;
COMMENT ON VIEW lane_progress IS 'What each lane has committed so far: for a progress line, not for an audit';

CREATE VIEW event AS SELECT run_id, event_id, happened_at, kind, detail FROM run_event;
COMMENT ON VIEW event IS 'What happened to a run, in order';

GRANT SELECT ON attempt, result, dead_letter, run_cost, tier_cost, document_cost, job_cost_by_day, cache_efficiency,
    escalation, escalation_yield, accuracy, waste, unpriced, run_overview, lane_progress, event TO farthing_lane, farthing_auditor;
"""


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    op.execute(VIEWS)


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
