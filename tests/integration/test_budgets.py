"""The hard budget: whatever lanes do at the same moment, what was granted never passes the cap (G9)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import TextClause, text

from schemas.attempts import Signal
from schemas.records import Record
from tasks.ledger import budgets, leases, runs
from tasks.ledger.connection import Ledger
from tests.ledgers import COST, RESERVED, Hand, lane_ledger, opening, sql, value

HELD = """
    SELECT coalesce(sum(coalesce(used, amount)), 0) FROM budget_grant g LEFT JOIN LATERAL (
        SELECT used FROM grant_close c WHERE c.grant_id = g.grant_id ORDER BY close_no DESC LIMIT 1) c ON true
"""
WAITERS = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


async def open_grant(hand: Hand, need: int, want: int) -> int | None:
    grant = await budgets.open_grant(
        hand.ledger, hand.run.run_id, hand.lane_id, hand.run.budget_id, need=need, want=want
    )
    return grant.amount if grant else None


async def test_twenty_takers_at_once_never_pass_the_cap(ledger_url: str) -> None:
    cap = 10_000
    async with lane_ledger(ledger_url, pool_size=12) as ledger:
        run = await runs.open_run(ledger, opening(cap=cap))
        hand = await Hand.join(ledger, run, amount=1)
        seen: list[tuple[int, int]] = []
        refused = 0

        async def take(seed: int) -> None:
            nonlocal refused
            dice = random.Random(seed)
            for _ in range(8):
                need = dice.randint(1, 900)
                grant = await budgets.open_grant(
                    ledger, run.run_id, hand.lane_id, run.budget_id, need=need, want=need * dice.randint(1, 4)
                )
                refused += grant is None
                if grant is not None and dice.random() < 0.5:
                    await budgets.close_grants(ledger, run.run_id, [grant.grant_id])

        async def watch() -> None:
            while True:
                seen.append(await asyncio.to_thread(observe))
                await asyncio.sleep(0)

        def observe() -> tuple[int, int]:
            granted, held = sql(ledger_url, f"SELECT granted, ({HELD}) FROM budget")[0]
            return granted, int(held)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(take(seed) for seed in range(20)))
        watching.cancel()
        await asyncio.wait([watching])
        seen.append(observe())
    assert refused
    assert len(seen) > 2
    assert all(granted <= cap and granted == held for granted, held in seen)


async def test_a_grant_is_what_was_wanted_or_what_is_left_if_that_is_enough(ledger: Ledger) -> None:
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening(cap=100)), amount=1)
    assert await open_grant(hand, need=10, want=60) == 60
    assert await open_grant(hand, need=10, want=60) == 39
    assert await open_grant(hand, need=1, want=60) is None


async def test_a_cap_that_is_lowered_stops_what_is_new_and_takes_back_nothing(
    ledger: Ledger, ledger_url: str
) -> None:
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening(cap=100)), amount=60)
    await runs.open_run(ledger, opening(cap=50))
    assert await open_grant(hand, need=1, want=1) is None
    assert sql(ledger_url, "SELECT granted, cap FROM budget") == [(60, 50)]
    await runs.open_run(ledger, opening(cap=70))
    assert await open_grant(hand, need=1, want=60) == 10


async def test_the_last_pico_can_be_granted_and_no_more(ledger: Ledger, ledger_url: str) -> None:
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening(cap=100)), amount=1)
    assert await open_grant(hand, need=99, want=99) == 99
    assert value(ledger_url, "SELECT granted FROM budget") == 100


async def test_a_closed_grant_gives_back_what_its_attempts_did_not_use(ledger: Ledger, ledger_url: str) -> None:
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening()), amount=5 * RESERVED)
    lease = (await hand.claim()).lease
    await hand.answer(lease, 0)
    await hand.intend(hand.intent(lease, 1))
    await hand.record(Record(hand.outcome(1, signal=Signal.LOST, verdict=None, usage=None)))
    await hand.intend(hand.intent(lease, 2))
    await hand.record(Record(hand.outcome(2, signal=Signal.RATE_LIMITED, verdict=None, usage=None)))
    await budgets.close_grants(ledger, hand.run.run_id, [hand.grant_id])
    assert sql(ledger_url, "SELECT close_no, used FROM grant_close") == [(1, COST + RESERVED)]
    assert value(ledger_url, "SELECT granted FROM budget") == COST + RESERVED


async def test_closing_twice_closes_once(ledger: Ledger, ledger_url: str) -> None:
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening()))
    for _ in range(2):
        await budgets.close_grants(ledger, hand.run.run_id, [hand.grant_id])
    assert sql(ledger_url, "SELECT close_no, used FROM grant_close") == [(1, 0)]
    assert value(ledger_url, "SELECT granted FROM budget") == 0


async def test_a_late_outcome_closes_the_grant_anew_by_what_it_really_cost(ledger: Ledger, ledger_url: str) -> None:
    hand = await Hand.join(ledger, await runs.open_run(ledger, opening()))
    lease = (await hand.claim()).lease
    await hand.intend(hand.intent(lease, 0))
    await hand.leave()
    assert value(ledger_url, "SELECT granted FROM budget") == RESERVED
    await hand.record(Record(hand.outcome(0)))
    assert sql(ledger_url, "SELECT close_no, used FROM grant_close ORDER BY 1") == [(1, RESERVED), (2, COST)]
    assert value(ledger_url, "SELECT granted FROM budget") == COST


async def test_lanes_that_settle_the_same_grants_at_once_settle_them_once(ledger_url: str) -> None:
    """Held up together at the budget's row, then let go: whoever comes second finds nothing left to do."""
    async with lane_ledger(ledger_url) as ledger:
        run = await runs.open_run(ledger, opening())
        hand = await Hand.join(ledger, run, amount=RESERVED)
        with psycopg.connect(ledger_url, options="-c search_path=farthing") as holder:
            holder.execute("SELECT FROM budget FOR UPDATE")
            settling = [
                asyncio.create_task(budgets.close_grants(ledger, run.run_id, [hand.grant_id])),
                asyncio.create_task(leases.leave(ledger, run.run_id, hand.lane_id, "done")),
            ]
            while value(ledger_url, WAITERS) < len(settling):
                await asyncio.sleep(0.01)
        await asyncio.gather(*settling)
    assert sql(ledger_url, "SELECT close_no, used FROM grant_close") == [(1, 0)]
    assert value(ledger_url, "SELECT granted FROM budget") == 0


async def test_a_budget_is_exhausted_when_a_need_does_not_fit_and_no_living_lane_holds_any_of_it(
    ledger: Ledger,
) -> None:
    run = await runs.open_run(ledger, opening(cap=100 * RESERVED))
    hand = await Hand.join(ledger, run)
    assert not await budgets.is_exhausted(ledger, run.budget_id, RESERVED)
    await hand.answer_shard()
    await budgets.close_grants(ledger, run.run_id, [hand.grant_id])
    left = 100 * RESERVED - 3 * COST
    assert not await budgets.is_exhausted(ledger, run.budget_id, left)
    assert await budgets.is_exhausted(ledger, run.budget_id, left + 1)
    await hand.take(1)
    assert not await budgets.is_exhausted(ledger, run.budget_id, left + 1)
    await hand.leave()
    assert await budgets.is_exhausted(ledger, run.budget_id, left + 1)


@pytest.mark.parametrize("statement", [budgets._SETTLE, leases._DECLARE_UNKNOWN], ids=["grants", "unknowns"])
async def test_ending_a_lane_looks_each_attempt_up_though_postgres_knows_only_earlier_runs(
    ledger: Ledger, ledger_url: str, statement: TextClause
) -> None:
    """Statistics that are older than a run once made it join two of the run's tables row by row."""
    run = await runs.open_run(ledger, opening())
    hand = await Hand.join(ledger, run)
    for earlier in range(1001, 1004):
        sql(ledger_url, INTENTS, earlier, 0, 0)
        sql(ledger_url, OUTCOMES, earlier, 0)
        sql(ledger_url, UNKNOWNS, earlier, 5)
    sql(ledger_url, "ANALYZE attempt_intent, attempt_outcome, attempt_unknown")
    sql(ledger_url, INTENTS, run.run_id, hand.lane_id, hand.grant_id)
    sql(ledger_url, OUTCOMES, run.run_id, MANY // 2)
    sql(ledger_url, UNKNOWNS, run.run_id, MANY // 2)
    sql(ledger_url, "UPDATE shard SET first_document_no = 1, document_count = %s WHERE shard_no = 0", MANY)
    explained = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement.text}")
    async with ledger.transaction() as connection:
        key = {"run_id": run.run_id, "lanes": [hand.lane_id], "grants": [], "shards": [0], "because": "lane died"}
        (plan,) = (await connection.execute(explained, key)).scalar_one()
    assert sum(vain_comparisons(plan["Plan"])) < MANY


#: Attempts of a run, as plain as they come: by run, lane and grant.
MANY = 2000
INTENTS = f"""
    INSERT INTO attempt_intent (run_id, document_no, attempt_no, tier, purpose, shard_no, epoch, lane_id, grant_id,
                                price_id, reserved)
    SELECT %s, n, 1, 'flash', 'answer', 0, 1, %s, %s, 1, 1 FROM generate_series(1, {MANY}) n
"""
OUTCOMES = """
    INSERT INTO attempt_outcome (run_id, document_no, attempt_no, signal, sent_at, completed_at, cost)
    SELECT run_id, document_no, 1, 'answered', now(), now(), 1 FROM attempt_intent
    WHERE run_id = %s AND document_no > %s
"""
UNKNOWNS = """
    INSERT INTO attempt_unknown (run_id, document_no, attempt_no, bound, because)
    SELECT run_id, document_no, 1, 1, 'lane_died' FROM attempt_intent WHERE run_id = %s AND document_no <= %s
"""


def vain_comparisons(node: dict[str, Any]) -> Iterator[float]:
    """How many pairs of rows each join of a plan looked at, and found that they do not belong together."""
    yield node.get("Rows Removed by Join Filter", 0) * node["Actual Loops"]
    for child in node.get("Plans", []):
        yield from vain_comparisons(child)
