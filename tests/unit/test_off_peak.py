"""Off-peak: every edge of the decision to begin or to wait, to the second, with the book that ships."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.answers import Answer
from schemas.errors import ProviderStopped, UnknownPrice
from schemas.jobs import TIERS, Input, Job
from schemas.money import Currency, Money
from schemas.off_peak import DOUBT, MARGIN, Open, Shut, Tariff, guard_of, spell, tariff_of
from schemas.pricing import Band, load_price_book
from tasks.drains import Draining
from tasks.off_peak import Gate

FLASH, PRO = "deepseek-flash", "deepseek-v4-pro"
SECOND = timedelta(seconds=1)
GUARD = timedelta(minutes=7)
TARIFF = Tariff(load_price_book(), (FLASH, PRO), Currency.USD)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def decide(text: str, guard: timedelta = GUARD) -> Open | Shut:
    return TARIFF.decide(utc(text), guard)


def waits_until(text: str, guard: timedelta = GUARD) -> datetime | None:
    found = decide(text, guard)
    return found.until if isinstance(found, Shut) else None


@pytest.mark.parametrize(
    ("instant", "until"),
    [
        ("2026-11-25T00:52:59", None),  # a Wednesday: an attempt would end a second before the peak begins
        ("2026-11-25T00:53:00", "04:00:05"),  # it would end as it begins
        ("2026-11-25T00:59:59", "04:00:05"),
        ("2026-11-25T01:00:00", "04:00:05"),
        ("2026-11-25T03:59:59", "04:00:05"),
        ("2026-11-25T04:00:00", "04:00:05"),  # our idea of its clock may be a little ahead
        ("2026-11-25T04:00:05", None),
        ("2026-11-25T05:52:59", None),
        ("2026-11-25T05:53:00", "10:00:05"),
        ("2026-11-25T09:59:59", "10:00:05"),
        ("2026-11-25T10:00:05", None),
        ("2026-11-25T23:59:59", None),
    ],
)
def test_nothing_begins_in_a_peak_window_nor_so_late_that_it_could_end_in_one(
    instant: str, until: str | None
) -> None:
    assert waits_until(instant) == (utc(f"2026-11-25T{until}") if until else None)


@pytest.mark.parametrize(
    "day",
    [
        "2026-11-28",  # Saturday
        "2026-11-29",  # Sunday
        "2026-10-01",  # National Day, a Thursday
        "2026-09-25",  # Mid-Autumn, a Friday
        "2026-10-10",  # a Saturday that is worked, and off-peak all the same
    ],
)
def test_weekends_holidays_and_worked_weekends_are_open_all_day(day: str) -> None:
    for clock in ("00:59:59", "01:00:00", "03:00:00", "05:59:00", "06:00:00", "09:59:59"):
        assert waits_until(f"{day}T{clock}") is None


def test_before_a_holiday_the_evening_is_open_through_to_the_next_working_days_peak() -> None:
    found = decide("2026-09-30T12:00:00")  # the eve of National Day, seven days off; then Thursday, the 8th
    while isinstance(found, Open) and found.until is not None and found.until < utc("2026-10-09T00:00:00"):
        found = TARIFF.decide(found.until, GUARD)
        if isinstance(found, Shut):
            break
    assert isinstance(found, Shut)
    assert found.until == utc("2026-10-08T04:00:05")


def test_before_peak_hours_existed_every_hour_is_open_until_they_come() -> None:
    assert waits_until("2026-07-01T02:00:00") is None
    assert waits_until("2026-08-16T15:59:59") is None
    assert waits_until("2026-08-17T02:00:00") == utc("2026-08-17T04:00:05")
    assert waits_until("2026-08-22T02:00:00") == utc("2026-08-22T04:00:05")  # that Saturday was not yet exempt
    assert TARIFF.is_flat(utc("2026-07-01T02:00:00"))
    assert not TARIFF.is_flat(utc("2026-11-25T05:00:00"))


def test_a_model_with_one_price_for_all_hours_never_waits() -> None:
    book = load_price_book()
    flat = next(row for row in book.rows() if row.band is Band.FLAT and not row.model.startswith("deepseek-"))
    found = Tariff(book, (flat.model,), flat.currency).decide(utc("2026-11-25T02:00:00"), GUARD)
    assert found == Open(utc("2026-11-25T02:00:00"), None)


def test_a_ladder_waits_for_whichever_of_its_models_has_peak_prices() -> None:
    book = load_price_book()
    flat = next(row for row in book.rows() if row.band is Band.FLAT and row.currency is Currency.USD)
    mixed = Tariff(book, (flat.model, PRO), Currency.USD)
    assert isinstance(mixed.decide(utc("2026-11-25T02:00:00"), GUARD), Shut)


def test_two_windows_with_no_time_for_an_attempt_in_between_are_one_wait() -> None:
    assert waits_until("2026-11-25T02:00:00", timedelta(hours=2) - DOUBT) == utc("2026-11-25T10:00:05")
    assert waits_until("2026-11-25T02:00:00", timedelta(hours=2) - DOUBT - SECOND) == utc("2026-11-25T04:00:05")


def test_a_year_without_a_published_calendar_is_refused_and_not_guessed() -> None:
    assert waits_until("2026-12-31T12:00:00") is None
    with pytest.raises(UnknownPrice, match="chinesecalendar"):
        decide("2026-12-31T15:53:00")  # midnight in China is nearer than the guard
    with pytest.raises(UnknownPrice, match="chinesecalendar"):
        decide("2027-01-04T02:00:00")


def test_it_says_until_when_in_both_clocks_and_what_waiting_saves() -> None:
    inside, before = decide("2026-11-25T02:00:00"), decide("2026-11-25T00:55:00")
    assert isinstance(inside, Shut)
    assert isinstance(before, Shut)
    assert inside.because == "peak prices until 12:00 Beijing (04:00 UTC); off-peak saves half"
    assert before.because == (
        "peak prices begin at 09:00 Beijing (01:00 UTC), too soon for an attempt, and end at 12:00 Beijing "
        "(04:00 UTC); off-peak saves half"
    )
    assert spell(utc("2026-11-25T18:30:00")) == "02:30 Beijing (18:30 UTC)"


MINUTES = st.integers(0, 120 * 24 * 60).map(lambda minutes: utc("2026-08-20T00:00:00") + timedelta(minutes=minutes))


@given(MINUTES, st.integers(1, 62))
def test_whoever_may_begin_never_ends_in_a_peak_and_whoever_waits_may_begin_then_and_not_before(
    instant: datetime, minutes: int
) -> None:
    guard, book = timedelta(minutes=minutes), load_price_book()
    found = TARIFF.decide(instant, guard)
    if isinstance(found, Open):
        seconds = range(0, int(guard.total_seconds()) + 1, 60)
        assert all(
            book.at(FLASH, Currency.USD, instant + second * SECOND).band is not Band.PEAK for second in seconds
        )
        return
    assert isinstance(TARIFF.decide(found.until, guard), Open)
    assert isinstance(TARIFF.decide(found.until - SECOND, guard), Shut)


@given(MINUTES, st.floats(0, 1))
def test_what_is_open_stays_open_until_it_says(instant: datetime, share: float) -> None:
    found = TARIFF.decide(instant, GUARD)
    if isinstance(found, Open) and found.until is not None:
        between = instant + (found.until - instant) * share
        assert found.holds_at(between) is (between < found.until)
        if between < found.until:
            assert isinstance(TARIFF.decide(between, GUARD), Open)


# ---- the gate of a lane -------------------------------------------------------------------------------------------


class Clock:
    """A provider's clock that moves only when it is asked for the time."""

    def __init__(self, now: datetime, *later: datetime) -> None:
        self.now, self.later, self.asked = now, list(later), 0

    async def ask(self) -> None:
        self.asked += 1
        if self.later:
            self.now = self.later.pop(0)


def make_gate(clock: Clock, draining: asyncio.Event | None = None) -> Gate:
    return Gate(
        lambda instant: TARIFF.decide(instant, GUARD),
        now=lambda: clock.now,
        ask_time=clock.ask,
        draining=draining or asyncio.Event(),
        scale=0,
    )


async def test_all_who_wait_go_on_together_and_one_of_them_is_told_that_it_opened() -> None:
    clock = Clock(utc("2026-11-25T02:00:00"), utc("2026-11-25T03:59:59"), utc("2026-11-25T04:00:05"))
    gate = make_gate(clock)
    opened = await asyncio.wait_for(asyncio.gather(*(gate.wait() for _ in range(20))), 10)
    assert sorted(opened) == [False] * 19 + [True]
    assert clock.asked == 2  # one document asks, not each
    assert gate.shut is None


async def test_an_open_gate_keeps_nobody_and_asks_nothing() -> None:
    clock = Clock(utc("2026-11-25T05:00:00"))
    gate = make_gate(clock)
    assert not await gate.wait()
    clock.now = utc("2026-11-25T05:53:00")
    assert gate.look() is not None
    clock.now = utc("2026-11-25T04:30:00")  # a clock that was put back is believed
    assert gate.look() is None
    assert clock.asked == 0


async def test_a_drain_ends_every_wait_at_once() -> None:
    draining = asyncio.Event()
    gate = make_gate(Clock(utc("2026-11-25T02:00:00")), draining)
    gate.scale = 1  # it would ask for the time in a minute
    waiting = [asyncio.create_task(gate.wait()) for _ in range(5)]
    await asyncio.sleep(0.05)
    draining.set()
    found = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
    assert [type(each) for each in found] == [Draining] * 5


async def test_a_provider_that_does_not_tell_the_time_is_asked_again() -> None:
    clock = Clock(utc("2026-11-25T02:00:00"), utc("2026-11-25T04:00:05"))
    gate, refused = make_gate(clock), 0

    async def refuse_first() -> None:
        nonlocal refused
        refused += 1
        if refused == 1:
            raise ProviderStopped("it does not answer")
        await clock.ask()

    gate.ask_time = refuse_first
    assert await asyncio.wait_for(gate.wait(), 10)
    assert refused == 2


def test_the_guard_is_the_longest_deadline_and_what_an_attempt_takes_besides() -> None:
    job = Job(
        name="tickets",
        folder=Path("jobs/tickets"),
        input=Input(path="data/*.parquet", id="id", text="text"),
        prompt="Sort these. Answer with JSON.",
        answer=Answer.from_schema("Answer", {"type": "object", "properties": {"topic": {"type": "string"}}}),
        ladder=(TIERS["flash"], TIERS["flash-thinking"], TIERS["pro"]),
        budget=Money.parse("1 USD"),
        concurrency={},
    )
    assert guard_of(job) == timedelta(seconds=600) + MARGIN
    assert timedelta(minutes=2) == MARGIN > DOUBT
    assert tariff_of(job, TARIFF.book, Currency.USD) == TARIFF
