"""What a person may write in schemas/prices/*.toml, and every way in which it can be wrong.

Amounts become exact integers here: a price per 1M tokens that is not a whole number of pico units per token is
refused, and so is an amount that is not a string, because a TOML number would already have been rounded.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Self

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from schemas.errors import ConfigurationError, Problem
from schemas.money import PICO, Currency
from schemas.peak_hours import PeakHours

_TOKENS_PER_PRICE = 10**6


def pico_per_token(amount: object) -> int:
    """Pico units per token of an amount per 1M tokens: "0.003" is 3000. Raises ValueError if it is not exact."""
    pico = _exact(amount) * PICO / _TOKENS_PER_PRICE
    if pico != pico.to_integral_value():
        raise ValueError(f"{amount!r} per 1M tokens is not a whole number of pico units per token; check its digits")
    return int(pico)


def pico_per_hour(amount: object) -> int:
    """Pico units of an amount per hour: "2.50" is 2.5e12. Raises ValueError if it is not exact."""
    pico = _exact(amount) * PICO
    if pico != pico.to_integral_value():
        raise ValueError(f"{amount!r} has more than twelve decimals")
    return int(pico)


def _exact(amount: object) -> Decimal:
    if not isinstance(amount, str):
        raise ValueError(f'{amount!r} is not exact; write the amount in quotes, like "0.14"')
    try:
        value = Decimal(amount)
    except InvalidOperation:
        raise ValueError(f'{amount!r} is not an amount; write it like "0.14"') from None
    if not value.is_finite() or not 0 <= value < 10**9 or value.as_tuple().exponent < -18:  # type: ignore[operator]  # finite: an int
        raise ValueError(f'{amount!r} is not an amount; write one from 0 up, like "0.14"')
    return value


PicoPerToken = Annotated[int, BeforeValidator(pico_per_token)]
PicoPerHour = Annotated[int, BeforeValidator(pico_per_hour)]


class _Written(BaseModel):
    """A table of a price file: exactly these keys, exactly these types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Amounts(_Written):
    """Pico units per token of one band. Without `hit`, cached tokens are priced as misses."""

    hit: PicoPerToken | None = None
    miss: PicoPerToken
    output: PicoPerToken

    @property
    def hit_pico(self) -> int:
        return self.miss if self.hit is None else self.hit

    @model_validator(mode="after")
    def _a_hit_is_never_dearer(self) -> Self:
        """Else a reservation, which assumes that every token misses, would not be the worst case."""
        if self.hit_pico > self.miss:
            raise ValueError("hit is dearer than miss; are the amounts in the order hit, miss, output?")
        return self


class Row(_Written):
    """One [[row]]: what a model costs in one currency from an instant on."""

    model: str = Field(min_length=1)
    currency: Annotated[Currency, Field(strict=False)]
    valid_from: AwareDatetime
    flat: Amounts | None = None
    off_peak: Amounts | None = None
    peak: Amounts | None = None
    above_tokens: int = Field(default=0, ge=0)
    source: str = Field(min_length=1)
    note: str = ""
    uncertain: bool = False

    @model_validator(mode="after")
    def _is_flat_or_has_both_bands(self) -> Self:
        bands = (self.flat is not None, self.off_peak is not None, self.peak is not None)
        if bands not in {(True, False, False), (False, True, True)}:
            raise ValueError("write either flat = {…}, or both off_peak = {…} and peak = {…}")
        if self.uncertain and not self.note:
            raise ValueError("an uncertain row needs a note that says what is uncertain")
        return self

    @model_validator(mode="after")
    def _starts_on_a_whole_minute(self) -> Self:
        if self.valid_from.second or self.valid_from.microsecond:
            raise ValueError("valid_from must be a whole minute: it is part of the row's name")
        return self


class Machine(_Written):
    """One [[machine]]: GPUs by the hour, the model they host, and the tokens they are assumed to serve in it."""

    model: str = Field(min_length=1)
    currency: Annotated[Currency, Field(strict=False)]
    valid_from: AwareDatetime
    hosts: str = Field(min_length=1)
    gpus: int = Field(gt=0)
    gpu_hour: PicoPerHour
    tokens_per_hour: int = Field(gt=0)
    source: str = Field(min_length=1)
    note: str = ""

    @property
    def pico_per_token(self) -> int:
        """The machine's hour over the tokens of that hour, rounded up."""
        return -(-self.gpus * self.gpu_hour // self.tokens_per_hour)

    def row(self) -> Row:
        """The same, as a row with one price for every token."""
        each = self.pico_per_token
        amounts = Amounts.model_construct(hit=each, miss=each, output=each)
        note = f"{self.tokens_per_hour:,} tokens an hour on {self.gpus} GPUs is an assumption. {self.note}".strip()
        return Row(
            model=self.model,
            currency=self.currency,
            valid_from=self.valid_from,
            flat=amounts,
            source=self.source,
            note=note,
            uncertain=True,
        )


class Peak(_Written):
    """The [peak] table: when peak rows hold."""

    since: AwareDatetime
    windows_utc: list[Annotated[tuple[time, time], Field(strict=False)]] = Field(min_length=1)
    utc_offset_hours: int = Field(ge=-12, le=14)
    weekends_exempt_from: date
    holidays_exempt_from: date

    @model_validator(mode="after")
    def _windows_are_inside_a_day(self) -> Self:
        if any(start >= end for start, end in self.windows_utc):
            raise ValueError("a window must end after it starts, within one UTC day; split one that crosses midnight")
        return self

    def hours(self, days_off: Mapping[int, frozenset[date]]) -> PeakHours:
        return PeakHours(
            since=self.since,
            windows=tuple(self.windows_utc),
            utc_offset=timedelta(hours=self.utc_offset_hours),
            weekends_exempt_from=self.weekends_exempt_from,
            holidays_exempt_from=self.holidays_exempt_from,
            days_off=days_off,
        )


class Calendar(_Written):
    """One [[calendar]]: a year's public holidays in China, every day off from Monday to Friday at least."""

    year: int = Field(ge=2026, le=2100)
    days_off: list[date] = Field(min_length=1)
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _days_are_of_the_year(self) -> Self:
        if strays := [f"{day}" for day in self.days_off if day.year != self.year]:
            raise ValueError(f"{', '.join(strays)}: not in {self.year}; each year has a [[calendar]] of its own")
        return self


class Alias(_Written):
    """One [[alias]]: names, as a shell pattern, that are billed as `model`."""

    pattern: str = Field(min_length=1)
    model: str
    note: str = ""


class PriceFile(_Written):
    """One whole file. `what_if_only` rows may be compared with, never reserved or billed by."""

    what_if_only: bool = False
    peak: Peak | None = None
    calendars: list[Calendar] = Field(default_factory=list, alias="calendar")
    aliases: list[Alias] = Field(default_factory=list, alias="alias")
    written_rows: list[Row] = Field(default_factory=list, alias="row")
    machines: list[Machine] = Field(default_factory=list, alias="machine")

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row, those of machines included."""
        return (*self.written_rows, *(machine.row() for machine in self.machines))


def read_price_files(folder: Path) -> tuple[PriceFile, ...]:
    """Every *.toml of `folder` in order of name. Raises ConfigurationError with every problem at once."""
    paths = sorted(folder.glob("*.toml"))
    if not paths:
        raise ConfigurationError(
            f"no price files in {folder}: FARTHING_PRICES names a folder with *.toml (README: Prices); unset "
            "it where you have none"
        )
    files: list[PriceFile] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            files.append(PriceFile.model_validate(tomllib.loads(path.read_text("utf-8"))))
        except tomllib.TOMLDecodeError as error:
            problems.append(Problem(path.name, str(error)))
        except ValidationError as error:
            problems.extend(_problems(path.name, error))
    if problems:
        raise ConfigurationError(*problems)
    return tuple(files)


def _problems(name: str, error: ValidationError) -> list[Problem]:
    """One line for each fault: `deepseek.toml: row 3.peak.hit: …`, rows counted from 1 as people do."""
    found = []
    for fault in error.errors(include_url=False):
        where = ".".join(f"{part + 1}" if isinstance(part, int) else part for part in fault["loc"])
        found.append(Problem(f"{name}: {where}" if where else name, fault["msg"].removeprefix("Value error, ")))
    return found
