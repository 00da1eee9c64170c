"""At which prices a run that begins now is at work: alone responsible for sharing its attempts out over hours.

Pure: an estimate of how long the work takes comes in. A run of minutes has one price, one of a night has several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction

from schemas.errors import UnknownPrice
from schemas.finish_by import off_peak_between
from schemas.jobs import Job, When
from schemas.off_peak import Shut, guard_of, tariff_of
from schemas.pricing import Price, PriceBook

#: The price row of each tier, by its name.
Rows = Mapping[str, Price]
#: A run that would take longer than that is priced as if it took so long: later prices are not known anyway.
_LONGEST = timedelta(days=31)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A share of a run's work, and what it is billed by."""

    share: Fraction
    rows: Rows


@dataclass(frozen=True, slots=True)
class Asked:
    """When a run would begin, and which hours it may use. `due` is by when it is to be done, if anybody said."""

    now: datetime
    when: When = When.NOW
    due: datetime | None = None


def rows_at(job: Job, book: PriceBook, at: datetime) -> dict[str, Price]:
    """What each tier of the ladder costs at an instant. Raises UnknownPrice."""
    return {tier.name: book.at(tier.model, job.budget.currency, at) for tier in job.ladder}


def begins(job: Job, book: PriceBook, now: datetime) -> datetime:
    """When a run that waits for off-peak prices would begin. Raises UnknownPrice."""
    found = tariff_of(job, book, job.budget.currency).decide(now, guard_of(job))
    return found.until if isinstance(found, Shut) else now


def share_out(job: Job, book: PriceBook, asked: Asked, lasts: timedelta) -> list[Stretch]:
    """The prices that so much work meets, each with its share. Raises UnknownPrice where none is known at its start.

    Where prices stop being known before its end, the rest is taken to cost what is known last.
    """
    lasts = min(lasts, _LONGEST)
    if asked.when is When.NOW:
        return _through(job, book, asked.now, lasts)
    cheap = rows_at(job, book, begins(job, book, asked.now))
    bought = _bought(job, book, asked, lasts)
    if not bought:
        return [Stretch(Fraction(1), cheap)]
    dear = {name: max(bands_of(price, book.rows()), key=lambda row: row.miss_pico) for name, price in cheap.items()}
    return [Stretch(1 - bought, cheap), Stretch(bought, dear)]


def _through(job: Job, book: PriceBook, start: datetime, lasts: timedelta) -> list[Stretch]:
    found, at, end = [], start, start + lasts
    rows = rows_at(job, book, at)
    with suppress(UnknownPrice):
        while (change := _next_change(job, book, at)) is not None and change < end:
            following = rows_at(job, book, change)
            found.append(Stretch(Fraction(_seconds(change - at), _seconds(lasts)), rows))
            at, rows = change, following
    return [*found, Stretch(1 - sum((each.share for each in found), Fraction(0)), rows)]


def _bought(job: Job, book: PriceBook, asked: Asked, lasts: timedelta) -> Fraction:
    """The share that does not fit into the off-peak time before the run is to be done."""
    if asked.due is None or not lasts:
        return Fraction(0)
    tariff = tariff_of(job, book, job.budget.currency)
    short = lasts - off_peak_between(tariff, guard_of(job), asked.now, asked.due)
    return Fraction(_seconds(max(short, timedelta(0))), _seconds(lasts))


def _next_change(job: Job, book: PriceBook, at: datetime) -> datetime | None:
    changes = (book.next_change(tier.model, job.budget.currency, at) for tier in job.ladder)
    return min((change for change in changes if change is not None), default=None)


def bands_of(row: Price, book: Sequence[Price]) -> list[Price]:
    """The row's price at every hour: it and its fellows of the same model, card, date and prompt length."""
    key = (row.model, row.currency, row.valid_from, row.above_tokens)
    return [price for price in book if (price.model, price.currency, price.valid_from, price.above_tokens) == key]


def _seconds(span: timedelta) -> int:
    """In millionths, which is what a timedelta has."""
    return span // timedelta(microseconds=1)
