"""Certified runs: answers that wait, the frozen order of a run's documents with its sample, and the certificate.

Why: `escalate: {target, delta}` decides about all documents of a run at once, so their first answers wait. `held` names
each such answer: its own attempt's, or an earlier result that is reused. A shard whose documents have all ended or wait
is `held`, until the next phase opens it again. `frozen_order` is written once for a run, before the first document of the
sample is sent, together with a place for each document (`ranked`); `certified` once, when the sample is answered. All
of it is only ever appended, but for a lane's count of what it held. Code from before this migration runs on, with jobs of
a threshold; of its own accord no older row changes.
"""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0013"

TABLES = """
CREATE TABLE held (
    run_id         bigint NOT NULL,
    document_no    bigint NOT NULL,
    attempt_no     smallint,
    confidence     double precision,
    of_run_id      bigint,
    of_document_no bigint,
    recorded_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, document_no),
    CHECK (num_nonnulls(attempt_no, of_document_no) = 1 AND num_nulls(of_run_id, of_document_no) <> 1)
);
CREATE TABLE ranked (
    run_id      bigint NOT NULL,
    document_no bigint NOT NULL,
    rank        bigint NOT NULL CHECK (rank >= 0),
    is_sampled  boolean NOT NULL,
    PRIMARY KEY (run_id, document_no),
    UNIQUE (run_id, rank)
);
CREATE INDEX ON ranked (run_id, document_no) WHERE is_sampled;
CREATE TABLE frozen_order (
    run_id       bigint PRIMARY KEY REFERENCES run,
    documents    bigint NOT NULL,
    piloted      bigint NOT NULL CHECK (piloted BETWEEN 0 AND documents),
    size         bigint NOT NULL CHECK (size >= 0),
    allowance    bigint,
    fields       text[] NOT NULL,
    salt         bytea NOT NULL,
    seed         bytea NOT NULL,
    order_digest text NOT NULL,
    frozen_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE certified (
    run_id       bigint PRIMARY KEY REFERENCES frozen_order,
    findings     jsonb NOT NULL,
    cut          bigint NOT NULL CHECK (cut >= 0),
    score_at_cut double precision,
    tail         numeric,
    served       jsonb NOT NULL,
    certified_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE shard DROP CONSTRAINT shard_state_check,
    ADD CONSTRAINT shard_state_check CHECK (state IN ('open', 'leased', 'held', 'done', 'failed'));
ALTER TABLE lane ADD COLUMN held bigint NOT NULL DEFAULT 0;

DO $$
DECLARE name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['held', 'ranked', 'frozen_order', 'certified'] LOOP
        EXECUTE format('CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON %I
                        FOR EACH ROW EXECUTE FUNCTION refuse_change()', name);
        EXECUTE format('CREATE TRIGGER append_only_all BEFORE TRUNCATE ON %I
                        FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()', name);
        EXECUTE format('GRANT SELECT, INSERT ON %I TO farthing_lane', name);
    END LOOP;
END $$;
GRANT UPDATE (held) ON lane TO farthing_lane;
"""

COUNTED = (
    *("attempt_intent", "attempt_outcome", "attempt_unknown", "answer", "document", "duplicate", "label", "shard"),
    *("held", "ranked"),
)
# As 0008 has it, with two tables more.
STATISTICS = f"""
CREATE OR REPLACE FUNCTION analyze_ledger() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF pg_try_advisory_xact_lock(hashtext('farthing analyze')) THEN
        PERFORM set_config('lock_timeout', '2s', true);
        ANALYZE {", ".join(f"farthing.{table}" for table in COUNTED)};
    END IF;
EXCEPTION WHEN lock_not_available THEN
    NULL;
END $$;
"""

# An answer that was held and then accepted is in `answer` and in `document`: it is one answer.
VIEWS = """
CREATE VIEW certificate AS
SELECT f.run_id, (r.policy -> 'escalate' ->> 'target')::numeric AS target, (r.policy -> 'escalate' ->> 'delta')::numeric AS delta,
       f.documents, f.piloted, f.size, f.allowance, f.fields, f.order_digest, f.frozen_at, c.cut, c.score_at_cut, c.tail,
       c.findings, c.served, c.certified_at
FROM frozen_order f JOIN run r USING (run_id) LEFT JOIN certified c USING (run_id);

CREATE OR REPLACE VIEW lane_progress AS
SELECT lane_id, run_id, host, pid, started_at, heartbeat_at, ended_at, ended_because, in_flight, waiting_because,
       done, results, dead_letters, reused, escalated, attempts, cost AS cost_pico, bounds AS unknown_pico,
       hit AS hit_tokens, miss AS miss_tokens, output AS output_tokens, held
FROM lane;

CREATE OR REPLACE VIEW answer_confidence AS
SELECT run_id, document_no, attempt_no, confidence FROM answer WHERE confidence IS NOT NULL
UNION ALL
SELECT run_id, document_no, attempt_no, confidence FROM document d
WHERE state = 'result' AND confidence IS NOT NULL
  AND NOT EXISTS (SELECT FROM held h WHERE h.run_id = d.run_id AND h.document_no = d.document_no
                  AND h.attempt_no = d.attempt_no);
GRANT SELECT ON certificate TO farthing_lane, farthing_auditor;
"""

COMMENTS = """
COMMENT ON TABLE held IS 'First answers that wait for their run''s certificate: an attempt of their own, or an earlier result';
COMMENT ON COLUMN held.run_id IS 'The run';
COMMENT ON COLUMN held.document_no IS 'The document, counted over the run''s files from 0';
COMMENT ON COLUMN held.attempt_no IS 'The attempt that brought the answer; null: it is reused';
COMMENT ON COLUMN held.confidence IS 'How sure it is, 0 to 1; null: only known to be valid, and so last in the order';
COMMENT ON COLUMN held.of_run_id IS 'The run of the result that is reused; null: of none';
COMMENT ON COLUMN held.of_document_no IS 'The document whose result is reused; null: of none';
COMMENT ON COLUMN held.recorded_at IS 'When it was written';
COMMENT ON TABLE ranked IS 'The place of each waiting document in its run''s frozen order';
COMMENT ON COLUMN ranked.run_id IS 'The run';
COMMENT ON COLUMN ranked.document_no IS 'The document, counted over the run''s files from 0';
COMMENT ON COLUMN ranked.rank IS 'Its place, from 0: the surest first, ties by the salted hash of their numbers';
COMMENT ON COLUMN ranked.is_sampled IS 'Whether the lot drew it: the last tier is asked whatever the certificate says';
COMMENT ON TABLE frozen_order IS 'The plan of a run''s certificate, written before the first document of its sample is sent';
COMMENT ON COLUMN frozen_order.run_id IS 'The run';
COMMENT ON COLUMN frozen_order.documents IS 'Documents that the promise is about: those that wait, and those with the last tier''s answer';
COMMENT ON COLUMN frozen_order.piloted IS 'Those that had the last tier''s answer already and are not drawn from';
COMMENT ON COLUMN frozen_order.size IS 'How many are drawn';
COMMENT ON COLUMN frozen_order.allowance IS 'Disagreements in the sample that the cut may pass; null: nothing can be certified';
COMMENT ON COLUMN frozen_order.fields IS 'The answer fields that are compared: an answer differs where any of them does';
COMMENT ON COLUMN frozen_order.salt IS 'What orders ties';
COMMENT ON COLUMN frozen_order.seed IS 'What draws the sample';
COMMENT ON COLUMN frozen_order.order_digest IS 'SHA-256 of the document numbers in their order';
COMMENT ON COLUMN frozen_order.frozen_at IS 'When it was written';
COMMENT ON TABLE certified IS 'What the sample found, and the cut that follows: ranks below it keep the first answer';
COMMENT ON COLUMN certified.run_id IS 'The run';
COMMENT ON COLUMN certified.findings IS 'The ranks of drawn documents on which the tiers disagree: about the whole answer';
COMMENT ON COLUMN certified.cut IS 'Ranks below it were accepted unless they were drawn';
COMMENT ON COLUMN certified.score_at_cut IS 'Confidence of the first document that was not accepted; null: all were, or it has none';
COMMENT ON COLUMN certified.tail IS 'The chance that the promise fails, for each field, rounded up; null: nothing was accepted';
COMMENT ON COLUMN certified.served IS 'By tier, the models that had served it';
COMMENT ON COLUMN certified.certified_at IS 'When it was written';
COMMENT ON COLUMN lane.held IS 'First answers that wait for the certificate';
COMMENT ON COLUMN lane_progress.held IS 'First answers that wait, or waited, for the certificate';
COMMENT ON VIEW certificate IS 'What each run was promised and by what: the plan from when the order was frozen on, the rest once it is certified';
COMMENT ON COLUMN certificate.run_id IS 'The run';
COMMENT ON COLUMN certificate.target IS 'The share of answers that are what the last tier would say';
COMMENT ON COLUMN certificate.delta IS 'The chance that fewer are';
COMMENT ON COLUMN certificate.documents IS 'Documents that the promise is about';
COMMENT ON COLUMN certificate.piloted IS 'Those that had the last tier''s answer before the order was frozen';
COMMENT ON COLUMN certificate.size IS 'How many were drawn';
COMMENT ON COLUMN certificate.allowance IS 'Disagreements in the sample that the cut may pass; null: nothing can be certified';
COMMENT ON COLUMN certificate.fields IS 'The answer fields that are compared';
COMMENT ON COLUMN certificate.order_digest IS 'SHA-256 of the document numbers in their order';
COMMENT ON COLUMN certificate.frozen_at IS 'When the order was frozen';
COMMENT ON COLUMN certificate.cut IS 'Ranks below it were accepted unless they were drawn; null: not certified yet';
COMMENT ON COLUMN certificate.score_at_cut IS 'Confidence of the first document that was not accepted';
COMMENT ON COLUMN certificate.tail IS 'The chance that the promise fails, for each field, rounded up';
COMMENT ON COLUMN certificate.findings IS 'The ranks of drawn documents on which the tiers disagree: about the whole answer';
COMMENT ON COLUMN certificate.served IS 'By tier, the models that had served it';
COMMENT ON COLUMN certificate.certified_at IS 'When it was certified';
"""


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    for part in (TABLES, STATISTICS, VIEWS, COMMENTS):
        op.execute(part)


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
