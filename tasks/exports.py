"""Exports: alone responsible for handing the lines of an audit to a spreadsheet or a warehouse.

One row for each part that the spend is split into; they add up to the audit's own totals. Money stands there twice:
as integers of pico units, and as an exact decimal of the currency.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import fields
from decimal import Decimal
from pathlib import Path

from schemas.errors import ConfigurationError
from schemas.inert import escape_cell
from schemas.money import Currency, Money
from schemas.spending import Line, Sums
from tasks.documents import write_table
from tasks.ledger.spend import Audit

Value = str | int | Decimal
SUMS = tuple(each.name for each in fields(Sums))


def columns(audit: Audit) -> tuple[str, ...]:
    """The names of the columns: the sides, the currency, the sums, and the two sums that matter as decimals."""
    return (*audit.by, "currency", *SUMS, "cost", "at_most")


def rows(audit: Audit) -> Iterator[tuple[Value, ...]]:
    """The audit's lines. Names are escaped, since a provider or a user wrote some of them."""
    currency = Currency(audit.currency) if audit.currency else Currency.USD  # an empty ledger has no line
    return (_row(line, currency) for line in audit.lines)


def _row(line: Line, currency: Currency) -> tuple[Value, ...]:
    money = (Money(pico, currency).decimal for pico in (line.sums.cost_pico, line.sums.high_pico))
    return (*map(escape_cell, line.names), currency.value, *(getattr(line.sums, name) for name in SUMS), *money)


def write_csv(audit: Audit, path: Path) -> None:
    """Write the audit's lines as CSV, in UTF-8. Raises ConfigurationError where the file cannot be written."""

    def write() -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns(audit))
            writer.writerows(_spelt(row) for row in rows(audit))

    _write(path, write)


def write_parquet(audit: Audit, path: Path) -> None:
    """The same as Parquet: sums are 64-bit integers, money besides is decimal(38, 12)."""
    texts = len(audit.by) + 1
    _write(path, lambda: write_table(columns(audit), list(rows(audit)), path, texts=texts, money=2))


def _write(path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror or error}; name another file") from None


def _spelt(row: tuple[Value, ...]) -> tuple[str | int, ...]:
    """Decimals in full, never with an exponent."""
    return tuple(f"{value:f}" if isinstance(value, Decimal) else value for value in row)
