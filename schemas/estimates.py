"""What a run is expected to cost before it starts: alone responsible for that calculation, whole units in the end.

Tokens per attempt and attempts per document come from a sample of its own documents, else from the job's earlier
runs, else from stated assumptions; all three are priced alike. An estimate promises nothing: the budget is what
holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from fractions import Fraction
from random import Random
from typing import Any

from schemas.calls import MORE_TOKENS, TEMPLATE_TOKENS, TEMPLATE_TOKENS_PER_MESSAGE
from schemas.errors import UnknownPrice
from schemas.forecasts import spell_plan
from schemas.intervals import LEVEL, Interval, PastCost, predict_mean, weigh
from schemas.jobs import Job, Tier
from schemas.money import Currency, Money
from schemas.off_peak import tariff_of
from schemas.pricing import Price, PriceBook, reservation
from schemas.projections import MILLION, Polled, TierTokens, project
from schemas.promises import plan
from schemas.samples import Design
from schemas.work_hours import Asked, Rows, Stretch, bands_of, begins, rows_at, share_out

#: English has 4.65 bytes per token, code 3.6, mixed scripts 1.9 (design: parts.md, "Tokens").
BYTES_PER_TOKEN = 4
#: What the chat form adds around a document.
FRAME_TOKENS = 8
#: Attempts of a tier that are paid twice: repairs of invalid answers, retries of lost replies.
REPEATED_PPM = 10_000
#: Of the documents that a tier answers, how many go one tier up, where no history says.
ESCALATED_PPM = 200_000
#: Reasoning that a thinking tier writes before its answer.
THINKING_TOKENS = 1_500
#: Attempts per tier that pay the whole prefix before the cache serves it.
PRIMING_ATTEMPTS = 2
#: A free text in an answer, and how many entries a list has.
TEXT_BYTES, ENTRIES = 40, 3
#: What a cached token and one of an answer cost, in parts and times of one that misses, as of most models.
_HIT_PART, _OUTPUT_TIMES = 50, 4
#: A run that would take longer takes for ever.
_LONGEST_S = 100 * 366 * 86_400


@dataclass(frozen=True, slots=True)
class Size:
    """How large a selection is: its documents, those that need an attempt, and the sample that was measured."""

    documents: int
    to_send: int
    sampled: int
    sampled_bytes: int


@dataclass(frozen=True, slots=True)
class PastTier:
    """What a tier did in an earlier run: its attempts, their tokens (priming as with the prefix in the cache) and
    seconds, added up."""

    tier: str
    attempts: int
    hit: int
    miss: int
    output: int
    seconds: Fraction | int = 0


@dataclass(frozen=True, slots=True)
class PastRun:
    """An earlier run of the job: over so many documents that were sent, tier by tier. `squared_spread` is how much
    their costs differ (variance over squared mean). With a `limit` it had the first so many documents only."""

    documents: int
    tiers: tuple[PastTier, ...]
    squared_spread: float = 0.0
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class History:
    """What earlier runs of a job say.

    `is_partial`: none of them has ended, so that what climbs, and costs most, may still be to come.
    `is_of_other_prompt`: none of them had the prompt, the answer and the ladder that the job has now.
    `is_stand_in`: they are the sandbox's, for want of others, and the run that is asked about is not.
    """

    runs: tuple[PastRun, ...]
    is_simulated: bool
    is_partial: bool = False
    is_of_other_prompt: bool = False
    is_stand_in: bool = False

    @property
    def documents(self) -> int:
        return sum(run.documents for run in self.runs)

    def is_sound(self, size: Size) -> bool:
        """Whether it says how far off an estimate may be."""
        return not (self.is_partial or self.is_of_other_prompt or self.is_stand_in or self.is_of_first(size))

    def is_of_first(self, size: Size) -> bool:
        """Whether all runs had only the first of the documents that are meant now, which need not be like all."""
        return all(run.limit is not None and run.limit < size.documents for run in self.runs)


@dataclass(frozen=True, slots=True)
class TierEstimate:
    """One row of an estimate: what is expected of a tier."""

    tokens: TierTokens
    model: str
    attempts: int
    cost: Money


@dataclass(frozen=True, slots=True)
class OffPeakEstimate:
    """What the same run is expected to cost at off-peak prices, and when a run that waits for them would begin."""

    begins: datetime
    cost: Money


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run is expected to cost, all of its documents together, and why.

    `cost` is for one that begins `at`. `level` says what `low` and `high` are: the interval that holds the true cost
    in so many of 100 cases, or more; None: nothing is known that would give one, and they are the cheapest and the
    dearest way it may go. `paid` is what a sample has paid of it already. `off_peak` is None where all hours cost the
    same, or nobody knows them. `lasts` is how long the work takes; None: nobody knows.
    """

    job: str
    at: datetime
    documents: int
    to_send: int
    low: Money
    cost: Money
    high: Money
    tiers: tuple[TierEstimate, ...]
    assumptions: tuple[str, ...]
    off_peak: OffPeakEstimate | None = None
    level: int | None = None
    paid: Money | None = None
    sampled: int | None = None
    lasts: timedelta | None = None


def estimate(
    job: Job, size: Size, book: PriceBook, asked: Asked, known: Polled | History | None = None, seed: int = 0
) -> Estimate:
    """Price a run of `size` as it is `asked` for, by what is `known`: a sample's answers, earlier runs, or nothing.

    Of a sample or of finished runs the interval is honest (schemas/intervals.py). It holds for documents like those,
    prices as the book has them, and work that takes between half and twice as long as it seems. Rare answers far
    longer than any seen are outside: bounded by `max_tokens`, the interval would be eight times as wide. Without
    either, low: every document is accepted by the first tier, every prefix hits, at the model's cheapest hours; high:
    every document climbs the whole ladder, no prefix ever hits, at its dearest hours. Raises UnknownPrice where a
    tier has no price. The same `seed` gives the same figures.
    """
    rows = rows_at(job, book, asked.now)
    expected = _expect(job, size, rows, known, seed)
    lasts = _lasting(job, expected.tokens, size)
    costs = [_price(job, expected.tokens, size, share_out(job, book, asked, span)) for span in _spans(lasts)]
    tiers = costs[0]
    sums = [sum(each.cost.pico for each in cost) for cost in costs]
    low, high = _bounds(job, size, book, rows, expected, sums)
    return Estimate(
        job=job.name,
        at=asked.now,
        documents=size.documents,
        to_send=size.to_send,
        low=low,
        cost=Money(sums[0], job.budget.currency),
        high=high,
        tiers=tuple(tiers),
        assumptions=tuple(_assumptions(size, share_out(job, book, asked, lasts), expected, known)),
        off_peak=_off_peak(job, expected.tokens, size, book, asked.now),
        level=None if expected.factors is None else LEVEL,
        paid=Money(known.paid_pico, job.budget.currency) if isinstance(known, Polled) else None,
        sampled=len(known.sample.drawn) if isinstance(known, Polled) else None,
        lasts=lasts or None,
    )


def forecast(job: Job, expected: Estimate) -> list[str]:
    """What the job's promise will take of a run that is expected to be this, in words; nothing for a threshold."""
    promise = job.promise
    if promise is None:
        return []
    last = expected.tiers[-1]
    each = Money(-(-last.cost.pico // last.attempts), last.cost.currency) if last.attempts else None
    return spell_plan(plan(promise, expected.to_send), last.tokens.tier, each)


def bound_sample(job: Job, expected: Estimate, longest: int, book: PriceBook) -> Money:
    """What a sample may cost at most, to be its cap: the dearest way it may go, and one attempt's worst case more.

    That is reserved before an attempt of a document of `longest` bytes is sent, and given back. Without it a cap as
    low as a small sample's would let none be.
    """
    rows = rows_at(job, book, expected.at)
    worst = max(
        _reserve(job, tier, price, longest) for tier in job.ladder for price in bands_of(rows[tier.name], book.rows())
    )
    return Money(expected.high.pico + worst, job.budget.currency)


def expect_pilot(job: Job, size: Size, book: PriceBook, asked: Asked) -> Money:
    """What a pilot of this size is expected to cost: each document once at the first tier, and once at the last."""
    ends = (
        estimate(replace(job, ladder=(tier,)), size, book, asked).cost for tier in (job.ladder[0], job.ladder[-1])
    )
    return _sum(ends, job.budget.currency)


def _reserve(job: Job, tier: Tier, price: Price, length: int) -> int:
    """Of the system message, the document and an answer that was cut off once."""
    tokens = len(job.prefix.encode()) + length + TEMPLATE_TOKENS + 2 * TEMPLATE_TOKENS_PER_MESSAGE
    return reservation(price, tokens, MORE_TOKENS * tier.max_tokens)


@dataclass(frozen=True, slots=True)
class _Expected:
    """Tokens by tier, and between which factors of their cost the truth is; None: nobody knows."""

    tokens: tuple[TierTokens, ...]
    factors: Interval | None


def _expect(job: Job, size: Size, rows: Rows, known: Polled | History | None, seed: int) -> _Expected:
    assumed = tuple(_assumed(job, size))
    match known:
        case Polled():
            found = project(known, rows, assumed, Random(seed))  # noqa: S311 (draws weights, guards nothing)
            return _Expected(found.tokens, found.factors)
        case History() if _is_of(job, known):
            return _from_history(job, size, rows, known, assumed)
        case _:
            return _Expected(assumed, None)


def _is_of(job: Job, history: History) -> bool:
    """Whether it has what the first tier of the ladder does."""
    return any(tier.tier == job.ladder[0].name for run in history.runs for tier in run.tiers)


def _from_history(job: Job, size: Size, rows: Rows, history: History, assumed: Sequence[TierTokens]) -> _Expected:
    """The mean over the runs, each weighted as schemas/intervals.py says."""
    past = [PastCost(_mean_cost(run, rows), run.documents, run.squared_spread) for run in history.runs]
    weights = [math.ceil(weight * MILLION) for weight in weigh(past)]
    tokens = tuple(_mean_tokens(history.runs, weights, each) for each in assumed)
    return _Expected(tokens, predict_mean(past, size.to_send) if history.is_sound(size) else None)


def _mean_cost(run: PastRun, rows: Rows) -> float:
    """Of a document, at the prices of now."""
    known = [(tier, rows[tier.tier]) for tier in run.tiers if tier.tier in rows]
    return (
        sum(
            tier.hit * row.hit_pico + tier.miss * row.miss_pico + tier.output * row.output_pico for tier, row in known
        )
        / run.documents
    )


def _mean_tokens(runs: Sequence[PastRun], weights: Sequence[int], typical: TierTokens) -> TierTokens:
    """A tier that no run has reached is expected to stay unused."""
    found = [
        (Fraction(weight, run.documents), tier)
        for run, weight in zip(runs, weights, strict=True)
        for tier in run.tiers
        if tier.tier == typical.tier
    ]
    attempts = sum((weight * tier.attempts for weight, tier in found), Fraction(0))
    if not attempts:
        return replace(typical, attempts_ppm=0)
    return replace(
        typical,
        hit=sum(weight * tier.hit for weight, tier in found) / attempts,
        miss=sum(weight * tier.miss for weight, tier in found) / attempts,
        output=sum(weight * tier.output for weight, tier in found) / attempts,
        attempts_ppm=attempts * MILLION / sum(weights),
        seconds=sum(weight * tier.seconds for weight, tier in found) / attempts,
    )


def _lasting(job: Job, tokens: Sequence[TierTokens], size: Size) -> timedelta:
    """How long the slowest tier is at work with as many requests in flight as the job says. 0: nobody knows."""
    seconds = [_attempts(size, each) * each.seconds / job.concurrency[each.tier] for each in tokens]
    return timedelta(seconds=min(math.ceil(max(seconds)), _LONGEST_S))


def _spans(lasts: timedelta) -> tuple[timedelta, timedelta, timedelta]:
    return lasts, lasts / 2, lasts * 2


def _bounds(
    job: Job, size: Size, book: PriceBook, rows: Rows, expected: _Expected, sums: Sequence[int]
) -> tuple[Money, Money]:
    """Of priming, at best there is none, since the cache is warm already, and at worst thrice as much."""
    if expected.factors is None:
        tokens = expected.tokens
        return _low(job, tokens[0], size, book.rows(), rows), _high(job, tokens, size, book.rows(), rows)
    priming = sum(math.ceil(_priming(size, each, rows[each.tier])) for each in expected.tokens)
    low = math.floor((min(sums) - priming) * Fraction(expected.factors.low))
    high = math.ceil((max(sums) + 2 * priming) * Fraction(expected.factors.high))
    return Money(low, job.budget.currency), Money(high, job.budget.currency)


def measure_prefix(job: Job) -> int:
    """Tokens of the shared prefix, by its bytes."""
    return _ceil(len(job.prefix.encode()), BYTES_PER_TOKEN)


def measure_answer(schema: Mapping[str, Any], tier: Tier) -> int:
    """Output tokens of a typical answer that fits the schema, with reasoning where the tier thinks."""
    tokens = _ceil(_answer_bytes(schema, schema.get("$defs", {}), 8), BYTES_PER_TOKEN - 1)  # JSON splits finer
    return min(tier.max_tokens, tokens + (THINKING_TOKENS if tier.thinking else 0))


def design_of(job: Job, size: int, *, is_even: bool = False) -> Design:
    """How to draw a sample of so many: by what a document costs at the first tier, in bytes that miss the cache.

    Evenly, it is the same sample for every variant of a job.
    """
    answer = measure_answer(job.answer.schema, job.ladder[0])
    fixed = FRAME_TOKENS + measure_prefix(job) // _HIT_PART + _OUTPUT_TIMES * answer
    return Design(size, BYTES_PER_TOKEN * fixed, job.name, is_even=is_even)


def _assumed(job: Job, size: Size) -> list[TierTokens]:
    document = FRAME_TOKENS + _ceil(size.sampled_bytes, max(1, size.sampled) * BYTES_PER_TOKEN)
    prefix, share, found = measure_prefix(job), MILLION, []
    for tier in job.ladder:
        attempts = share + share * REPEATED_PPM // MILLION
        found.append(TierTokens(tier.name, prefix, document, measure_answer(job.answer.schema, tier), attempts))
        share = share * ESCALATED_PPM // MILLION
    return found


def _off_peak(
    job: Job, tokens: Sequence[TierTokens], size: Size, book: PriceBook, now: datetime
) -> OffPeakEstimate | None:
    try:
        if tariff_of(job, book, job.budget.currency).is_flat(now):
            return None
        starts = begins(job, book, now)
        tiers = _price(job, tokens, size, [Stretch(Fraction(1), rows_at(job, book, starts))])
    except UnknownPrice:  # a run that waits would be refused; the price of now is known
        return None
    return OffPeakEstimate(starts, _sum((each.cost for each in tiers), job.budget.currency))


def _price(job: Job, tokens: Sequence[TierTokens], size: Size, stretches: Sequence[Stretch]) -> list[TierEstimate]:
    return [_price_tier(job.tier(each.tier), each, size, stretches, job.budget.currency) for each in tokens]


def _price_tier(
    tier: Tier, tokens: TierTokens, size: Size, stretches: Sequence[Stretch], currency: Currency
) -> TierEstimate:
    attempts = _attempts(size, tokens)
    work = sum((each.share * tokens.cost(each.rows[tier.name]) for each in stretches), Fraction(0)) * attempts
    priming = _priming(size, tokens, stretches[0].rows[tier.name])
    return TierEstimate(tokens, tier.model, math.ceil(attempts), Money(math.ceil(work + priming), currency))


def _attempts(size: Size, tokens: TierTokens) -> Fraction:
    """How many are expected: not whole, since a tier of few attempts would cost a good deal more if it were."""
    return Fraction(size.to_send * tokens.attempts_ppm) / MILLION


def _priming(size: Size, tokens: TierTokens, price: Price) -> Fraction:
    """What it takes beyond that until the cache serves the prefix: once for all documents, at the run's start."""
    attempts = min(PRIMING_ATTEMPTS, math.ceil(_attempts(size, tokens)))
    return Fraction(attempts * tokens.hit * (price.miss_pico - price.hit_pico))


def _low(job: Job, first: TierTokens, size: Size, book: Sequence[Price], rows: Mapping[str, Price]) -> Money:
    hours = bands_of(rows[job.ladder[0].name], book)
    return Money(math.floor(size.to_send * min(first.cost(price) for price in hours)), job.budget.currency)


def _high(
    job: Job, tokens: Sequence[TierTokens], size: Size, book: Sequence[Price], rows: Mapping[str, Price]
) -> Money:
    cost = Fraction(0)
    for each in tokens:
        cold = TierTokens(each.tier, 0, each.hit + each.miss, each.output, 0)
        attempts = max(math.ceil(_attempts(size, each)), size.to_send)
        cost += attempts * max(cold.cost(price) for price in bands_of(rows[each.tier], book))
    return Money(math.ceil(cost), job.budget.currency)


def _sum(costs: Iterable[Money], currency: Currency) -> Money:
    return Money(sum(cost.pico for cost in costs), currency)


def _assumptions(
    size: Size, stretches: Sequence[Stretch], expected: _Expected, known: Polled | History | None
) -> list[str]:
    """What the figures rest on, for the table's foot."""
    lines = [
        _hours_line(stretches),
        _ends_line(expected),
        "answers that can be reused from earlier runs cost nothing, and are not counted here",
    ]
    if skipped := size.documents - size.to_send:
        lines.append(
            f"{skipped:,} documents have an id that an earlier one has, or nothing to send, and are not sent"
        )
    return lines + basis(size, known)


def _hours_line(stretches: Sequence[Stretch]) -> str:
    shares: dict[str, Fraction] = {}
    for each in stretches:
        for price in each.rows.values():
            name = f"{price.model} {price.band.value.replace('_', '-')}"
            shares[name] = shares.get(name, Fraction(0)) + each.share / list(each.rows.values()).count(price)
    told = (name if len(stretches) == 1 else f"{name} {math.floor(share * 100)} %" for name, share in shares.items())
    return f"expected at the prices of the hours of work: {', '.join(told)}"


def _ends_line(expected: _Expected) -> str:
    if expected.factors is not None:
        return (
            f"between: the true cost is in there in {LEVEL} of 100 cases or more, for documents like these, prices "
            "as the book has them, and work that takes from half to twice as long as expected"
        )
    return (
        "no interval, since too little is known: low is the first tier only, every prefix hits, cheapest hours; "
        "high: every document climbs the whole ladder, no prefix hits, dearest hours; "
        "`farthing estimate` with --sample asks some documents, and then knows"
    )


def basis(size: Size, known: Polled | History | None) -> list[str]:
    """Where the tokens of an attempt, and the attempts of a document, are from."""
    match known:
        case Polled():
            return [_sample_line(known)]
        case History(runs=runs) if runs:
            return _history_lines(known, size)
        case _:
            return _assumed_lines(size)


def _sample_line(polled: Polled) -> str:
    simulated = ", answers simulated" if polled.is_simulated else ""
    return (
        f"from {len(polled.sample.drawn):,} documents drawn at random of {polled.sample.documents:,} that can be "
        f"sent, run {polled.run_id}{simulated}; their answers are reused by the run that follows; "
        "rare answers far longer than any of these, which max_tokens allows, are outside of the interval"
    )


def _history_lines(history: History, size: Size) -> list[str]:
    simulated = ", answers simulated" if history.is_simulated else ""
    lines = [
        f"tokens and escalated share as in the job's last {len(history.runs)} run(s), "
        f"{history.documents:,} documents{simulated}"
    ]
    if history.is_partial:
        lines.append("none of them has ended yet: what climbs comes last, so this may be too low")
    if history.is_of_other_prompt:
        lines.append("they had another prompt, answer or ladder than the job has now, so this may be far off")
    if history.is_stand_in:
        lines.append("they are the sandbox's, whose answers are made up: a model's own cost something else")
    if history.is_of_first(size):
        lines.append("they had the first documents only (--limit), and a file may begin with its shortest")
    return lines


def _assumed_lines(size: Size) -> list[str]:
    return [
        f"no history: {BYTES_PER_TOKEN} bytes are one token, over a sample of {size.sampled} documents; "
        f"{ESCALATED_PPM // 10_000} % of each tier go one up; {REPEATED_PPM // 10_000} % are tried twice; "
        f"a text in an answer has {TEXT_BYTES} bytes, a list {ENTRIES} entries; "
        f"thinking takes {THINKING_TOKENS:,} tokens"
    ]


def _answer_bytes(schema: Mapping[str, Any], known: Mapping[str, Any], depth: int) -> int:
    """Bytes of a typical value that fits, as compact JSON; a schema that refers to itself ends at `depth`."""
    if depth == 0:
        return 4
    if "$ref" in schema:
        return _answer_bytes(known.get(str(schema["$ref"]).rpartition("/")[2], {}), known, depth - 1)
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return max(_answer_bytes(each, known, depth - 1) for each in schema[several])
    if "enum" in schema:
        return max(len(str(value)) for value in schema["enum"]) + 2
    match schema.get("type"):
        case "object":
            fields = schema.get("properties", {})
            return 2 + sum(len(name) + 5 + _answer_bytes(each, known, depth - 1) for name, each in fields.items())
        case "array":
            entries = min(ENTRIES, int(schema.get("maxItems", ENTRIES)))
            return 2 + entries * (1 + _answer_bytes(schema.get("items", {}), known, depth - 1))
        case "string" | None:
            return TEXT_BYTES
    return 6


def _ceil(amount: int, parts: int) -> int:
    """Division that rounds up: an estimate may be too high by one unit, never too low."""
    return -(-amount // parts)
