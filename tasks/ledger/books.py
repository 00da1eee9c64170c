"""The books: booked cost by day and month, what an export closes, and months that are closed.

Reading needs an auditor. Booking a closing or closing a month is the bookkeeper's, one at a time: whoever comes
second waits, reads what the first has written, and writes nothing that was written already.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, TypeAlias

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.attempts import Usage
from schemas.balance import Paid
from schemas.errors import ConfigurationError
from schemas.money import Currency, Money
from schemas.months import Books, Checked, Closed, Late, Month, RunInMonth, read_runs
from schemas.pricing import Price
from schemas.reconciliation import BookedTokens, Closing, Correction, Shared, Unsettled
from tasks.ledger.balances import read_paid, read_paid_between
from tasks.ledger.connection import Ledger
from tasks.ledger.runs import SUM_UP, register_prices
from tasks.ledger.spend import SNAPSHOT

#: What a row of the books is made of.
Bookable: TypeAlias = Closing | Correction

_ALONE = text("SELECT pg_advisory_xact_lock(hashtext('farthing books'))")
#: However long another transaction, or judging, takes: who was stopped in here keeps only others from booking.
_PATIENT = text("SET LOCAL idle_in_transaction_session_timeout TO 0")
_WRITING_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")

_RUN = text("SELECT currency, is_simulated FROM run_overview WHERE run_id = :run")

_DAYS = text("SELECT DISTINCT day FROM booked WHERE run_id = :run AND price IS NOT NULL")

_CURRENCIES = text("SELECT DISTINCT currency FROM run_overview WHERE is_simulated = :is_simulated")

_BOOKED = text("""
    SELECT day, user_id, price, model, hit_pico, miss_pico, output_pico, sum(hit) AS hit, sum(miss) AS miss,
           sum(output) AS output
    FROM booked
    WHERE day = ANY(:days) AND is_simulated = :is_simulated AND currency = :currency AND price IS NOT NULL
      AND overridden_at IS NULL
    GROUP BY day, user_id, price, model, hit_pico, miss_pico, output_pico
""")

_SHARED = text("""
    SELECT run_id, user_id, day, price, hit, miss, output, bound_pico, is_overridden FROM closed_share
    WHERE day = ANY(:days) AND is_simulated = :is_simulated AND currency = :currency ORDER BY run_id, day, price
""")

#: Replies of a run that is paused may wait in a file, until it is resumed.
_UNSETTLED = text("""
    SELECT run_id, document_no, attempt_no, user_id, model, bound_pico, placed_at,
           is_open OR state IN ('running', 'paused') AS is_open
    FROM unsettled
    WHERE is_simulated = :is_simulated AND currency = :currency
      AND (CAST(:first AS date) IS NULL
           OR placed_at BETWEEN CAST(:first AS date) - interval '1 day' AND CAST(:next AS date) + interval '1 day')
""")

_INSERT = text("""
    INSERT INTO cost_adjustment (run_id, document_no, attempt_no, amount, evidence, billed_on, price_id, hit, miss,
                                 output, corrected_price_id)
    VALUES (:run_id, :document_no, :attempt_no, :amount, :evidence, :billed_on, :price_id, :hit, :miss, :output,
            :corrected_price_id)
""")

#: A closing counts until a late reply overrides it; seen from `until`, a reply of later has not come yet.
_MONTH = text("""
    WITH line AS (
        SELECT run_id, document_no, source, row_no, cost_pico,
               ROW(source, document_no, row_no, day - DATE '1970-01-01', price, model, hit_pico, miss_pico,
                   output_pico, hit, miss, output, cost_pico, extract(epoch FROM recorded_at))::text AS line
        FROM booked
        WHERE day >= :first AND day < :next AND is_simulated = :is_simulated AND currency = :currency
          AND recorded_at <= :until AND (overridden_at IS NULL OR overridden_at > :until)
    ), bucket AS (
        SELECT run_id, document_no / 10000 AS bucket, count(*) AS rows, sum(cost_pico) AS cost_pico,
               sha256(convert_to(string_agg(line, chr(10) ORDER BY document_no, source COLLATE "C", row_no),
                                 'UTF8')) AS digest
        FROM line GROUP BY run_id, bucket
    )
    SELECT run_id, sum(rows) AS rows, sum(cost_pico) AS cost_pico,
           'sha256:' || encode(sha256(string_agg(digest, '' ORDER BY bucket)), 'hex') AS digest
    FROM bucket GROUP BY run_id ORDER BY run_id
""")

#: Rows that came, and closings that a reply overrode, after the month was closed.
_LATE = text("""
    SELECT run_id AS run, sum(rows) AS rows, sum(cost_pico) AS cost_pico FROM (
        SELECT run_id, 1 AS rows, cost_pico FROM booked
        WHERE day >= :first AND day < :next AND is_simulated = :is_simulated AND currency = :currency
          AND recorded_at > :until AND overridden_at IS NULL
        UNION ALL
        SELECT run_id, 0, -cost_pico FROM booked
        WHERE day >= :first AND day < :next AND is_simulated = :is_simulated AND currency = :currency
          AND recorded_at <= :until AND overridden_at > :until
    ) late GROUP BY run_id ORDER BY run_id
""")

_UNKNOWN_IN_MONTH = text("""
    SELECT count(*) AS attempts, coalesce(sum(bound_pico), 0) AS bound, coalesce(bool_or(is_open), false) AS is_open
    FROM unsettled
    WHERE is_simulated = :is_simulated AND currency = :currency
      AND (placed_at AT TIME ZONE 'UTC')::date >= :first AND (placed_at AT TIME ZONE 'UTC')::date < :next
""")

_QUIET = text("SELECT quiet_instant()")

_CLOSE = text("""
    INSERT INTO month_close (month, is_simulated, currency, attempts, cost, unknown_attempts, unknown, runs, digest,
                             until)
    VALUES (:month, :is_simulated, :currency, :attempts, :cost, :unknown_attempts, :unknown, CAST(:runs AS jsonb),
            :digest, :until)
""")

_CLOSED = text("""
    SELECT * FROM closed_month WHERE month = :month AND is_simulated = :is_simulated AND currency = :currency
""")


@dataclass(frozen=True, slots=True)
class Scope:
    """Which money a reconciliation is about. `run` is None for all of a month."""

    run: int | None
    month: Month | None
    currency: Currency
    is_simulated: bool


@dataclass(frozen=True, slots=True)
class Ours:
    """What the ledger has of the days in question: booked tokens, attempts of unknown cost, what exports told."""

    days: frozenset[date]
    booked: tuple[BookedTokens, ...]
    unsettled: tuple[Unsettled, ...]
    shared: tuple[Shared, ...] = ()


async def find_scope(
    ledger: Ledger,
    run: int | None,
    month: Month | None,
    stated: Currency | None,
    *,
    is_simulated: bool,
    has_export: bool,
) -> Scope:
    """The currency of a run or a month, and whether it is simulated. Raises ConfigurationError where it is not clear.

    `stated` is the currency that an export is in, where there is one and it says so, or that a user asked for.
    """
    async with ledger.transaction() as connection:
        if run is not None:
            row = (await connection.execute(_RUN, {"run": run})).one_or_none()
            if row is None:
                raise ConfigurationError(f"there is no run {run}: `farthing audit` lists the runs of this ledger")
            found, is_simulated = {row.currency}, row.is_simulated
        else:
            found = set((await connection.execute(_CURRENCIES, {"is_simulated": is_simulated})).scalars())
    runs = f"{'simulated' if is_simulated else 'real'} runs in {', '.join(sorted(found)) or 'no currency'}"
    if stated is not None and stated not in found:
        raise ConfigurationError(
            f"the export is in {stated}, and the ledger has {runs}: sums are never converted; export the wallet that "
            "pays for them"
            if has_export
            else f"--currency {stated}: the ledger has {runs}"
        )
    if stated is None and len(found) != 1:
        which = "give the cost-….csv, too, which says what the export is in" if has_export else "say --currency C"
        raise ConfigurationError(f"the ledger has {runs}: {which}")
    return Scope(run, month, stated or Currency(found.pop()), is_simulated)


async def find_ours(ledger: Ledger, scope: Scope) -> Ours:
    """The ledger's side, from one snapshot."""
    async with ledger.transaction() as connection:
        await connection.execute(SNAPSHOT)
        return await _find_ours(connection, scope)


async def find_paid(ledger: Ledger, scope: Scope) -> tuple[Paid, ...]:
    """What each account paid from the first reading of its balance to the last, of a run or in a month."""
    async with ledger.transaction() as connection:
        await connection.execute(SNAPSHOT)
        if scope.run is not None:
            return await read_paid(connection, [scope.run])
        month = _require_month(scope)
        return await read_paid_between(
            connection, month.begin, month.end, scope.currency, is_simulated=scope.is_simulated
        )


async def _find_ours(connection: AsyncConnection, scope: Scope) -> Ours:
    key = {"is_simulated": scope.is_simulated, "currency": scope.currency.value}
    unsettled = [
        Unsettled(row.run_id, row.document_no, row.attempt_no, row.user_id, row.model, row.bound_pico,
                  row.placed_at.astimezone(UTC), row.is_open)
        for row in await connection.execute(_UNSETTLED, key | _bounds(scope))
    ]  # fmt: skip
    days = await _find_days(connection, scope, unsettled)
    booked = await connection.execute(_BOOKED, key | {"days": list(days)})
    near = tuple(each for each in unsettled if not days.isdisjoint(_days_of(each)))
    shared = await connection.execute(_SHARED, key | {"days": list(days)})
    return Ours(days, tuple(map(_read_booked, booked)), near, tuple(map(_read_shared, shared)))


def _bounds(scope: Scope) -> dict[str, date | None]:
    """The days that unknown attempts are looked for around; those of a run, wherever they lead."""
    month = scope.month
    return {"first": None, "next": None} if month is None else {"first": month.first, "next": month.next.first}


def _read_booked(row: Row[Any]) -> BookedTokens:
    prices = Usage(row.hit_pico, row.miss_pico, row.output_pico)
    return BookedTokens(
        row.day, row.user_id, row.price, row.model, prices, Usage(int(row.hit), int(row.miss), int(row.output))
    )


def _read_shared(row: Row[Any]) -> Shared:
    tokens = Usage(int(row.hit), int(row.miss), int(row.output))
    return Shared(row.run_id, row.user_id, row.day, row.price, tokens, int(row.bound_pico), row.is_overridden)


async def _find_days(connection: AsyncConnection, scope: Scope, unsettled: Sequence[Unsettled]) -> frozenset[date]:
    """The days of a month, or those that a run booked something on, or may have."""
    if scope.month is not None:
        first = scope.month.first
        return frozenset(first + timedelta(n) for n in range((scope.month.next.first - first).days))
    days = set((await connection.execute(_DAYS, {"run": scope.run})).scalars())
    days.update(*(_days_of(each) for each in unsettled if each.run == scope.run))
    while near := {day for each in unsettled for day in _days_of(each) if days & _days_of(each)} - days:
        days |= near  # one of another run, around midnight: what it was billed may be on either day
    return frozenset(days)


def _days_of(attempt: Unsettled) -> set[date]:
    return {instant.date() for instant in attempt.window}


@asynccontextmanager
async def _alone(ledger: Ledger) -> AsyncIterator[None]:
    """Nobody else keeps books meanwhile. A transaction that begins in the block sees all that the last one wrote."""
    async with ledger.transaction() as guard:
        await guard.execute(_PATIENT)
        await guard.execute(_ALONE)
        yield


async def book_closings(
    ledger: Ledger, scope: Scope, agreed: Sequence[Bookable], prove: Callable[[Ours], Sequence[Bookable]]
) -> None:
    """Close the unknown attempts that were agreed to, and correct earlier shares, each by one row.

    Raises ConfigurationError, with nothing booked, where `prove` finds others by now: somebody else booked, or a
    reply came.
    """
    if not agreed:
        return
    prices = await register_prices(ledger, _prices(agreed))
    async with _alone(ledger), ledger.transaction("book_closings") as connection:
        await connection.execute(_WRITING_SNAPSHOT)
        await connection.execute(_PATIENT)  # while we judge
        if set(prove(await _find_ours(connection, scope))) != set(agreed):
            raise ConfigurationError(
                "what the export proves is not what it was a moment ago, for the ledger has changed: nothing was "
                "booked; run it again"
            )
        await connection.execute(_INSERT, [_row(each, prices[each.price.name]) for each in agreed])
        await connection.execute(SUM_UP, [{"run_id": run} for run in {_run_of(each) for each in agreed}])


def _prices(bookable: Sequence[Bookable]) -> list[Price]:
    return list({each.price.name: each.price for each in bookable}.values())


def _run_of(row: Bookable) -> int:
    return row.of.run if isinstance(row, Closing) else row.run


def _row(row: Bookable, price_id: int) -> dict[str, Any]:
    of = row.of if isinstance(row, Closing) else None
    return {
        "run_id": _run_of(row),
        "document_no": of and of.document_no,
        "attempt_no": of and of.attempt_no,
        "amount": row.amount_pico,
        "evidence": row.evidence,
        "billed_on": row.billed_on,
        "price_id": price_id if of else None,
        "corrected_price_id": None if of else price_id,
        "hit": row.tokens.hit,
        "miss": row.tokens.miss,
        "output": row.tokens.output,
    }


async def close_month(ledger: Ledger, scope: Scope, *, with_unknown: bool) -> Closed:
    """Close the books of a month that is over, by the database's clock.

    Raises ConfigurationError where it is not, where it is closed already, where a run is still at work on it, and,
    unless `with_unknown`, where attempts of unknown cost are left.
    """
    month = _require_month(scope)
    async with _alone(ledger):
        until = await _find_quiet_instant(ledger)
        async with ledger.transaction("close_month") as connection:
            await connection.execute(_WRITING_SNAPSHOT)
            await _refuse_closed(connection, scope)
            if until < month.end:
                raise ConfigurationError(f"{month} is not over before {month.end:%Y-%m-%d %H:%M} UTC: close it then")
            books, is_open = await _read_books(connection, scope, until)
            _refuse_unknown(books, is_open=is_open, with_unknown=with_unknown)
            await connection.execute(_CLOSE, _close_row(books, until))
            closed = await _find_closed(connection, scope)
    assert closed is not None
    return closed


async def _find_quiet_instant(ledger: Ledger) -> datetime:
    """An instant at which nobody was writing booked cost: a snapshot of later has all rows recorded until then."""
    async with ledger.transaction() as connection:
        instant: datetime = (await connection.execute(_QUIET)).scalar_one()
        return instant


async def _refuse_closed(connection: AsyncConnection, scope: Scope) -> None:
    if (closed := await _find_closed(connection, scope)) is not None:
        raise ConfigurationError(
            f"{scope.month} was closed by {closed.closed_by} on {closed.closed_at:%Y-%m-%d %H:%M} UTC; "
            f"`farthing verify {scope.month}` says what came since"
        )


def _require_month(scope: Scope) -> Month:
    if scope.month is None:
        raise ConfigurationError("say which month, like 2026-11")
    return scope.month


def _close_row(books: Books, until: datetime) -> dict[str, Any]:
    return {
        "month": books.month.first,
        "is_simulated": books.is_simulated,
        "currency": books.currency.value,
        "attempts": books.rows,
        "cost": books.cost_pico,
        "unknown_attempts": books.unknown_attempts,
        "unknown": books.unknown_pico,
        "runs": json.dumps(books.runs_json()),
        "digest": books.digest,
        "until": until,
    }


def _refuse_unknown(books: Books, *, is_open: bool, with_unknown: bool) -> None:
    if is_open:
        raise ConfigurationError(
            f"a run is not done with attempts of {books.month}: let it end or resume it (`farthing audit` lists runs)"
        )
    if books.unknown_attempts and not with_unknown:
        most = Money(books.unknown_pico, books.currency)
        raise ConfigurationError(
            f"{books.unknown_attempts} attempts of {books.month} may have been billed, {most} at most: "
            f"`farthing reconcile {books.month} EXPORT.zip --close` finds out; --with-unknown closes it as it is"
        )


async def find_checked_month(ledger: Ledger, scope: Scope) -> Checked:
    """Compute a closed month anew, and what came since. Raises ConfigurationError for one that is not closed."""
    month = _require_month(scope)
    async with ledger.transaction() as connection:
        await connection.execute(SNAPSHOT)
        closed = await _find_closed(connection, scope)
        if closed is None:
            raise ConfigurationError(f"the books of {month} are open: `farthing close {month}` closes them")
        then, _ = await _read_books(connection, scope, closed.until)
        late = (await connection.execute(_LATE, _month_key(scope) | {"until": closed.until})).mappings()
        return Checked(closed, then, tuple(Late(row["run"], int(row["rows"]), int(row["cost_pico"])) for row in late))


def _month_key(scope: Scope) -> dict[str, Any]:
    month = _require_month(scope)
    return {
        "first": month.first,
        "next": month.next.first,
        "is_simulated": scope.is_simulated,
        "currency": scope.currency.value,
    }


async def _read_books(connection: AsyncConnection, scope: Scope, until: datetime) -> tuple[Books, bool]:
    """The books, and whether a run is not done with some attempt of the month."""
    key = _month_key(scope)
    rows = (await connection.execute(_MONTH, key | {"until": until})).all()
    unknown = (await connection.execute(_UNKNOWN_IN_MONTH, key)).one()
    books = Books(
        _require_month(scope),
        scope.is_simulated,
        scope.currency,
        tuple(RunInMonth(row.run_id, int(row.rows), int(row.cost_pico), row.digest) for row in rows),
        unknown.attempts,
        int(unknown.bound),
    )
    return books, unknown.is_open


async def _find_closed(connection: AsyncConnection, scope: Scope) -> Closed | None:
    month = _require_month(scope)
    key = {"month": month.first, "is_simulated": scope.is_simulated, "currency": scope.currency.value}
    row = (await connection.execute(_CLOSED, key)).one_or_none()
    if row is None:
        return None
    books = Books(
        month, scope.is_simulated, scope.currency, read_runs(row.runs), row.unknown_attempts, int(row.unknown_pico)
    )
    return Closed(books, row.digest, row.until.astimezone(UTC), row.closed_at.astimezone(UTC), row.closed_by)
