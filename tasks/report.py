"""What people look at: alone responsible for turning estimates, prices, audits and proofs into tables and text.

Pure: nothing is read or printed in here. Every sum is printed by `Money`, every share from two counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import ceil
from typing import TYPE_CHECKING, Any, Self

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from schemas.balance import Paid
from schemas.ceilings import spell_ceilings
from schemas.errors import UnknownPrice
from schemas.inert import escape_markdown, plain, plain_lines
from schemas.money import Currency, Money
from schemas.off_peak import spell
from schemas.pricing import Band, Price, PriceBook
from schemas.public_prices import Amounts as PublicAmounts
from schemas.public_prices import Comparison as PriceComparison
from schemas.public_prices import Difference
from schemas.spending import MILLION, Line, Sums, per_million
from tasks.ledger.spend import Audit, PartitionSpend, Progress, RunSummary, SharedBudget, TierSpend, Waste

if TYPE_CHECKING:  # each brings in much that an audit has no use for: a third of a second
    from schemas.backfills import Price as BackfillPrice
    from schemas.estimates import Estimate, OffPeakEstimate
    from tasks.backfills import Plan
    from tasks.ledger.proof import Proof
    from tasks.steering import Capped, Limited, Steered

#: Said wherever figures of a sandbox run are shown.
SIMULATED = (
    "SIMULATED: documents, tokens and prices are real. The answers are not: how often a tier is wrong and how sure "
    "it sounds, and so accuracy, confidence and what escalation bought, follow from the sandbox's stated error model "
    "(sandbox/errormodel.py) and say nothing about DeepSeek."
)


class Figure(str):
    """A number as it is shown, with the number itself, by which a table of such is sorted."""

    exact: int

    def __new__(cls, shown: str, exact: int) -> Self:
        made = super().__new__(cls, shown)
        made.exact = exact
        return made

    def __reduce__(self) -> tuple[type[Self], tuple[str, int]]:
        return type(self), (str(self), self.exact)


def count(number: int) -> Figure:
    """How many, with commas."""
    return Figure(f"{number:,}", number)


def money(sum_: Money) -> Figure:
    """A sum as `Money` shows it."""
    return Figure(str(sum_), sum_.pico)


def share(part: int, whole: int) -> str:
    """`part` of `whole` in percent, cut to two decimals so that 99.996 % is never shown as all; — of nothing."""
    if not whole:
        return "—"
    hundredths = part * 10_000 // whole
    return Figure(f"{hundredths // 100}.{hundredths % 100:02d} %", hundredths)


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str | None = None,
    *,
    texts: Sequence[int] = (0,),
) -> Table:
    """A table of figures but for the columns `texts`; without column names it has no head. No text in it acts."""
    head = Text(plain(title), "bold")
    made = Table(title=head, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    made.show_header = any(columns)
    made.min_width = head.cell_len + 1  # else a long title over a narrow table is broken
    made.caption = None if caption is None else Text(plain_lines(caption), "table.caption")
    made.caption_justify = "left"
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number in texts else "right", overflow="fold")
    for row in rows:
        _add_row(made, *row)
    return made


def _add_row(made: Table, *cells: str | Text) -> None:
    """Cells as they are: rich would read markup and emoji codes out of a string."""
    made.add_row(*(cell if isinstance(cell, Text) else Text(plain_lines(cell)) for cell in cells))


# Prices


def price_table(prices: Sequence[Price], book: PriceBook, at: datetime) -> Table:
    """Prices at an instant per 1M tokens, as the provider prints them."""
    rows = [
        (
            price.model + ("?" if price.is_uncertain else "") + (" (what-if only)" if price.is_what_if_only else ""),
            price.band.value.replace("_", "-"),
            *(str(Money(pico * MILLION, price.currency)) for pico in (price.hit_pico, price.miss_pico)),
            str(Money(price.output_pico * MILLION, price.currency)),
            f"{price.valid_from:%Y-%m-%d %H:%M}",
            _instant(book.next_change(price.model, price.currency, at)),
        )
        for price in prices
    ]
    columns = ("per 1M tokens", "hours", "cache hit", "cache miss", "output", "since (UTC)", "next change")
    return table(f"Prices at {at.astimezone(UTC):%Y-%m-%d %H:%M} UTC", columns, rows, _price_notes(prices, book, at))


def _price_notes(prices: Sequence[Price], book: PriceBook, at: datetime) -> str | None:
    notes = [f"{price.model}? {price.note}" for price in prices if price.is_uncertain]
    if window := next((w for price in prices if (w := find_peak(book, price, at))), None):
        start, end = window
        until = f"until {end:%H:%M}" if end.date() == start.date() else f"until {_instant(end)}"
        begin = "peak hours now" if start <= at else f"next peak hours {_instant(start)}"
        notes.insert(0, f"{begin} {until} UTC")
    notes += filter(None, [calendar_warning(book, [(price.model, price.currency) for price in prices], at)])
    return "\n".join(notes) or None


#: A year's Chinese holidays are published in the November before it.
WARNED_BEFORE = timedelta(days=60)


def calendar_warning(book: PriceBook, cards: Iterable[tuple[str, Currency]], at: datetime) -> str | None:
    """From when on nothing has a price, if that is soon, and what to do before."""
    ends = [end for card in set(cards) if (end := book.known_until(*card, at, WARNED_BEFORE)) is not None]
    if not ends:
        return None
    return (
        f"no price is known from {_instant(min(ends))} UTC, when the holiday calendar ends: runs will be refused. "
        "Before that `pip install --upgrade chinesecalendar`, or write a [[calendar]] (README: Prices)"
    )


def find_peak(book: PriceBook, price: Price, at: datetime) -> tuple[datetime, datetime] | None:
    """The peak window that `at` is in, or the next one; None where the price has no peak hours."""
    if price.band is Band.FLAT:
        return None
    change = book.next_change(price.model, price.currency, at)
    if change is None:
        return None
    if price.band is Band.PEAK:
        return at, change
    try:
        if book.at(price.model, price.currency, change).band is not Band.PEAK:
            return None
        end = book.next_change(price.model, price.currency, change)
    except UnknownPrice:  # the holidays of that day are not published yet
        return None
    return None if end is None else (change, end)


def price_json(price: Price, book: PriceBook, at: datetime) -> dict[str, Any]:
    """A price row in pico units per token, as scripts rely on it."""
    change = book.next_change(price.model, price.currency, at)
    return {
        "model": price.model,
        "band": price.band.value,
        "currency": price.currency.value,
        "hit_pico": price.hit_pico,
        "miss_pico": price.miss_pico,
        "output_pico": price.output_pico,
        "valid_from": price.valid_from.isoformat(),
        "next_change": change.isoformat() if change else None,
        "uncertain": price.is_uncertain,
        "what_if_only": price.is_what_if_only,
        "note": price.note,
    }


def price_check_report(found: Sequence[PriceComparison]) -> list[RenderableType]:
    """What public price maps say otherwise, and what to do about it."""
    parts: list[RenderableType] = []
    for each in found:
        unknown = f"; no price of ours for {', '.join(each.unknown)}" if each.unknown else ""
        head = f"{each.map}: {len(each.compared)} models compared, {len(each.differences)} differences{unknown}"
        rows = [
            (
                difference.row,
                _instant(difference.since),
                "now" if difference.until is None else _instant(difference.until),
                _per_million(difference.ours),
                _per_million(difference.theirs),
            )
            for difference in each.differences
        ]
        columns = ("row", "from (UTC)", "until", "ours: cached / not / output, $ per 1M", "theirs")
        parts.append(table(head, columns, rows, _CHECK_ADVICE) if rows else head)
    return parts


_CHECK_ADVICE = (
    "Look at the provider's page. If the map is right, add a [[row]] with its own valid_from to a price file of your "
    "own (README: Prices); an old row stays as it is, since attempts were booked by it."
)


def _per_million(amounts: PublicAmounts) -> str:
    return " / ".join(f"{(each / 10**6).normalize():f}" for each in (amounts.hit, amounts.miss, amounts.output))


def price_check_json(found: Sequence[PriceComparison]) -> dict[str, Any]:
    """The same for scripts. Amounts are pico-dollars per token, as text: another's need not be whole."""
    return {
        "agrees": not any(each.differences for each in found),
        "maps": [
            {
                "map": each.map,
                "compared": list(each.compared),
                "unknown": list(each.unknown),
                "differences": [_difference_json(difference) for difference in each.differences],
            }
            for each in found
        ],
    }


def _difference_json(difference: Difference) -> dict[str, Any]:
    def spell_amounts(amounts: PublicAmounts) -> dict[str, str]:
        named = {"hit_pico": amounts.hit, "miss_pico": amounts.miss, "output_pico": amounts.output}
        return {name: f"{amount.normalize():f}" for name, amount in named.items()}

    return {
        "model": difference.model,
        "row": difference.row,
        "currency": "USD",
        "since": difference.since.isoformat(),
        "until": None if difference.until is None else difference.until.isoformat(),
        "ours": spell_amounts(difference.ours),
        "theirs": spell_amounts(difference.theirs),
    }


def _instant(at: datetime | None) -> str:
    return "—" if at is None else f"{at.astimezone(UTC):%a %Y-%m-%d %H:%M}"


# Estimates


def estimate_table(estimate: Estimate, budget: Money) -> Table:
    """What a run is expected to cost, tier by tier, with what the figures rest on."""
    rows = [
        (
            f"{each.tokens.tier} ({each.model})",
            f"{each.attempts:,}",
            f"{ceil(each.tokens.hit):,}",
            f"{ceil(each.tokens.miss):,}",
            f"{ceil(each.tokens.output):,}",
            str(each.cost),
        )
        for each in estimate.tiers
    ]
    columns = ("tier", "attempts", "hit tokens each", "miss", "output", "cost")
    title = f"{estimate.job}: {estimate.documents:,} documents, {estimate.cost} expected"
    made = table(title, columns, rows, "\n".join(_estimate_notes(estimate, budget)))
    made.add_section()
    level = "low and high" if estimate.level is None else f"in {estimate.level} of 100 cases between"
    _add_row(made, level, "", "", "", "", f"{estimate.low} and {estimate.high}")
    if estimate.paid is not None:
        _add_row(made, f"of which {estimate.sampled} are paid", "", "", "", "", str(estimate.paid))
    return made


def _estimate_notes(estimate: Estimate, budget: Money) -> list[str]:
    notes = [f"· {line}" for line in (*_off_peak_notes(estimate), *estimate.assumptions)]
    if budget.currency is estimate.cost.currency and budget.pico < estimate.cost.pico:
        notes.insert(0, f"The budget of {budget} will not do: the run would pause. Raise it with --budget.")
    return notes


def _off_peak_notes(estimate: Estimate) -> list[str]:
    """`now $684, from 18:00 Beijing (10:00 UTC) $342`, where it costs less then."""
    if (then := estimate.off_peak) is None:
        return []
    if then.cost.pico >= estimate.cost.pico:
        return ["off-peak prices hold now" if then.begins <= estimate.at else _begins(estimate, then)]
    return [f"{_begins(estimate, then)}, with --off-peak or `when: off-peak`"]


def _begins(estimate: Estimate, then: OffPeakEstimate) -> str:
    return f"now {estimate.cost}, from {spell(then.begins)} {then.cost}"


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """An estimate as scripts rely on it; sums in pico units, of all documents together.

    `level`: in so many of 100 cases the true cost is from low to high; null: they are no interval. `paid_pico` is
    what the `sampled` documents have cost already, of all that.
    """
    return {
        "job": estimate.job,
        "documents": estimate.documents,
        "to_send": estimate.to_send,
        "cost_pico": estimate.cost.pico,
        "low_pico": estimate.low.pico,
        "high_pico": estimate.high.pico,
        "level": estimate.level,
        "sampled": estimate.sampled,
        "paid_pico": None if estimate.paid is None else estimate.paid.pico,
        "lasts_s": None if estimate.lasts is None else ceil(estimate.lasts.total_seconds()),
        "currency": estimate.cost.currency.value,
        "off_peak": None
        if estimate.off_peak is None
        else {
            "begins": estimate.off_peak.begins.isoformat(),
            "cost_pico": estimate.off_peak.cost.pico,
            "saves_pico": estimate.cost.pico - estimate.off_peak.cost.pico,
        },
        "tiers": {
            each.tokens.tier: {
                "model": each.model,
                "attempts": each.attempts,
                "hit_tokens": ceil(each.tokens.hit),
                "miss_tokens": ceil(each.tokens.miss),
                "output_tokens": ceil(each.tokens.output),
                "cost_pico": each.cost.pico,
            }
            for each in estimate.tiers
        },
        "assumptions": list(estimate.assumptions),
    }


# Audits


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report: the same rows become a table on the terminal, one in markdown, and one on a page.

    With `is_summed` the last row adds up the others, and stays there however they are sorted.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    is_summed: bool = False


def sections(audit: Audit) -> list[Section]:
    """The report of an audit; parts with nothing to say are left out."""
    made = (totals, tiers, token_costs, cache, promises, escalations, accuracy, dearest, slowest, dead_letters, waste)
    return [part for make in made if (part := make(audit)).rows]


def audit_report(audit: Audit) -> list[RenderableType]:
    """An audit for a terminal."""
    made = section_tables(sections(audit))
    return [*made, Text(SIMULATED, "yellow"), ""] if audit.is_simulated else made


def section_tables(parts: Iterable[Section]) -> list[RenderableType]:
    """Parts of a report for a terminal."""
    made: list[RenderableType] = []
    for part in parts:
        made.append(table(part.title, part.columns, part.rows, part.note or None))
        made += [""] if part.note else []  # a table ends with an empty line, its caption does not
    return made


def markdown(audit: Audit) -> str:
    """An audit as markdown, for a Prefect artifact."""
    parts = [section_markdown(part) for part in sections(audit)]
    return "\n\n".join([*parts, f"> {SIMULATED}"] if audit.is_simulated else parts)


def cells(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[dict[str, object]]:
    """A table for Prefect: sums as text, since it would print integers of pico units."""
    return [dict(zip(columns, map(plain, row), strict=True)) for row in rows]


def section_markdown(part: Section) -> str:
    """A part of a report as markdown."""

    def line(cells: Sequence[str]) -> str:
        whole = [escape_markdown(cell).replace(" %", "\u00a0%") for cell in cells]  # or a narrow column breaks there
        return f"| {' | '.join(whole)} |"

    ruler = line(["---"] + ["---:"] * (len(part.columns) - 1))
    body = "\n".join([f"## {escape_markdown(part.title)}", "", line(part.columns), ruler, *map(line, part.rows)])
    return f"{body}\n\n{escape_markdown(part.note)}" if part.note else body


def title(audit: Audit) -> str:
    """What was audited: `licences, run 3 (done)`."""
    if audit.run is not None:
        state = f"{audit.state}: {audit.reason}" if audit.reason else f"{audit.state}"
        return f"{audit.job}, run {audit.run} ({state})"
    runs = "1 run" if len(audit.runs) == 1 else f"{len(audit.runs)} runs"
    return f"{audit.job or 'the whole ledger'}, {runs}"


def totals(audit: Audit) -> Section:
    unknown = f"at most {_money(audit, audit.unknown_pico)}, {audit.unknown_attempts:,} attempts"
    rows = [
        ("documents", _documents(audit), True),
        ("results", f"{audit.results:,}" + (f" ({audit.reused:,} reused)" if audit.reused else ""), True),
        ("dead letters", count(audit.dead_letters), True),
        ("duplicates", f"{audit.duplicates:,}", audit.duplicates),
        ("attempts", f"{audit.attempts:,}", True),
        ("escalated", f"{audit.escalated:,}", audit.escalated),
        ("cost", _exact(audit, audit.cost_pico), audit.currency),
        ("not known to be billed", unknown, audit.unknown_pico),
        (
            "so it is between",
            f"{_money(audit, audit.cost_pico)} and {_money(audit, audit.high_pico)}",
            audit.unknown_pico,
        ),
        ("at peak prices, off-peak", _hours(audit), set(audit.hours) - {"flat"}),
        ("saved against peak prices", _off_peak_saving(audit), audit.off_peak_attempts),
        ("corrections", _money(audit, audit.adjusted_pico), audit.adjusted_pico),
        (
            "per 1,000 documents that ended" + (", reused, too" if audit.reused else ""),
            _money(audit, audit.pico_per_1000_documents),
            audit.pico_per_1000_documents,
        ),
        ("per document: mean, median, 95 %", _per_document(audit), audit.document_costs.documents),
        _budget(audit),
        *((*row, True) for row in balance_rows(audit.balances)),
    ]
    told = tuple((name, figure) for name, figure, is_told in rows if is_told)
    return Section(title(audit), ("", ""), told, balance_alarm(audit.balances))


def _hours(audit: Audit) -> str:
    costs = [audit.hours[band].cost_pico if band in audit.hours else 0 for band in (Band.PEAK, Band.OFF_PEAK)]
    return " / ".join(f"{_money(audit, pico)} ({share(pico, audit.cost_pico)})" for pico in costs)


def _per_document(audit: Audit) -> str:
    """What a document cost that was sent: mean and median, what 19 of 20 stay under, and the dearest."""
    costs = audit.document_costs
    figures = (_money(audit, pico) for pico in (costs.mean_pico, costs.p50_pico, costs.p95_pico))
    return f"{' / '.join(figures)}, at most {_money(audit, costs.max_pico)}"


def _off_peak_saving(audit: Audit) -> str:
    return f"{_money(audit, audit.off_peak_saved_pico)} by working off-peak, {audit.off_peak_attempts:,} attempts"


def balance_rows(balances: Sequence[Paid]) -> list[tuple[str, str]]:
    """What accounts paid in some time, beside the most that the ledger knows that all its runs were billed then."""
    return [(f"the account paid, coarsely{_added(each)}", _paid_against(each)) for each in balances]


def _added(paid: Paid) -> str:
    return f" ({Money(paid.added_pico, paid.currency)} came onto it)" if paid.added_pico else ""


def _paid_against(paid: Paid) -> str:
    went = signed(paid.paid_pico, paid.currency)
    known = Money(paid.cost_pico + paid.unknown_pico, paid.currency)
    return f"{went} from {paid.since:%m-%d %H:%M} to {paid.until:%m-%d %H:%M} UTC; the ledger: at most {known}"


def signed(pico: int, currency: Currency) -> str:
    """A sum that may be negative."""
    return f"{'-' if pico < 0 else ''}{Money(abs(pico), currency)}"


_ALARM = (
    "ALARM, a coarse one: the account paid {} more than this ledger can explain. Does another program use it? "
    "`farthing reconcile` with the console's export says of which day and model it is."
)
_GRANTED = (
    "the account went down by {} more than this ledger can explain, and nothing of what was topped up is gone: "
    "granted balance expires, and the console says when it did."
)


def balance_alarm(balances: Sequence[Paid]) -> str:
    """What to do where an account paid more than the ledger can know of. Empty: nothing."""
    told = [each for each in balances if each.is_alarm or each.is_granted]
    return "\n".join((_ALARM if each.is_alarm else _GRANTED).format(_excess(each)) for each in told)


def _excess(paid: Paid) -> Money:
    return Money(paid.paid_pico - paid.cost_pico - paid.unknown_pico, paid.currency)


def _budget(audit: Audit) -> tuple[str, str, object]:
    if audit.shared_budget is None or audit.currency is None:
        return "budget", _money(audit, audit.budget_pico), audit.budget_pico
    return f"budget {audit.shared_budget.name}", shared_use(audit.shared_budget, Currency(audit.currency)), True


def shared_use(budget: SharedBudget, currency: Currency) -> str:
    """Who used how much of a shared budget, in one line."""
    parts = [
        f"{Money(budget.cap_pico, currency)} shared",
        f"{Money(budget.used_pico, currency)} used here",
        f"{Money(budget.others_pico, currency)} by other runs",
        f"{Money(budget.held_pico, currency)} set aside" if budget.held_pico else None,
        f"{Money(budget.left_pico, currency)} left" if budget.left_pico >= 0 else None,
        f"{Money(-budget.left_pico, currency)} over a cap that was lowered" if budget.left_pico < 0 else None,
    ]
    return ", ".join(part for part in parts if part)


def _documents(audit: Audit) -> str:
    """How many there are; where several runs had the same ones, how many ended in any."""
    if len(audit.runs) < 2:
        return f"{audit.documents:,}"
    in_runs = f"{audit.documents:,} in {len(audit.runs)} runs"
    if audit.distinct_documents is None:
        return f"{in_runs}; --distinct counts the different ones"
    return f"{in_runs} ({audit.distinct_documents:,} different ones ended)"


def tiers(audit: Audit) -> Section:
    """What each tier did, and its share of the cost."""
    rows = [
        (
            name,
            count(tier.attempts),
            count(tier.results),
            _money(audit, tier.cost_pico),
            share(tier.cost_pico, audit.cost_pico),
            _tokens(tier),
        )
        for name, tier in audit.tiers.items()
    ]
    columns = ("tier", "attempts", "results", "cost", "of all", "tokens: cached, not cached, output")
    return Section("Where the money went", columns, tuple(rows))


def token_costs(audit: Audit) -> Section:
    """Tokens by the bucket they were billed in, and what a million of each came to."""
    costs = audit.token_costs
    buckets = (
        ("cached", audit.hit_tokens, costs.hit_pico, costs.hit_tokens),
        ("not cached", audit.miss_tokens, costs.miss_pico, costs.miss_tokens),
        ("output", audit.output_tokens, costs.output_pico, costs.output_tokens),
        ("all", audit.hit_tokens + audit.miss_tokens + audit.output_tokens, audit.cost_pico, costs.tokens),
    )
    rows = [
        (
            name,
            count(tokens),
            _money(audit, pico),
            share(pico, audit.cost_pico),
            _money(audit, per_million(pico, priced)),
        )
        for name, tokens, pico, priced in buckets
        if audit.attempts
    ]
    columns = ("tokens", "billed", "cost", "of all", "per 1M")
    return Section("What the tokens cost", columns, tuple(rows), is_summed=True)


def cache(audit: Audit) -> Section:
    """What the prompt cache saved: hits are priced against misses of the same tokens, at each attempt's own price."""
    if not audit.attempts:
        return Section("The prompt cache", (), ())
    rate = "—" if audit.prefix_hit_rate is None else share(round(audit.prefix_hit_rate * MILLION), MILLION)
    rows = (
        ("shared prefix that hit, after priming", rate),
        ("its tokens: expected, hit", f"{audit.expected_hit_tokens:,} / {audit.real_hit_tokens:,}"),
        ("saved by hits", _money(audit, audit.saved_pico)),
        ("the same attempts without a cache", _money(audit, audit.cost_pico + audit.saved_pico)),
        ("lost to misses of the prefix", _lost(audit)),
        ("spent on priming", _money(audit, audit.priming_pico)),
    )
    return Section("What the cache saved", ("", ""), rows)


def _lost(audit: Audit) -> str:
    """What misses cost, and whether the prefix was not there at all or only in part."""
    told = _money(audit, audit.lost_pico)
    if not audit.lost_pico:
        return told
    partly = audit.lost_pico - audit.lost_whole_pico
    return f"{told}: {_money(audit, audit.lost_whole_pico)} none of it hit, {_money(audit, partly)} a part did"


def promises(audit: Audit) -> Section:
    """What runs promised of their answers, and the certificates that keep it."""
    rows = [
        (
            f"run {each.run}: {float(each.target):g} of {each.documents:,}, but for {float(each.delta):g}",
            count(each.may_differ),
            count(each.sampled),
            "—" if each.disagreements is None else count(each.disagreements),
            "not certified yet" if each.cut is None else count(each.cut),
            "—" if each.score_at_cut is None else f"{each.score_at_cut:.4f}",
            "—" if each.tail is None else f"{float(each.tail):.4f}",
        )
        for each in audit.certificates
    ]
    columns = ("what", "may differ", "drawn", "of these differ", "accepted above place", "confidence there")
    return Section("What was promised", (*columns, "chance to fail"), tuple(rows), _agreement_note(audit))


def _agreement_note(audit: Audit) -> str:
    return "Agreement is not truth: where both tiers make the same mistake, they agree." if audit.certificates else ""


def escalations(audit: Audit) -> Section:
    """Why documents climbed, and what came of it."""
    rows = [
        (
            f"{each.reason.replace('_', ' ')} → {each.to_tier}",
            count(each.escalated),
            count(each.rescued),
            count(each.agreed),
            count(each.changed),
            f"{each.right_before:,} → {each.right_after:,} of {each.labelled:,}" if each.labelled else "—",
            _money(audit, each.cost_pico),
            share(each.cost_pico, audit.cost_pico),
            _money(audit, each.pico_per_rescued),
        )
        for each in audit.escalations
    ]
    columns = (
        *("why, to which tier", "documents", "answered there", "same", "changed", "right before → after"),
        *("cost", "of all", "per answer"),
    )
    return Section("What escalation bought", columns, tuple(rows), _gain_note(audit))


def _gain_note(audit: Audit) -> str:
    """The price of one more right document, where labels tell; a document that climbs twice counts once per step."""
    labelled = [each for each in audit.escalations if each.labelled]
    gain = sum(each.right_after - each.right_before for each in labelled)
    if not labelled:
        return ""
    if gain <= 0:
        return "Against the experts' labels it made no document right that was not."
    cost = sum(each.cost_pico for each in labelled)
    return f"{gain:,} more right, by the experts' labels: {_money(audit, -(-cost // gain))} for each."


def accuracy(audit: Audit) -> Section:
    rows = [
        (each.tier, count(each.labelled), count(each.correct), share(each.correct, each.labelled))
        for each in audit.accuracy
    ]
    if rows:
        labelled, correct = (sum(each.labelled for each in audit.accuracy), sum(e.correct for e in audit.accuracy))
        rows.append(("all", count(labelled), count(correct), share(correct, labelled)))
    note = "" if audit.state in (None, "done") else "Of what has ended. The unsure end last, so this flatters."
    columns = ("answered by", "labelled results", "right", "share")
    return Section("Against the labels", columns, tuple(rows), note, is_summed=True)


def dearest(audit: Audit) -> Section:
    rows = [
        (
            each.document_id or f"number {each.document_no}",
            Figure(f"{each.run}", each.run),
            what_became(each.state, each.tier, each.reason),
            count(each.attempts),
            _money(audit, each.cost_pico),
            _at_most(audit, each.unknown_pico),
        )
        for each in audit.document_costs.dearest
    ]
    columns = ("dearest documents", "run", "what became of it", "attempts", "cost", "not known")
    return Section("What single documents cost", columns, tuple(rows))


def slowest(audit: Audit) -> Section:
    rows = [
        (
            each.document_id or f"number {each.document_no}",
            Figure(f"{each.run}", each.run),
            what_became(each.state, each.tier, each.reason),
            count(each.attempts),
            Figure(f"{each.waited_us / 10**6:,.1f} s", each.waited_us),
        )
        for each in audit.slowest
    ]
    columns = ("slowest documents", "run", "what became of it", "attempts", "waited for replies")
    return Section("Which documents took longest", columns, tuple(rows))


def what_became(state: str | None, tier: str | None, reason: str | None) -> str:
    """How a document ended: `result, pro`, or by what reason it is a dead letter."""
    return f"{(reason or state or 'not ended').replace('_', ' ')}{f', {tier}' if tier else ''}"


def dead_letters(audit: Audit) -> Section:
    rows = [
        (reason.replace("_", " "), count(documents)) for reason, documents in audit.dead_letters_by_reason.items()
    ]
    return Section("Dead letters", ("reason", "documents"), tuple(rows))


def waste(audit: Audit) -> Section:
    rows = [
        (
            _what_came(each),
            each.tier,
            each.purpose,
            count(each.attempts),
            _money(audit, each.cost_pico),
            _at_most(audit, each.unknown_pico),
        )
        for each in audit.waste
    ]
    columns = ("attempts that bought no result", "tier", "purpose", "attempts", "cost", "not known")
    return Section("Waste", columns, tuple(rows), _waste_note(audit) if rows else "")


def _waste_note(audit: Audit) -> str:
    """What each kind of waste came to."""
    kinds = {kind: [each for each in audit.waste if each.kind == kind] for kind in ("failed", "unsure", "unknown")}
    costs = {
        kind: sum(each.cost_pico + each.unknown_pico for each in found) for kind, found in kinds.items() if found
    }
    told = [
        f"{kind} {'at most ' if kind == 'unknown' else ''}{_money(audit, pico)}"
        + ("" if kind == "unknown" else f" ({share(pico, audit.cost_pico)} of all)")
        for kind, pico in costs.items()
    ]
    return f"Together: {', '.join(told)}."


def _what_came(waste: Waste) -> str:
    """`answered, invalid answer`, or just `blank` where signal and verdict are one."""
    return ", ".join(dict.fromkeys(filter(None, (waste.signal, waste.verdict)))).replace("_", " ")


def line_table(audit: Audit) -> Table:
    """The spend split by the sides that were asked for; the parts add up to all of it."""
    part = line_section(audit)
    made = table(part.title, part.columns, part.rows[:-1], texts=range(len(audit.by)))
    if audit.currency is not None:
        made.add_section()
        _add_row(made, *part.rows[-1])
    return made


def line_section(audit: Audit) -> Section:
    """The same as a part of a report, with the sum as its last row."""
    columns = (*audit.by, "attempts", "cached", "not cached", "output", "cost", "of all", "per 1M", "not known")
    whole = Line(("all", *[""] * (len(audit.by) - 1)), sum((each.sums for each in audit.lines), Sums()))
    rows = tuple(_line_cells(audit, each) for each in (*audit.lines, whole))
    return Section(title(audit), columns, rows, is_summed=True)


def _line_cells(audit: Audit, line: Line) -> tuple[str, ...]:
    sums = line.sums
    return (
        *line.names,
        *map(count, (sums.attempts, sums.hit_tokens, sums.miss_tokens, sums.output_tokens)),
        _money(audit, sums.cost_pico),
        share(sums.cost_pico, audit.cost_pico),
        _money(audit, sums.pico_per_million),
        _at_most(audit, sums.unknown_pico),
    )


def _money(audit: Audit, pico: int | None) -> str:
    return "—" if pico is None or audit.currency is None else money(Money(pico, Currency(audit.currency)))


def _at_most(audit: Audit, pico: int) -> str:
    return Figure(f"at most {_money(audit, pico)}", pico) if pico else "—"


def _exact(audit: Audit, pico: int) -> str:
    """A sum for people and, to the last unit, for those who check it."""
    return f"{_money(audit, pico)} ({pico:,} pico)"


def _tokens(spent: Audit | TierSpend) -> str:
    return f"{spent.hit_tokens:,} / {spent.miss_tokens:,} / {spent.output_tokens:,}"


# Runs and proofs


def run_table(runs: Sequence[RunSummary]) -> Table:
    """One line per run, newest first."""
    part = run_section(runs)
    return table(part.title, part.columns, part.rows, texts=(1, 2, 6))


def run_section(runs: Sequence[RunSummary]) -> Section:
    """The same as a part of a report."""
    rows = [
        (
            Figure(f"{each.run}", each.run),
            each.job,
            each.state + (f" ({each.reason})" if each.reason else ""),
            Figure(f"{each.done:,}/{each.documents:,}", each.documents),
            money(Money(each.cost_pico, Currency(each.currency))),
            f"{each.opened_at:%Y-%m-%d %H:%M}",
            "simulated" if each.is_simulated else "",
        )
        for each in runs
    ]
    return Section("Runs", ("run", "job", "state", "documents", "cost", "opened (UTC)", ""), tuple(rows))


def resumed_line(progress: Progress, job_budget: Money | None) -> str | None:
    """What a run that goes on goes on from, and under which budget; None where it has just been opened.

    A budget that was set for an earlier start holds until another is asked for; the job's is for new runs.
    """
    starts = [event for event in progress.events if event.kind in ("opened", "resumed", "cap_changed")]
    last = next((event for event in starts if event.kind != "cap_changed"), None)
    if last is None or last.kind == "opened":
        return None
    budget = Money(progress.budget_pico, Currency(progress.currency))
    ended = int(last.detail.get("documents", progress.done))
    change = starts[0] if starts[0].kind == "cap_changed" else None
    if change is not None and "was" in change.detail:
        told = f"{budget}, was {Money(int(change.detail['was']), Currency(progress.currency))}"
    elif job_budget is None or job_budget == budget:
        told = f"{budget}, as before"
    else:
        told = f"{budget}, as before, and not the {job_budget} of the job; --budget changes it"
    limited = f"; in flight: {ceilings(progress)}" if progress.is_limited else ""
    told += limited
    return f"resuming run {progress.run}: {ended:,} of {progress.documents:,} documents are done; budget: {told}"


def ceilings(progress: Progress) -> str:
    """How many requests may be in flight, and who says so."""
    most = f"at most {spell_ceilings(progress.ceilings)}"
    if not progress.is_limited:
        return most
    job = spell_ceilings(progress.concurrency) or "unknown"
    return f"{most}, set by `farthing limit` (the job: {job}); --reset lifts it"


def progress_table(progress: Progress) -> Table:
    """How far a run is, and what happened to it of late."""
    currency = Currency(progress.currency)
    rows = [
        ("state", progress.state),
        ("documents", f"{progress.done:,} of {progress.documents:,} ({share(progress.done, progress.documents)})"),
        ("waits because", progress.waiting_because or "—"),
        *([("phase", progress.phase)] if progress.phase else []),
        ("in flight", f"{progress.in_flight:,} in {progress.lanes} lane(s)" + _most(progress)),
        ("dead letters", f"{progress.dead_letters:,}"),
        ("escalated", f"{progress.escalated:,}"),
        ("spent", f"{Money(progress.cost_pico, currency)} of {Money(progress.budget_pico, currency)}"),
        ("not known to be billed", f"at most {Money(progress.unknown_pico, currency)}"),
    ]
    if progress.shared_budget is not None:
        rows.append((f"budget {progress.shared_budget.name}", shared_use(progress.shared_budget, currency)))
    made = table(f"{progress.job}, run {progress.run}", ("", ""), rows, texts=(0, 1))
    made.add_section()
    for event in progress.events:
        detail = ", ".join(f"{name} {plain(_spell(name, value, currency))}" for name, value in event.detail.items())
        _add_row(
            made, f"{event.happened_at.astimezone(UTC):%m-%d %H:%M:%S}", f"{event.kind.replace('_', ' ')} {detail}"
        )
    return made


def paused_lines(steered: Steered) -> str:
    """What `farthing pause` has done, and how the run goes on."""
    seen = steered.seen
    if not steered.is_changed:
        return f"run {seen.run} is paused already ({seen.reason or 'no reason is kept'}); {_goes_on(seen)}"
    at_work = (
        f"its {seen.lanes} lane(s) begin nothing more, finish the {seen.in_flight:,} requests in flight, and leave"
        if seen.lanes
        else "no lane was at work"
    )
    return f"run {seen.run} is paused: {at_work}\n{_goes_on(seen)}"


def limited_lines(limited: Limited) -> str:
    """What may be in flight now, and until when that holds."""
    seen = limited.seen
    before = f", was {spell_ceilings(limited.was) or 'as the job says'}" if limited.is_changed else " already"
    now = spell_ceilings(limited.ceilings)
    told = f"at most {now}" if now else "as many as the job says"
    holds = f"that holds when the run is resumed, too, until `farthing limit {seen.run} --reset` or another number"
    lines = [f"run {seen.run} may have in flight, over all its lanes: {told}{before}"]
    return "\n".join([*lines, holds] if limited.ceilings != seen.concurrency else lines)


def capped_lines(capped: Capped) -> str:
    """What the budget is now, how it stands, and what that means for the run."""
    seen, currency = capped.seen, Currency(capped.currency)
    now, was, spent, held = (
        Money(pico, currency) for pico in (capped.budget_pico, capped.was_pico, capped.spent_pico, capped.held_pico)
    )
    whose = f"{capped.budget_name}, the budget that run {seen.run} shares," if capped.budget_name else "the budget"
    change = f"{now}, was {was}" if capped.is_changed else f"{now} already"
    lines = [f"run {seen.run}: {whose} is {change}; {spent} spent, {held} held for what is in flight"]
    if capped.budget_pico <= capped.spent_pico:
        lines.append("nothing new is begun under it")
    elif seen.state == "paused":
        lines.append(f"{_goes_on(seen)} under it")
    return "\n".join(lines)


def _goes_on(seen: Progress) -> str:
    from schemas.requests import spell_command  # the file brings in all of a job, which an audit has no use for

    if seen.backfill_id is not None:
        return f"the same `farthing backfill {seen.job}` command goes on"
    return f"`{spell_command(seen.job, seen.selection, is_simulated=seen.is_simulated)}` goes on"


def _most(progress: Progress) -> str:
    return f", {ceilings(progress)}" if progress.ceilings else ""


def _spell(name: str, value: object, currency: Currency) -> str:
    """A detail of an event, for people: caps are in pico units."""
    if name in ("cap", "was") and isinstance(value, int):
        return str(Money(value, currency))
    if value is None:
        return "not known"
    return spell_ceilings(dict(sorted(value.items()))) if isinstance(value, dict) else str(value)


# Backfills


def plan_table(plan: Plan) -> Table:
    """How each partition stands, and what a run of those that are due is expected to cost."""
    costs = plan.price.by_partition
    rows = [
        (
            each.partition,
            each.words + (f", at work in run {each.at_work}" if each.at_work else ""),
            f"{each.documents:,}",
            f"{each.to_send:,}" if each.partition in costs else "",
            str(costs[each.partition]) if each.partition in costs else "—",
        )
        for each in plan.standings
    ]
    due, all_ = len(plan.due), len(plan.standings)
    title = f"{plan.job.name}: {due} of {all_} partitions are due, {plan.price.cost} expected"
    columns = ("partition", "state", "documents", "to send", "expected")
    return table(title, columns, rows, "\n".join(_plan_notes(plan)) or None, texts=(0, 1))


def _plan_notes(plan: Plan) -> list[str]:
    notes = []
    if plan.unfinished is not None:
        done, all_ = len(plan.unfinished.done), len(plan.unfinished.partitions)
        notes.append(f"goes on with backfill {plan.unfinished.backfill_id}: {done} of its {all_} partitions are done")
    if plan.gone:
        notes.append(f"not in the input any more, and left out: {', '.join(plan.gone)}")
    if plan.due:
        level = "" if plan.price.level is None else f"in {plan.price.level} of 100 cases "
        notes.append(f"{level}between {plan.price.low} and {plan.price.high}; the budget has {plan.room} left")
        notes += _cheaper_later(plan.price)
        notes += plan.price.basis
    notes += _not_due(plan)
    return [f"· {note}" for note in notes]


def _cheaper_later(price: BackfillPrice) -> list[str]:
    if price.off_peak is None or price.off_peak_begins is None or price.off_peak.pico >= price.cost.pico:
        return []
    return [f"now {price.cost}, from {spell(price.off_peak_begins)} {price.off_peak}, with --off-peak"]


def _not_due(plan: Plan) -> list[str]:
    """How to run what is left out."""
    from schemas.backfills import State  # only where there is a plan, which has brought it in

    due = {each.partition for each in plan.due}
    left = [each.state for each in plan.standings if each.partition not in due and each.at_work is None]
    changed = sum(state in (State.CHANGED_TEXT, State.CHANGED_PROMPT, State.CHANGED_MODEL) for state in left)
    dead = sum(state is State.DEAD_LETTERS for state in left)
    notes = [f"{changed} changed since they were run: --changed runs them again"] if changed else []
    return notes + ([f"{dead} have dead letters: --dead tries those again"] if dead else [])


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan as scripts rely on it; sums in pico units."""
    price, costs = plan.price, plan.price.by_partition
    return {
        "job": plan.job.name,
        "backfill": None if plan.unfinished is None else plan.unfinished.backfill_id,
        "partitions": [
            {
                "partition": each.partition,
                "state": each.state.value,
                "due": each.partition in costs,
                "documents": each.documents,
                "ended": each.ended,
                "dead_letters": each.dead,
                "to_send": each.to_send,
                "cost_pico": costs[each.partition].pico if each.partition in costs else 0,
                "runs": list(each.runs),
                "at_work": each.at_work,
            }
            for each in plan.standings
        ],
        "due": [each.partition for each in plan.due],
        "gone": list(plan.gone),
        "documents": plan.documents,
        "to_send": sum(each.to_send for each in plan.due),
        "cost_pico": price.cost.pico,
        "low_pico": price.low.pico,
        "high_pico": price.high.pico,
        "level": price.level,
        "off_peak_pico": None if price.off_peak is None else price.off_peak.pico,
        "left_pico": plan.room.pico,
        "currency": price.cost.currency.value,
    }


def backfill_report(
    outcome: Mapping[str, Any], found: Sequence[PartitionSpend], proofs: Sequence[Proof], currency: Currency
) -> list[RenderableType]:
    """What is shown after a backfill: its partitions, models that changed, and whether the ledger proves its runs."""
    state = f"{outcome['state']}: {outcome['reason'].replace('_', ' ')}" if outcome["reason"] else outcome["state"]
    made: list[RenderableType] = [partition_table(f"backfill {outcome['backfill_id']} ({state})", found, currency)]
    for tier, models in outcome["drift"].items():
        made.append(Text(plain(f"{tier} was served by {', then by '.join(models)}"), "yellow"))
    broken = [proof for proof in proofs if not proof.proved]
    return [*made, *map(proof_line, broken or proofs[:1])]


def backfill_json(
    job: str,
    outcome: Mapping[str, Any],
    found: Sequence[PartitionSpend],
    proofs: Sequence[Proof],
    currency: Currency,
) -> dict[str, Any]:
    """What a backfill came to, as scripts rely on it; sums in pico units."""
    names = ("documents", "results", "reused", "dead_letters", "attempts", "cost_pico", "unknown_pico")
    sums = {name: sum(getattr(each, name) for each in found) for name in names}
    told = {name: outcome[name] for name in ("state", "reason", "advice", "failed", "gone", "drift")}
    return {
        "backfill": outcome["backfill_id"],
        "job": job,
        **told,
        **sums,
        "currency": currency.value,
        "proved": all(proof.proved for proof in proofs),
        "partitions": [each.to_json() for each in found],
    }


def partition_table(name: str, found: Sequence[PartitionSpend], currency: Currency) -> Table:
    """What each partition of a backfill came to, and their sum, which is the sum of their runs' audits."""
    made = table(
        f"Partitions of {name}", PARTITION_COLUMNS, (_partition_cells(each, currency) for each in found), texts=(0, 1)
    )
    made.add_section()
    sums = (sum(getattr(each, field) for each in found) for field in ("documents", "results", "dead_letters"))
    cost = sum(each.cost_pico for each in found)
    _add_row(made, "all", "", *(f"{each:,}" for each in sums), f"{Money(cost, currency)} ({cost:,} pico)")
    if unknown := sum(each.unknown_pico for each in found):
        _add_row(made, "not known to be billed", "", "", "", "", f"at most {Money(unknown, currency)}")
    return made


PARTITION_COLUMNS = ("partition", "state", "documents", "results", "dead letters", "cost")


def partition_rows(found: Sequence[PartitionSpend], currency: Currency) -> list[dict[str, object]]:
    """The same for Prefect."""
    return cells(PARTITION_COLUMNS, (_partition_cells(each, currency) for each in found))


def _partition_cells(each: PartitionSpend, currency: Currency) -> tuple[str, ...]:
    state = each.state + (f" ({each.reason.replace('_', ' ')})" if each.reason else "")
    results = f"{each.results:,}" + (f" ({each.reused:,} reused)" if each.reused else "")
    figures = (f"{each.documents:,}", results, f"{each.dead_letters:,}", str(Money(each.cost_pico, currency)))
    return each.partition, state, *figures


def run_report(audit: Audit, proof: Proof) -> list[RenderableType]:
    """What is shown after a run: its audit, then whether the ledger proves it."""
    return [*audit_report(audit), proof_line(proof)]


def proof_line(proof: Proof) -> Text:
    """Whether the ledger proves, in one line."""
    if proof.proved:
        names = [name for name in proof.guarantees if name != "G18"]
        promise = " and the promise (G18)" if "G18" in proof.guarantees else ""
        return Text(f"The ledger proves: {names[0]} to {names[-1]}{promise} hold, to the last unit.", "bold green")
    broken = ", ".join(name for name, holds in proof.guarantees.items() if not holds)
    return Text(f"The ledger does NOT prove: {broken}. See `farthing verify {proof.run}`.", "bold red")


def proof_table(proof: Proof) -> Table:
    """Each guarantee with what was checked and, where it is broken, the rows that break it."""
    made = table(
        f"{proof.job}, run {proof.run} ({proof.state})", ("", "checked", "holds", "what it says"), (), texts=(0, 3)
    )
    for name, evidence in proof.evidence.items():
        says = "\n".join(map(plain, [evidence.says, *evidence.violations]))
        holds = Text("NO", "bold red") if evidence.violations else Text("yes", "green")
        _add_row(made, name, f"{evidence.checked:,}", holds, says)
    return made


def next_commands(audit: Audit) -> str:
    """What to try after the demo, or where it was ended early."""
    if audit.state != "done":
        return (
            "Try next:\n"
            "  the same command                  goes on where this one ended; nothing is paid twice\n"
            f"  farthing status {audit.run or audit.job}                 how far it is, and why it does not go on\n"
            "  farthing sandbox reset            forget it, and start anew"
        )
    return (
        "Try next:\n"
        "  farthing demo                     again: every answer is reused, 0 attempts, costs 0\n"
        f"  farthing audit {audit.run or audit.job}                  the same figures; with --json for scripts\n"
        f"  farthing verify {audit.run or ''}                 recompute every guarantee from the ledger's rows\n"
        "  farthing demo --job obligations   extraction with quotes, over three tiers\n"
        "  farthing new mine                 a job of your own to start from"
    )
