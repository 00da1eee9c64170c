"""What if: a run priced again comes to what the provider would have billed, which the sandbox's own tariff tells."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import tariff
from schemas.errors import ConfigurationError, UnknownPrice
from schemas.money import Currency
from schemas.pricing import Band, load_machines, load_price_book, reservation
from schemas.whatif import Alternative, Group, Past, RunTier, Scenario, host, reprice, usual_scenarios
from tasks.whatif import compare

BOOK = load_price_book()
FLASH, PRO = RunTier("flash", tariff.FLASH), RunTier("pro", tariff.PRO)
OPENED = datetime(2026, 9, 21, tzinfo=UTC)  # a Monday
MINUTES = 60 * 24 * 60
unhurried = settings(deadline=None, max_examples=60)


@dataclass(frozen=True)
class Sent:
    """One attempt as the provider saw it."""

    rung: int
    reached: int
    at: datetime
    hit: int
    miss: int
    output: int

    @property
    def model(self) -> str:
        return (FLASH, PRO)[self.rung].model


def group(sent: Sent, **changes: object) -> Group:
    usual = Group(
        rung=sent.rung,
        reached=sent.reached,
        climbs=False,
        model=sent.model,
        minute=sent.at,
        prompt_tokens=0,
        reserved_by=BOOK.dearest(sent.model, Currency.USD, sent.at, sent.at).name,
        documents=1,
        hit=sent.hit,
        miss=sent.miss,
        output=sent.output,
        unknown_pico=0,
    )
    return replace(usual, **changes)


def past(*groups: Group, below: Decimal | None = None) -> Past:
    return Past(1, "tickets", Currency.USD, False, (FLASH, PRO), 0, 0, groups, below)


def documents() -> st.SearchStrategy[list[list[Sent]]]:
    """Documents of a run over two months, each with an attempt on every rung up to the one it reached."""
    tokens = st.tuples(st.integers(0, 4_000), st.integers(1, 9_000), st.integers(1, 500))
    attempt = st.tuples(st.integers(0, MINUTES), tokens)
    document = st.lists(attempt, min_size=1, max_size=2)
    return st.lists(document, min_size=1, max_size=6).map(
        lambda found: [
            [
                Sent(rung, len(attempts) - 1, OPENED + timedelta(minutes=minute), *used)
                for rung, (minute, used) in enumerate(attempts)
            ]
            for attempts in found
        ]
    )


def price_again(sent: list[list[Sent]], **scenario: object) -> Alternative:
    return reprice(past(*(group(each) for one in sent for each in one)), Scenario("x", **scenario), BOOK)


def billed(sent: list[list[Sent]], charge: Callable[[Sent], int]) -> int:
    return sum(charge(each) for one in sent for each in one)


def card(model: str, at: datetime) -> tariff.Row:
    """The row of the provider's page that holds then."""
    return [row for row in tariff.ROWS if (row.model, row.currency) == (model, "USD") and row.since <= at][-1]


@unhurried
@given(documents())
def test_without_a_change_a_run_costs_what_the_provider_billed(sent: list[list[Sent]]) -> None:
    due = billed(sent, lambda a: tariff.charge_at(a.model, "USD", a.at).price.cost(a.hit, a.miss, a.output))
    found = price_again(sent)
    assert (found.cost_pico, found.unknown_pico) == (due, 0)
    assert [step.documents for step in found.steps] == [len(sent), sum(len(one) == 2 for one in sent)]


@unhurried
@given(documents())
def test_off_peak_and_without_a_cache_it_costs_what_the_provider_would_have_billed(sent: list[list[Sent]]) -> None:
    cheap = billed(sent, lambda a: card(a.model, a.at).price.cost(a.hit, a.miss, a.output))
    assert price_again(sent, is_off_peak=True).cost_pico == cheap
    cold = billed(sent, lambda a: tariff.charge_at(a.model, "USD", a.at).price.cost(0, a.hit + a.miss, a.output))
    assert price_again(sent, has_cache=False).cost_pico == cold


@unhurried
@given(documents(), st.sampled_from(["2026-04-25", "2026-05-01", "2026-08-31"]))
def test_at_the_cards_of_another_day_it_keeps_its_hours_of_the_week(sent: list[list[Sent]], day: str) -> None:
    at = datetime.fromisoformat(day).replace(tzinfo=UTC)
    began = min(attempt.at for one in sent for attempt in one)

    def charge(attempt: Sent) -> int:
        row, moved = card(attempt.model, at), attempt.at
        while moved - (attempt.at - began) >= at:
            moved -= timedelta(weeks=1)
        price = row.peak if row.peak and tariff.is_peak(moved + timedelta(weeks=1)) else row.price
        return price.cost(attempt.hit, attempt.miss, attempt.output)

    assert price_again(sent, prices_at=at).cost_pico == billed(sent, charge)


@unhurried
@given(documents())
def test_one_tier_alone_takes_real_attempts_where_there_are_and_else_a_document_s_own_tokens(
    sent: list[list[Sent]],
) -> None:
    flash_alone = sum(tariff.charge_at(a.model, "USD", a.at).price.cost(a.hit, a.miss, a.output) for a, *_ in sent)
    assert price_again(sent, ladder=("flash",)).cost_pico == flash_alone
    climbed = [one for one in sent if len(one) == 2]
    longer = (
        Fraction(sum(b.output for _, b in climbed), sum(a.output for a, _ in climbed)) if climbed else Fraction(1)
    )
    due = 0
    for one in sent:
        answer = one[-1]
        output = answer.output if len(one) == 2 else math.ceil(answer.output * longer)
        due += tariff.charge_at(tariff.PRO, "USD", answer.at).price.cost(answer.hit, answer.miss, output)
    assert price_again(sent, ladder=("pro",)).cost_pico == due


@unhurried
@given(
    st.integers(0, MINUTES),
    st.integers(1, 20_000),
    st.integers(1, 8_000),
    st.sampled_from(
        [
            (Scenario(ladder=("pro",)), tariff.PRO),
            (Scenario(ladder=("gpt-5.5",)), "gpt-5.5"),
            (Scenario(is_off_peak=True), tariff.FLASH),
            (Scenario(prices_at=datetime(2026, 5, 1, tzinfo=UTC)), tariff.FLASH),
            (Scenario(hosts={tariff.FLASH: "self-hosted-flash-2xh100"}), "self-hosted-flash-2xh100"),
        ]
    ),
)
def test_what_was_unknown_stays_an_interval_that_holds_whatever_was_asked_for(
    minute: int, prompt: int, longest: int, asked: tuple[Scenario, str]
) -> None:
    scenario, model = asked
    at = OPENED + timedelta(minutes=minute)
    was = BOOK.dearest(tariff.FLASH, Currency.USD, at, at + timedelta(minutes=3))
    worst = reservation(was, prompt, longest)
    lost = group(Sent(0, 0, at, 0, 0, 0), unknown_pico=worst, reserved_by=was.name)
    assert reprice(past(lost), Scenario(), BOOK).unknown_pico == worst
    found = reprice(past(lost), scenario, BOOK)
    assert found.cost_pico == 0
    band = Band.OFF_PEAK if scenario.is_off_peak or was.band is Band.OFF_PEAK else Band.PEAK
    now = BOOK.in_band(BOOK.at(model, Currency.USD, scenario.prices_at or at), band)
    assert reservation(now, prompt, longest) <= found.unknown_pico


def test_another_model_is_priced_by_its_card_with_its_steps_and_says_what_is_assumed() -> None:
    short = group(Sent(0, 0, OPENED, 1_000, 500, 100))
    long = group(Sent(0, 0, OPENED, 200_000, 100_000, 100), prompt_tokens=272_001)
    found = reprice(past(short, long), Scenario(ladder=("gpt-5.5",)), BOOK)
    usd = Decimal("0.5") * 1_000 + 5 * 500 + 30 * 100 + 1 * 200_000 + 10 * 100_000 + 45 * 100
    assert found.cost_pico == int(usd * 10**6)
    assert any("another tokenizer" in line for line in found.assumptions)
    assert [(model, note.split(";")[0]) for model, note in found.price_notes] == [("gpt-5.5", "launch price")]
    without = reprice(past(short), Scenario(ladder=("qwen3.6-27b",)), BOOK)
    assert without.cost_pico == int((Decimal("0.6") * 1_500 + Decimal("3.6") * 100) * 10**6)
    assert any("no price for cached tokens" in note for _, note in without.price_notes)


def test_who_would_climb_by_another_threshold_is_priced_one_step_up() -> None:
    sure, unsure = Sent(0, 0, OPENED, 640, 100, 5), Sent(0, 0, OPENED, 640, 200, 7)
    groups = group(sure), group(unsure, climbs=True)
    found = reprice(past(*groups, below=Decimal("0.95")), Scenario(), BOOK)
    assert [step.documents for step in found.steps] == [2, 1]
    pro = tariff.charge_at(tariff.PRO, "USD", OPENED).price
    assert found.steps[1].cost_pico == pro.cost(640, 200, 7)


def test_a_machine_pays_from_the_volume_at_which_the_api_costs_its_hour() -> None:
    machine = next(each for each in load_machines() if each.model == "self-hosted-flash-2xh100")
    off_peak = OPENED + timedelta(hours=12)
    found = host(past(group(Sent(0, 0, off_peak, 600_000, 300_000, 100_000))), tariff.FLASH, machine, BOOK)
    api = 600_000 * 3_000 + 300_000 * 150_000 + 100_000 * 600_000
    assert (found.tokens, found.api_pico, found.hour_pico) == (10**6, api, 5 * 10**12)
    assert found.busy_hours == 1
    assert found.break_even is None  # 46.8 M tokens an hour, and it serves 36 M
    larger = machine.model_copy(update={"tokens_per_hour": 50_000_000})
    pays_from = host(past(group(Sent(0, 0, off_peak, 600_000, 300_000, 100_000))), tariff.FLASH, larger, BOOK)
    assert pays_from.break_even == math.ceil(Fraction(5 * 10**12 * 10**6, api)) == 46_816_480


@pytest.mark.parametrize(
    ("ladder", "advice"),
    [
        (("flash", "flash"), "names a step twice"),
        (("flash", "pro", "gpt-5.5"), "name at most 2"),
        (("flash",), "nowhere to climb"),
    ],
)
def test_a_ladder_that_the_run_cannot_tell_of_is_refused(ladder: tuple[str, ...], advice: str) -> None:
    was = past(group(Sent(0, 0, OPENED, 1, 1, 1)), below=Decimal("0.5"))
    with pytest.raises(ConfigurationError, match=advice):
        reprice(was, Scenario(ladder=ladder), BOOK)


def test_what_has_no_price_is_refused_and_never_free() -> None:
    was = past(group(Sent(0, 0, OPENED, 1, 1, 1)))
    for scenario in (Scenario(ladder=("gpt-9",)), Scenario(prices_at=datetime(2020, 1, 1, tzinfo=UTC))):
        with pytest.raises(UnknownPrice):
            reprice(was, scenario, BOOK)
    with pytest.raises(UnknownPrice, match="only in USD"):
        reprice(replace(was, currency=Currency.CNY), Scenario(ladder=("gpt-5.5",)), BOOK)


def test_in_another_currency_nothing_is_converted_and_what_has_no_card_there_is_left_out() -> None:
    was = replace(past(group(Sent(0, 0, OPENED, 1, 1, 1))), currency=Currency.CNY)
    found = compare(was, BOOK, load_machines())
    assert [each.scenario.name for each in found.alternatives] == [
        *("flash alone", "pro alone", "without a cache", "all off-peak"),
    ]
    assert found.hostings == ()
    assert len(found.left_out) > len(load_machines())
    assert all("only in USD" in why for _, why in found.left_out)


def test_the_usual_scenarios_are_every_tier_alone_hours_cache_models_and_machines() -> None:
    was = past(group(Sent(0, 0, OPENED, 1, 1, 1)))
    names = [scenario.name for scenario in usual_scenarios(was, BOOK, load_machines())]
    assert names[:4] == ["flash alone", "pro alone", "without a cache", "all off-peak"]
    wanted = {"gpt-5.5", "claude-opus-4.7", "gpt-5.4-mini", "claude-haiku-4.5", "kimi-k2.6", "glm-5.1"}
    wanted |= {"step-3.5-flash", "qwen3.6-plus", "qwen3.6-27b", "deepseek-v3.2"}
    assert {f"{name} alone" for name in wanted} <= set(names)
    assert sum(" on self-hosted-" in name for name in names) == len(load_machines())
    assert len(set(names)) == len(names)
