"""The ledger's tables, views and roles, as Alembic migrations."""
