"""The account's balance, as `GET /user/balance` tells it."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from schemas.money import PICO, Currency, Money


@dataclass(frozen=True, slots=True)
class Balance:
    """What is left on the account, in the currency it is funded in: that currency decides the price card."""

    currency: Currency
    amount: Money
    is_available: bool


def read_balance(value: object) -> Balance | None:
    """The funded row of a balance reply; None where it names no currency we have a price card for.

    Every account lists both currencies. Where neither holds anything the first row is taken; where both do,
    the first funded one.
    """
    rows = value.get("balance_infos") if isinstance(value, dict) else None
    amounts = [amount for row in rows if (amount := _read_row(row))] if isinstance(rows, list) else []
    funded = [amount for amount in amounts if amount.pico > 0] or amounts
    if not isinstance(value, dict) or not funded:
        return None
    return Balance(funded[0].currency, funded[0], is_available=value.get("is_available") is True)


def _read_row(row: object) -> Money | None:
    """A row's `total_balance`: a decimal string, at times negative after an overdraft."""
    if not isinstance(row, dict) or not isinstance(row.get("total_balance"), str):
        return None
    try:
        pico = Decimal(row["total_balance"]) * PICO
        currency = Currency(str(row.get("currency")))
    except (InvalidOperation, ValueError):
        return None
    return Money(int(pico), currency) if pico.is_finite() else None
