"""What public price maps say of DeepSeek's models, against our own book: alone responsible for that comparison.

Two maps are read, as whoever checks has downloaded them: LiteLLM's `model_prices_and_context_window.json`, which has
one price of today in USD per token, and the snapshot of `model-prices`, which has dated ones in USD per 1M tokens,
peak hours and holidays. Their numbers are read digit by digit as decimals: a float would differ from a price that is
the same. They are second opinions: nothing is ever priced by them, and a difference is for somebody to look up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from schemas.errors import ConfigurationError, UnknownPrice
from schemas.money import PICO, Currency
from schemas.pricing import Band, Price, PriceBook

#: The maps know other providers that host the same models; only the maker's own prices are compared.
PROVIDER = "deepseek"
#: Prices, and hours in which they hold, change at whole and at half hours.
STEP = timedelta(minutes=30)
_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Amounts:
    """Pico-dollars per token. Decimals, since another's price need not be whole."""

    hit: Decimal
    miss: Decimal
    output: Decimal

    @classmethod
    def of(cls, price: Price) -> Amounts:
        return cls(Decimal(price.hit_pico), Decimal(price.miss_pico), Decimal(price.output_pico))

    def times(self, factor: Decimal) -> Amounts:
        return Amounts(self.hit * factor, self.miss * factor, self.output * factor)


@dataclass(frozen=True, slots=True)
class Quote:
    """What a map says of one model: `at` an instant, or None where it does not say.

    `is_of_today`: it has one price, and does not tell of which hours or since when.
    """

    model: str
    at: Callable[[datetime], Amounts | None]
    is_of_today: bool


@dataclass(frozen=True, slots=True)
class PublicMap:
    """One map that was read: what it is, and its quotes."""

    name: str
    quotes: tuple[Quote, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """From `since` to before `until`, `model` costs something else by a map than by our `row`. None: it goes on."""

    map: str
    model: str
    row: str
    since: datetime
    until: datetime | None
    ours: Amounts
    theirs: Amounts


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was compared, and what differs. `unknown` are models of the map that the book has no price for."""

    map: str
    compared: tuple[str, ...]
    unknown: tuple[str, ...]
    differences: tuple[Difference, ...]


def read_map(text: str) -> PublicMap:
    """A map from the text of its file. Raises ConfigurationError where it is neither of the two."""
    try:
        found = json.loads(text, parse_float=Decimal, parse_int=Decimal)
        if isinstance(found, dict) and "schedules" in found and found.get("schema") == _SCHEMA:
            return PublicMap("model-prices", tuple(_read_model_prices(found)))
        if isinstance(found, dict) and any("litellm_provider" in each for each in _tables(found)):
            return PublicMap("LiteLLM", tuple(_read_litellm(found)))
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ConfigurationError(f"is no price map that can be read ({type(error).__name__}); {_WANTED}") from None
    raise ConfigurationError(f"is none of the price maps that are known; {_WANTED}")


_WANTED = (
    "give LiteLLM's model_prices_and_context_window.json, or snapshot.json of the package model-prices "
    f"(schema {_SCHEMA})"
)


def compare(book: PriceBook, public: PublicMap, since: datetime, at: datetime) -> Comparison:
    """Hold the book against a map, from `since` until `at`; one that has prices of today only, at `at`."""
    compared, unknown, differences = [], [], []
    for quote in public.quotes:
        try:
            book.canonical(quote.model)
        except UnknownPrice:
            unknown.append(quote.model)
            continue
        compared.append(quote.model)
        found = _compare_today(book, quote, at) if quote.is_of_today else _compare_spans(book, quote, since, at)
        differences += [Difference(public.name, quote.model, *each) for each in found]
    return Comparison(public.name, tuple(compared), tuple(unknown), tuple(differences))


_Found = tuple[str, datetime, datetime | None, Amounts, Amounts]


def _compare_today(book: PriceBook, quote: Quote, at: datetime) -> Iterator[_Found]:
    """It may have the price of any hours."""
    theirs = quote.at(at)
    row = book.at(quote.model, Currency.USD, at)
    bands = [row] if row.band is Band.FLAT else [book.in_band(row, band) for band in (Band.OFF_PEAK, Band.PEAK)]
    if theirs is not None and theirs not in [Amounts.of(each) for each in bands]:
        yield bands[0].name, row.valid_from, None, Amounts.of(bands[0]), theirs


def _compare_spans(book: PriceBook, quote: Quote, since: datetime, at: datetime) -> Iterator[_Found]:
    """Every half hour, neighbours that differ alike together."""
    span: _Found | None = None
    for instant in _half_hours(since, at):
        found = _differ(book, quote, instant)
        if span is not None and (found is None or (span[0], *span[3:]) != found):
            yield span[0], span[1], instant, span[3], span[4]
            span = None
        if span is None and found is not None:
            span = (found[0], instant, None, found[1], found[2])
    if span is not None:
        yield span


def _differ(book: PriceBook, quote: Quote, instant: datetime) -> tuple[str, Amounts, Amounts] | None:
    with suppress(UnknownPrice):  # before the book's first row there is nothing of ours to hold against theirs
        row, theirs = book.at(quote.model, Currency.USD, instant), quote.at(instant)
        if theirs is not None and theirs != Amounts.of(row):
            return row.name, Amounts.of(row), theirs
    return None


def _half_hours(since: datetime, at: datetime) -> Iterator[datetime]:
    instant = since.replace(minute=since.minute // 30 * 30, second=0, microsecond=0)
    while instant <= at:
        yield instant
        instant += STEP


def _tables(found: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (each for each in found.values() if isinstance(each, dict))


def _read_litellm(found: Mapping[str, Any]) -> Iterator[Quote]:
    """Its own name of a model may have the provider's before it. The first entry explains the format."""
    seen = set()
    for key, entry in found.items():
        name = key.removeprefix(f"{PROVIDER}/")
        is_priced = isinstance(entry, dict) and entry.get("litellm_provider") == PROVIDER
        if is_priced and "input_cost_per_token" in entry and name not in seen:
            seen.add(name)
            amounts = _litellm_amounts(entry)
            yield Quote(name, lambda _, amounts=amounts: amounts, is_of_today=True)  # type: ignore[misc]  # a default binds it


def _litellm_amounts(entry: Mapping[str, Any]) -> Amounts:
    miss = Decimal(entry["input_cost_per_token"])
    hit = entry.get("cache_read_input_token_cost", entry.get("input_cost_per_token_cache_hit"))
    output = Decimal(entry.get("output_cost_per_token") or 0)
    return Amounts(miss if hit is None else Decimal(hit), miss, output).times(Decimal(PICO))


def _read_model_prices(found: Mapping[str, Any]) -> Iterator[Quote]:
    hours = _Hours.of(found["schedules"])
    for name, modes in found["prices"].get(PROVIDER, {}).items():
        intervals = [(_instant(each.get("start")), _amounts(each["rates"])) for each in modes.get("standard", [])]
        yield Quote(name, _Dated(tuple(intervals), hours).at, is_of_today=False)


def _amounts(rates: Mapping[str, Any]) -> Amounts:
    """Without a price of cached tokens they cost what others do."""
    hit = rates.get("cache_read", rates["input"])
    return Amounts(Decimal(hit), Decimal(rates["input"]), Decimal(rates["output"])).times(Decimal(10**6))


def _instant(written: str | None) -> datetime | None:
    return None if written is None else datetime.fromisoformat(written).astimezone(UTC)


@dataclass(frozen=True, slots=True)
class _Dated:
    """Prices since when, and by how much peak hours multiply them. The first has no beginning."""

    intervals: tuple[tuple[datetime | None, Amounts], ...]
    hours: _Hours

    def at(self, instant: datetime) -> Amounts | None:
        begun = [amounts for start, amounts in self.intervals if start is None or start <= instant]
        return begun[-1].times(self.hours.factor(instant)) if begun else None


@dataclass(frozen=True, slots=True)
class _Hours:
    """The provider's peak hours as the map has them."""

    schedules: tuple[Mapping[str, Any], ...]
    holidays: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> _Hours:
        mine = [each for each in written["schedule"] if each["provider"] == PROVIDER and "peak_hours_utc" in each]
        return cls(tuple(mine), written.get("holidays", {}))

    def factor(self, instant: datetime) -> Decimal:
        for each in self.schedules:
            until = _instant(each.get("valid_until"))
            begun = _instant(each.get("valid_from"))
            if (begun is None or begun <= instant) and (until is None or instant < until):
                return Decimal(each["peak_multiplier"]) if self._is_peak(each, instant) else Decimal(1)
        return Decimal(1)

    def _is_peak(self, schedule: Mapping[str, Any], instant: datetime) -> bool:
        clock = f"{instant:%H:%M}"
        windows: Sequence[tuple[str, str]] = schedule["peak_hours_utc"]
        if not any(start <= clock < end for start, end in windows):
            return False
        if schedule.get("weekdays_only") and instant.weekday() >= 5:
            return False
        calendar = self.holidays.get(schedule.get("holidays", ""))
        if calendar is None:
            return True
        local = instant + timedelta(hours=int(calendar["utc_offset_hours"]))
        return local.date().isoformat() not in calendar["dates"]
