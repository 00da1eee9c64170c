"""A superuser changes one value of the ledger at a time: the proof says so, or it was never promised to (G17)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from sqlalchemy import Column
from sqlalchemy.types import ARRAY, Boolean, Date, DateTime, Double, Integer, LargeBinary, Text

from schemas.attempts import RunId
from schemas.errors import ConfigurationError
from schemas.tables import metadata
from tasks.ledger.connection import Ledger
from tasks.ledger.proof import prove
from tests.ledgers import BACKFILL, BOOK, MONTH_CLOSE, run_everything, sql

TABLES = {table.name: table for table in metadata.tables.values() if table.name != "ledger_version"}
ALL = "every column"
#: What nobody promised to notice, and why.
NOT_PROMISED = {
    "budget": dict.fromkeys(("name", "declared", "is_simulated"), "how jobs find it; its cap counts (G9)"),
    "run": {
        "reason": "why it is not done; a done run has none",
        **dict.fromkeys(("concurrency", "limits"), "how much could be in flight at once, not what was"),
    },
    "lane": {
        **dict.fromkeys(
            ("host", "pid", "started_at", "heartbeat_at", "ended_at", "ended_because"), "who worked, not what it cost"
        ),
        **dict.fromkeys(("in_flight", "waiting_because", "places"), "progress of the moment"),
    },
    "shard": dict.fromkeys(("lease_epoch", "lane_id"), "the last lease; those at work are in the intents (G10)"),
    "run_event": dict.fromkeys(
        ("event_id", "happened_at", "detail", "event_key"), "a story; what counts in it are caps and digests"
    ),
    "budget_grant": dict.fromkeys(
        ("amount", "granted_at"), "the amount counts until the grant is closed, and then what it used (G9)"
    ),
    "grant_close": dict.fromkeys(("close_no", "closed_at"), "what counts is the sum of the last close (G9)"),
    "cost_adjustment": dict.fromkeys(
        set(TABLES["cost_adjustment"].columns.keys()) - {"attempt_no", "price_id", "corrected_price_id"},
        "a correction, written by people after the run; one of an attempt or with a price is checked (G7)",
    ),
    "month_close": {ALL: "about many runs: `farthing verify MONTH` computes it anew"},
    "run_sums": {
        "run_id": "then they are not read, and the rows are; of the other run it is noticed",
        "late": "then they are not read, and the rows are",
        "summed_at": "when they were added up, not what they come to",
    },
    "backfill": {
        ALL: "what was asked for and is left to do; its runs are proved by themselves, its cap is their budget's"
    },
}
_OF_AN_ATTEMPT = "document_no = 2, hit = 0, miss = 0, output = 0, amount = 0, billed_on = now()"
_SOME_PRICE = "(SELECT min(price_id) FROM price WHERE currency = 'USD')"
#: Where another value has to be one that the table's checks let pass.
SPELT = {
    ("price", "band"): "CASE band WHEN 'flat' THEN 'peak' ELSE 'flat' END",
    ("budget", "name"): "'x', declared = cap",
    ("budget", "declared"): "cap, name = 'x'",
    ("run", "state"): "'paused'",
    ("backfill", "state"): "'done'",
    ("shard", "state"): "'open'",
    ("document", "state"): "'dead_letter', reason = 'x'",
    ("cost_adjustment", "attempt_no"): f"1, {_OF_AN_ATTEMPT}, price_id = {_SOME_PRICE}",
    ("cost_adjustment", "price_id"): f"{_SOME_PRICE}, {_OF_AN_ATTEMPT}, attempt_no = 1",
    ("cost_adjustment", "corrected_price_id"): (
        f"{_SOME_PRICE}, hit = 1, miss = 0, output = 0, amount = 0, billed_on = now()"
    ),
    ("held", "of_run_id"): "1, of_document_no = 1, attempt_no = NULL",
    ("held", "of_document_no"): "1, of_run_id = 1, attempt_no = NULL",
    ("certified", "tail"): "tail + 1",
    ("month_close", "month"): "month + interval '1 month'",
    ("month_close", "cost"): "cost + 1",
    ("month_close", "unknown"): "unknown + 1",
}
#: Which row is changed: one that everything is filled in for, and that a run rests on.
ROW = {
    "price": "price_id = (SELECT max(price_id) FROM attempt_outcome)",
    "attempt_outcome": "document_no = 1 AND attempt_no = 1",
    "document": "document_no = 0",
    "run_event": "kind = 'opened'",
    "run_sums": "late = 1",
}


def another(column: Column[object]) -> str:
    """SQL for a value of the column's kind which is not the one that is there."""
    name = f'"{column.name}"'
    if spelt := SPELT.get((column.table.name, column.name)):
        return spelt
    match column.type:
        case Boolean():
            return f"NOT coalesce({name}, false)"
        case Integer():
            return f"coalesce({name}, 0) + 100"
        case Double():
            return f"coalesce({name}, 0) + 1e-9"
        case DateTime():
            return f"coalesce({name}, now()) - interval '1 microsecond'"
        case Date():
            return f"coalesce({name}, current_date) - 1"
        case LargeBinary():
            return f"sha256(coalesce({name}, ''))"
        case ARRAY():
            return f"{name} || {name}[1:1]"
        case Text():
            return f"coalesce({name}, '') || 'x'"
        case _:  # jsonb
            return f"""coalesce({name}, '{{}}') || '{{"tampered": true}}'"""


@contextmanager
def tampered(connection: psycopg.Connection, column: Column[object]) -> Iterator[None]:
    """The ledger with one value changed, past every trigger and foreign key; then as it was."""
    table = column.table.name
    connection.execute(f"CREATE TEMP TABLE kept AS TABLE {table}")
    where = ROW.get(table, f"ctid = (SELECT min(ctid) FROM {table})")
    changed = connection.execute(f'UPDATE {table} SET "{column.name}" = {another(column)} WHERE {where}')
    assert changed.rowcount == 1
    yield
    connection.execute(f"DELETE FROM {table}; INSERT INTO {table} TABLE kept; DROP TABLE kept")


async def is_proved(ledger: Ledger, run_id: RunId) -> bool:
    try:
        return (await prove(ledger, run_id, BOOK)).proved
    except ConfigurationError:  # it has lost its number, its prompt or its budget: there is no such run any more
        return False


@pytest.mark.parametrize("table", TABLES)
async def test_a_changed_value_of_any_column_is_noticed(table: str, ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    sql(ledger_url, "INSERT INTO cost_adjustment (run_id, amount, evidence) VALUES (1, 5, 'an export')")
    sql(ledger_url, BACKFILL)
    sql(ledger_url, MONTH_CLOSE)
    sql(ledger_url, "SELECT sum_up(1)")
    unnoticed = set()
    options = "-c search_path=farthing -c session_replication_role=replica"
    with psycopg.connect(ledger_url, autocommit=True, options=options) as superuser:
        for column in TABLES[table].columns:
            with tampered(superuser, column):
                if await is_proved(ledger, run.run_id):
                    unnoticed.add(column.name)
        assert (await prove(ledger, run.run_id, BOOK)).proved
    promised = NOT_PROMISED.get(table, {})
    assert unnoticed == (set(TABLES[table].columns.keys()) if ALL in promised else set(promised))


async def test_a_purge_is_no_tampering_and_is_told_of(ledger: Ledger, ledger_url: str) -> None:
    run = await run_everything(ledger)
    sql(ledger_url, "UPDATE answer SET content = '', answer = NULL")
    proof = await prove(ledger, run.run_id, BOOK)
    assert proof.proved
    assert "1 answers were purged" in proof.evidence["G3"].says


async def test_a_digest_that_was_made_anew_is_not_the_one_that_was_told(ledger: Ledger, ledger_url: str) -> None:
    """A lane may set a run's digest; the event of its end it cannot change."""
    run = await run_everything(ledger)
    sql(ledger_url, "UPDATE attempt_outcome SET provider_id = 'forged' WHERE document_no = 0")
    named = (await prove(ledger, run.run_id, BOOK)).evidence["G3"].violations[0]
    forged = named.split("the digest ")[1].split(",")[0]
    sql(ledger_url, f"UPDATE run SET ledger_digest = '{forged}'")
    (violation,) = (await prove(ledger, run.run_id, BOOK)).evidence["G3"].violations
    assert violation.startswith(f"run 1: its rows have the digest {forged}, settled was sha256:")
