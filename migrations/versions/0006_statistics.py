"""No statistics of run_id, so that Postgres does not take a run that has just begun for an empty one.

Why: every table of the ledger is asked about one run. With statistics, a run that began after the last ANALYZE is in no
list of known values, so that one row is expected of it; any plan is then as good as another, and two of its tables were
joined row by row: closing a lane's grants took 30 s at 10,000 documents, with the budget's row held, and a hundred
times that at ten times as many. Without any, a run is expected to be a two hundredth of what there is (Postgres's
DEFAULT_NUM_DISTINCT), which is enough to look rows up by their whole key.

Statistics that were gathered before stay until the table is dropped: of a ledger that is older than this and slow,
drop them with `SELECT pg_clear_attribute_stats('farthing', TABLE, 'run_id', false)` (Postgres 18).
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"

TABLES = ("attempt_intent", "attempt_outcome", "attempt_unknown", "answer", "document", "duplicate", "label", "shard")


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ALTER COLUMN run_id SET STATISTICS 0")


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
