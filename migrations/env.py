"""How Alembic meets the ledger: it runs on the connection that `tasks.ledger` opened, as the ledger's owner."""

from __future__ import annotations

from alembic import context
from sqlalchemy import text

from migrations import roles
from schemas.tables import metadata

connection = context.config.attributes["connection"]
connection.execute(text(roles.CREATE))
connection.execute(text(f"SET ROLE {roles.OWNER}"))
connection.commit()
context.configure(
    connection=connection,
    target_metadata=metadata,
    include_schemas=True,
    version_table="ledger_version",
    version_table_schema=metadata.schema,
    transaction_per_migration=True,  # a lock that one takes holds nobody up while the next are at work
)
with context.begin_transaction():
    context.run_migrations()
