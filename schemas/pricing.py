"""What a token costs: by model, currency, date, hour, weekday and Chinese holiday, in exact integers.

The book is read from schemas/prices/*.toml, which says where each row comes from and how to add one, and from price
files of the user's own (FARTHING_PRICES). A price is asked for at an instant. DeepSeek does not say whether an
attempt's dispatch or its completion decides [?]: attempts are booked by their completion, and the ledger keeps both
instants, on the provider's clock, so that this can be redone.
What the book does not know, it refuses: an unknown price is never zero.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cache
from hashlib import sha256
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from schemas.attempts import Usage
from schemas.errors import ConfigurationError, UnknownPrice
from schemas.money import Currency
from schemas.peak_hours import PeakHours
from schemas.price_files import Alias, Amounts, Machine, PriceFile, Row, read_price_files

PRICES = Path(__file__).with_name("prices")


class Band(StrEnum):
    """Which hours a price row holds in."""

    FLAT = "flat"
    OFF_PEAK = "off_peak"
    PEAK = "peak"


@dataclass(frozen=True, slots=True)
class Price:
    """One price row, in pico units of `currency` per token. `name` is its natural key and never changes.

    It holds from `valid_from` until the next row of its model and currency, in the hours of its band, for prompts of
    more than `above_tokens` tokens. `is_uncertain` with `note` says that a fact of it is not confirmed;
    `is_what_if_only` that it may be compared with, never billed by.
    """

    name: str
    model: str
    currency: Currency
    band: Band
    valid_from: datetime
    hit_pico: int
    miss_pico: int
    output_pico: int
    above_tokens: int = 0
    source: str = ""
    note: str = ""
    is_uncertain: bool = False
    is_what_if_only: bool = False

    def cost(self, usage: Usage) -> int:
        """The exact cost of billed tokens, in pico units; reasoning is inside `output`."""
        return usage.hit * self.hit_pico + usage.miss * self.miss_pico + usage.output * self.output_pico


def reservation(price: Price, input_bound: int, max_tokens: int) -> int:
    """W: the most that an attempt can cost at `price`, in pico units, when every input token misses the cache."""
    return input_bound * price.miss_pico + max_tokens * price.output_pico


@dataclass(frozen=True, slots=True)
class _Period:
    """What a card charges from one instant to the next change; each band's steps by prompt length, shortest first."""

    valid_from: datetime
    bands: dict[Band, tuple[Price, ...]]

    def price(self, band: Band, prompt_tokens: int) -> Price:
        steps = self.bands[band]
        if len(steps) == 1:
            return steps[0]
        return steps[max(0, bisect_left(steps, prompt_tokens, key=attrgetter("above_tokens")) - 1)]

    def prices_up_to(self, bands: Iterable[Band], input_bound: int) -> list[Price]:
        """Every price that a prompt of at most `input_bound` tokens may meet."""
        prices = [price for band in bands for price in self.bands[band]]
        return [price for price in prices if price.above_tokens == 0 or price.above_tokens < input_bound]


class _Card:
    """The prices of one model in one currency, in order of time."""

    __slots__ = ("_hours", "_label", "_periods", "_starts")

    def __init__(self, prices: list[Price], hours: PeakHours | None) -> None:
        by_start = groupby(sorted(prices, key=_order), key=attrgetter("valid_from"))
        self._periods = [_period(start, list(group)) for start, group in by_start]
        self._starts = [period.valid_from for period in self._periods]
        self._label = f"{prices[0].model} in {prices[0].currency}"
        self._hours = hours

    def at(self, utc: datetime, prompt_tokens: int, hours_at: datetime) -> Price:
        period = self._periods[self._index(utc)]
        return period.price(self._band(period, hours_at), prompt_tokens)

    def between(self, start: datetime, end: datetime, input_bound: int) -> list[Price]:
        """Every price that may hold at some instant of [start, end]."""
        first, last = self._index(start), self._index(end)
        found: list[Price] = []
        for index in range(first, last + 1):
            period = self._periods[index]
            since = max(start, period.valid_from)
            until = end if index == last else self._starts[index + 1] - datetime.resolution
            found += period.prices_up_to(self._bands(period, since, until), input_bound)
        return found

    def next_change(self, utc: datetime) -> datetime | None:
        after = bisect_right(self._starts, utc)
        row_edge = self._starts[after] if after < len(self._starts) else None
        if after == 0 or Band.FLAT in self._periods[after - 1].bands or self._hours is None:
            return row_edge
        band_edge = self._hours.next_change(utc)
        return band_edge if row_edge is None else min(band_edge, row_edge)

    def _index(self, utc: datetime) -> int:
        index = bisect_right(self._starts, utc) - 1
        if index < 0:
            raise UnknownPrice(
                f"no price of {self._label} at {utc:%Y-%m-%d %H:%M} UTC: its first row is from "
                f"{self._starts[0]:%Y-%m-%d %H:%M}; if you know the earlier price, add its row to a "
                "price file of your own (README: Prices)"
            )
        return index

    def _band(self, period: _Period, utc: datetime) -> Band:
        if self._hours is None or Band.FLAT in period.bands:
            return Band.FLAT
        return Band.PEAK if self._hours.is_peak(utc) else Band.OFF_PEAK

    def _bands(self, period: _Period, start: datetime, end: datetime) -> list[Band]:
        if self._hours is None or Band.FLAT in period.bands:
            return [Band.FLAT]
        return [Band.PEAK if is_peak else Band.OFF_PEAK for is_peak in self._hours.kinds_between(start, end)]


class PriceBook:
    """Every known price. Instants must be aware; a naive one raises ValueError. Models may be given by an alias."""

    def __init__(
        self, prices: Iterable[Price], aliases: Iterable[Alias] = (), hours: PeakHours | None = None
    ) -> None:
        self._rows = tuple(sorted(prices, key=lambda price: (price.model, price.currency, *_order(price))))
        self._hours = hours
        by_card = groupby(self._rows, key=lambda price: (price.model, price.currency))
        self._cards = {key: _Card(list(group), hours) for key, group in by_card}
        self._aliases = tuple((alias.pattern.lower(), alias.model) for alias in aliases)
        self._by_name = {price.name: price for price in self._rows}
        self._names = {name: price.model for price in self._rows for name in (price.model, price.model.lower())}
        self._refuse_ambiguity()

    @property
    def digest(self) -> str:
        """The same for books that price alike: of the rows, the aliases and the written calendars."""
        hours = self._hours and (
            replace(self._hours, days_off={}),
            sorted((year, sorted(days)) for year, days in self._hours.days_off.items()),
        )
        told = repr((self._rows, self._aliases, hours))
        return f"sha256:{sha256(told.encode()).hexdigest()}"

    @property
    def models(self) -> tuple[str, ...]:
        """Every model with a price, by its canonical name."""
        return tuple(sorted({model for model, _ in self._cards}))

    def rows(self) -> tuple[Price, ...]:
        """Every row, by model, currency, date, prompt length and band."""
        return self._rows

    def currencies(self, model: str) -> tuple[Currency, ...]:
        """The currencies that a model has a card in. Raises UnknownPrice for an unknown model."""
        name = self.canonical(model)
        return tuple(currency for currency in Currency if (name, currency) in self._cards)

    def canonical(self, model: str) -> str:
        """The name that prices are kept under, from the name sent or served. Raises UnknownPrice if there is none."""
        lowered = model.strip().lower()
        known = self._names.get(model) or self._names.get(lowered)
        if known is not None:
            return known
        for pattern, target in self._aliases:
            if fnmatchcase(lowered, pattern):
                self._names[lowered] = target
                return target
        raise UnknownPrice(
            f"no price for model {model[:60]!r}; known are {', '.join(self.models)}. Add a [[row]] or an [[alias]] "
            "for it to a price file of your own (README: Prices)"
        )

    def at(
        self,
        model: str,
        currency: Currency,
        instant: datetime,
        prompt_tokens: int = 0,
        *,
        hours_at: datetime | None = None,
    ) -> Price:
        """The price row in force at `instant` for a prompt of `prompt_tokens` (hit + miss).

        `hours_at` asks for the band of another instant's hours. Raises UnknownPrice for an unknown model or currency,
        before the first row, and where the holiday calendar ends; the message says what to update.
        """
        return self._card(model, currency).at(_utc(instant), prompt_tokens, _utc(hours_at or instant))

    def find(self, name: str) -> Price | None:
        """The row of that name."""
        return self._by_name.get(name)

    def in_band(self, price: Price, band: Band) -> Price:
        """The row that holds in the hours of `band` where `price` holds in others; itself where all cost the same."""
        return price if price.band is Band.FLAT else self._by_name[_name(price, band)]

    def dearest(
        self,
        model: str,
        currency: Currency,
        start: datetime,
        end: datetime,
        *,
        input_bound: int = 1,
        max_tokens: int = 1,
    ) -> Price:
        """The row to reserve by: of all that may hold in [start, end], the one with the greatest W for these bounds.

        No attempt of at most `input_bound` input and `max_tokens` output tokens can cost more than its `reservation`
        at this row, whenever in the interval it is billed. Raises UnknownPrice as `at` does for either end, and for a
        model whose prices are for comparison only.
        """
        since, until = _utc(start), _utc(end)
        if until < since:
            raise ValueError(f"the interval ends before it starts: {start} to {end}")
        candidates = self._card(model, currency).between(since, until, input_bound)
        dearest = max(candidates, key=lambda price: (reservation(price, input_bound, max_tokens), price.hit_pico))
        if dearest.is_what_if_only:
            raise UnknownPrice(
                f"the price of {dearest.model} is for what-if comparisons; no attempt may be billed by it"
            )
        return dearest

    def next_change(self, model: str, currency: Currency, instant: datetime) -> datetime | None:
        """When, after `instant`, the price next changes or stops being known; None if no change is foreseen."""
        return self._card(model, currency).next_change(_utc(instant))

    def known_until(self, model: str, currency: Currency, instant: datetime, within: timedelta) -> datetime | None:
        """From when on the price is not known any more, if that is less than `within` after `instant`; else None."""
        change = self.next_change(model, currency, instant)
        while change is not None and change < instant + within:
            try:
                self.at(model, currency, change)
            except UnknownPrice:
                return change
            change = self.next_change(model, currency, change)
        return None

    def _card(self, model: str, currency: Currency) -> _Card:
        name = self.canonical(model)
        card = self._cards.get((name, currency))
        if card is None:
            have = ", ".join(self.currencies(name))
            raise UnknownPrice(
                f"no price of {name} in {currency}, only in {have}; cards are never converted: add the {currency} "
                "rows to a price file of your own (README: Prices)"
            )
        return card

    def _refuse_ambiguity(self) -> None:
        """No two rows may share a name, and no alias may hide a model or lead nowhere."""
        names = [price.name for price in self._rows]
        problems = [f"prices: two rows are called {name}" for name in sorted(set(names)) if names.count(name) > 1]
        for pattern, target in self._aliases:
            if target not in self.models:
                problems.append(f"prices: alias {pattern} leads to {target}, which has no row")
            hidden = [name for name in self.models if name != target and fnmatchcase(name, pattern)]
            problems += [f"prices: alias {pattern} also covers {name}, which has rows of its own" for name in hidden]
        problems += [
            f"prices: {price.name} is a peak price, but [peak] does not cover it"
            for price in self._rows
            if price.band is Band.PEAK and (self._hours is None or price.valid_from < self._hours.since)
        ]
        if problems:
            raise ConfigurationError(*problems)


@cache
def load_price_book(own: Path | None = None) -> PriceBook:
    """The book that ships and, on top of it, the user's own price files. Raises ConfigurationError.

    `own` is `Settings.prices`: rows, aliases and calendars that were published after this release.
    """
    return read_price_book(PRICES) if own is None else read_price_book(PRICES, own)


def read_price_book(*folders: Path) -> PriceBook:
    """The price book of all files in `folders`. Raises ConfigurationError with every problem of a folder at once."""
    files = [file for folder in folders for file in read_price_files(folder)]
    peaks = [file.peak for file in files if file.peak]
    if len(peaks) > 1:
        raise ConfigurationError("prices: two files have a [peak] table; only one provider may have peak hours")
    days_off = _days_off(files)
    hours = peaks[0].hours(days_off) if peaks else None
    prices = [price for file in files for price in _prices(file)]
    return PriceBook(prices, [alias for file in files for alias in file.aliases], hours)


def _days_off(files: Iterable[PriceFile]) -> dict[int, frozenset[date]]:
    """The public holidays of every year that a file has. Raises ConfigurationError where two have the same year."""
    days_off: dict[int, frozenset[date]] = {}
    for calendar in (calendar for file in files for calendar in file.calendars):
        if calendar.year in days_off:
            raise ConfigurationError(f"prices: two [[calendar]] tables are of {calendar.year}; keep one of them")
        days_off[calendar.year] = frozenset(calendar.days_off)
    return days_off


@cache
def load_machines(own: Path | None = None) -> tuple[Machine, ...]:
    """The machines in the price files that ship and in the user's own. Raises ConfigurationError."""
    folders = (PRICES,) if own is None else (PRICES, own)
    return tuple(each for folder in folders for file in read_price_files(folder) for each in file.machines)


def _prices(file: PriceFile) -> list[Price]:
    return [
        _price(row, band, amounts, file.what_if_only)
        for row in file.rows
        for band, amounts in ((Band.FLAT, row.flat), (Band.OFF_PEAK, row.off_peak), (Band.PEAK, row.peak))
        if amounts is not None
    ]


def _price(row: Row, band: Band, amounts: Amounts, is_what_if_only: bool) -> Price:
    valid_from = row.valid_from.astimezone(UTC)
    return Price(
        name=_name(row, band),
        model=row.model,
        currency=row.currency,
        band=band,
        valid_from=valid_from,
        hit_pico=amounts.hit_pico,
        miss_pico=amounts.miss,
        output_pico=amounts.output,
        above_tokens=row.above_tokens,
        source=row.source,
        note=row.note,
        is_uncertain=row.uncertain,
        is_what_if_only=is_what_if_only,
    )


def _name(row: Row | Price, band: Band) -> str:
    name = f"{row.model}/{row.currency}/{row.valid_from.astimezone(UTC):%Y-%m-%dT%H:%MZ}/{band}"
    return f"{name}/above-{row.above_tokens}" if row.above_tokens else name


def _period(valid_from: datetime, prices: list[Price]) -> _Period:
    """Put the rows of one instant together. Raises ConfigurationError where some prompt or hour has no price."""
    bands = {band: tuple(price for price in prices if price.band is band) for band in Band}
    held = {band: steps for band, steps in bands.items() if steps}
    where = f"prices: {prices[0].model} in {prices[0].currency} from {valid_from:%Y-%m-%dT%H:%MZ}"
    if set(held) not in ({Band.FLAT}, {Band.OFF_PEAK, Band.PEAK}):
        raise ConfigurationError(f"{where}: is both flat and banded")
    if any(steps[0].above_tokens for steps in held.values()):
        raise ConfigurationError(f"{where}: needs a row without above_tokens for short prompts")
    return _Period(valid_from, held)


def _order(price: Price) -> tuple[datetime, int, Band]:
    return price.valid_from, price.above_tokens, price.band


def _utc(instant: datetime) -> datetime:
    if instant.tzinfo is None:
        raise ValueError(f"{instant} has no time zone; a price needs an aware instant, such as datetime.now(UTC)")
    return instant.astimezone(UTC)
