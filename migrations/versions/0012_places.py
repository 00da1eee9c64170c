"""What a lane holds in flight, so that all lanes together never have more than the run's ceilings.

Why: a lane that came in took its share before the others had come down to theirs, and a reply that outlasts the wait
left both in flight. So a lane's places are state, in the row that its heartbeat writes anyway: it lowers them once no
more is in flight, and raises them by what no other living lane holds, under a lock. Lanes of code from before this
migration run on, and hold nothing by this: pause their runs first, or the ceiling is passed while they are at work.
"""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"

COLUMN = """
ALTER TABLE lane ADD COLUMN places jsonb NOT NULL DEFAULT '{}'::jsonb CHECK (jsonb_typeof(places) = 'object');
COMMENT ON COLUMN lane.places IS 'By tier, how many requests the lane may have in flight at most: of all living lanes of a
run, or of a backfill, together no more than the ceilings';
GRANT UPDATE (places) ON lane TO farthing_lane;
"""


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    op.execute(COLUMN)


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
