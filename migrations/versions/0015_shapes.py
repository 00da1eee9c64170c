"""How a run's spend lies over time and how sure its answers were, stored with its other sums once it is done.

Why: a report page counted both from the rows, a minute for ten million attempts. Time is cut by a stride that a run's
span allows, and each stride is a multiple of the shorter ones, so that runs of any length are charted together. A
run's span ends when it was done, by a clock that nothing moves afterwards. What was summed before this migration has
neither, and is counted from the rows as it was. Nothing that code from before this migration asks for changes.
"""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0014"

#: As in schemas/buckets.py: each is a multiple of the one before it, and a chart has at most so many.
STRIDES = (
    *("1 s", "5 s", "15 s", "30 s", "1 min", "5 min", "15 min", "30 min", "1 h", "3 h", "6 h", "12 h"),
    *("1 day", "7 days", "28 days", "364 days"),
)
MOST_STRIDES = 90
#: A Monday.
ORIGIN = "2001-01-01 00:00:00+00"
#: How many parts confidence has, from 0 to 1.
CONFIDENCES = 40

_OVER_TIME = (
    "begins timestamptz, tier text, attempts bigint, cost_pico numeric, unknown_pico numeric, hit_tokens bigint, "
    "miss_tokens bigint"
)
_CONFIDENCES = "tier text, part integer, answers bigint, unsure bigint"


def _names(typed: str, of: str) -> str:
    return ", ".join(f"{of}.{column.split()[0]}" for column in typed.split(", "))


def _view(name: str, stored: str, typed: str) -> str:
    """What is stored of runs that are done, and of the others what the rows say."""
    return f"""
        CREATE VIEW {name} AS
        SELECT s.run_id, {_names(typed, "x").replace("x.begins", "to_timestamp(x.begins) AS begins")}
        FROM summed s CROSS JOIN LATERAL jsonb_to_recordset(s.{stored}) AS x ({typed.replace("timestamptz", "bigint")})
        UNION ALL
        SELECT r.run_id, {_names(typed, "x")}
        FROM run r CROSS JOIN LATERAL (SELECT * FROM {name}_by_rows v WHERE v.run_id = r.run_id OFFSET 0) x
        WHERE NOT EXISTS (SELECT FROM summed s WHERE s.run_id = r.run_id AND s.{stored} IS NOT NULL);
    """


# Whoever writes to a run that is not done may do so until the last heartbeat, and a lane that was killed a little longer.
SPAN = f"""
CREATE VIEW run_span AS
SELECT x.run_id, x.first, x.last,
       coalesce((SELECT min(each) FROM unnest('{{{", ".join(STRIDES)}}}'::interval[]) each
                 WHERE x.last - x.first <= each * {MOST_STRIDES}), '{STRIDES[-1]}') AS stride
FROM (SELECT r.run_id, r.opened_at AS first,
             coalesce(r.finished_at, (SELECT greatest(r.opened_at, max(l.heartbeat_at), max(l.ended_at)) FROM lane l
                                      WHERE l.run_id = r.run_id)) AS last
      FROM run r) x;

CREATE VIEW spend_over_time_by_rows AS
SELECT a.run_id, date_bin(s.stride, greatest(least(a.intended_at, s.last), s.first), '{ORIGIN}') AS begins, a.tier,
       count(*) AS attempts, coalesce(sum(a.cost_pico), 0) AS cost_pico, sum(a.unknown_pico) AS unknown_pico,
       coalesce(sum(a.hit), 0)::bigint AS hit_tokens, coalesce(sum(a.miss), 0)::bigint AS miss_tokens
FROM attempt a JOIN run_span s USING (run_id)
GROUP BY a.run_id, 2, a.tier;

CREATE VIEW confidence_spread_by_rows AS
SELECT c.run_id, i.tier, least(greatest(width_bucket(c.confidence, 0, 1, {CONFIDENCES}), 1), {CONFIDENCES}) - 1 AS part,
       count(*) AS answers,
       count(*) FILTER (WHERE c.confidence < (r.policy -> 'escalate' ->> 'below')::numeric) AS unsure
FROM answer_confidence c
JOIN attempt_intent i USING (run_id, document_no, attempt_no)
JOIN run r USING (run_id)
GROUP BY c.run_id, i.tier, 3;
"""

# Instants are stored as seconds, since how JSON spells them is up to who asks.
SUMS = f"""
ALTER TABLE run_sums ADD COLUMN over_time jsonb, ADD COLUMN confidences jsonb;

CREATE OR REPLACE VIEW summed AS
SELECT s.run_id, s.late, s.spend, s.ended, s.cache_efficiency, s.off_peak_saving, s.escalation_yield, s.accuracy,
       s.cost_at_most, s.cost_documents, s.dearest, s.slowest, s.waits, s.over_time, s.confidences
FROM run_sums s WHERE s.late = (SELECT l.late FROM lateness l WHERE l.run_id = s.run_id);

{_view("spend_over_time", "over_time", _OVER_TIME)}
{_view("confidence_spread", "confidences", _CONFIDENCES)}

CREATE VIEW run_shapes_by_rows AS
SELECT r.run_id,
       (SELECT coalesce(jsonb_agg(to_jsonb(v) - 'run_id' || jsonb_build_object('begins', extract(epoch FROM v.begins)::bigint)
                                  ORDER BY v.begins, v.tier), '[]')
        FROM spend_over_time_by_rows v WHERE v.run_id = r.run_id) AS over_time,
       (SELECT coalesce(jsonb_agg(to_jsonb(v) - 'run_id' ORDER BY v.tier, v.part), '[]')
        FROM confidence_spread_by_rows v WHERE v.run_id = r.run_id) AS confidences
FROM run r;

CREATE OR REPLACE FUNCTION sum_up(bigint) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET enable_nestloop = off AS $$
BEGIN
    IF EXISTS (SELECT FROM farthing.run r JOIN farthing.unsummed u USING (run_id) WHERE r.run_id = $1 AND r.state = 'done') THEN
        INSERT INTO farthing.run_sums (run_id, late, spend, ended, cache_efficiency, off_peak_saving, escalation_yield,
                                       accuracy, cost_at_most, cost_documents, dearest, slowest, waits, over_time,
                                       confidences)
        SELECT b.run_id, b.late, b.spend, b.ended, b.cache_efficiency, b.off_peak_saving, b.escalation_yield,
               b.accuracy, b.cost_at_most, b.cost_documents, b.dearest, w.slowest, w.waits, h.over_time, h.confidences
        FROM farthing.run_sums_by_rows b
        JOIN farthing.run_waits_by_rows w USING (run_id)
        JOIN farthing.run_shapes_by_rows h USING (run_id)
        WHERE b.run_id = $1 AND w.run_id = $1 AND h.run_id = $1
        ON CONFLICT DO NOTHING;
    END IF;
END $$;
"""

_RUN = "The run: one execution of a job"
_OF_TIME = {
    "run_id": _RUN,
    "begins": "When the stride begins, by Postgres''s clock",
    "tier": "A step of the ladder",
    "attempts": "Attempts, which are HTTP requests, that were begun in the stride",
    "cost_pico": "What is known of their cost, in pico units",
    "unknown_pico": "The most that the others of them can have cost, in pico units",
    "hit_tokens": "Prompt tokens that were in the provider''s cache",
    "miss_tokens": "Prompt tokens that were not in the cache",
}
_OF_CONFIDENCE = {
    "run_id": _RUN,
    "tier": "A step of the ladder",
    "part": f"Which of {CONFIDENCES} equal parts of 0 to 1 the confidence is in, from 0",
    "answers": "Valid answers that were so sure",
    "unsure": "Those below the threshold of the run",
}
_STORED = {
    "over_time": "The run''s lines of spend_over_time, instants in seconds; null: summed before that was kept",
    "confidences": "The run''s lines of confidence_spread; null: summed before that was kept",
}
VIEWS = {
    "run_span": (
        "From when to when a run spent, and the stride that its time is cut by",
        {
            "run_id": _RUN,
            "first": "When the run was opened",
            "last": "When it was done, or who worked on it was last heard of",
            "stride": "Long enough for the span to have few",
        },
    ),
    "spend_over_time": ("Attempts by when they were begun. Of a run that is done: as stored", _OF_TIME),
    "spend_over_time_by_rows": ("spend_over_time, counted from the rows", _OF_TIME),
    "confidence_spread": ("How sure valid answers were. Of a run that is done: as stored", _OF_CONFIDENCE),
    "confidence_spread_by_rows": ("confidence_spread, counted from the rows", _OF_CONFIDENCE),
    "run_shapes_by_rows": ("What run_sums has of shapes, counted from the rows", {"run_id": _RUN, **_STORED}),
}


def _comment(kind: str, name: str, meaning: str) -> None:
    op.execute(f"COMMENT ON {kind} {name} IS '{meaning}'")


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    for part in (SPAN, SUMS):
        op.execute(part)
    for view, (meaning, columns) in VIEWS.items():
        op.execute(f"GRANT SELECT ON {view} TO farthing_lane, farthing_auditor")
        _comment("VIEW", view, meaning)
        for column, of_column in columns.items():
            _comment("COLUMN", f"{view}.{column}", of_column)
    for column, meaning in _STORED.items():
        for where in ("run_sums", "summed"):
            _comment("COLUMN", f"{where}.{column}", meaning)


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
