"""What a run would have cost otherwise: its own attempts, priced again. No call is made.

`reprice` takes a run's attempts, added up by what decides their price, and a scenario: another ladder, threshold,
hour, date, no cache, other models, machines of one's own. All of it is whole numbers of pico units. What was unknown
stays so: its bound is W, its worst case, and W at other prices is at most W times the dearest of their ratios. Priced
by the same book and without a change, a run costs what it cost.

How documents move. Each stands on the rung that it reached, and on every rung below. On a ladder of other steps, step
i gets the documents that stood on rung i (or would climb to it). A document that was at a step's tier is priced by
its attempts there; another one by the tokens that it had on the rung it came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cached_property

from schemas.errors import ConfigurationError, UnknownPrice
from schemas.money import Currency
from schemas.price_files import Machine
from schemas.pricing import Band, Price, PriceBook

_WEEK = timedelta(days=7)
#: More than any step of a card by prompt length: where the prompt is unknown, its dearest step is the bound.
_LONGEST = 10**9


@dataclass(frozen=True, slots=True)
class Group:
    """Attempts of a run that are priced alike.

    `rung` is the tier's that they were made at, `reached` the highest of their documents', who would go one further
    by the threshold if `climbs`. `documents` entered the rung by these. `minute` is when they were completed, else
    meant; `prompt_tokens` is a number that every card prices as theirs. `reserved_by` names the row behind W. Where
    the cost is not known, there are no tokens and `unknown_pico` is the bound.
    """

    rung: int
    reached: int
    climbs: bool
    model: str
    minute: datetime
    prompt_tokens: int
    reserved_by: str
    documents: int
    hit: int
    miss: int
    output: int
    unknown_pico: int


@dataclass(frozen=True, slots=True)
class RunTier:
    """A tier of the run's ladder and the model that was asked for there."""

    name: str
    model: str


@dataclass(frozen=True)
class Past:
    """A run as it was, under the threshold that is asked about: `below`, None for the run's own.

    `cost_pico` and `unknown_pico` are what the ledger has of these groups.
    """

    run: int
    job: str
    currency: Currency
    is_simulated: bool
    tiers: tuple[RunTier, ...]
    cost_pico: int
    unknown_pico: int
    groups: tuple[Group, ...]
    below: Decimal | None = None

    @cached_property
    def began(self) -> datetime:
        """The minute of its first attempt, on the clock that prices go by."""
        return min(group.minute for group in self.groups)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is otherwise. `ladder` names tiers of the run or models of the price book; (): the run's own tiers.

    `prices_at`: the cards of that instant, at the hours of the week that the run worked in. `hosts`: by model, the
    machine of one's own that serves it.
    """

    name: str = "as it was"
    ladder: tuple[str, ...] = ()
    is_off_peak: bool = False
    has_cache: bool = True
    prices_at: datetime | None = None
    hosts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepCost:
    """One step of a ladder: the documents that get there, what they cost, and the bound of what is not known."""

    name: str
    model: str
    documents: int
    cost_pico: int
    unknown_pico: int


@dataclass(frozen=True)
class Alternative:
    """What a run would have cost in a scenario: from `cost_pico` to `high_pico`, and what that rests on.

    `price_notes` are what the price book says of models that are uncertain: the model and the note.
    """

    scenario: Scenario
    steps: tuple[StepCost, ...]
    assumptions: tuple[str, ...]
    price_notes: tuple[tuple[str, str], ...]

    @property
    def cost_pico(self) -> int:
        """What is known of it."""
        return sum(step.cost_pico for step in self.steps)

    @property
    def unknown_pico(self) -> int:
        """The most that its unknown attempts would cost."""
        return sum(step.unknown_pico for step in self.steps)

    @property
    def high_pico(self) -> int:
        """The most that all of it would cost."""
        return self.cost_pico + self.unknown_pico


@dataclass(frozen=True, slots=True)
class Hosting:
    """A machine of one's own against the API, for what a run sent to one model.

    `break_even` is how many tokens an hour the API serves for the machine's price of an hour; None: more than the
    machine can serve, so that it never pays. Prices in pico units.
    """

    machine: Machine
    tokens: int
    api_pico: int
    hour_pico: int
    break_even: int | None
    busy_hours: int


@dataclass(frozen=True, slots=True)
class _Step:
    name: str
    rung: int | None
    model: str


def reprice(past: Past, scenario: Scenario, book: PriceBook) -> Alternative:
    """What the run would have cost. Raises UnknownPrice and ConfigurationError where nobody can say."""
    steps = _steps(past, scenario, book)
    pricing = _Pricing(past, scenario, book)
    found = [_price_step(number, step, past, pricing) for number, step in enumerate(steps)]
    models = [scenario.hosts.get(step.model, step.model) for step in steps if step.rung is None or scenario.hosts]
    notes = dict.fromkeys(_price_notes(past, models, pricing))
    return Alternative(scenario, tuple(found), tuple(_assumptions(past, scenario, steps)), tuple(notes))


def host(past: Past, model: str, machine: Machine, book: PriceBook) -> Hosting:
    """A machine against the API, by what the run sent to `model`. Raises UnknownPrice."""
    pricing = _Pricing(past, Scenario(), book)
    own = [group for group in past.groups if book.canonical(group.model) == model]
    tokens = sum(group.hit + group.miss + group.output for group in own)
    api, hour = sum(pricing.cost(group, None, 1, 1) for group in own), machine.gpus * machine.gpu_hour
    break_even = -(-hour * tokens // api) if api else None
    return Hosting(
        machine=machine,
        tokens=tokens,
        api_pico=api,
        hour_pico=hour,
        break_even=None if break_even is None or break_even > machine.tokens_per_hour else break_even,
        busy_hours=-(-tokens // machine.tokens_per_hour),
    )


def usual_scenarios(past: Past, book: PriceBook, machines: Iterable[Machine]) -> list[Scenario]:
    """What is worth a look where nobody asks: each tier alone, no cache, off-peak, other models, machines."""
    models = {book.canonical(tier.model) for tier in past.tiers}
    hosting = [machine for machine in machines if machine.hosts in models]
    own = {machine.model for machine in machines}
    others = [price.model for price in book.rows() if price.is_what_if_only and price.model not in own]
    return [
        *(Scenario(f"{tier.name} alone", (tier.name,)) for tier in past.tiers if len(past.tiers) > 1),
        Scenario("without a cache", has_cache=False),
        Scenario("all off-peak", is_off_peak=True),
        *(Scenario(f"{model} alone", (model,)) for model in dict.fromkeys(others)),
        *(Scenario(f"{each.hosts} on {each.model}", hosts={each.hosts: each.model}) for each in hosting),
    ]


def _steps(past: Past, scenario: Scenario, book: PriceBook) -> list[_Step]:
    rungs = {tier.name: number for number, tier in enumerate(past.tiers)}
    names = scenario.ladder or tuple(rungs)
    if len(set(names)) < len(names):
        raise ConfigurationError(f"ladder: {', '.join(names)} names a step twice")
    if len(names) > len(rungs):
        raise ConfigurationError(
            f"ladder: run {past.run} has {len(rungs)} tiers, so nobody knows who would climb to a step "
            f"{len(rungs) + 1}; name at most {len(rungs)}"
        )
    if len(names) == 1 and past.below is not None:
        raise ConfigurationError("threshold: a ladder of one step has nowhere to climb; leave out --threshold")
    return [
        _Step(name, rungs[name], past.tiers[rungs[name]].model)
        if name in rungs
        else _Step(name, None, book.canonical(name))
        for name in names
    ]


def _price_step(number: int, step: _Step, past: Past, pricing: _Pricing) -> StepCost:
    documents = cost = unknown = 0
    ratios = [_output_ratio(past.groups, rung, step.rung) for rung in range(len(past.tiers))]
    for group in past.groups:
        if group.reached + group.climbs < number:
            continue
        own = step.rung if step.rung is not None and group.reached >= step.rung else None
        source = min(number, group.reached) if own is None else own
        if group.rung != source:
            continue
        model, (times, over) = (step.model, ratios[source]) if own is None else (None, (1, 1))
        documents += group.documents
        cost += pricing.cost(group, model, times, over)
        unknown += pricing.bound(group, model, times, over)
    return StepCost(step.name, step.model, documents, cost, unknown)


def _output_ratio(groups: Iterable[Group], source: int, rung: int | None) -> tuple[int, int]:
    """How much longer answers were on `rung` than on `source`, by the documents that were on both; 1 if none was."""
    if rung is None:
        return 1, 1
    on_both = [group for group in groups if group.reached >= max(rung, source)]
    there, here = (sum(group.output for group in on_both if group.rung == each) for each in (rung, source))
    return (there, here) if there and here else (1, 1)


@dataclass(frozen=True)
class _Pricing:
    """The prices of a scenario. A model of None is the one that served."""

    past: Past
    scenario: Scenario
    book: PriceBook

    def cost(self, group: Group, model: str | None, times: int, over: int) -> int:
        """The known cost, with answers `times / over` as long."""
        if not group.hit + group.miss + group.output:
            return 0
        row = self.row(model or group.model, group.minute, group.prompt_tokens)
        hit, miss = (group.hit, group.miss) if self.scenario.has_cache else (0, group.hit + group.miss)
        output = -(-group.output * times // over)
        return hit * row.hit_pico + miss * row.miss_pico + output * row.output_pico

    def bound(self, group: Group, model: str | None, times: int, over: int) -> int:
        """The most that the unknown attempts can have cost."""
        if not group.unknown_pico:
            return 0
        was = self._reserved(group)
        now = self._dearest(was, group, model)
        if not was.miss_pico or not was.output_pico:
            raise UnknownPrice(f"{was.name} is free of charge, so it bounds no other price")
        longest = max(times, over)  # it was reserved for the longest answer there may be, and stays so
        return max(
            -(-group.unknown_pico * now.miss_pico // was.miss_pico),
            -(-group.unknown_pico * now.output_pico * longest // (was.output_pico * over)),
        )

    def row(self, model: str, minute: datetime, prompt_tokens: int) -> Price:
        """The row that prices an attempt of that minute."""
        name = self.scenario.hosts.get(self.book.canonical(model), model)
        at = self.scenario.prices_at
        row = self.book.at(
            name,
            self.past.currency,
            at or minute,
            prompt_tokens,
            hours_at=minute if at is None else self._moved(minute),
        )
        return self.book.in_band(row, Band.OFF_PEAK) if self.scenario.is_off_peak else row

    def _moved(self, minute: datetime) -> datetime:
        """The same hour of the week, in the week that begins at `prices_at`."""
        assert self.scenario.prices_at is not None
        weeks = -(-(self.scenario.prices_at - self.past.began) // _WEEK)
        return minute + weeks * _WEEK

    def _reserved(self, group: Group) -> Price:
        row = self.book.find(group.reserved_by)
        if row is None:
            raise UnknownPrice(
                f"{group.reserved_by} is not in the price book: put it back, `farthing verify` says more"
            )
        return row

    def _dearest(self, was: Price, group: Group, model: str | None) -> Price:
        """The row that bounds what W was reserved for: the dearest of its hours, unless those are known."""
        scenario = self.scenario
        if model is None and scenario.prices_at is None and self.book.canonical(group.model) not in scenario.hosts:
            return self.book.in_band(was, Band.OFF_PEAK) if scenario.is_off_peak else was
        row = self.row(model or group.model, group.minute, _LONGEST)
        is_cheap = scenario.is_off_peak or was.band is Band.OFF_PEAK
        return self.book.in_band(row, Band.OFF_PEAK if is_cheap else Band.PEAK)


def _assumptions(past: Past, scenario: Scenario, steps: Sequence[_Step]) -> list[str]:
    """What the figure rests on, for the table's foot."""
    lines = ["the same documents, retries and repairs as in the run; what answers are worth is not priced"]
    if any(step.rung is None for step in steps):
        lines.append(
            "tokens are DeepSeek's: another tokenizer counts otherwise, and another model answers at other length"
        )
    if any(step.rung != number for number, step in enumerate(steps) if step.rung is not None):
        lines.append(
            "who was not at a tier is priced there by its own tokens, its answer as much longer as others' were"
        )
    if past.below is not None:
        lines.append(
            f"threshold {past.below}: who would climb is priced by its own tokens one step up, and stays there"
        )
    if scenario.prices_at is not None:
        lines.append(
            f"the cards of {scenario.prices_at:%Y-%m-%d %H:%M} UTC, at the hours of the week that the run worked in"
        )
    return lines


def _price_notes(past: Past, models: Sequence[str], pricing: _Pricing) -> Iterable[tuple[str, str]]:
    for model in models if past.groups else ():
        row = pricing.row(model, past.began, 0)
        if row.is_uncertain:
            yield row.model, f"{row.source}; {row.note}"
        if row.is_what_if_only and row.hit_pico == row.miss_pico:
            yield row.model, "no price for cached tokens is known, they cost as much as others"
