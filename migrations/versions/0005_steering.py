"""How many requests of a run may be in flight: what its job says, and what an operator says instead.

Why: an operator changes the ceiling of a live run from another terminal, its lanes hear of it with their next heartbeat,
and it holds for whoever resumes the run. So it is state of the run, like `state` and `reason`, in the row that every
heartbeat reads anyway; what it was before is an event, written in the same transaction. `limits` lies over
`concurrency`, tier by tier: without any, the job's word holds. Lanes that are at work while this is applied go on; they
do not hear of limits.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"

COLUMNS = """
ALTER TABLE run
    ADD COLUMN concurrency jsonb NOT NULL DEFAULT '{}'::jsonb CHECK (jsonb_typeof(concurrency) = 'object'),
    ADD COLUMN limits jsonb NOT NULL DEFAULT '{}'::jsonb CHECK (jsonb_typeof(limits) = 'object');
COMMENT ON COLUMN run.concurrency IS 'Requests in flight by tier, as the job said at the newest start; {}: opened before this was kept';
COMMENT ON COLUMN run.limits IS 'Requests in flight by tier, as an operator said: they lie over concurrency until they are reset';
GRANT UPDATE (concurrency, limits) ON run TO farthing_lane;

CREATE OR REPLACE VIEW run_overview AS
SELECT r.run_id, r.job, r.state, r.reason, r.currency, r.is_simulated, r.prompt_version, r.selection, r.documents,
       b.cap AS budget_pico, b.granted AS granted_pico, r.opened_at, r.finished_at, r.ledger_digest, r.budget_id,
       b.name AS budget_name, r.policy -> 'ladder' AS ladder, r.concurrency, r.concurrency || r.limits AS ceilings
FROM run r JOIN budget b USING (budget_id);
"""


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    op.execute(COLUMNS)


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
