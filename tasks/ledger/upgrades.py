"""Upgrades of the ledger, which alone need Alembic and the owner's rights: a quarter of a second for nobody else."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from pydantic import SecretStr
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from tasks.ledger.connection import CONNECT, MIGRATIONS, VERSION, Role, explain, parse_url

#: Of two who upgrade one ledger at once the second finds nothing left to do. Held until the connection is closed.
_ALONE = text("SELECT pg_advisory_lock(hashtext('farthing upgrade'))")
#: Runs that are done and were so before their sums were stored, or that something came to later.
_UNSUMMED = text("""
    SELECT run_id FROM farthing.unsummed JOIN farthing.run USING (run_id) WHERE state = 'done' ORDER BY run_id
""")


def upgrade(database_url: SecretStr) -> str:
    """Bring the ledger's tables, views and roles up to this code; returns the version. Safe to repeat.

    Each migration is a transaction, and so are the sums of each run that has none: some minutes for ten million
    attempts, in which lanes work on and audits read rows. What is interrupted goes on with the next upgrade.
    """
    url = parse_url(database_url)
    engine = create_engine(url, poolclass=NullPool, connect_args=CONNECT)
    try:
        with engine.connect() as connection:
            connection.execute(_ALONE)
            connection.commit()
            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(MIGRATIONS))
            command.upgrade(config, "head")
            version = str(connection.execute(text(VERSION)).scalar_one())
        _sum_up(engine)
        return version
    except DBAPIError as error:
        raise explain(error, url) from None  # its text may hold the address
    finally:
        engine.dispose()


def _sum_up(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text(f"SET ROLE {Role.LANE.value}"))
        runs = connection.execute(_UNSUMMED).scalars().all()
        connection.commit()
        for run_id in runs:
            connection.execute(text("SELECT farthing.sum_up(:run_id)"), {"run_id": run_id})
            connection.commit()
