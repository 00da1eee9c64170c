"""Booking a reply: exact cost where usage came back, the bound where it may have been billed, alarms."""

from __future__ import annotations

import operator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.attempts import NOT_BILLED, UNKNOWN_BILLING, Reply, Signal, Usage
from schemas.booking import Booking, Reserved, book_reply
from schemas.money import MOST_PICO, Currency
from schemas.pricing import PriceBook, load_price_book, read_price_book, reservation
from schemas.whatif import Group, Past, RunTier, Scenario, reprice

BOOK = load_price_book()
OFF_PEAK = datetime(2026, 9, 26, 0, 10, tzinfo=UTC)  # a Saturday morning in Beijing
PEAK = datetime(2026, 9, 24, 2, 0, tzinfo=UTC)  # a Thursday, ten in the morning there
RESERVED = Reserved(worst=10**9, max_tokens=1000)


def reply(signal: Signal = Signal.ANSWERED, usage: Usage | None = None, **fields: object) -> Reply:
    at = fields.pop("at", OFF_PEAK)
    return Reply(signal=signal, sent_at=OFF_PEAK, completed_at=at, usage=usage, **fields)


def book(answer: Reply, reserved: Reserved = RESERVED, model: str = "deepseek-flash") -> Booking:
    return book_reply(answer, model, Currency.USD, reserved, BOOK)


def test_known_usage_costs_its_tokens_times_the_row_of_its_instant() -> None:
    usage = Usage(hit=640, miss=100, output=20)
    for at, (hit, miss, output) in {OFF_PEAK: (3000, 150_000, 600_000), PEAK: (6000, 300_000, 1_200_000)}.items():
        booked = book(reply(usage=usage, at=at))
        assert booked.cost == 640 * hit + 100 * miss + 20 * output
        assert booked.price == BOOK.at("deepseek-flash", Currency.USD, at)
        assert (booked.bound, booked.alarm) == (None, None)
        assert booked.used == booked.cost


def test_a_failed_reply_with_usage_is_still_billed() -> None:
    booked = book(reply(Signal.INTERRUPTED, Usage(0, 10, 1)))
    assert booked.cost == 10 * 150_000 + 600_000


def test_the_model_that_served_decides_the_price() -> None:
    booked = book(reply(usage=Usage(0, 1, 0), served_model="deepseek-v4-pro"))
    assert booked.price is not None
    assert booked.price.model == "deepseek-v4-pro"
    assert booked.cost == booked.price.miss_pico


@pytest.mark.parametrize("signal", sorted(NOT_BILLED))
def test_what_the_provider_did_not_work_on_costs_nothing(signal: Signal) -> None:
    booked = book(reply(signal))
    assert (booked.cost, booked.bound, booked.price, booked.used) == (0, None, None, 0)


def test_a_refusal_is_free_only_where_it_is_not_a_reply_of_the_model() -> None:
    assert book(reply(Signal.REFUSED, http_status=400)).cost == 0
    filtered = book(reply(Signal.REFUSED, http_status=200))
    assert (filtered.cost, filtered.bound) == (None, RESERVED.worst)


@pytest.mark.parametrize("signal", sorted({*UNKNOWN_BILLING, Signal.ANSWERED, Signal.BLANK, Signal.INTERRUPTED}))
def test_without_usage_what_may_have_been_billed_keeps_its_reservation(signal: Signal) -> None:
    booked = book(reply(signal))
    assert (booked.cost, booked.bound, booked.used) == (None, RESERVED.worst, RESERVED.worst)


def test_a_model_without_price_is_unknown_and_stops_the_run() -> None:
    booked = book(reply(usage=Usage(1, 1, 1), served_model="deepseek-v9"))
    assert (booked.cost, booked.bound, booked.price) == (None, RESERVED.worst, None)
    assert booked.alarm is not None
    assert "deepseek-v9" in booked.alarm


def test_a_cost_above_the_reservation_is_booked_and_alarms() -> None:
    booked = book(reply(usage=Usage(0, 10, 1)), Reserved(worst=2_099_999, max_tokens=10))
    assert booked.cost == 2_100_000
    assert booked.alarm is not None
    assert "2099999" in booked.alarm
    assert book(reply(usage=Usage(0, 10, 1)), Reserved(worst=2_100_000, max_tokens=10)).alarm is None


def test_more_output_than_allowed_is_booked_and_alarms() -> None:
    booked = book(reply(usage=Usage(0, 1, 11)), Reserved(worst=10**12, max_tokens=10))
    assert booked.cost is not None
    assert booked.alarm == "11 output tokens came back of 10 allowed"


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**5))
def test_no_reply_within_its_bounds_costs_more_than_was_reserved(hit: int, miss: int, output: int) -> None:
    price = BOOK.dearest("deepseek-flash", Currency.USD, OFF_PEAK, PEAK + (OFF_PEAK - PEAK))
    worst = reservation(price, hit + miss, output)
    booked = book(reply(usage=Usage(hit, miss, output)), Reserved(worst, output))
    assert booked.alarm is None
    assert booked.cost is not None
    assert booked.cost <= worst


@pytest.mark.parametrize("served", ["gpt-5.5", "kimi-k2.6"])
def test_a_model_whose_price_is_for_comparison_only_is_unknown_and_stops_the_run(served: str) -> None:
    booked = book(reply(usage=Usage(0, 10, 1), served_model=served, at=datetime(2026, 11, 20, tzinfo=UTC)))
    assert (booked.cost, booked.bound, booked.price) == (None, RESERVED.worst, None)
    assert booked.alarm is not None
    assert served in booked.alarm


#: A price per million tokens with six decimals, as millionths: as many pico units per token.
MILLIONTHS = st.integers(0, 10**8)
ROWS = st.lists(
    st.tuples(
        st.integers(0, 100),
        st.tuples(MILLIONTHS, MILLIONTHS, MILLIONTHS).map(lambda drawn: (*sorted(drawn[:2]), drawn[2])),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda row: row[0],
)
FIRST = datetime(2026, 1, 1, tzinfo=UTC)


def own_book(rows: list[tuple[int, tuple[int, int, int]]], folder: Path) -> PriceBook:
    """The price book of a file as a person writes it: each row from so many days on."""
    text = "".join(
        f'[[row]]\nmodel = "m"\ncurrency = "USD"\nsource = "drawn"\n'
        f"valid_from = {(FIRST + timedelta(day)).isoformat()}\n"
        f"flat = {{hit = {dollars(hit)}, miss = {dollars(miss)}, output = {dollars(output)}}}\n"
        for day, (hit, miss, output) in rows
    )
    (folder / "own.toml").write_text(text)
    return read_price_book(folder)


def dollars(millionths: int) -> str:
    return f'"{millionths // 10**6}.{millionths % 10**6:06d}"'


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, sent=st.lists(st.tuples(st.integers(0, 120 * 1440 - 1), *[st.integers(0, 10**9)] * 3), max_size=8))
def test_booked_cost_is_what_whole_numbers_say_and_the_same_book_prices_it_the_same_again(
    rows: list[tuple[int, tuple[int, int, int]]], sent: list[tuple[int, int, int, int]], tmp_path: Path
) -> None:
    """For any usage, instant and price rows. Before the first row nothing has a price."""
    prices, due, groups = own_book(rows, tmp_path), 0, []
    enough = Reserved(worst=MOST_PICO, max_tokens=10**9)
    for minute, *usage in sent:
        at = FIRST + timedelta(minutes=minute)
        booked = book_reply(reply(usage=Usage(*usage), at=at), "m", Currency.USD, enough, prices)
        held = [row for day, row in sorted(rows) if day * 1440 <= minute]
        if not held:
            assert (booked.cost, booked.bound) == (None, MOST_PICO)
            continue
        assert booked.cost == sum(map(operator.mul, usage, held[-1]))
        due += booked.cost
        groups.append(Group(0, 0, False, "m", at, 0, "m", 1, *usage, unknown_pico=0))
    past = Past(1, "drawn", Currency.USD, False, (RunTier("one", "m"),), due, 0, tuple(groups))
    assert reprice(past, Scenario(), prices).cost_pico == due
