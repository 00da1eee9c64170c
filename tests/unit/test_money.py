"""Money: what may be written, what is refused, and what people are shown."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.money import MOST_PICO, PICO, Currency, Money


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25 USD", Money(25 * PICO, Currency.USD)),
        ("180 CNY", Money(180 * PICO, Currency.CNY)),
        ("0.5 cny", Money(PICO // 2, Currency.CNY)),
        ("25", Money(25 * PICO, Currency.USD)),
        ("  3   usd ", Money(3 * PICO, Currency.USD)),
        ("1_000 USD", Money(1000 * PICO, Currency.USD)),
        ("0", Money(0, Currency.USD)),
        ("1e3 USD", Money(1000 * PICO, Currency.USD)),
        ("0.000000000001", Money(1, Currency.USD)),
    ],
)
def test_a_sum_is_read_exactly(text: str, expected: Money) -> None:
    assert Money.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "USD", "$25", "25USD", "25 EUR", "25 USD please", "1,000 USD", "0x10", "1/3"),
        *("nan", "nan USD", "sNaN", "inf", "-inf USD", "-1 USD", "-0.000000000001", "0.0000000000001"),
    ],
)
def test_what_is_not_an_exact_sum_is_refused_with_the_reason(text: str) -> None:
    with pytest.raises(ValueError, match="is not a sum of money"):
        Money.parse(text)


@given(pico=st.integers(0, MOST_PICO), currency=st.sampled_from(Currency))
def test_a_sum_survives_being_written_out_and_read_again(pico: int, currency: Currency) -> None:
    money = Money(pico, currency)
    assert Money.parse(f"{money.decimal} {currency}") == money


@given(pico=st.integers(-(10**24), 10**24))
def test_the_decimal_of_a_sum_is_exact(pico: int) -> None:
    assert Money(pico, Currency.USD).decimal * PICO == Decimal(pico)


@pytest.mark.parametrize(
    ("pico", "currency", "shown"),
    [
        (0, Currency.USD, "$0.00"),
        (25 * PICO, Currency.USD, "$25.00"),
        (1_234_567 * PICO + PICO // 2, Currency.CNY, "¥1,234,567.50"),
        (PICO, Currency.USD, "$1.00"),
        (PICO // 2, Currency.USD, "$0.500"),
        (12_345 * 10**6, Currency.USD, "$0.0123"),
        (3_000, Currency.USD, "$0.00000000300"),
        (1, Currency.USD, "$0.000000000001"),
    ],
)
def test_people_are_shown_two_decimals_or_three_digits(pico: int, currency: Currency, shown: str) -> None:
    assert str(Money(pico, currency)) == shown


def test_sums_of_two_currencies_are_never_equal() -> None:
    assert Money(PICO, Currency.USD) != Money(PICO, Currency.CNY)
