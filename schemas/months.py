"""A month of the books, in UTC, and what it came to: when it was closed, and now."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, time
from typing import Any

from schemas.errors import ConfigurationError
from schemas.money import Currency

_WRITTEN = re.compile(r"\d{4}-\d{2}")


@dataclass(frozen=True, slots=True)
class Month:
    """A calendar month in UTC, by its first day."""

    first: date

    @classmethod
    def find(cls, text: str) -> Month | None:
        """Read `2026-11`; None for what is written otherwise. Raises ConfigurationError for a month there is not."""
        if not _WRITTEN.fullmatch(text):
            return None
        try:
            return cls(date.fromisoformat(f"{text}-01"))
        except ValueError:
            raise ConfigurationError(f"{text} is no month: write it like 2026-11") from None

    @property
    def next(self) -> Month:
        year, month = divmod(self.first.year * 12 + self.first.month, 12)
        return Month(date(year, month + 1, 1))

    @property
    def begin(self) -> datetime:
        return datetime.combine(self.first, time(), UTC)

    @property
    def end(self) -> datetime:
        """The instant it is over."""
        return datetime.combine(self.next.first, time(), UTC)

    def __str__(self) -> str:
        return f"{self.first:%Y-%m}"


@dataclass(frozen=True, slots=True)
class RunInMonth:
    """What one run booked in a month: rows, their sum in pico units, and a SHA-256 over them in order."""

    run: int
    rows: int
    cost_pico: int
    digest: str


@dataclass(frozen=True, slots=True)
class Books:
    """The booked cost of a month, by run, of the rows recorded by some instant; and what was unknown beside it."""

    month: Month
    is_simulated: bool
    currency: Currency
    runs: tuple[RunInMonth, ...]
    unknown_attempts: int
    unknown_pico: int

    @property
    def rows(self) -> int:
        return sum(run.rows for run in self.runs)

    @property
    def cost_pico(self) -> int:
        return sum(run.cost_pico for run in self.runs)

    @property
    def digest(self) -> str:
        """`sha256:` over the runs in the order of their numbers, each with its own digest."""
        lines = "\n".join(
            f"{run.run} {run.rows} {run.cost_pico} {run.digest}" for run in sorted(self.runs, key=lambda run: run.run)
        )
        told = f"{self.month} {self.currency} {'simulated' if self.is_simulated else 'real'}\n{lines}"
        return f"sha256:{hashlib.sha256(told.encode()).hexdigest()}"

    def runs_json(self) -> list[dict[str, Any]]:
        """The runs as the ledger keeps them."""
        return [asdict(run) for run in self.runs]


@dataclass(frozen=True, slots=True)
class Closed:
    """Books as they were closed: when and by whom, and with which digest."""

    books: Books
    digest: str
    until: datetime
    closed_at: datetime
    closed_by: str


@dataclass(frozen=True, slots=True)
class Late:
    """What was booked for a closed month after that: rows of a run, and what they change of its cost."""

    run: int
    rows: int
    cost_pico: int


@dataclass(frozen=True, slots=True)
class Checked:
    """A closed month held against the ledger. `then` is computed anew of the rows it was closed with."""

    closed: Closed
    then: Books
    late: tuple[Late, ...]

    @property
    def differences(self) -> tuple[str, ...]:
        """What is no more as it was closed, in words. Empty: the books are closed still."""
        return tuple(_compare(self.closed, self.then))

    @property
    def late_pico(self) -> int:
        return sum(each.cost_pico for each in self.late)


def read_runs(kept: Sequence[Mapping[str, Any]]) -> tuple[RunInMonth, ...]:
    """The runs of a closed month, as `Books.runs_json` wrote them."""
    return tuple(RunInMonth(**run) for run in kept)


def _compare(closed: Closed, then: Books) -> Iterator[str]:
    was, now = ({run.run: run for run in books.runs} for books in (closed.books, then))
    for run in sorted({*was, *now}):
        before, after = was.get(run), now.get(run)
        if before != after:
            yield f"run {run}: closed with {_tell(before)}, its rows say {_tell(after)}"
    if closed.digest != closed.books.digest:
        yield f"month {closed.books.month}: its digest is {closed.digest}, its runs say {closed.books.digest}"


def _tell(run: RunInMonth | None) -> str:
    return "nothing" if run is None else f"{run.rows} rows of {run.cost_pico} pico ({run.digest})"
