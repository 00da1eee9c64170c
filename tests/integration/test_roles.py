"""Who may do what to the ledger (G16): roles are held by grants, everybody else by triggers."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from schemas.tables import metadata
from tasks.ledger.connection import Ledger
from tests.ledgers import run_everything, sql

TABLES = sorted(table.name for table in metadata.tables.values())
STATE = {"run", "shard", "lane", "budget"}
#: Columns that a lane may change, and what the rest of these tables is protected by.
LANE_MAY_UPDATE = {
    "budget": {"granted", "cap"},
    "run": {"state", "reason", "finished_at", "ledger_digest"},
    "shard": {"state", "lease_epoch", "lane_id"},
    "lane": {
        *("heartbeat_at", "ended_at", "ended_because", "in_flight", "waiting_because", "done", "results"),
        *("dead_letters", "reused", "escalated", "attempts", "cost", "bounds", "hit", "miss", "output"),
    },
}
VIEWS = (
    *("attempt", "result", "dead_letter", "run_cost", "tier_cost", "document_cost", "job_cost_by_day"),
    *("cache_efficiency", "escalation", "escalation_yield", "accuracy", "waste", "unpriced", "run_overview"),
    *("lane_progress", "event"),
)


@pytest.fixture
async def full_url(ledger: Ledger, ledger_url: str) -> str:
    """A ledger with a row in every table."""
    await run_everything(ledger)
    sql(ledger_url, "INSERT INTO cost_adjustment (run_id, amount, evidence) VALUES (1, 5, 'an export')")
    return ledger_url


@pytest.fixture
def act(full_url: str) -> Iterator[psycopg.Connection]:
    """A connection that may become any role; each statement stands alone."""
    with psycopg.connect(full_url, autocommit=True, options="-c search_path=farthing") as connection:
        yield connection


def refuses(connection: psycopg.Connection, role: str, statement: str) -> bool:
    """Whether `role` is refused; what is allowed is rolled back."""
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(f"SET LOCAL ROLE {role}")
            connection.execute(statement)
    except psycopg.errors.InsufficientPrivilege:
        return True
    return False


def columns(table: str) -> list[str]:
    return [column.name for column in metadata.tables[f"farthing.{table}"].columns]


def test_every_table_has_a_row_to_try_on(act: psycopg.Connection) -> None:
    empty = [table for table in TABLES if not act.execute(f"SELECT FROM {table} LIMIT 1").fetchall()]
    assert empty == []


def test_a_lane_updates_named_state_columns_and_nothing_else(act: psycopg.Connection) -> None:
    allowed: dict[str, set[str]] = {}
    for table in TABLES:
        for column in columns(table):
            if not refuses(act, "farthing_lane", f"UPDATE {table} SET {column} = {column}"):
                allowed.setdefault(table, set()).add(column)
    assert allowed == LANE_MAY_UPDATE


@pytest.mark.parametrize("role", ["farthing_lane", "farthing_auditor", "farthing_retention"])
def test_no_role_deletes_truncates_or_changes_the_schema(act: psycopg.Connection, role: str) -> None:
    for table in TABLES:
        for statement in (f"DELETE FROM {table}", f"TRUNCATE {table} CASCADE", f"DROP TABLE {table} CASCADE"):
            assert refuses(act, role, statement), statement
        assert refuses(act, role, f"ALTER TABLE {table} DISABLE TRIGGER ALL")
    assert refuses(act, role, "CREATE TABLE mine (number integer)")


def test_a_lane_cannot_adjust_costs_or_forge_the_version(act: psycopg.Connection) -> None:
    assert refuses(act, "farthing_lane", "INSERT INTO cost_adjustment (run_id, amount, evidence) VALUES (1, -5, '')")
    assert refuses(act, "farthing_lane", "INSERT INTO ledger_version VALUES ('9999')")
    assert refuses(act, "farthing_lane", "UPDATE ledger_version SET version_num = '9999'")


def test_an_auditor_reads_every_view_and_no_table(act: psycopg.Connection) -> None:
    assert [view for view in VIEWS if refuses(act, "farthing_auditor", f"SELECT * FROM {view}")] == []
    assert [table for table in TABLES if not refuses(act, "farthing_auditor", f"SELECT FROM {table}")] == []
    assert refuses(act, "farthing_auditor", "DELETE FROM event")  # the others are joins, which nobody can change
    found = act.execute(
        "SELECT relname FROM pg_class WHERE relkind = 'v' AND relnamespace = 'farthing'::regnamespace"
    )
    assert {name for (name,) in found} == set(VIEWS)


def test_retention_blanks_answers_and_nothing_else(act: psycopg.Connection) -> None:
    for statement in ("UPDATE document SET answer = NULL", "UPDATE answer SET answer = NULL, content = ''"):
        assert not refuses(act, "farthing_retention", statement)
    for statement in (
        """UPDATE document SET answer = '{"colour": "forged"}' WHERE state = 'result'""",
        "UPDATE document SET state = 'dead_letter'",
        "UPDATE answer SET answer = NULL, content = 'forged'",
        "UPDATE answer SET confidence = 1",
        "UPDATE attempt_outcome SET cost = 0",
        "SELECT document_id FROM document",
        "SELECT content FROM answer",
        "INSERT INTO answer (run_id, document_no, attempt_no, content) VALUES (1, 1, 9, '')",
    ):
        assert refuses(act, "farthing_retention", statement), statement


def test_even_the_owner_is_stopped_by_triggers(act: psycopg.Connection) -> None:
    for table in TABLES:
        column = columns(table)[-1]
        assert refuses(act, "farthing_owner", f"DELETE FROM {table}"), table
        assert refuses(act, "farthing_owner", f"TRUNCATE {table} CASCADE"), table
        if table not in STATE:
            assert refuses(act, "farthing_owner", f"UPDATE {table} SET {column} = {column}"), table


def test_everyone_else_sees_nothing(act: psycopg.Connection) -> None:
    for name in (*TABLES, *VIEWS):
        assert refuses(act, "pg_monitor", f"SELECT FROM farthing.{name}"), name
