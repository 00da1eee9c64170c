"""What variants of a job are worth: each two of them compared on the same documents, one document at a time.

Pure. What makes a document long or hard, both have to bear, so that it is no doubt about their difference: intervals
are of the differences themselves. Nothing is picked in here: whoever reads it weighs cost against quality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from random import Random
from typing import Any

from schemas.agreement import Agreement
from schemas.intervals import bound_mean
from schemas.money import Currency, Money
from schemas.signals import Share, bound_share

#: Sums are told for so many documents.
PER = 1000
#: Where no difference is seen, one of this many right answers is looked for.
_WORTH_TELLING = 0.01
#: By which a variance over a squared difference is so many documents that 80 of 100 such samples tell it: the squared
#: sum of the normal quantiles of an interval's tail (4 %, schemas/intervals.py) and of 80 %.
_ENOUGH = (1.751 + 0.842) ** 2


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one document in one variant.

    `answer` None: it ended without a result. `is_right` None: it has no label. `pico` is what it cost, priming
    as if the prefix had been in the cache; None: nobody knows, or nothing was sent. `cached` is the share of its
    prompt tokens that was, `seconds` are from the first attempt that was sent to the last reply.
    """

    answer: Mapping[str, Any] | None
    is_right: bool | None = None
    pico: int | None = None
    cached: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the job, and its results in the order of the sample; None: its run has not had that document.

    `paid_pico` is what its run has cost, with what may have been billed. `bands` are the hours it was booked at.
    """

    name: str
    run_id: int
    results: tuple[Result | None, ...]
    paid_pico: int
    bands: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over so many documents, and between what that of all documents is (`intervals.LEVEL`)."""

    mean: Fraction
    low: float
    high: float
    of: int

    @property
    def is_told(self) -> bool:
        """Of a difference: whether it can be told from none."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Figures:
    """What a variant came to by itself. None: nothing is known of it."""

    variant: Variant
    documents: int
    without_result: int
    right: Share | None
    pico: Mean | None
    cached: Mean | None
    seconds: Mean | None


@dataclass(frozen=True, slots=True)
class Difference:
    """By how much the second variant is more than the first, over the documents that both have had.

    On `better` documents only the second is right, on `worse` only the first. `differing` is by field, of documents
    with both answers. `needed`: where no difference in being right is told, which one would be by how many documents.
    """

    first: str
    second: str
    agreement: Share | None
    differing: Mapping[str, int]
    right: Mean | None
    better: int
    worse: int
    needed: tuple[float, int] | None
    pico: Mean | None
    seconds: Mean | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Variants of a job on a sample of its `documents`, each two of them compared, and in words what that means."""

    job: str
    documents: int
    sampled: int
    currency: Currency
    is_simulated: bool
    figures: tuple[Figures, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Poll:
    """The variants of a job whose documents have ended, drawn evenly of so many `documents`."""

    job: str
    agreement: Agreement
    documents: int
    currency: Currency
    is_simulated: bool
    variants: tuple[Variant, ...]


def compare(poll: Poll, random: Random) -> Comparison:
    """What the variants, of which there are two at least, come to beside one another."""
    dearest, slowest = _greatest(poll, _pico), _greatest(poll, _seconds)
    figures = tuple(_figures(each, dearest, slowest, random) for each in poll.variants)
    differences = tuple(_differ(poll.agreement, *pair, random) for pair in combinations(poll.variants, 2))
    return Comparison(
        poll.job,
        poll.documents,
        len(poll.variants[0].results),
        poll.currency,
        poll.is_simulated,
        figures,
        differences,
        tuple(_notes(poll, figures, differences)),
    )


_Read = Callable[[Result], float | int | None]


def _pico(result: Result) -> int | None:
    return result.pico


def _seconds(result: Result) -> float | None:
    return result.seconds


def _cached(result: Result) -> float | None:
    return result.cached


def _right(result: Result) -> int | None:
    return None if result.is_right is None else int(result.is_right)


def _known(variant: Variant, read: _Read) -> list[float | int]:
    values = (read(result) for result in variant.results if result is not None)
    return [value for value in values if value is not None]


def _greatest(poll: Poll, read: _Read) -> float:
    """Over all variants: what a document has cost in one it may cost in another."""
    return float(max((value for each in poll.variants for value in _known(each, read)), default=0))


def _figures(variant: Variant, dearest: float, slowest: float, random: Random) -> Figures:
    results = [result for result in variant.results if result is not None]
    right = _known(variant, _right)
    return Figures(
        variant,
        documents=len(results),
        without_result=sum(result.answer is None for result in results),
        right=bound_share(int(sum(right)), len(right)) if right else None,
        pico=_mean(_known(variant, _pico), 0, dearest, random),
        cached=_mean(_known(variant, _cached), 0, 1, random),
        seconds=_mean(_known(variant, _seconds), 0, slowest, random),
    )


def _mean(values: Sequence[float | int], least: float, most: float, random: Random) -> Mean | None:
    if not values:
        return None
    ends = bound_mean([float(value) for value in values], least, most, random)
    return Mean(sum(map(Fraction, values), Fraction(0)) / len(values), ends.low, ends.high, len(values))


def _differ(agreement: Agreement, first: Variant, second: Variant, random: Random) -> Difference:
    both = [
        (one, other)
        for one, other in zip(first.results, second.results, strict=True)
        if one is not None and other is not None
    ]
    apart = [agreement.differing(one.answer, other.answer) for one, other in both]
    answered = [
        fields
        for fields, (one, other) in zip(apart, both, strict=True)
        if one.answer is not None and other.answer is not None
    ]
    rights = _less(both, _right)
    right = bound_difference([int(each) for each in rights], random)
    return Difference(
        first.name,
        second.name,
        agreement=bound_share(sum(not fields for fields in apart), len(apart)) if apart else None,
        differing={name: sum(name in fields for fields in answered) for name in agreement.fields},
        right=right,
        better=rights.count(1),
        worse=rights.count(-1),
        needed=None if right is None or right.is_told else find_needed(rights),
        pico=_bound_less(both, _pico, random),
        seconds=_bound_less(both, _seconds, random),
    )


def _pairs(both: Iterable[tuple[Result, Result]], read: _Read) -> list[tuple[float | int, float | int]]:
    """Of the documents of which both are known."""
    read_both = ((read(one), read(other)) for one, other in both)
    return [(one, other) for one, other in read_both if one is not None and other is not None]


def _less(both: Iterable[tuple[Result, Result]], read: _Read) -> list[float | int]:
    return [other - one for one, other in _pairs(both, read)]


def bound_difference(values: Sequence[int], random: Random) -> Mean | None:
    """The mean of differences in being right: 1 where only the second is, -1 where only the first, else 0."""
    return _mean(values, -1, 1, random)


def _bound_less(both: Sequence[tuple[Result, Result]], read: _Read, random: Random) -> Mean | None:
    """Of what is not bounded by itself: one document may be nothing to the one, and the dearest seen to the other."""
    pairs = _pairs(both, read)
    if not pairs:
        return None
    least, most = (max(values) for values in zip(*pairs, strict=True))
    return _mean([other - one for one, other in pairs], -float(least), float(most), random)


def find_needed(values: Sequence[float | int]) -> tuple[float, int] | None:
    """How many documents such differences take to be told: the one that was seen, or else one point.

    Returns that difference and a number of two digits, more than there are. None: the two never differ.
    """
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    if not variance:
        return None
    sought = max(abs(mean), _WORTH_TELLING)
    return sought, _round_up(max(len(values) + 1, math.ceil(_ENOUGH * variance / sought**2)))


def _round_up(number: int) -> int:
    step = int(10 ** max(0, len(str(number)) - 2))
    return -(-number // step) * step


def _notes(poll: Poll, figures: Sequence[Figures], differences: Sequence[Difference]) -> Iterator[str]:
    for each in differences:
        yield from spell(each, poll.currency)
    sampled = len(poll.variants[0].results)
    for one in figures:
        if one.documents < sampled:
            yield (
                f"{one.variant.name} has had {one.documents} of the {sampled} documents, with the text that they "
                "have now: it is compared on these only"
            )
    if len(set(each.bands for each in poll.variants if each.bands)) > 1:
        yield (
            "the variants were booked at different hours of the price card, so that a difference in cost is one of "
            "hours, too: `farthing whatif` prices each run at the same"
        )
    if all(one.right is None for one in figures):
        yield (
            "no document has a label, so nobody knows which is right where two differ: name a column with "
            "`input: {label: …}`"
        )
    if len(differences) > 1:
        yield (
            f"each of the {len(differences)} pairs is held against chance by itself: the more are compared, the "
            "likelier it is that one of them misleads"
        )


def spell(difference: Difference, currency: Currency) -> Iterator[str]:
    """What a difference is worth, in words."""
    first, second = difference.first, difference.second
    told = [*_tell_cost(difference.pico, currency), *_tell_right(difference.right)]
    if told:
        yield f"{second} {' and '.join(told)} than {first}{_worth(difference, currency)}"
    yield from _doubt_cost(difference, currency)
    yield from _doubt_right(difference)


def _tell_cost(pico: Mean | None, currency: Currency) -> Iterator[str]:
    if pico is None or not pico.is_told:
        return
    low, high = sorted(abs(end) for end in (pico.low, pico.high))
    more = "more" if pico.mean > 0 else "less"
    yield (
        f"costs {per_thousand(abs(pico.mean), currency)} {more} per {PER:,} documents "
        f"({per_thousand(low, currency)} to {per_thousand(high, currency)})"
    )


def _tell_right(right: Mean | None) -> Iterator[str]:
    if right is None or not right.is_told:
        return
    low, high = sorted(abs(end) for end in (right.low, right.high))
    more = "more" if right.mean > 0 else "less"
    yield f"is right {points(abs(right.mean))} points {more} often ({points(low)} to {points(high)})"


def _worth(difference: Difference, currency: Currency) -> str:
    """What one more right answer costs, where it costs anything and both are told."""
    pico, right = difference.pico, difference.right
    if pico is None or right is None or not (pico.is_told and right.is_told and pico.mean * right.mean > 0):
        return ""
    each = Money(round(pico.mean / right.mean), currency)
    return f": {each} for each answer {'more that is right' if pico.mean > 0 else 'fewer that is right, saved'}"


def _doubt_cost(difference: Difference, currency: Currency) -> Iterator[str]:
    pico = difference.pico
    if pico is None:
        yield f"what {difference.second} costs beside {difference.first} is not known"
    elif not pico.is_told:
        yield (
            f"no difference in cost between {difference.first} and {difference.second} can be told from {pico.of} "
            f"documents: {difference.second} may cost up to {per_thousand(-pico.low, currency)} less or "
            f"{per_thousand(pico.high, currency)} more per {PER:,} documents"
        )


def _doubt_right(difference: Difference) -> Iterator[str]:
    right = difference.right
    if right is None or right.is_told:
        return
    told = (
        f"no difference in being right between {difference.first} and {difference.second} can be told from "
        f"{right.of} documents with a label: {difference.second} may be right up to {points(-right.low)} points less "
        f"or {points(right.high)} points more often"
    )
    if difference.needed is None:
        yield f"{told}; on these, both are right on the very same ones"
        return
    sought, number = difference.needed
    yield f"{told}; to tell a difference of {points(sought)} points, about {number:,} would be needed"


def per_thousand(pico: Fraction | float, currency: Currency) -> Money:
    """What so many documents cost of which one costs so much."""
    return Money(round(pico * PER), currency)


def points(share: Fraction | float) -> str:
    """A share as points of a hundred."""
    return f"{float(share) * 100:.1f}"
