"""${message}.

Why: <the reason for this change>. The code before it <still runs / does not run> on the changed ledger.
"""

from __future__ import annotations

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    op.execute("""""")


def downgrade() -> None:
    raise RuntimeError("the ledger only moves forward: restore a backup instead")
