"""The view of what waiting for off-peak prices saved.

Why: the report states it, and an auditor reads views only. Each lane that works under the policy says so once, with an
event `off_peak`; what its attempts cost is held against the peak row of the same model, card and date. Code from before
this migration neither writes such events nor reads the view, and runs on.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"

VIEW = """
CREATE VIEW off_peak_saving AS
SELECT a.run_id, a.job, a.currency, count(*) AS attempts, sum(a.cost_pico) AS cost_pico,
       sum(a.hit::numeric * p.hit_pico + a.miss::numeric * p.miss_pico + a.output::numeric * p.output_pico - a.cost_pico)
           AS saved_pico
FROM attempt a
JOIN run_event e ON e.run_id = a.run_id AND e.kind = 'off_peak' AND e.detail ->> 'lane' = a.lane_id::text
JOIN price p ON p.band = 'peak' AND p.name = replace(a.price, '/off_peak', '/peak')
WHERE a.band = 'off_peak' AND a.cost_pico > 0
GROUP BY a.run_id, a.job, a.currency;
COMMENT ON VIEW off_peak_saving IS 'What attempts of lanes that waited for off-peak prices would have cost more at peak ones';

GRANT SELECT ON off_peak_saving TO farthing_lane, farthing_auditor;
"""


def upgrade() -> None:
    op.execute("SET LOCAL search_path TO farthing")
    op.execute(VIEW)


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
