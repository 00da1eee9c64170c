"""What tests share: one real Postgres for the whole run, and a database of its own for every test that asks."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr

from sandbox.postgres import Server, create_database, drop_database, running
from tests.faults import summary

#: The migrated database that `ledger_url` copies.
TEMPLATE = "migrated"
#: Where Linux keeps files in memory, and how much of it the servers of a run may need.
MEMORY, ENOUGH_BYTES = Path("/dev/shm"), 4 * 1024**3
#: What the README tells users to set. A test that met it would use, and pay for, whatever is meant by it.
SETTINGS = ("FARTHING_", "DEEPSEEK_", "PREFECT_API_", "OTEL_")

# Before any test, worker or child begins. Where chance begins and how long faults go on is for whoever runs them.
for name in [name for name in os.environ if name.startswith(SETTINGS) and not name.startswith("FARTHING_FAULTS_")]:
    del os.environ[name]


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all workers of this run; the last worker to leave stops it and deletes its data."""
    base = tmp_path_factory.getbasetemp()
    home = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    # What breaks Postgres itself has servers of its own; here a database that is dropped would wait for the disk.
    with running(_in_memory(home), throwaway=True, durable=False) as server:
        yield server


def _in_memory(home: Path) -> Path:
    """A folder of this run's in memory, where there is much: a database for each test is 300 files that come and go.

    ext4 looks long for an inode where so many were deleted just now: a quarter of all processor time went there.
    """
    if not os.access(MEMORY, os.W_OK) or shutil.disk_usage(MEMORY).free < ENOUGH_BYTES:
        return home
    return MEMORY / f"farthing-{home.parent.name}-{home.name}"


@pytest.fixture
def database_url(postgres: Server) -> Iterator[str]:
    """The URL of a fresh, empty database."""
    name = f"test_{uuid.uuid4().hex}"
    yield create_database(postgres, name)
    drop_database(postgres, name)


@pytest.fixture(scope="session")
def template(postgres: Server) -> str:
    """A migrated database to copy, made once for all workers."""
    from tasks.ledger.upgrades import upgrade  # Alembic and SQLAlchemy are for those who ask for a ledger

    with closing(psycopg.connect(postgres.url, autocommit=True)) as connection:
        connection.execute("SELECT pg_advisory_lock(hashtext(%s))", [TEMPLATE])
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [TEMPLATE]).fetchone():
            upgrade(SecretStr(create_database(postgres, f"{TEMPLATE}_soon")))
            connection.execute(f"ALTER DATABASE {TEMPLATE}_soon RENAME TO {TEMPLATE}")
    return TEMPLATE


@pytest.fixture
def ledger_url(postgres: Server, template: str) -> Iterator[str]:
    """The URL of a fresh, migrated database."""
    name = f"test_{uuid.uuid4().hex}"
    yield create_database(postgres, name, template=template)
    drop_database(postgres, name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of the faults that were played. Here, because a controller of workers reads no other conftest."""
    if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker's report would be of its own tests only
        summary.show(terminalreporter)
