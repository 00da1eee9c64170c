"""What the emulated DeepSeek charges: its own dated price table, in whole pico units of one currency per token.

The rows and the peak rules are the provider's published ones; nothing here is shared with the product, so that
a bill from here and a ledger from there agree only when both are right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import lru_cache

import chinese_calendar

from sandbox.errors import SandboxError

FLASH = "deepseek-flash"
PRO = "deepseek-v4-pro"
SHANGHAI = timezone(timedelta(hours=8))
#: Half-open windows of the day in UTC.
PEAK_WINDOWS = ((time(1), time(4)), (time(6), time(10)))
#: The first Shanghai days on which weekends and public holidays are off-peak all day.
WEEKENDS_EXEMPT_SINCE = date(2026, 8, 23)
HOLIDAYS_EXEMPT_SINCE = date(2026, 9, 18)


@dataclass(frozen=True, slots=True)
class Price:
    """Pico units per token of the three billed buckets."""

    hit: int
    miss: int
    output: int

    def cost(self, hit: int, miss: int, output: int) -> int:
        return hit * self.hit + miss * self.miss + output * self.output


@dataclass(frozen=True, slots=True)
class Row:
    """One dated row of the price page; `peak` is None where the price is flat all day."""

    model: str
    currency: str
    since: datetime
    price: Price
    peak: Price | None


@dataclass(frozen=True, slots=True)
class Charge:
    """The price that holds at an instant, and its band: flat, off-peak or peak."""

    price: Price
    band: str


def _price(text: str) -> Price:
    """`0.003 / 0.15 / 0.60` units per million tokens. One micro-unit per million is one pico unit per token."""
    return Price(*(int(Decimal(part) * 10**6) for part in text.split("/")))


def _rows(currency: str, table: str) -> Iterator[Row]:
    for line in table.strip().splitlines():
        model, since, low, peak = (cell.strip() for cell in line.split("|"))
        start = datetime.fromisoformat(since).replace(tzinfo=UTC)
        yield Row({"flash": FLASH, "pro": PRO}[model], currency, start, _price(low), _price(peak) if peak else None)


_USD = """
flash | 2026-04-24 00:00 | 0.028 / 0.14 / 0.28       |
flash | 2026-04-26 12:15 | 0.0028 / 0.14 / 0.28      |
flash | 2026-08-16 16:00 | 0.007 / 0.22 / 0.66       | 0.014 / 0.44 / 1.32
flash | 2026-09-10 04:00 | 0.003 / 0.15 / 0.60       | 0.006 / 0.30 / 1.20
pro   | 2026-04-24 00:00 | 0.145 / 1.74 / 3.48       |
pro   | 2026-04-26 12:15 | 0.003625 / 0.435 / 0.87   |
pro   | 2026-08-16 16:00 | 0.022 / 0.66 / 1.98       | 0.044 / 1.32 / 3.96
"""
# The card of today; what CNY accounts paid before is not known here, and an unknown price is refused.
_CNY = """
flash | 2026-09-10 04:00 | 0.02 / 1 / 4              | 0.04 / 2 / 8
pro   | 2026-08-16 16:00 | 0.15 / 4.5 / 13.5         | 0.30 / 9 / 27
"""
ROWS = (*_rows("USD", _USD), *_rows("CNY", _CNY))


def charge_at(model: str, currency: str, instant: datetime) -> Charge:
    """The price of a served model at an instant. Raises SandboxError where no row or no calendar covers it."""
    for row in reversed(ROWS):
        if row.model == model and row.currency == currency and row.since <= instant:
            if row.peak is None:
                return Charge(row.price, "flat")
            return Charge(row.peak, "peak") if is_peak(instant) else Charge(row.price, "off-peak")
    raise SandboxError(f"no {currency} price of {model} at {instant.isoformat()}; set the clock to a later day")


def is_peak(instant: datetime) -> bool:
    """Whether the peak tariff holds. The windows are UTC; the days are Asia/Shanghai's."""
    if _is_exempt(instant.astimezone(SHANGHAI).date()):
        return False
    clock = instant.astimezone(UTC).time()
    return any(start <= clock < end for start, end in PEAK_WINDOWS)


@lru_cache(maxsize=64)
def _is_exempt(day: date) -> bool:
    """Weekends, working ones too, and public holidays."""
    if day >= HOLIDAYS_EXEMPT_SINCE and _is_day_off(day):
        return True
    return day.weekday() >= 5 and day >= WEEKENDS_EXEMPT_SINCE


def _is_day_off(day: date) -> bool:
    """A year without a published calendar is refused whole: its evenings and weekends would be followed by days
    that have no price."""
    try:
        return bool(chinese_calendar.is_holiday(day))
    except NotImplementedError:
        raise SandboxError(f"no Chinese holiday calendar for {day.year}; start the sandbox with --clock") from None
