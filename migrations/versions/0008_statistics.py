"""Statistics of run_id again, and a way for a lane to have them fresh.

Why: without any (0006) Postgres expects a two hundredth of a table of every run, so that joins over two columns more
are expected to be one row, for good: `farthing estimate` and some proofs then compared rows pair by pair. With fresh
statistics every plan is a good one. They are stale only at the end of a run, which is when its proof and its audit
read all of it; only a table's owner may refresh them, so this function does it in the owner's name.
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"

TABLES = ("attempt_intent", "attempt_outcome", "attempt_unknown", "answer", "document", "duplicate", "label", "shard")

# Of several at once the first does it; the others go on, and so does who would wait for a vacuum or a new index.
FUNCTION = f"""
CREATE FUNCTION analyze_ledger() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF pg_try_advisory_xact_lock(hashtext('farthing analyze')) THEN
        PERFORM set_config('lock_timeout', '2s', true);
        ANALYZE {", ".join(f"farthing.{table}" for table in TABLES)};
    END IF;
EXCEPTION WHEN lock_not_available THEN
    NULL;
END $$;
REVOKE ALL ON FUNCTION analyze_ledger() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION analyze_ledger() TO farthing_lane;
"""


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ALTER COLUMN run_id SET STATISTICS -1")
    op.execute(FUNCTION)


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
