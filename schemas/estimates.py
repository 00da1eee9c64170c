"""What a run is expected to cost before it starts: alone responsible for that calculation, in exact integers.

Tokens per attempt and attempts per document come from the job's own history where there is one, else from stated
assumptions. Means of tokens are whole, rounded up; shares are parts per million. An estimate promises nothing: the
budget is what holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from schemas.errors import UnknownPrice
from schemas.jobs import Job, Tier
from schemas.money import Currency, Money
from schemas.off_peak import Shut, guard_of, tariff_of
from schemas.pricing import Price, PriceBook

MILLION = 10**6
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


@dataclass(frozen=True, slots=True)
class Size:
    """How large a selection is: its documents, those that need an attempt, and the sample that was measured."""

    documents: int
    to_send: int
    sampled: int
    sampled_bytes: int


@dataclass(frozen=True, slots=True)
class TierTokens:
    """Mean tokens of one attempt at a tier, and its attempts per million documents that are sent."""

    tier: str
    hit: int
    miss: int
    output: int
    attempts_ppm: int


@dataclass(frozen=True, slots=True)
class History:
    """What earlier runs of a job say: tokens and attempts per tier, over so many documents.

    `is_partial`: one of them has not ended yet, so that what climbs, and costs most, may still be to come.
    """

    runs: int
    documents: int
    is_simulated: bool
    tiers: tuple[TierTokens, ...]
    is_partial: bool = False


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
    """What a run is expected to cost, between the cheapest and the dearest way it may go, and why.

    `cost` is at the prices of `at`, the instant it was made for. `off_peak` is None where all hours cost the same, or
    nobody knows them.
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


def estimate(job: Job, size: Size, book: PriceBook, now: datetime, history: History | None = None) -> Estimate:
    """Price a run of `size` at `now`.

    low: every document is accepted by the first tier, every prefix hits, at the model's cheapest hours.
    high: every document climbs the whole ladder, no prefix ever hits, at its dearest hours.
    Raises UnknownPrice where a tier has no price.
    """
    tokens = _expected(job, size, history)
    rows = _rows(job, book, now)
    expected = _estimate_tiers(job, tokens, size, rows)
    return Estimate(
        job=job.name,
        at=now,
        documents=size.documents,
        to_send=size.to_send,
        low=_low(job, tokens[0], size, book.rows(), rows),
        cost=_sum((each.cost for each in expected), job.budget.currency),
        high=_high(job, tokens, size, book.rows(), rows),
        tiers=tuple(expected),
        assumptions=tuple(_assumptions(size, rows, history)),
        off_peak=_off_peak(job, tokens, size, book, now),
    )


def measure_prefix(job: Job) -> int:
    """Tokens of the shared prefix, by its bytes."""
    return _ceil(len(job.prefix.encode()), BYTES_PER_TOKEN)


def measure_answer(schema: Mapping[str, Any], tier: Tier) -> int:
    """Output tokens of a typical answer that fits the schema, with reasoning where the tier thinks."""
    tokens = _ceil(_answer_bytes(schema, schema.get("$defs", {}), 8), BYTES_PER_TOKEN - 1)  # JSON splits finer
    return min(tier.max_tokens, tokens + (THINKING_TOKENS if tier.thinking else 0))


def _expected(job: Job, size: Size, history: History | None) -> list[TierTokens]:
    """One entry per tier of the ladder, from history where the whole ladder has one."""
    assumed = _assumed(job, size)
    known = {each.tier: each for each in history.tiers} if history else {}
    if job.ladder[0].name not in known:
        return assumed
    unseen = {each.tier: TierTokens(each.tier, each.hit, each.miss, each.output, 0) for each in assumed}
    return [known.get(tier.name, unseen[tier.name]) for tier in job.ladder]


def _assumed(job: Job, size: Size) -> list[TierTokens]:
    document = FRAME_TOKENS + _ceil(size.sampled_bytes, max(1, size.sampled) * BYTES_PER_TOKEN)
    prefix, share, found = measure_prefix(job), MILLION, []
    for tier in job.ladder:
        attempts = share + share * REPEATED_PPM // MILLION
        found.append(TierTokens(tier.name, prefix, document, measure_answer(job.answer.schema, tier), attempts))
        share = share * ESCALATED_PPM // MILLION
    return found


def _rows(job: Job, book: PriceBook, at: datetime) -> dict[str, Price]:
    return {tier.name: book.at(tier.model, job.budget.currency, at) for tier in job.ladder}


def _off_peak(
    job: Job, tokens: Sequence[TierTokens], size: Size, book: PriceBook, now: datetime
) -> OffPeakEstimate | None:
    tariff = tariff_of(job, book, job.budget.currency)
    try:
        if tariff.is_flat(now):
            return None
        found = tariff.decide(now, guard_of(job))
        begins = found.until if isinstance(found, Shut) else now
        tiers = _estimate_tiers(job, tokens, size, _rows(job, book, begins))
    except UnknownPrice:  # a run that waits would be refused; the price of now is known
        return None
    return OffPeakEstimate(begins, _sum((each.cost for each in tiers), job.budget.currency))


def _estimate_tiers(
    job: Job, tokens: Sequence[TierTokens], size: Size, rows: Mapping[str, Price]
) -> list[TierEstimate]:
    return [_estimate_tier(job.tier(each.tier), each, size, rows[each.tier]) for each in tokens]


def _estimate_tier(tier: Tier, tokens: TierTokens, size: Size, price: Price) -> TierEstimate:
    attempts = _ceil(size.to_send * tokens.attempts_ppm, MILLION)
    priming = min(PRIMING_ATTEMPTS, attempts) * tokens.hit * (price.miss_pico - price.hit_pico)
    cost = attempts * _attempt_cost(tokens, price) + priming
    return TierEstimate(tokens, tier.model, attempts, Money(cost, price.currency))


def _low(job: Job, first: TierTokens, size: Size, book: Sequence[Price], rows: Mapping[str, Price]) -> Money:
    hours = _hours(rows[job.ladder[0].name], book)
    return Money(size.to_send * min(_attempt_cost(first, price) for price in hours), job.budget.currency)


def _high(
    job: Job, tokens: Sequence[TierTokens], size: Size, book: Sequence[Price], rows: Mapping[str, Price]
) -> Money:
    cost = 0
    for each in tokens:
        cold = TierTokens(each.tier, 0, each.hit + each.miss, each.output, 0)
        attempts = max(_ceil(size.to_send * each.attempts_ppm, MILLION), size.to_send)
        cost += attempts * max(_attempt_cost(cold, price) for price in _hours(rows[each.tier], book))
    return Money(cost, job.budget.currency)


def _hours(row: Price, book: Sequence[Price]) -> list[Price]:
    """The row's price at every hour: it and its fellows of the same model, card, date and prompt length."""
    key = (row.model, row.currency, row.valid_from, row.above_tokens)
    return [price for price in book if (price.model, price.currency, price.valid_from, price.above_tokens) == key]


def _attempt_cost(tokens: TierTokens, price: Price) -> int:
    return tokens.hit * price.hit_pico + tokens.miss * price.miss_pico + tokens.output * price.output_pico


def _sum(costs: Iterable[Money], currency: Currency) -> Money:
    return Money(sum(cost.pico for cost in costs), currency)


def _assumptions(size: Size, rows: Mapping[str, Price], history: History | None) -> list[str]:
    """What the figures rest on, for the table's foot."""
    hours = (f"{price.model} {price.band.value.replace('_', '-')}" for price in rows.values())
    bands = ", ".join(dict.fromkeys(hours))
    skipped = size.documents - size.to_send
    lines = [
        f"expected at the price of this hour: {bands}",
        "low: first tier only, every prefix hits, cheapest hours; "
        "high: every document climbs the whole ladder, no prefix hits, dearest hours",
        "answers that can be reused from earlier runs cost nothing, and are not counted here",
    ]
    if skipped:
        lines.append(f"{skipped:,} documents have an id that an earlier one has, and are not sent")
    return lines + basis(size, history)


def basis(size: Size, history: History | None) -> list[str]:
    """Where the tokens of an attempt, and the attempts of a document, are from."""
    return _history_lines(history) if history and history.tiers else _assumed_lines(size)


def _history_lines(history: History) -> list[str]:
    simulated = ", answers simulated" if history.is_simulated else ""
    lines = [
        f"tokens and escalated share as in the job's last {history.runs} run(s), "
        f"{history.documents:,} documents{simulated}"
    ]
    if history.is_partial:
        lines.append("one of them has not ended yet: what climbs comes last, so this may be too low")
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
