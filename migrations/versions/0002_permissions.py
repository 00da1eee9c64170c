"""Append-only by force, and least privilege.

Why: a ledger that its own writer can edit proves nothing. Triggers refuse what nobody may do, grants refuse
what a role may not. Views run as their owner, so that the auditor needs no right on any table. What it all comes to
is declared in migrations/permissions.toml, which a test holds against the catalog.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"

# A trigger function runs as whoever sets it off: with their search_path, a function of their own could stand in for one
# that it calls.
TRIGGERS = """
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'farthing.%: % is refused; correct the ledger by new rows', TG_TABLE_NAME, TG_OP
        USING ERRCODE = 'insufficient_privilege';
END $$;

CREATE FUNCTION refuse_all_but_purge() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF to_jsonb(NEW) - 'answer' - 'content' IS DISTINCT FROM to_jsonb(OLD) - 'answer' - 'content'
       OR NEW.answer IS NOT NULL OR to_jsonb(NEW) ->> 'content' <> '' THEN
        RAISE EXCEPTION 'farthing.%: only answers may be purged (answer null, content empty)', TG_TABLE_NAME
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NEW;
END $$;

DO $$
DECLARE name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['price', 'prompt_version', 'run_event', 'input_file', 'duplicate', 'label',
        'budget_grant', 'grant_close', 'attempt_intent', 'attempt_outcome', 'attempt_unknown',
        'cost_adjustment'] LOOP
        EXECUTE format('CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON %I
                        FOR EACH ROW EXECUTE FUNCTION refuse_change()', name);
        EXECUTE format('CREATE TRIGGER append_only_all BEFORE TRUNCATE ON %I
                        FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()', name);
    END LOOP;
    FOREACH name IN ARRAY ARRAY['document', 'answer'] LOOP
        EXECUTE format('CREATE TRIGGER purge_only BEFORE UPDATE ON %I
                        FOR EACH ROW EXECUTE FUNCTION refuse_all_but_purge()', name);
        EXECUTE format('CREATE TRIGGER append_only BEFORE DELETE ON %I
                        FOR EACH ROW EXECUTE FUNCTION refuse_change()', name);
        EXECUTE format('CREATE TRIGGER append_only_all BEFORE TRUNCATE ON %I
                        FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()', name);
    END LOOP;
    FOREACH name IN ARRAY ARRAY['run', 'shard', 'lane', 'budget'] LOOP
        EXECUTE format('CREATE TRIGGER never_deleted BEFORE DELETE ON %I
                        FOR EACH ROW EXECUTE FUNCTION refuse_change()', name);
        EXECUTE format('CREATE TRIGGER never_deleted_all BEFORE TRUNCATE ON %I
                        FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()', name);
    END LOOP;
END $$;
"""

GRANTS = """
REVOKE ALL ON SCHEMA farthing FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA farthing FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA farthing FROM PUBLIC;
GRANT USAGE ON SCHEMA farthing TO farthing_lane, farthing_auditor, farthing_retention;

GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA farthing TO farthing_lane;
REVOKE INSERT ON ledger_version, cost_adjustment FROM farthing_lane;
GRANT SELECT ON ledger_version TO farthing_auditor;
GRANT UPDATE (granted, cap, declared) ON budget TO farthing_lane;
GRANT UPDATE (state, reason, finished_at, ledger_digest) ON run TO farthing_lane;
GRANT UPDATE (state, lease_epoch, lane_id) ON shard TO farthing_lane;
GRANT UPDATE (heartbeat_at, ended_at, ended_because, in_flight, waiting_because, done, results, dead_letters,
              reused, escalated, attempts, cost, bounds, hit, miss, output) ON lane TO farthing_lane;

GRANT SELECT (run_id, document_no, answer, recorded_at), UPDATE (answer) ON document TO farthing_retention;
GRANT SELECT (run_id, document_no, attempt_no), UPDATE (answer, content) ON answer TO farthing_retention;
"""


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    op.execute(TRIGGERS)
    op.execute(GRANTS)


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
