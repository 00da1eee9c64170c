"""The account's balance, as `GET /user/balance` tells it, and what it went down by, as a coarse alarm.

Coarse, since others may use the account, the provider may book late, and the page tells whole cents: it cannot say
what an attempt cost, but it can say that the account paid for what no row of the ledger can explain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

from schemas.money import PICO, Currency, Money

#: The page tells no less; two readings may be off by one together.
_CENT = PICO // 100
#: No sum that anybody holds has more digits in pico units.
_DIGITS = 30
#: The event of a run that says what the account held.
BALANCE = "balance"


@dataclass(frozen=True, slots=True)
class Balance:
    """What is left on the account, in the currency it is funded in: that currency decides the price card.

    `granted` and `topped_up` make up the amount; None where the page does not say.
    """

    currency: Currency
    amount: Money
    is_available: bool
    granted: Money | None = None
    topped_up: Money | None = None


def read_balance(value: object, currency: Currency | None = None) -> Balance | None:
    """The funded row of a balance reply, or that of a `currency`; None where it names none we have a price card for.

    Every account lists both currencies. Where neither holds anything the first row is taken; where both do,
    the first funded one.
    """
    rows = value.get("balance_infos") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(rows, list):
        return None
    is_available = value.get("is_available") is True
    told = [balance for row in rows if (balance := _read_row(row, is_available=is_available))]
    found = [balance for balance in told if currency in (None, balance.currency)]
    funded = [balance for balance in found if balance.amount.pico > 0] or found
    return funded[0] if funded else None


def _read_row(row: object, *, is_available: bool) -> Balance | None:
    if not isinstance(row, dict) or (amount := _read_sum(row, "total_balance")) is None:
        return None
    granted, topped_up = (_read_sum(row, name) for name in ("granted_balance", "topped_up_balance"))
    return Balance(amount.currency, amount, is_available, granted, topped_up)


def _read_sum(row: Mapping[str, object], name: str) -> Money | None:
    """A decimal string, at times negative after an overdraft."""
    try:
        pico = Decimal(str(row[name])) * PICO if isinstance(row.get(name), str) else Decimal("nan")
        currency = Currency(str(row.get("currency")))
    except (ArithmeticError, ValueError):
        return None
    return Money(int(pico), currency) if pico.is_finite() and pico.adjusted() <= _DIGITS else None


@dataclass(frozen=True, slots=True)
class Reading:
    """What an account at a provider held at an instant of Postgres's clock, in pico units. None: it was not told.

    `key` tells API keys apart; "": it was noted before that was.
    """

    run: int
    is_simulated: bool
    provider: str
    noted_at: datetime
    currency: Currency
    total_pico: int | None
    topped_up_pico: int | None = None
    key: str = ""


def balance_detail(
    at: str, currency: Currency, found: Balance | None, provider: str, key: str, ago_s: float
) -> dict[str, Any]:
    """A reading as an event of a run has it: sums as the page told them, and how long ago it did."""
    sums = (found.amount, found.granted, found.topped_up) if found else (None, None, None)
    spelt = (None if each is None else f"{each.decimal.normalize():f}" for each in sums)
    told = dict(zip(("total", "granted", "topped_up"), spelt, strict=True))
    whose = {"provider": provider, "key": key}
    return {"at": at, "currency": currency.value, **told, **whose, "seconds_ago": round(ago_s, 3)}


def read_reading(run: int, is_simulated: bool, happened_at: datetime, detail: Mapping[str, Any]) -> Reading:
    """The reading that `balance_detail` wrote."""
    return Reading(
        run,
        is_simulated,
        str(detail["provider"]),
        happened_at - timedelta(seconds=float(detail["seconds_ago"])),
        Currency(detail["currency"]),
        _pico(detail["total"]),
        _pico(detail["topped_up"]),
        str(detail.get("key", "")),
    )


def _pico(told: str | None) -> int | None:
    return None if told is None else int(Decimal(told) * PICO)


@dataclass(frozen=True, slots=True)
class Paid:
    """What an account paid between two readings, and the most that the ledger knows of that all its runs paid then.

    That is booked cost and bounds of what is unknown. `added_pico` came onto the account in between, as far as
    readings show it; what was paid is told without it. `is_granted`: what would be an alarm is none, since of what
    was topped up nothing went, and what was granted expires.
    """

    since: datetime
    until: datetime
    currency: Currency
    paid_pico: int
    added_pico: int
    cost_pico: int
    unknown_pico: int
    is_alarm: bool
    is_granted: bool = False


def told_of(readings: Sequence[Reading]) -> list[Reading]:
    """Those that say something, in order."""
    return sorted((each for each in readings if each.total_pico is not None), key=lambda each: each.noted_at)


def compare(readings: Sequence[Reading], cost_pico: int, unknown_pico: int) -> Paid:
    """What these readings of one account, two or more that say something, say beside what the ledger knows."""
    told = told_of(readings)
    totals = [each.total_pico or 0 for each in told]
    added = [now - before for before, now in pairwise(totals) if now > before]
    paid = totals[0] - totals[-1] + sum(added)
    is_more = paid - _CENT * (1 + len(added)) > cost_pico + unknown_pico
    is_granted = is_more and _has_kept([each.topped_up_pico for each in told])
    since, until, currency = told[0].noted_at, told[-1].noted_at, told[0].currency
    is_alarm = is_more and not is_granted
    return Paid(since, until, currency, paid, sum(added), cost_pico, unknown_pico, is_alarm, is_granted)


def _has_kept(sums: Sequence[int | None]) -> bool:
    """Whether these are known, and never went down."""
    return all(now is not None and before is not None and now >= before for before, now in pairwise(sums))
