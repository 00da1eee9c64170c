"""The books are read by their days: of other attempts few are looked at, and nothing unknown is left out."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import Any

import pytest
from sqlalchemy import TextClause, text

from tasks.ledger import books
from tasks.ledger.connection import Ledger
from tests.integration.test_sums import SIZES, run_anything
from tests.ledgers import run_everything, sql, value

#: Attempts of an older run, in the order of their months.
MANY = 80_000
OLDER = f"""
    INSERT INTO attempt_intent (run_id, document_no, attempt_no, tier, purpose, shard_no, epoch, lane_id, grant_id,
                                price_id, reserved, intended_at)
    SELECT 1000, n, 1, 'flash', 'answer', 0, 1, 1, 1, 1, 1, timestamptz '2026-01-01' + n * interval '150 s'
    FROM generate_series(1, {MANY}) n;
    INSERT INTO attempt_outcome (run_id, document_no, attempt_no, signal, sent_at, completed_at, price_id, hit, miss,
                                 output, cost)
    SELECT run_id, document_no, 1, 'answered', intended_at, intended_at, 1, 1, 1, 1, 1 FROM attempt_intent
    WHERE run_id = 1000;
    INSERT INTO run OVERRIDING SYSTEM VALUE SELECT (jsonb_populate_record(r, '{{"run_id": 1000}}')).* FROM run r;
    SELECT brin_summarize_new_values('attempt_outcome_by_day');
    ANALYZE
"""
KEY = {"is_simulated": False, "currency": "USD"}
DAYS = [date(2026, 9, day) for day in (25, 26, 27)]

#: What `unsettled` is about, from the tables and by nothing but its meaning.
_UNKNOWN_BY_MEANING = """
    SELECT i.run_id, i.document_no, i.attempt_no, u.bound IS NULL AND o.signal IS NULL, coalesce(u.bound, i.reserved)
    FROM attempt_intent i
    LEFT JOIN attempt_outcome o USING (run_id, document_no, attempt_no)
    LEFT JOIN attempt_unknown u USING (run_id, document_no, attempt_no)
    WHERE o.cost IS NULL AND NOT EXISTS (
        SELECT FROM cost_adjustment c WHERE (c.run_id, c.document_no, c.attempt_no)
            = (i.run_id, i.document_no, i.attempt_no))
    ORDER BY 1, 2, 3
"""


def read_rows(node: dict[str, Any]) -> Iterator[float]:
    """How many rows of attempts each scan of a plan looked at."""
    if str(node.get("Relation Name")).startswith("attempt_"):
        looked = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")
        yield sum(node.get(name, 0) for name in looked) * node["Actual Loops"]
    for child in node.get("Plans", []):
        yield from read_rows(child)


async def count_read(ledger: Ledger, query: TextClause, **key: Any) -> float:
    async with ledger.transaction() as connection:
        (plan,) = (
            await connection.execute(text(f"EXPLAIN (ANALYZE, FORMAT JSON) {query.text}"), KEY | key)
        ).scalar_one()
    return sum(read_rows(plan["Plan"]))


async def test_attempts_of_other_days_are_not_read(ledger: Ledger, ledger_url: str) -> None:
    await run_everything(ledger)
    sql(ledger_url, OLDER)
    month = {"first": date(2026, 9, 1), "next": date(2026, 10, 1)}
    until = datetime.now(UTC)
    for query, key in (
        (books._BOOKED, {"days": DAYS}),
        (books._SHARED, {"days": DAYS}),
        (books._UNSETTLED, {"first": None, "next": None}),
        (books._UNKNOWN_IN_MONTH, month),
        (books._MONTH, month | {"until": until}),
        (books._LATE, month | {"until": until}),
    ):
        assert await count_read(ledger, query, **key) < MANY / 4
    of_january = await count_read(ledger, books._BOOKED, days=[date(2026, 1, 9)])
    assert MANY / 200 < of_january < MANY / 4


@pytest.mark.parametrize("is_at_work", [True, False])
async def test_nothing_unknown_is_left_out(is_at_work: bool, ledger: Ledger, ledger_url: str) -> None:
    """For any rows. Of a lane that has ended nothing is open; the ledger would not prove."""
    for seed, documents in SIZES:
        await run_anything(ledger, ledger_url, seed, documents)
    sql(
        ledger_url,
        "INSERT INTO cost_adjustment (run_id, document_no, attempt_no, amount, evidence, price_id, hit, miss, output,"
        " billed_on) SELECT run_id, document_no, attempt_no, 0, 'e', 1, 0, 0, 0, '2026-09-26' FROM attempt_unknown"
        " WHERE document_no % 3 = 0",
    )
    if not is_at_work:
        sql(ledger_url, "UPDATE lane SET ended_at = now(), ended_because = 'died'")
    found = sql(
        ledger_url,
        "SELECT run_id, document_no, attempt_no, is_open, bound_pico FROM unsettled ORDER BY 1, 2, 3",
    )
    meant = [row for row in sql(ledger_url, _UNKNOWN_BY_MEANING) if is_at_work or not row[3]]
    assert found == meant
    assert value(ledger_url, "SELECT count(*) FROM unsettled") > 20
