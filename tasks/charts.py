"""Charts of a report page: alone responsible for what each shows, in words, as bars, and as the table behind it.

Pure. A bar is as long as a share of its axis; every number that is read, on an axis or beside the pointer, is spelt
in here, from exact integers, as the rest of the report is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise

from schemas.buckets import CONFIDENCES, COST_EDGES, list_strides, pick_ticks
from schemas.inert import plain
from schemas.money import Currency, Money
from tasks.ledger.shapes import Shape, Slice
from tasks.ledger.spend import Audit
from tasks.report import Figure, Section, count, money, share

#: The part of an axis that a bar takes is told so exactly.
DIGITS = 6
HUNDRED_PERCENT = 10_000


@dataclass(frozen=True, slots=True)
class Series:
    """Bars of one colour: how long each is, as a share of the axis, and what it stands for. None: there is none."""

    name: str
    lengths: tuple[float | None, ...]
    shown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """A line across a chart, at a share of the axis along which its bars stand."""

    at: float
    shown: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart. `says` is its point in a sentence; `names` are on the axis, `titles` say the same in full."""

    key: str
    kind: str
    title: str
    says: str
    along: str
    across: str
    names: tuple[str, ...]
    titles: tuple[str, ...]
    series: tuple[Series, ...]
    ticks: tuple[tuple[float, str], ...]
    table: Section
    mark: Mark | None = None


def spend_over_time(audit: Audit, shape: Shape) -> Chart:
    """What was spent in each stride, by tier."""
    begins = _list_begins(shape)
    at = {(each.begins, each.tier): each.cost_pico for each in shape.slices}
    costs = {tier: [at.get((begin, tier), 0) for begin in begins] for tier in audit.tiers}
    spell = _money_of(audit)
    whole = [sum(each) for each in zip(*costs.values(), strict=True)]
    dearest = max(range(len(whole)), key=whole.__getitem__)
    unknown = _sum_by_begin(shape, lambda each: each.unknown_pico)
    attempts = _sum_by_begin(shape, lambda each: each.attempts)
    rows = (
        (
            spell_instant(begin),
            count(attempts.get(begin, 0)),
            *(spell(costs[tier][number]) for tier in costs),
            spell(whole[number]),
            Figure(f"at most {spell(unknown[begin])}", unknown[begin]) if unknown.get(begin) else "—",
        )
        for number, begin in enumerate(begins)
    )
    return _make(
        ("time", "stacked", "Spend over time"),
        f"{spell(audit.cost_pico)} from {spell_instant(shape.first)} to {spell_instant(shape.last)}, each bar "
        f"{spell_stride(shape.stride)}. The dearest began {spell_instant(begins[dearest])}: {spell(whole[dearest])}.",
        ("when attempts were begun (UTC)", "cost"),
        _name_begins(shape, begins),
        costs,
        spell,
        max(whole),
        Section("", ("begun from (UTC)", "attempts", *costs, "together", "not known"), tuple(rows)),
    )


def cost_by_tier(audit: Audit, table: Section) -> Chart:
    """What each tier cost; its table is the report's own."""
    spell = _money_of(audit)
    costs = [tier.cost_pico for tier in audit.tiers.values()]
    dearest, spent = max(audit.tiers.items(), key=lambda each: each[1].cost_pico)
    names = [(name, name) for name in audit.tiers]
    return _make(
        ("tiers", "lying", "Cost by tier"),
        f"{dearest} took {share(spent.cost_pico, audit.cost_pico)} of the cost and gave {spent.results:,} of "
        f"{audit.results - audit.reused:,} new results.",
        ("", "cost"),
        names,
        {"cost": costs},
        spell,
        max(costs),
        table,
    )


def cost_per_document(audit: Audit, shape: Shape) -> Chart:
    """How many documents cost about how much."""
    spell = _money_of(audit)
    buckets = range(min(shape.costs), max(shape.costs) + 1)
    # From "nothing is known" to the first cost there are many empty buckets, which say nothing.
    shown = [each for each in buckets if shape.costs.get(each) or (each > min(set(shape.costs) - {0}, default=0))]
    counts = [shape.costs.get(each, 0) for each in shown]
    edges = [_spell_bucket(each, spell) for each in shown]
    costs = audit.document_costs
    rows = (
        (Figure(title, bucket), count(documents), share(documents, costs.documents))
        for bucket, documents, (_, title) in zip(shown, counts, edges, strict=True)
    )
    return _make(
        ("documents", "standing", "Cost per document"),
        f"Half of {costs.documents:,} documents that were sent cost at most {spell(costs.p50_pico)}, 95 % at most "
        f"{spell(costs.p95_pico)}, the dearest {spell(costs.max_pico)}; {spell(costs.mean_pico)} on average.",
        ("known cost of a document, in steps of about a quarter", "documents"),
        edges,
        {"documents": counts},
        count,
        max(counts),
        Section("", ("known cost", "documents", "of all"), tuple(rows)),
    )


def cache_over_time(audit: Audit, shape: Shape) -> Chart:
    """Which share of the prompts' tokens was cached, stride by stride."""
    begins = _list_begins(shape)
    hit = _sum_by_begin(shape, lambda each: each.hit_tokens)
    all_ = _sum_by_begin(shape, lambda each: each.hit_tokens + each.miss_tokens)
    hundredths = [hit[begin] * HUNDRED_PERCENT // all_[begin] if all_.get(begin) else None for begin in begins]
    rows = (
        (
            spell_instant(begin),
            count(hit.get(begin, 0)),
            count(all_.get(begin, 0) - hit.get(begin, 0)),
            share(hit.get(begin, 0), all_.get(begin, 0)),
        )
        for begin in begins
    )
    prompts = audit.hit_tokens + audit.miss_tokens
    return _make(
        ("cache", "line", "Cache hits over time"),
        f"{share(audit.hit_tokens, prompts)} of {prompts:,} prompt tokens were cached. A document's own never are.",
        ("when attempts were begun (UTC)", "prompt tokens that were cached"),
        _name_begins(shape, begins),
        {"cached": hundredths},
        partial(share, whole=HUNDRED_PERCENT),
        HUNDRED_PERCENT,
        Section("", ("begun from (UTC)", "cached", "not cached", "share"), tuple(rows)),
    )


def confidence(audit: Audit, shape: Shape) -> Chart:
    """How sure answers were, by tier, and where documents climb."""
    counted = {(each.tier, each.part): each.answers for each in shape.confidences}
    tiers = [tier for tier in audit.tiers if any(name == tier for name, _ in counted)]
    answers = {tier: [counted.get((tier, part), 0) for part in range(CONFIDENCES)] for tier in tiers}
    edges = [f"{part / CONFIDENCES:g}" for part in range(CONFIDENCES + 1)]
    names = [(low, f"{low} to {high}") for low, high in pairwise(edges)]
    together = [sum(each) for each in zip(*answers.values(), strict=True)]
    rows = (
        (Figure(title, part), *(count(answers[tier][part]) for tier in tiers))
        for part, (_, title) in enumerate(names)
        if together[part]
    )
    unsure = sum(each.unsure for each in shape.confidences)
    below = shape.threshold
    told = f"{unsure:,} of {sum(together):,} valid answers were less sure than their run's threshold."
    if below is not None:
        told = (
            f"{unsure:,} of {sum(together):,} valid answers were less sure than {below}. Below it a document "
            "climbs, where there is a tier above."
        )
    return _make(
        ("confidence", "stacked", "Confidence and threshold"),
        told,
        ("confidence of an answer", "answers"),
        names,
        answers,
        count,
        max(together),
        Section("", ("confidence", *tiers), tuple(rows)),
        None if below is None else Mark(float(below), f"threshold {below}"),
    )


def dead_letters(audit: Audit, table: Section) -> Chart:
    """Why documents ended without a result; its table is the report's own."""
    counts = list(audit.dead_letters_by_reason.values())
    names = [(reason.replace("_", " "),) * 2 for reason in audit.dead_letters_by_reason]
    return _make(
        ("dead", "lying", "Dead letters by reason"),
        f"{audit.dead_letters:,} of {audit.documents:,} documents ({share(audit.dead_letters, audit.documents)}) "
        f"ended without a result, most often: {names[0][0]}.",
        ("", "documents"),
        names,
        {"documents": counts},
        count,
        max(counts),
        table,
    )


def _make(
    named: tuple[str, str, str],
    says: str,
    axes: tuple[str, str],
    names: Sequence[tuple[str, str]],
    series: Mapping[str, Sequence[int | None]],
    spell: Callable[[int], str],
    most: int,
    table: Section,
    mark: Mark | None = None,
) -> Chart:
    """A chart of exact numbers, `most` of which is the longest bar."""
    ticks = pick_ticks(most)
    end = ticks[-1]
    made = (
        Series(
            plain(name),
            tuple(None if each is None else _measure(each, end) for each in numbers),
            tuple("—" if each is None else spell(each) for each in numbers),
        )
        for name, numbers in series.items()
    )
    short, full = (tuple(map(plain, each)) for each in zip(*names, strict=True))
    axis = tuple((round(tick / end, DIGITS), spell(tick) if tick else "0") for tick in ticks)
    return Chart(*named, says, *axes, short, full, tuple(made), axis, table, mark)


def _measure(number: int, end: int) -> float:
    """The length of a bar; that of anything is not nothing."""
    return max(round(number / end, DIGITS), 10**-DIGITS) if number else 0


def spell_instant(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}"


def spell_stride(stride: timedelta) -> str:
    """`10 seconds`, `1 hour`, `28 days`."""
    seconds = int(stride.total_seconds())
    size, unit = next(
        each for each in ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second")) if not seconds % each[0]
    )
    return f"{seconds // size} {unit}{'' if seconds == size else 's'}"


def _list_begins(shape: Shape) -> list[datetime]:
    return list(list_strides(shape.first, shape.last, shape.stride))


def _name_begins(shape: Shape, begins: Sequence[datetime]) -> list[tuple[str, str]]:
    """As short as the stride and the span allow."""
    clock = "%H:%M:%S" if shape.stride < timedelta(minutes=1) else "%H:%M"
    if shape.stride >= timedelta(days=1):
        clock = "%Y-%m-%d"
    elif begins[0].date() != begins[-1].date():
        clock = f"%m-%d {clock}"
    return [(f"{begin:{clock}}", f"{spell_instant(begin)} UTC") for begin in begins]


def _sum_by_begin(shape: Shape, number: Callable[[Slice], int]) -> dict[datetime, int]:
    made: dict[datetime, int] = {}
    for each in shape.slices:
        made[each.begins] = made.get(each.begins, 0) + number(each)
    return made


def _spell_bucket(bucket: int, spell: Callable[[int], str]) -> tuple[str, str]:
    """The lower edge of a bucket of costs, and both."""
    if bucket == 0:
        return "0", "nothing that is known"
    if bucket == 1:
        return f"< {spell(COST_EDGES[1])}", f"less than {spell(COST_EDGES[1])}"
    low = spell(COST_EDGES[bucket - 1])
    return low, f"{low} to {spell(COST_EDGES[bucket])}" if bucket < len(COST_EDGES) else f"{low} and more"


def _money_of(audit: Audit) -> Callable[[int], Figure]:
    currency = Currency(audit.currency or Currency.USD)  # a ledger without a run has no chart
    return lambda pico: money(Money(pico, currency))
