"""The ledger against an export: compared, booked, and what people look at of it and of closed months."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from schemas.balance import Paid
from schemas.errors import ConfigurationError
from schemas.inert import escape_cell
from schemas.money import Currency, Money
from schemas.months import Checked, Closed
from schemas.pricing import PriceBook
from schemas.reconciliation import Closing, Correction, Match, Reconciliation, Status, reconcile
from schemas.statements import Bucket, Statement
from tasks.ledger.books import Bookable, Ours, Scope, book_closings, find_ours, find_paid
from tasks.ledger.connection import Ledger
from tasks.report import balance_alarm, balance_rows, signed, table

#: Lines that a terminal shows; the CSV has all.
SHOWN = 40
_BUCKETS = {Bucket.HIT: "cached", Bucket.MISS: "not cached", Bucket.OUTPUT: "output"}


@dataclass(frozen=True)
class Outcome:
    """A reconciliation with what was booked of it. `ours` is how the ledger was before, `after` how it is now.

    `balances` is what each account paid meanwhile, as far as somebody looked.
    """

    scope: Scope
    statement: Statement
    ours: Ours
    found: Reconciliation
    booked: tuple[Bookable, ...]
    after: Reconciliation
    balances: tuple[Paid, ...] = ()

    @property
    def name(self) -> str:
        return f"run {self.scope.run}" if self.scope.run is not None else f"{self.scope.month}"

    @property
    def charged_pico(self) -> Decimal | None:
        """What the export itself says that these days cost; None where it says nothing of sums."""
        sums = [each.pico for each in self.statement.charged if each.period.day in self.ours.days]
        return sum(sums, Decimal(0)) if sums else None

    @property
    def closed(self) -> list[Closing]:
        """What was closed now."""
        return [each for each in self.booked if isinstance(each, Closing)]

    @property
    def corrected(self) -> list[Correction]:
        """What was corrected now."""
        return [each for each in self.booked if isinstance(each, Correction)]

    @property
    def is_clean(self) -> bool:
        return self.after.is_clean


@dataclass(frozen=True)
class Judge:
    """What the ledger is held against: a statement at the prices of a book, and what its user knows of it."""

    statement: Statement
    book: PriceBook
    is_complete: bool
    is_alone: bool

    def __call__(self, ours: Ours, currency: Currency) -> Reconciliation:
        return reconcile(
            ours.booked,
            ours.unsettled,
            self.statement,
            self.book,
            currency,
            ours.days,
            is_complete=self.is_complete,
            is_alone=self.is_alone,
            shared=ours.shared,
        )


async def compare(ledger: Ledger, scope: Scope, judge: Judge) -> Outcome:
    """The ledger's days against the statement, with nothing booked of it."""
    ours = await find_ours(ledger, scope)
    found = judge(ours, scope.currency)
    return Outcome(scope, judge.statement, ours, found, (), found, await find_paid(ledger, scope))


async def book(ledger: Ledger, seen: Outcome, judge: Judge) -> Outcome:
    """Book what was shown and agreed to, and compare again. Raises ConfigurationError where it is another by now."""
    scope, agreed = seen.scope, seen.found.bookable
    await book_closings(ledger, scope, agreed, lambda now: judge(now, scope.currency).bookable)
    after = judge(await find_ours(ledger, scope), scope.currency)
    return replace(seen, booked=agreed, after=after)


def reconciliation_report(outcome: Outcome) -> list[RenderableType]:
    """A reconciliation for a terminal."""
    made: list[RenderableType] = [_totals(outcome), ""]
    odd = [each for each in outcome.after.matches if each.status is not Status.MATCHED]
    if odd:
        made += [_lines(outcome, odd), ""]
    made += [_stays(why, len(attempts)) for why, attempts in outcome.after.left.items()]
    return [*made, *_next(outcome)]


def _stays(why: str, attempts: int) -> str:
    return f"{attempts} attempts stay unknown: {why}" if attempts else f"nothing is corrected: {why}"


def _totals(outcome: Outcome) -> Table:
    after, currency = outcome.after, outcome.scope.currency
    counts = Counter(each.status for each in after.matches)
    unknown = [each.bound_pico for each in outcome.ours.unsettled]
    rows = [
        ("lines: matched", f"{counts[Status.MATCHED]:,}", True),
        *(
            (f"lines: {status}", f"{counts[status]:,}", counts[status])
            for status in Status
            if status != Status.MATCHED
        ),
        ("the ledger", _exact(after.ours_pico, currency), True),
        ("the export", _exact(after.theirs_pico, currency), True),
        ("off by", f"{after.theirs_pico - after.ours_pico:,} pico", True),
        ("the export's own sum", _sum(outcome), outcome.charged_pico is not None),
        ("others on the account", _exact(after.others_pico, currency), after.others_pico),
        ("unknown before", f"{len(unknown):,} attempts, at most {Money(sum(unknown), currency)}", unknown),
        ("closed now", f"{len(outcome.closed):,} attempts, {_closed(outcome)}", outcome.closed),
        ("corrected now", f"{len(outcome.corrected):,} runs, {_corrected(outcome)}", outcome.corrected),
        *((*row, True) for row in balance_rows(outcome.balances)),
    ]
    title = f"{outcome.name} against {', '.join(outcome.statement.sources)}"
    return table(title, ("", ""), [(name, figure) for name, figure, is_told in rows if is_told])


def _exact(pico: int, currency: Currency) -> str:
    return f"{Money(pico, currency)} ({pico} pico)"


def _closed(outcome: Outcome) -> str:
    return _exact(sum(each.amount_pico for each in outcome.closed), outcome.scope.currency)


def _corrected(outcome: Outcome) -> str:
    pico = sum(each.amount_pico for each in outcome.corrected)
    return f"{signed(pico, outcome.scope.currency)} ({pico} pico)"


def _sum(outcome: Outcome) -> str:
    """The export's sums may be rounded, and are of everybody on the account."""
    charged = outcome.charged_pico or Decimal(0)
    return f"{outcome.scope.currency.sign}{charged.scaleb(-12):f}"


def _lines(outcome: Outcome, odd: Sequence[Match]) -> Table:
    currency = outcome.scope.currency
    rows = [
        (
            str(each.key.day),
            each.key.model,
            each.key.user_id or "—",
            _BUCKETS[each.key.bucket],
            f"{currency.sign}{Money(each.key.price_pico * 10**6, currency).decimal.normalize():f}",
            f"{each.ours:,}",
            f"{each.theirs:,}",
            ("−" if each.off_pico > 0 else "+") + str(Money(abs(each.off_pico), currency)),
            each.status.value,
        )
        for each in odd[:SHOWN]
    ]
    columns = ("day (UTC)", "model", "user_id", "tokens", "per 1M", "ledger", "export", "the ledger is off by", "")
    more = f"{len(odd) - SHOWN:,} more: --csv FILE has them all" if len(odd) > SHOWN else None
    return table("Lines that differ", columns, rows, more, texts=(0, 1, 2, 3, 8))


def _next(outcome: Outcome) -> list[RenderableType]:
    """What to do about it, where there is something to do."""
    after = outcome.after
    told: list[RenderableType] = []
    if after.closings:
        pico = _exact(after.closed_pico, outcome.scope.currency)
        runs = ", ".join(map(str, sorted({each.of.run for each in after.closings})))
        told += [f"{len(after.closings)} unknown attempts of run {runs} were billed {pico}: --close books that"]
    if after.corrections:
        days = ", ".join(sorted({str(each.billed_on) for each in after.corrections}))
        told += [
            f"{days}: a reply came late for an attempt that an export had closed together with others. What it says "
            f"counts, and the others' shares are off by {after.corrected_pico:,} pico: --close books that"
        ]
    told += [
        f"{day}: a reply came late for an attempt that an export had closed together with others. What it says "
        "counts, and this export does not say what the others were billed: the day's sum is off by the lines above"
        for day in after.doubtful
    ]
    if not after.is_clean and not after.doubtful and not after.corrections:
        told += [
            "where the export has more: does another program use this account (--key NAME leaves it out)? "
            "where the ledger has more: is the export of the whole day, and of this account?"
        ]
    if after.is_clean and not after.closings and not after.left:
        told += ["every line matches, and nothing of these days is unknown"]
    if alarm := balance_alarm(outcome.balances):
        told += [alarm]
    return told


def reconciliation_json(outcome: Outcome) -> dict[str, Any]:
    """A reconciliation as scripts rely on it; sums in pico units, tokens as the ledger has them now."""
    after = outcome.after
    counts = Counter(each.status for each in after.matches)
    return {
        "run": outcome.scope.run,
        "month": None if outcome.scope.month is None else str(outcome.scope.month),
        "currency": outcome.scope.currency.value,
        "is_simulated": outcome.scope.is_simulated,
        "sources": list(outcome.statement.sources),
        "is_clean": after.is_clean,
        "by_user_id": after.is_by_user,
        "counts": {status.name.lower(): counts[status] for status in Status},
        "ours_pico": after.ours_pico,
        "theirs_pico": after.theirs_pico,
        "off_pico": after.theirs_pico - after.ours_pico,
        "others_pico": after.others_pico,
        "unknown_attempts": len(outcome.ours.unsettled),
        "unknown_pico": sum(each.bound_pico for each in outcome.ours.unsettled),
        "closable": {"attempts": len(after.closings), "cost_pico": after.closed_pico},
        "closed": {
            "attempts": len(outcome.closed),
            "cost_pico": sum(each.amount_pico for each in outcome.closed),
            "runs": sorted({each.of.run for each in outcome.closed}),
        },
        "correctable": {"rows": len(after.corrections), "cost_pico": after.corrected_pico},
        "corrected": {
            "rows": len(outcome.corrected),
            "cost_pico": sum(each.amount_pico for each in outcome.corrected),
            "runs": sorted({each.run for each in outcome.corrected}),
        },
        "doubtful_days": [str(day) for day in after.doubtful],
        "left": [{"why": why, "attempts": len(attempts)} for why, attempts in after.left.items()],
        "balances": [_paid_json(each) for each in outcome.balances],
        "lines": [_line_json(each) for each in after.matches],
    }


def _paid_json(paid: Paid) -> dict[str, Any]:
    return asdict(paid) | {"since": paid.since.isoformat(), "until": paid.until.isoformat()}


def _line_json(match: Match) -> dict[str, Any]:
    return {
        "day": str(match.key.day),
        "model": match.key.model,
        "user_id": match.key.user_id or None,
        "bucket": match.key.bucket.value,
        "price_pico": match.key.price_pico,
        "ours": match.ours,
        "theirs": match.theirs,
        "off_pico": match.off_pico,
        "status": match.status.value,
    }


def write_lines(found: Reconciliation, path: Path) -> None:
    """Every line as CSV. Raises ConfigurationError where the file cannot be written."""
    lines = [_line_json(each) for each in found.matches]
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(lines[0] if lines else [])
            for line in lines:
                texts = ("model", "user_id")
                writer.writerow(escape_cell(value or "") if name in texts else value for name, value in line.items())
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror or error}; name another file") from None


def closed_report(closed: Closed) -> list[RenderableType]:
    """A closed month for a terminal."""
    books = closed.books
    rows = [
        ("booked", _exact(books.cost_pico, books.currency)),
        ("rows, runs", f"{books.rows:,}, {len(books.runs):,}"),
        (
            "not known to be billed",
            f"at most {Money(books.unknown_pico, books.currency)}, {books.unknown_attempts:,}",
        ),
        ("closed", f"{closed.closed_at:%Y-%m-%d %H:%M:%S} UTC by {closed.closed_by}"),
        ("digest", closed.digest),
    ]
    return [table(f"{books.month}, {_kind(closed)}", ("", ""), rows)]


def _kind(closed: Closed) -> str:
    return "simulated" if closed.books.is_simulated else closed.books.currency.value


def checked_report(checked: Checked) -> list[RenderableType]:
    """A closed month held against its rows, for a terminal."""
    currency = checked.closed.books.currency
    made = closed_report(checked.closed)
    if checked.late:
        late = [
            (
                str(each.run),
                f"{each.rows:,}",
                signed(each.cost_pico, currency),
            )
            for each in checked.late
        ]
        title = f"Late: booked after the close, and no part of it ({checked.late_pico} pico)"
        made += ["", table(title, ("run", "rows", "cost"), late)]
    if checked.differences:
        return [*made, "", *checked.differences, "the month's rows are no more those that it was closed with"]
    return [*made, "", "the rows are, one by one, those that the month was closed with"]


def closed_json(closed: Closed) -> dict[str, Any]:
    """A closed month as scripts rely on it; sums in pico units."""
    books = closed.books
    return {
        "month": str(books.month),
        "currency": books.currency.value,
        "is_simulated": books.is_simulated,
        "rows": books.rows,
        "cost_pico": books.cost_pico,
        "unknown_attempts": books.unknown_attempts,
        "unknown_pico": books.unknown_pico,
        "digest": closed.digest,
        "closed_at": closed.closed_at.isoformat(),
        "closed_by": closed.closed_by,
        "runs": books.runs_json(),
    }


def checked_json(checked: Checked) -> dict[str, Any]:
    """A closed month held against its rows: `proved`, what differs, and what came late."""
    return closed_json(checked.closed) | {
        "proved": not checked.differences,
        "differences": list(checked.differences),
        "late": [asdict(each) for each in checked.late],
        "late_pico": checked.late_pico,
    }
