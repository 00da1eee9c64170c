"""Whether an attempt may begin now at off-peak prices, or until when to wait: alone responsible for that decision.

Pure: the price book knows the hours, the instant is the provider's and is passed in. An attempt is billed by the
provider's clock, and whether its dispatch or its completion decides is not known [?], so none may begin that could
still be under way when a peak window opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone

from schemas.jobs import Job
from schemas.money import Currency
from schemas.pricing import Band, Price, PriceBook

#: What the provider's peak hours are published in. China has had no summer time since 1991.
BEIJING = timezone(timedelta(hours=8), "Beijing")
#: How far the provider's clock may be from what we take it for: it tells whole seconds, and a reply takes its time.
DOUBT = timedelta(seconds=5)
#: What an attempt may take besides its deadline: a minute to get its intent, after which it is not sent, and another
#: for the provider to bill it.
MARGIN = timedelta(minutes=2)


@dataclass(frozen=True, slots=True)
class Open:
    """Attempts may begin from `since`, and before `until` without asking again (None: no change is foreseen)."""

    since: datetime
    until: datetime | None

    def holds_at(self, instant: datetime) -> bool:
        return self.since <= instant and (self.until is None or instant < self.until)


@dataclass(frozen=True, slots=True)
class Shut:
    """No attempt may begin before `until`; `because` says why, in words for people."""

    until: datetime
    because: str


@dataclass(frozen=True, slots=True)
class Tariff:
    """The prices that a run's attempts meet: those of its models, on one card. Only peak and off-peak matter here."""

    book: PriceBook
    models: tuple[str, ...]
    currency: Currency

    def decide(self, instant: datetime, guard: timedelta) -> Open | Shut:
        """Whether an attempt that ends within `guard` may begin at `instant`.

        Open where no model of the run has peak prices from DOUBT before the instant until `guard` after it, both
        included. Raises UnknownPrice where a price in between is not known, as after the last year whose Chinese
        holidays are published.
        """
        begins = self._first_peak(instant - DOUBT, instant + guard)
        if begins is None:
            edge = self._next_change(instant + guard)
            return Open(instant, None if edge is None else edge - guard)
        ends = self._end_of_peak(begins)
        while (another := self._first_peak(ends, ends + DOUBT + guard)) is not None:
            ends = self._end_of_peak(another)  # the time in between is too short for an attempt
        return Shut(ends + DOUBT, self._explain(instant, begins, ends))

    def is_flat(self, instant: datetime) -> bool:
        """Whether all hours cost the same. Raises UnknownPrice."""
        return all(price.band is Band.FLAT for price in self._prices(instant))

    def _first_peak(self, start: datetime, end: datetime) -> datetime | None:
        """The first instant of [start, end] at which a model has a peak price; None: there is none."""
        at: datetime | None = start
        while at is not None and at <= end:
            if self._is_peak(at):
                return at
            at = self._next_change(at)
        return None

    def _end_of_peak(self, at: datetime) -> datetime:
        while self._is_peak(at):
            change = self._next_change(at)
            if change is None:
                raise AssertionError("a peak window always ends")
            at = change
        return at

    def _is_peak(self, at: datetime) -> bool:
        return any(price.band is Band.PEAK for price in self._prices(at))

    def _prices(self, at: datetime) -> list[Price]:
        return [self.book.at(model, self.currency, at) for model in self.models]

    def _next_change(self, at: datetime) -> datetime | None:
        changes = (self.book.next_change(model, self.currency, at) for model in self.models)
        return min((change for change in changes if change is not None), default=None)

    def _explain(self, instant: datetime, begins: datetime, ends: datetime) -> str:
        saving = "saves half" if self._is_twice(begins, ends) else "is cheaper"
        if begins <= instant:
            return f"peak prices until {spell(ends)}; off-peak {saving}"
        hours = f"peak prices begin at {spell(begins)}, too soon for an attempt, and end at {spell(ends)}"
        return f"{hours}; off-peak {saving}"

    def _is_twice(self, peak: datetime, off_peak: datetime) -> bool:
        pairs = zip(self._prices(peak), self._prices(off_peak), strict=True)
        return all(_amounts(dear) == [2 * pico for pico in _amounts(cheap)] for dear, cheap in pairs)


def tariff_of(job: Job, book: PriceBook, currency: Currency) -> Tariff:
    """The tariff of every tier that the job's documents may climb to."""
    return Tariff(book, tuple(dict.fromkeys(tier.model for tier in job.ladder)), currency)


def guard_of(job: Job) -> timedelta:
    """How long before a peak window nothing begins any more: the longest deadline of the ladder, and MARGIN.

    One figure for the whole ladder, so that a lane either works or waits.
    """
    return timedelta(seconds=max(tier.deadline_s for tier in job.ladder)) + MARGIN


def spell(instant: datetime) -> str:
    """`18:00 Beijing (10:00 UTC)`."""
    return f"{instant.astimezone(BEIJING):%H:%M} Beijing ({instant.astimezone(UTC):%H:%M} UTC)"


def _amounts(price: Price) -> Sequence[int]:
    return [price.hit_pico, price.miss_pico, price.output_pico]
