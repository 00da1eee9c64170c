"""A provider's statement: what the console's export says was used, line by line, and at which price.

Read from the rows of its CSV files (design: deepseek.md, "Bill and balance"). Nobody has published what they look
like, so columns may stand in any order, and there may be more than are needed; what cannot be read is refused by
file, line and column, and nothing is guessed. Days are UTC's, like the price page's; an instant says its offset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from enum import StrEnum

from schemas.errors import ConfigurationError, Problem
from schemas.money import PICO, Currency

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
#: No count of tokens and no price in pico units has more digits.
_DIGITS = 18
#: A value is quoted in an error up to here.
_SHOWN = 40


class Bucket(StrEnum):
    """A billed bucket of tokens, by the name that the export has for it."""

    HIT = "input_cache_hit_tokens"
    MISS = "input_cache_miss_tokens"
    OUTPUT = "output_tokens"


@dataclass(frozen=True, slots=True)
class Period:
    """The time that a row is about, within one UTC day."""

    start: datetime
    end: datetime

    @property
    def day(self) -> date:
        return self.start.date()


@dataclass(frozen=True, slots=True)
class Used:
    """Tokens of one bucket that were used in a period at a price in pico units per token; `key` names the API key."""

    period: Period
    model: str
    user_id: str
    key: str
    bucket: Bucket
    price_pico: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Charged:
    """What a period cost by the export's own sum, which it may have rounded, in pico units."""

    period: Period
    currency: Currency
    pico: Decimal


@dataclass(frozen=True, slots=True)
class Sheet:
    """One CSV file of an export: its name, and its rows with the numbers of their lines."""

    name: str
    lines: Iterable[tuple[int, Sequence[str]]]


@dataclass(frozen=True)
class Statement:
    """All files of an export together, or what an API key (`key`) used of it.

    `sources` names each file that was given, with its SHA-256.
    """

    used: tuple[Used, ...]
    charged: tuple[Charged, ...]
    sources: tuple[str, ...] = ()
    key: str | None = None

    @property
    def currency(self) -> Currency | None:
        """The currency of its sums. None: it has none. Raises ConfigurationError where it has two."""
        found = {each.currency for each in self.charged}
        if len(found) > 1:
            raise ConfigurationError(
                f"the export has sums in {' and '.join(sorted(found))}, and its amounts do not say which is theirs: "
                "export one wallet at a time"
            )
        return next(iter(found), None)

    @property
    def since(self) -> datetime:
        """When its first row begins."""
        return min(each.period.start for each in self.used)

    @property
    def until(self) -> datetime:
        """When its last row begins: an hour, or a day, that was not over when it was exported has more to come."""
        last = max(each.period.start for each in self.used)
        return min(each.period.start for each in self.used if each.period.end > last)


def read_statement(sheets: Iterable[Sheet], sources: Sequence[str] = (), key: str | None = None) -> Statement:
    """All sheets as one statement, or what an API key of that name used of it.

    Raises ConfigurationError for the first thing that cannot be read.
    """
    used: list[Used] = []
    charged: list[Charged] = []
    first: dict[tuple[object, ...], str] = {}
    for sheet in sheets:
        for where, says in _read_sheet(sheet):
            _refuse_repeated(says, sheet.name, where, first)
            if isinstance(says, Used):
                used.append(says)
            else:
                charged.append(says)
    if not used:
        raise ConfigurationError("no row of the export says which tokens were used: give the file that has `amount`")
    if key is not None and not any(each.key == key for each in used):
        known = ", ".join(sorted({each.key or "no name" for each in used}))
        raise ConfigurationError(f"--key: the export has nothing of an API key {key!r}; it knows {known[:200]}")
    kept = tuple(each for each in used if key is None or each.key == key)
    return Statement(kept, tuple(charged), tuple(sources), key)


@dataclass(frozen=True, slots=True)
class _Cells:
    """The cells of one line, by the names of their columns."""

    where: str
    of: Mapping[str, str]

    def refuse(self, column: str, what: str) -> ConfigurationError:
        return ConfigurationError(Problem(self.where, f"{column}: {what}"))

    def get(self, column: str) -> str:
        """The cell. Raises ConfigurationError for an empty one."""
        if not (cell := self.of.get(column, "")):
            raise self.refuse(column, "is empty")
        return cell

    def whole(self, column: str, unit: int = 1) -> int:
        """A number that is whole in units of `1/unit`, and not negative."""
        number = self.number(column) * unit
        if number != number.to_integral_value() or number < 0:
            of = "" if unit == 1 else " of pico units per token"
            raise self.refuse(column, f"{self.get(column)[:_SHOWN]!r} is no whole number{of}, 0 or more")
        return int(number)

    def number(self, column: str) -> Decimal:
        cell = self.get(column)
        try:
            number = Decimal(cell)
        except InvalidOperation:
            number = Decimal("nan")
        if not number.is_finite() or abs(number.adjusted()) > _DIGITS or len(cell) > 2 * _DIGITS:
            raise self.refuse(column, f"{cell[:_SHOWN]!r} is no number that can be an amount or a price")
        return number


def _read_sheet(sheet: Sheet) -> Iterator[tuple[str, Used | Charged]]:
    """What its rows say, each with the place where."""
    lines = iter(sheet.lines)
    number, header = next(lines, (1, ()))
    columns = [cell.strip().lower() for cell in header]
    read = _choose_reader(columns, f"{sheet.name}:{number}")
    for number, cells in lines:
        where = f"{sheet.name}:{number}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(columns):
            raise ConfigurationError(Problem(where, f"has {len(cells)} cells, and the header {len(columns)}"))
        said = read(_Cells(where, dict(zip(columns, (cell.strip() for cell in cells), strict=True))))
        if said is not None:
            yield where, said


def _choose_reader(columns: Sequence[str], where: str) -> Callable[[_Cells], Used | Charged | None]:
    """How its lines are read, by the columns it has."""
    if twice := {name for name in columns if name and columns.count(name) > 1}:
        raise ConfigurationError(Problem(where, f"has the column {min(twice)} twice"))
    if not {"start_time_iso", "utc_date"} & set(columns):
        raise ConfigurationError(Problem(where, f"no column says when: start_time_iso or utc_date; {_told(columns)}"))
    if {"type", "price", "amount", "model"} <= set(columns):
        return _read_used
    if {"cost", "currency"} <= set(columns):
        return _read_charged
    raise ConfigurationError(
        Problem(where, f"needs the columns model, type, price and amount, or cost and currency; {_told(columns)}")
    )


def _told(columns: Sequence[str]) -> str:
    names = ", ".join(name for name in columns if name)[:200]
    return f"it has {names}" if names else "it is empty"


def _read_used(cells: _Cells) -> Used | None:
    """A row of tokens. None for one about something else, which has no price."""
    kind = cells.get("type")
    if kind not in set(Bucket):
        if cells.of["price"] and cells.number("price") and cells.number("amount"):
            raise cells.refuse("type", f"{kind[:_SHOWN]!r} has a price and is no bucket known: {', '.join(Bucket)}")
        return None
    if not (tokens := cells.whole("amount")):
        return None
    return Used(
        period=_read_period(cells),
        model=cells.get("model"),
        user_id=cells.of.get("user_id", ""),
        key=cells.of.get("api_key_name") or cells.of.get("api_key") or "",
        bucket=Bucket(kind),
        price_pico=cells.whole("price", PICO),
        tokens=tokens,
    )


def _read_charged(cells: _Cells) -> Charged:
    code = cells.get("currency").upper()
    if code not in set(Currency):
        raise cells.refuse("currency", f"{code[:_SHOWN]!r} is none that DeepSeek bills in: {', '.join(Currency)}")
    return Charged(_read_period(cells), Currency(code), cells.number("cost") * PICO)


def _read_period(cells: _Cells) -> Period:
    """An hour or a day, by its instants or by its UTC date."""
    if "start_time_iso" not in cells.of:
        return _read_day(cells)
    start = _read_instant(cells, "start_time_iso")
    end = _read_instant(cells, "end_time_iso") if cells.of.get("end_time_iso") else start + HOUR
    if not start < end:
        raise cells.refuse("end_time_iso", "is not later than start_time_iso")
    if (end - timedelta(microseconds=1)).date() != start.date():
        raise cells.refuse("end_time_iso", "the row is about two UTC days: export by the hour, or by UTC days")
    return Period(start, end)


def _read_day(cells: _Cells) -> Period:
    given = cells.get("utc_date")
    try:
        day = date.fromisoformat(given[:10].replace("/", "-"))
    except ValueError:
        raise cells.refuse("utc_date", f"{given[:_SHOWN]!r} is no date like 2026-11-25") from None
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return Period(start, start + DAY)


def _read_instant(cells: _Cells, column: str) -> datetime:
    given = cells.get(column)
    try:
        instant = datetime.fromisoformat(given)
        if instant.tzinfo is None:
            raise cells.refuse(column, f"{given[:_SHOWN]!r} has no offset, like Z or +08:00, and none is guessed")
        return instant.astimezone(UTC)
    except (ValueError, OverflowError):
        raise cells.refuse(column, f"{given[:_SHOWN]!r} is no instant like 2026-11-25T02:00:00+00:00") from None


def _refuse_repeated(says: Used | Charged, sheet: str, where: str, first: dict[tuple[object, ...], str]) -> None:
    """Two files about the same hours would count them twice; within one file rows may be split by more columns."""
    if isinstance(says, Used):
        same: tuple[object, ...] = (
            says.period.start,
            says.model,
            says.user_id,
            says.key,
            says.bucket,
            says.price_pico,
        )
    else:
        same = (says.period.start, says.currency)
    if first.setdefault(same, sheet) != sheet:
        raise ConfigurationError(
            Problem(where, f"tells again of what {first[same]} tells: give each hour or month in one file only")
        )
