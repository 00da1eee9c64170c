"""Balances: what the account held when runs began and ended, as events of them, and what it paid in between.

A run that was at work in that time counts with all that it may have been billed then, so that an alarm is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.attempts import RunId
from schemas.balance import BALANCE, Balance, Paid, Reading, balance_detail, compare, read_reading, told_of
from schemas.money import Currency
from schemas.reconciliation import LATE
from tasks.ledger import runs
from tasks.ledger.breakdowns import hashed
from tasks.ledger.connection import Ledger

#: The kind is a literal, since an index has the events of that kind alone.
_READINGS = f"""
    SELECT o.run_id, o.is_simulated, e.happened_at, e.detail
    FROM event e JOIN run_overview o USING (run_id) WHERE e.kind = '{BALANCE}'
"""  # noqa: S608 (made of our own constants)
_OF_RUNS = text(f"{_READINGS} AND e.run_id = ANY(:runs)")
_BETWEEN = text(f"{_READINGS} AND e.happened_at >= :since AND e.happened_at <= :until")

#: Runs that may have been billed in that time, and whether they were in no other. One that no reading says the
#: provider of counts, too: it may have been this one.
_AT_WORK = text(f"""
    SELECT o.run_id, o.opened_at >= :since AND max(coalesce(l.ended_at, l.heartbeat_at)) <= :until AS is_inside
    FROM run_overview o JOIN lane_progress l USING (run_id)
    WHERE o.is_simulated = :is_simulated AND o.currency = :currency AND o.opened_at <= :until
      AND coalesce((SELECT bool_or(e.detail ->> 'provider' = :provider) FROM event e
                    WHERE e.run_id = o.run_id AND e.kind = '{BALANCE}'), true)
    GROUP BY o.run_id, o.opened_at HAVING max(coalesce(l.ended_at, l.heartbeat_at)) >= :earliest
""")  # noqa: S608 (made of our own constants)

_KNOWN = text("""
    SELECT coalesce(sum(cost_pico), 0) AS cost_pico, coalesce(sum(unknown_pico), 0) AS unknown_pico
    FROM (
        SELECT cost_pico, unknown_pico FROM spend WHERE run_id = ANY(:inside)
        UNION ALL
        SELECT a.cost_pico, a.unknown_pico
        FROM unnest(CAST(:others AS bigint[])) AS one (run_id)
        CROSS JOIN LATERAL (
            SELECT x.cost_pico, x.unknown_pico FROM attempt x
            WHERE x.run_id = one.run_id AND x.intended_at BETWEEN :earliest AND :until OFFSET 0) a
    ) known
""")


async def note(
    ledger: Ledger,
    run_id: RunId,
    at: str,
    currency: Currency,
    found: Balance | None,
    provider: str,
    key: str,
    ago_s: float = 0.0,
) -> None:
    """Append what the account held at the start or the end of a run, `ago_s` seconds ago. None: nobody knows."""
    detail = balance_detail(at, currency, found, provider, key, ago_s)
    await runs.note(ledger, run_id, BALANCE, detail, key=f"{BALANCE} {at} {datetime.now(UTC).isoformat()}")


async def read_paid(connection: AsyncConnection, of_runs: Sequence[int]) -> tuple[Paid, ...]:
    """What each account paid from the first reading of these runs to the last. None of one that was read once."""
    rows = await connection.execute(_OF_RUNS, {"runs": list(of_runs)})
    return await _read_paid(connection, [read_reading(*row) for row in rows])


async def read_paid_between(
    connection: AsyncConnection, since: datetime, until: datetime, currency: Currency, *, is_simulated: bool
) -> tuple[Paid, ...]:
    """The same from the first reading to the last of that time, by Postgres's clock."""
    rows = await connection.execute(_BETWEEN, {"since": since, "until": until})
    readings = [read_reading(*row) for row in rows]
    mine = [each for each in readings if (each.currency, each.is_simulated) == (currency, is_simulated)]
    return await _read_paid(connection, mine)


async def _read_paid(connection: AsyncConnection, readings: Sequence[Reading]) -> tuple[Paid, ...]:
    found = []
    for _, mine in groupby(sorted(readings, key=_account), key=_account):
        if len(told := told_of(list(mine))) > 1:
            found.append(await _compare(connection, told[0], told[-1].noted_at))
    return tuple(found)


def _account(reading: Reading) -> tuple[str, str, str, bool]:
    """What an account is known by here. One with two keys is two, each explained by what runs with either spent."""
    return reading.provider, reading.key, reading.currency.value, reading.is_simulated


async def _compare(connection: AsyncConnection, first: Reading, until: datetime) -> Paid:
    """All readings of that account in that time count, other runs' included, and so does what those spent."""
    since = first.noted_at
    rows = await connection.execute(_BETWEEN, {"since": since, "until": until + LATE})
    readings = [read_reading(*row) for row in rows]
    within = [each for each in readings if _account(each) == _account(first) and since <= each.noted_at <= until]
    key: dict[str, Any] = {"since": since, "until": until, "earliest": since - LATE}
    whose = {"provider": first.provider, "currency": first.currency.value, "is_simulated": first.is_simulated}
    at_work = (await connection.execute(_AT_WORK, key | whose)).all()
    inside = [row.run_id for row in at_work if row.is_inside]
    others = [row.run_id for row in at_work if not row.is_inside]
    async with hashed(connection):
        known = (await connection.execute(_KNOWN, key | {"inside": inside, "others": others})).one()
    return compare(within, int(known.cost_pico), int(known.unknown_pico))
