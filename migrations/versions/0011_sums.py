"""Sums of a run, stored once it is done, and read by an audit in place of its rows; a comment on every object.

Why: ten million attempts cannot be added up in the two seconds that somebody waits for an audit. The views that add up
keep their names and columns; what they were is called `…_by_rows`. They now read `run_sums` for a run whose sums are
stored and whose facts are still those, and its rows for any other: one at work, one of before this migration that was
not summed, one that a late reply or a correction came to. `late` counts those, and only ever grows, so that sums are
never changed but followed by newer ones. Only `sum_up` writes them, from the rows, in the owner's name; verify adds the
rows up again. Runs that are done already are summed after this migration (`tasks.ledger.upgrades`). Nothing of another
table changes: code from before this migration runs on, and what it settles is read by its rows.
"""

from __future__ import annotations

from alembic import op

from migrations.comments import COMMENTS

revision = "0011"
down_revision = "0010"

#: Of the dearest documents of a run so many are kept.
DEAREST = 50

#: The views that are stored: their columns besides the run, and those of the run itself.
STORED = {
    "spend": (
        "r.job, r.currency",
        "day date, tier text, model text, purpose text, band text, signal text, verdict text, billing text, "
        "attempts bigint, escalated bigint, hit_tokens bigint, miss_tokens bigint, output_tokens bigint, "
        "reasoning_tokens bigint, cost_pico numeric, unknown_pico numeric, hit_pico numeric, miss_pico numeric, "
        "output_pico numeric",
    ),
    "ended": ("", "state text, tier text, reason text, documents bigint"),
    "cache_efficiency": (
        "r.job, r.currency",
        "tier text, prefix_tokens integer, attempts bigint, expected_hit_tokens bigint, real_hit_tokens bigint, "
        "prefix_hit_rate numeric, hit_tokens bigint, miss_tokens bigint, lost_pico numeric, saved_pico numeric, "
        "lost_whole_pico numeric",
    ),
    "off_peak_saving": ("r.job, r.currency", "attempts bigint, cost_pico numeric, saved_pico numeric"),
    "escalation_yield": (
        "r.job, r.currency",
        "to_tier text, reason text, escalated bigint, rescued bigint, agreed bigint, changed bigint, labelled bigint, "
        "right_before bigint, right_after bigint, cost_pico numeric, unknown_pico numeric",
    ),
    "accuracy": ("r.job", "tier text, labelled bigint, correct bigint"),
}
#: Tokens that have a price, so that cost over tokens is a price where some have none.
PRICED = "CASE x.billing WHEN 'known' THEN x.hit_tokens + x.miss_tokens + x.output_tokens ELSE 0 END AS priced_tokens"

TABLE = f"""
CREATE TABLE run_sums (
    run_id             bigint NOT NULL REFERENCES run,
    late               bigint NOT NULL CHECK (late >= 0),
    {", ".join(f"{name} jsonb NOT NULL" for name in STORED)},
    cost_at_most       bigint[] NOT NULL,
    cost_documents     bigint[] NOT NULL,
    dearest            jsonb NOT NULL,
    summed_at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, late)
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON run_sums FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER append_only_all BEFORE TRUNCATE ON run_sums FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
GRANT SELECT ON run_sums TO farthing_lane;

CREATE INDEX attempt_unknown_declared ON attempt_unknown (run_id) WHERE because LIKE 'lane %';
CREATE INDEX IF NOT EXISTS cost_adjustment_by_run ON cost_adjustment (run_id);
"""

# Only an attempt that was declared unknown when its lane ended can have an outcome later. OFFSET 0 keeps a subquery
# what it is: a probe for each such attempt, and below the sums of one run at a time, by its index.
LATENESS = f"""
CREATE VIEW lateness AS
SELECT r.run_id,
       (SELECT count(*) FROM attempt_unknown u
        CROSS JOIN LATERAL (SELECT FROM attempt_outcome o WHERE o.run_id = u.run_id AND o.document_no = u.document_no
                            AND o.attempt_no = u.attempt_no OFFSET 0) came
        WHERE u.run_id = r.run_id AND u.because LIKE 'lane %')
       + (SELECT count(*) FROM cost_adjustment a WHERE a.run_id = r.run_id) AS late
FROM run r;

CREATE VIEW summed AS
SELECT s.run_id, s.late, {", ".join(f"s.{name}" for name in STORED)}, s.cost_at_most, s.cost_documents, s.dearest
FROM run_sums s WHERE s.late = (SELECT l.late FROM lateness l WHERE l.run_id = s.run_id);

CREATE VIEW unsummed AS
SELECT r.run_id FROM run r WHERE NOT EXISTS (SELECT FROM summed s WHERE s.run_id = r.run_id);
"""

# A cost is counted under its first three digits, so that what is stored stays small: the most that one of them cost
# stands for all, and is less than a hundredth too much.
_ABOUT = "trunc({0}, 3 - length({0}::text))"
DOCUMENTS = f"""
CREATE VIEW document_costs_by_rows AS
SELECT run_id, {_ABOUT.format("cost_pico")} AS about_pico, max(cost_pico) AS at_most_pico, count(*) AS documents
FROM document_spend GROUP BY run_id, {_ABOUT.format("cost_pico")};

CREATE VIEW document_costs AS
SELECT s.run_id, {_ABOUT.format("x.at_most_pico")} AS about_pico, x.at_most_pico, x.documents
FROM summed s CROSS JOIN LATERAL unnest(s.cost_at_most, s.cost_documents) AS x (at_most_pico, documents)
UNION ALL
SELECT u.run_id, x.about_pico, x.at_most_pico, x.documents
FROM unsummed u
CROSS JOIN LATERAL (SELECT * FROM document_costs_by_rows v WHERE v.run_id = u.run_id OFFSET 0) x;

CREATE VIEW dearest_document AS
SELECT s.run_id, x.document_no, x.attempts, x.cost_pico, x.unknown_pico
FROM summed s
CROSS JOIN LATERAL jsonb_to_recordset(s.dearest)
    AS x (document_no bigint, attempts bigint, cost_pico bigint, unknown_pico bigint)
UNION ALL
SELECT u.run_id, x.document_no, x.attempts, x.cost_pico, x.unknown_pico
FROM unsummed u
CROSS JOIN LATERAL (SELECT * FROM document_spend v WHERE v.run_id = u.run_id
                    ORDER BY v.cost_pico + v.unknown_pico DESC, v.document_no LIMIT {DEAREST}) x;
"""

_FROM_ROWS = ", ".join(
    f"""
       (SELECT coalesce(jsonb_agg(x.line ORDER BY x.line), '[]')
        FROM (SELECT to_jsonb(v) - '{{run_id,job,currency}}'::text[] AS line FROM {name}_by_rows v
              WHERE v.run_id = r.run_id) x) AS {name}"""
    for name in STORED
)
FROM_ROWS = f"""
CREATE VIEW run_sums_by_rows AS
SELECT r.run_id, l.late, {_FROM_ROWS}, c.cost_at_most, c.cost_documents,
       (SELECT coalesce(jsonb_agg(to_jsonb(x) - 'run_id' ORDER BY x.cost_pico + x.unknown_pico DESC, x.document_no), '[]')
        FROM (SELECT * FROM document_spend v WHERE v.run_id = r.run_id
              ORDER BY v.cost_pico + v.unknown_pico DESC, v.document_no LIMIT {DEAREST}) x) AS dearest
FROM run r
JOIN lateness l USING (run_id)
CROSS JOIN LATERAL (
    SELECT coalesce(array_agg(v.at_most_pico ORDER BY v.at_most_pico), '{{}}') AS cost_at_most,
           coalesce(array_agg(v.documents ORDER BY v.at_most_pico), '{{}}') AS cost_documents
    FROM document_costs_by_rows v WHERE v.run_id = r.run_id
) c;
"""

# Of a run that Postgres has not counted it believes that it has no rows, and would compare all pairs of them.
FUNCTION = """
CREATE FUNCTION sum_up(bigint) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET enable_nestloop = off AS $$
BEGIN
    IF EXISTS (SELECT FROM farthing.run r JOIN farthing.unsummed u USING (run_id) WHERE r.run_id = $1 AND r.state = 'done') THEN
        INSERT INTO farthing.run_sums SELECT * FROM farthing.run_sums_by_rows b WHERE b.run_id = $1 ON CONFLICT DO NOTHING;
    END IF;
END $$;
REVOKE ALL ON FUNCTION sum_up(bigint) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION sum_up(bigint) TO farthing_lane, farthing_bookkeeper;
"""


# A reused answer is looked up where it was given: a hash would be made of every document of the ledger.
ACCURACY = """
CREATE OR REPLACE VIEW accuracy_by_rows AS
SELECT d.run_id, r.job, coalesce(d.tier, s.tier) AS tier, count(*) AS labelled,
       count(*) FILTER (WHERE coalesce(d.answer, s.answer) ->> (r.policy ->> 'measure') = t.label) AS correct
FROM document d
JOIN run r USING (run_id)
JOIN label t USING (run_id, document_no)
LEFT JOIN LATERAL (SELECT x.tier, x.answer FROM document x WHERE d.state = 'reused' AND x.run_id = d.of_run_id
                   AND x.document_no = d.of_document_no OFFSET 0) s ON true
WHERE d.state IN ('result', 'reused') AND r.policy ->> 'measure' IS NOT NULL
GROUP BY d.run_id, r.job, coalesce(d.tier, s.tier);
"""


def _view(name: str) -> str:
    """The view of that name: what is stored for runs that are summed, what the rows say for the others."""
    of_run, typed = STORED[name]
    columns = ["x." + column.split()[0] for column in typed.split(", ")]
    columns += [PRICED] if name == "spend" else []
    listed = ", ".join(([of_run] if of_run else []) + columns)
    return f"""
        CREATE VIEW {name} AS
        SELECT s.run_id, {listed} FROM summed s JOIN run r USING (run_id)
        CROSS JOIN LATERAL jsonb_to_recordset(s.{name}) AS x ({typed})
        UNION ALL
        SELECT u.run_id, {listed.replace("r.", "x.") if of_run else listed} FROM unsummed u
        CROSS JOIN LATERAL (SELECT * FROM {name}_by_rows v WHERE v.run_id = u.run_id OFFSET 0) x;
    """


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    for part in (TABLE, LATENESS):
        op.execute(part)
    for name in STORED:
        op.execute(f"ALTER VIEW {name} RENAME TO {name}_by_rows")
        op.execute(_view(name))
    for part in (ACCURACY, DOCUMENTS, FROM_ROWS, FUNCTION):
        op.execute(part)
    views = ("lateness", "summed", "unsummed", "run_sums_by_rows", "document_costs", "document_costs_by_rows")
    granted = ", ".join((*STORED, *views, "dearest_document"))
    op.execute(f"GRANT SELECT ON {granted} TO farthing_lane, farthing_auditor")
    op.execute(COMMENTS)


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
