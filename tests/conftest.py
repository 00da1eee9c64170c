"""What tests share: one real Postgres for the whole run, and a database of its own for every test that asks."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from sandbox.postgres import Server, create_database, drop_database, running


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all workers of this run; the last worker to leave stops it and deletes its data."""
    base = tmp_path_factory.getbasetemp()
    with running(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base, throwaway=True) as server:
        yield server


@pytest.fixture
def database_url(postgres: Server) -> Iterator[str]:
    """The URL of a fresh, empty database."""
    name = f"test_{uuid.uuid4().hex}"
    yield create_database(postgres, name)
    drop_database(postgres, name)
