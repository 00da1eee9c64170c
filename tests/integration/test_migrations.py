"""Migrations make the tables that the code knows, again and at once if need be, and say what rights they lack."""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from pydantic import SecretStr
from sqlalchemy import create_engine, make_url
from sqlalchemy.pool import NullPool

from migrations.roles import ROLES
from sandbox.postgres import create_database, running
from schemas.errors import LedgerUnavailable
from schemas.tables import SCHEMA, metadata
from tasks.ledger.connection import Role, opened
from tasks.ledger.upgrades import upgrade
from tests.ledgers import lane_ledger, run_everything, sql, value

ROOT = Path(__file__).parents[2]
MIGRATE = """
import sys
from pydantic import SecretStr
from tasks.ledger.upgrades import upgrade
print(upgrade(SecretStr(sys.argv[1])))
"""


@pytest.fixture
def stranger_url(ledger_url: str) -> Iterator[str]:
    """The ledger's URL for a login that has no rights."""
    name = f"stranger_{uuid.uuid4().hex}"
    sql(ledger_url, f"CREATE ROLE {name} LOGIN PASSWORD 'let-me-in'")
    yield make_url(ledger_url).set(username=name, password="let-me-in").render_as_string(hide_password=False)
    sql(ledger_url, f"DROP ROLE {name}")


def differences(url: str) -> list[Any]:
    """What autogenerate would change about tables and columns; constraints and indexes live in migrations only."""
    engine = create_engine(
        make_url(url).set(drivername="postgresql+psycopg"),
        poolclass=NullPool,
        connect_args={"options": "-c search_path=public"},  # the login's own schema would count as the default one
    )
    options = {
        "include_schemas": True,
        "include_name": lambda name, kind, _: kind != "schema" or name == SCHEMA,
        "version_table": "ledger_version",
        "version_table_schema": SCHEMA,
        "compare_server_default": True,
    }
    with engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
    flat = [step for steps in found for step in (steps if isinstance(steps, list) else [steps])]
    return [step for step in flat if re.fullmatch("(add|remove)_(table|column)|modify_(?!comment).*", step[0])]


def test_migrations_make_exactly_the_tables_and_columns_that_the_code_knows(ledger_url: str) -> None:
    assert differences(ledger_url) == []


def test_the_comparison_sees_a_column_that_only_the_database_has(ledger_url: str) -> None:
    sql(ledger_url, "ALTER TABLE run ADD COLUMN mood text")
    assert [(step[0], step[3].name) for step in differences(ledger_url)] == [("remove_column", "mood")]


def test_upgrading_twice_changes_nothing(ledger_url: str) -> None:
    before = catalogue(ledger_url)
    assert upgrade(SecretStr(ledger_url)) == value(ledger_url, "SELECT version_num FROM ledger_version")
    assert catalogue(ledger_url) == before


def test_each_migration_is_a_transaction_and_one_that_failed_is_done_by_the_next_upgrade(database_url: str) -> None:
    sql(
        database_url,
        "CREATE SCHEMA farthing AUTHORIZATION farthing_owner; SET ROLE farthing_owner;"
        "CREATE TABLE farthing.run_sums (n int)",
    )
    with pytest.raises(LedgerUnavailable):
        upgrade(SecretStr(database_url))
    assert value(database_url, "SELECT version_num FROM farthing.ledger_version") == "0010"
    sql(database_url, "DROP TABLE farthing.run_sums")
    assert upgrade(SecretStr(database_url)) > "0010"


async def test_runs_of_before_their_sums_were_stored_are_summed_by_an_upgrade(ledger_url: str) -> None:
    async with lane_ledger(ledger_url) as ledger:
        await run_everything(ledger)
    sums = "SELECT to_jsonb(s) - 'summed_at' FROM run_sums s"
    made = sql(ledger_url, sums)
    sql(ledger_url, "DELETE FROM run_sums")
    for _ in range(2):
        upgrade(SecretStr(ledger_url))
        assert sql(ledger_url, sums) == made


def catalogue(url: str) -> list[tuple[Any, ...]]:
    return sql(url, "SELECT oid, relname, relacl::text FROM pg_class WHERE relnamespace = 'farthing'::regnamespace")


def test_everything_belongs_to_an_owner_that_cannot_log_in(ledger_url: str) -> None:
    owners = sql(
        ledger_url,
        "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'farthing'::regnamespace",
    )
    assert owners == [("farthing_owner",)]
    can_log_in = "SELECT bool_or(rolcanlogin) FROM pg_roles WHERE rolname = ANY(%s)"
    assert value(ledger_url, can_log_in, list(ROLES)) is False


def test_a_login_that_may_create_roles_migrates_databases_of_a_new_cluster_at_once(tmp_path: Path) -> None:
    """No superuser is needed. Roles belong to the cluster, so they race for them; Alembic is not for threads."""
    with running(tmp_path, throwaway=True) as server:
        sql(server.url, "CREATE ROLE migrator LOGIN CREATEROLE PASSWORD 'let-me-in'")
        urls = [create_database(server, f"ledger_{number}") for number in range(2)]
        for number in range(2):
            sql(server.url, f"GRANT CREATE ON DATABASE ledger_{number} TO migrator")
        theirs = [make_url(url).set(username="migrator", password="let-me-in") for url in [*urls, urls[0]]]
        started = [
            subprocess.Popen(
                [sys.executable, "-c", MIGRATE, url.render_as_string(hide_password=False)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for url in theirs
        ]
        versions = [process.communicate()[0] for process in started]
        assert [process.returncode for process in started] == [0, 0, 0]
        assert len(set(versions)) == 1
        assert {value(url, "SELECT count(*) FROM ledger_version") for url in urls} == {1}


def test_a_login_without_rights_cannot_migrate_and_is_told_what_it_needs(stranger_url: str) -> None:
    with pytest.raises(LedgerUnavailable, match="CREATEROLE and CREATE on the database") as caught:
        upgrade(SecretStr(stranger_url))
    assert "let-me-in" not in str(caught.value)


@pytest.mark.parametrize("role", Role)
async def test_a_login_that_is_no_member_cannot_open_the_ledger_and_is_told_which_grant(
    role: Role, stranger_url: str
) -> None:
    with pytest.raises(LedgerUnavailable, match="GRANT farthing_lane, farthing_auditor TO <login>"):
        async with opened(SecretStr(stranger_url), role):
            pass


async def test_a_member_that_owns_nothing_can_work_and_audit(stranger_url: str, ledger_url: str) -> None:
    roles = "farthing_lane, farthing_auditor, farthing_bookkeeper"
    sql(ledger_url, f"GRANT {roles} TO {make_url(stranger_url).username}")
    for role in Role:
        async with opened(SecretStr(stranger_url), role) as ledger, ledger.transaction():
            pass
