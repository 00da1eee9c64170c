"""Upgrades of the ledger, which alone need Alembic and the owner's rights: a quarter of a second for nobody else."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from pydantic import SecretStr
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from tasks.ledger.connection import CONNECT, MIGRATIONS, VERSION, explain, parse_url


def upgrade(database_url: SecretStr) -> str:
    """Bring the ledger's tables, views and roles up to this code; returns the version. Safe to repeat."""
    url = parse_url(database_url)
    engine = create_engine(url, poolclass=NullPool, connect_args=CONNECT)
    try:
        with engine.begin() as connection:
            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(MIGRATIONS))
            command.upgrade(config, "head")
            return str(connection.execute(text(VERSION)).scalar_one())
    except DBAPIError as error:
        raise explain(error, url) from None  # its text may hold the address
    finally:
        engine.dispose()
