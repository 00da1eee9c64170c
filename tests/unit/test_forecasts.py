"""What a promise takes is told before it costs anything, and where it eats the saving that is told, too."""

from __future__ import annotations

from schemas.forecasts import spell_plan
from schemas.money import Currency, Money
from schemas.promises import Promise, plan

EACH = Money(10**9, Currency.USD)  # a thousandth


def test_a_plan_says_how_many_may_differ_how_many_are_drawn_and_what_that_costs() -> None:
    planned = plan(Promise.parse("0.95", "0.05"), 10_000)
    told = spell_plan(planned, "pro", EACH)
    assert told[0].startswith("promise: 0.95 of 10,000 answers are what pro would say, but for a chance of 0.05")
    assert "at most 500 may differ" in told[0]
    assert f"{planned.size:,} documents" in told[1]
    assert str(Money(EACH.pico * planned.size, Currency.USD)) in told[1]
    assert f"from none to {10_000 - planned.size:,}" in told[2]
    assert len(told) == 3


def test_where_a_guarantee_eats_the_saving_it_says_so() -> None:
    assert "eats most of the saving" in spell_plan(plan(Promise.parse("0.95", "0.05"), 200), "pro", EACH)[-1]
    assert "eats most of the saving" in spell_plan(plan(Promise.parse("0.99", "0.05"), 2_000), "pro", None)[-1]


def test_fields_that_share_the_chance_are_named() -> None:
    assert "in each of 3 fields" in spell_plan(plan(Promise.parse("0.9", "0.05"), 1_000, fields=3), "pro", None)[0]
