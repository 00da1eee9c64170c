"""Exact money: integers of pico units (1e-12) of one currency, never a float and never converted.

A price with six decimals per million tokens is an exact integer of pico-dollars per token; of nano-dollars
it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

PICO = 10**12
#: What Postgres's bigint holds: some nine million dollars.
MOST_PICO = 2**63 - 1
_SHOWN_CHARACTERS = 60


class Currency(StrEnum):
    """A currency that DeepSeek keeps a price card and a balance in."""

    USD = "USD"
    CNY = "CNY"

    @property
    def sign(self) -> str:
        return {"USD": "$", "CNY": "¥"}[self.value]


@dataclass(frozen=True, slots=True)
class Money:
    """An exact sum: `Money(25 * PICO, Currency.USD)` is twenty-five dollars."""

    pico: int
    currency: Currency

    @classmethod
    def parse(cls, text: str) -> Money:
        """Read `25 USD` or `0.5 CNY`; a bare number is dollars. Raises ValueError with what to write instead."""
        amount, _, code = text.strip().partition(" ")
        try:
            pico = Decimal(amount.replace("_", "")) * PICO
            currency = Currency(code.strip().upper() or "USD")
        except (ArithmeticError, ValueError):
            raise ValueError(f"{_shorten(text)} is not a sum of money; write it like `25 USD` or `180 CNY`") from None
        if not pico.is_finite() or pico != pico.to_integral_value() or pico < 0:
            raise ValueError(f"{_shorten(text)} is not a sum of money; it must be finite, >= 0 and whole pico units")
        if pico > MOST_PICO:
            raise ValueError(f"{_shorten(text)} is more than a ledger can hold; write at most 9000000")
        return cls(int(pico), currency)

    @property
    def decimal(self) -> Decimal:
        """The sum in whole units, exact."""
        return Decimal(self.pico).scaleb(-12)

    @property
    def exact(self) -> str:
        """As a job file or an option says it, to the last digit."""
        return f"{self.decimal.normalize():f} {self.currency}"

    def __str__(self) -> str:
        """For people: two decimals from one unit up, else enough to show three digits."""
        value = self.decimal
        places = 2 if abs(value) >= 1 or not value else min(12, 2 - value.adjusted())
        return f"{self.currency.sign}{value:,.{places}f}"


def _shorten(text: str) -> str:
    """What was written, quoted, of a length that fits into a message."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…")
