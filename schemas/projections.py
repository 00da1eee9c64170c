"""What a sample's attempts say of all documents: alone responsible for that projection.

The documents that were certain to be drawn are known; of the others, what one of them took is divided by its weight,
and the mean of that, times the weight of all of them, is what they take together (the ratio estimator of sampling
with probability proportional to size: Särndal, Swensson, Wretman, "Model Assisted Survey Sampling", 1992). Tokens are
kept as fractions; only sums of money are made whole, by whoever prices them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from random import Random

from schemas.intervals import Interval, bound_mean
from schemas.pricing import Price
from schemas.samples import Drawn, Sample
from schemas.work_hours import Rows

MILLION = 10**6


@dataclass(frozen=True, slots=True)
class TierTokens:
    """Mean tokens of one attempt at a tier, its attempts per million documents that are sent, and its mean seconds.

    No seconds: nobody knows how long it takes.
    """

    tier: str
    hit: Fraction | int
    miss: Fraction | int
    output: Fraction | int
    attempts_ppm: Fraction | int
    seconds: Fraction | int = 0

    def cost(self, price: Price) -> Fraction:
        """Of one attempt, in pico units."""
        return Fraction(self.hit * price.hit_pico + self.miss * price.miss_pico + self.output * price.output_pico)


@dataclass(frozen=True, slots=True)
class Call:
    """An attempt of a sampled document. `unknown_pico` is the most it can cost where nobody knows what it did.

    `is_priming`: it paid for the prefix that later ones find in the cache.
    """

    tier: str
    is_priming: bool
    hit: int
    miss: int
    output: int
    unknown_pico: int
    milliseconds: int


@dataclass(frozen=True, slots=True)
class Polled:
    """A sample whose documents have ended, with the attempts of each in the order of `sample.drawn`.

    `run_id` is the run that asked them, which paid `paid_pico` for it.
    """

    sample: Sample
    calls: tuple[tuple[Call, ...], ...]
    run_id: int
    paid_pico: int
    is_simulated: bool


@dataclass(frozen=True, slots=True)
class Projection:
    """What to expect of all documents, by tier, and between which factors of that the truth is."""

    tokens: tuple[TierTokens, ...]
    factors: Interval


def project(polled: Polled, rows: Rows, typical: Sequence[TierTokens], random: Random) -> Projection:
    """From a sample to its population. `typical` stands for tiers that no sampled document has reached."""
    calls = _warm(polled.calls, typical)
    tokens = [_project_tier(polled.sample, calls, fallback) for fallback in typical]
    return Projection(tuple(tokens), _bound(polled.sample, calls, rows, typical, random))


def _warm(calls: Sequence[Sequence[Call]], typical: Sequence[TierTokens]) -> list[list[Call]]:
    """Priming as it would have been with the prefix in the cache: it is paid once, however many documents follow."""
    hits = {each.tier: _usual_hit(each, calls) for each in typical}
    return [[_warmed(call, hits[call.tier]) for call in mine if call.tier in hits] for mine in calls]


def _usual_hit(typical: TierTokens, calls: Sequence[Sequence[Call]]) -> int:
    seen = sorted(call.hit for mine in calls for call in mine if call.tier == typical.tier and not call.is_priming)
    return seen[len(seen) // 2] if seen else math.floor(typical.hit)


def _warmed(call: Call, hit: int) -> Call:
    if not call.is_priming or call.hit >= hit:
        return call
    prompt = call.hit + call.miss
    return replace(call, hit=min(hit, prompt), miss=prompt - min(hit, prompt))


def _project_tier(sample: Sample, calls: Sequence[Sequence[Call]], typical: TierTokens) -> TierTokens:
    """One tier's attempts and tokens over the whole population."""
    mine = [[call for call in each if call.tier == typical.tier and not call.unknown_pico] for each in calls]
    unknown = [sum(1 for call in each if call.tier == typical.tier and call.unknown_pico) for each in calls]

    def total(measure: Callable[[Call], int]) -> Fraction:
        return estimate_total(sample, [sum(map(measure, each)) for each in mine])

    known = total(lambda call: 1)
    attempts = known + estimate_total(sample, unknown)  # what is unknown is taken for one like the others
    found = replace(typical, attempts_ppm=attempts * MILLION / sample.documents)
    if not known:
        return found
    return replace(
        found,
        hit=total(lambda call: call.hit) / known,
        miss=total(lambda call: call.miss) / known,
        output=total(lambda call: call.output) / known,
        seconds=total(lambda call: call.milliseconds) / known / 1000,
    )


def estimate_total(sample: Sample, values: Sequence[int]) -> Fraction:
    """The total of a value over the population, from those of the sampled documents."""
    certain, others = split(sample, values)
    known = Fraction(sum(value for _, value in certain))
    left = sample.weight - sum(drawn.weight for drawn, _ in certain)
    if not others:  # those that are left weigh less than any that was drawn, and are taken to be like these
        return known * Fraction(sample.weight, sample.weight - left)
    return known + left * sum((Fraction(value, drawn.weight) for drawn, value in others), Fraction(0)) / len(others)


def bound_total(sample: Sample, costs: Sequence[int], most: Sequence[int], random: Random) -> tuple[float, float]:
    """Where the population's total lies: costs of the sampled documents, and the most that each could have cost.

    What was drawn is known: only as much doubt remains as there is left to draw (finite population correction).
    """
    certain, others = split(sample, costs)
    known = sum(cost for _, cost in certain)
    left = sample.weight - sum(drawn.weight for drawn, _ in certain)
    ratios = [cost / drawn.weight for drawn, cost in others]
    dearest = max(bound / drawn.weight for drawn, bound in zip(sample.drawn, most, strict=True))
    if not others:
        return float(known), known + left * dearest
    found = _bound_ratio(ratios, [drawn.weight / sample.threshold for drawn, _ in others], dearest, random)
    return known + left * found.low, known + left * found.high


def _bound_ratio(ratios: Sequence[float], chances: Sequence[float], most: float, random: Random) -> Interval:
    """Bounds of the mean of ratios, of documents that had these chances to be drawn.

    One that was almost certain to be drawn stands for hardly any other: how far it is from the mean says little of
    what was not drawn, which is how the variance of this kind of sampling is estimated (Ohlsson 1998, as in
    schemas/samples.py).
    """
    mean = sum(ratios) / len(ratios)
    doubts = [math.sqrt(1 - chance) for chance in chances]
    off = [doubt * (ratio - mean) for doubt, ratio in zip(doubts, ratios, strict=True)]
    centre = mean - sum(off) / len(off)
    doubt = math.sqrt(1 - sum(chances) / len(chances))
    least, dearest = mean - doubt * mean, mean + doubt * (max(most, *ratios) - mean)
    return bound_mean([centre + each for each in off], least, dearest, random)


def split(sample: Sample, values: Sequence[int]) -> tuple[list[tuple[Drawn, int]], list[tuple[Drawn, int]]]:
    """The documents that were certain to be drawn, and the others, each with its value."""
    pairs = list(zip(sample.drawn, values, strict=True))
    if sample.is_whole:
        return pairs, []
    certain = [pair for pair in pairs if pair[0].weight >= sample.threshold]
    return certain, [pair for pair in pairs if pair[0].weight < sample.threshold]


def _bound(
    sample: Sample, calls: Sequence[Sequence[Call]], rows: Rows, typical: Sequence[TierTokens], random: Random
) -> Interval:
    costs = [sum(_cost(call, rows) for call in mine) for mine in calls]
    most = [cost + _rest_of_ladder(mine, rows, typical) for mine, cost in zip(calls, costs, strict=True)]
    total = float(estimate_total(sample, costs))
    if not total:
        return Interval(1.0, 1.0)
    low, high = bound_total(sample, costs, most, random)
    return Interval(low / total, high / total)


def _cost(call: Call, rows: Rows) -> int:
    price = rows[call.tier]
    known = call.hit * price.hit_pico + call.miss * price.miss_pico + call.output * price.output_pico
    return max(known, call.unknown_pico)


def _rest_of_ladder(calls: Sequence[Call], rows: Rows, typical: Sequence[TierTokens]) -> int:
    """What the document would have cost at the tiers that it did not reach, by its own prompt and a usual answer.

    Not by the longest that max_tokens allows: hardly any answer is that long, and the interval would say nothing.
    """
    prompt = max((call.hit + call.miss for call in calls), default=0)
    hit = max((call.hit for call in calls), default=0)
    reached = {call.tier for call in calls}
    answer = max((call.output for call in calls), default=0)
    rest = 0
    for tier in typical:
        if tier.tier not in reached:
            price = rows[tier.tier]
            output = max(answer, math.ceil(tier.output))
            rest += hit * price.hit_pico + (prompt - hit) * price.miss_pico + output * price.output_pico
    return rest
