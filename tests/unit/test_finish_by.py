"""By when a run is to be done: what is waited for, what is bought, and how people write it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.finish_by import LOOK_AGAIN, FinishBy, Pace, decide, off_peak_between
from schemas.money import Currency
from schemas.off_peak import Open, Shut, Tariff
from schemas.pricing import load_price_book
from schemas.requests import RunRequest
from tasks.finish_by import Haste

#: Wednesday 2026-11-25: peak 01:00 to 04:00 and 06:00 to 10:00 UTC.
TARIFF = Tariff(load_price_book(), ("deepseek-flash",), Currency.USD)
GUARD, HOUR = timedelta(minutes=5), timedelta(hours=1)


def at(clock: str, day: int = 25) -> datetime:
    return datetime.fromisoformat(f"2026-11-{day}T{clock}+00:00")


def test_the_off_peak_time_is_what_lies_between_the_windows_and_their_guards() -> None:
    found = off_peak_between(TARIFF, GUARD, at("00:00"), at("12:00"))
    windows = (55, 60 + 55, 2 * 60)  # minutes: before the first guard, between the windows, after the last
    assert timedelta(minutes=sum(windows)) - found < timedelta(minutes=1)
    assert off_peak_between(TARIFF, GUARD, at("01:30"), at("03:00")) == timedelta(0)
    assert off_peak_between(TARIFF, GUARD, at("12:00"), at("12:30")) == timedelta(minutes=30)


@pytest.mark.parametrize(
    ("now", "by", "needed", "is_open"),
    [
        ("01:30", "05:00", 0.5, False),  # an hour from 04:00 on is enough
        ("01:30", "05:00", 2.0, False),  # it is not; but there are 2.5 hours of peak left, and 1 is needed
        ("03:00", "05:00", 2.0, True),  # now all of it is
        ("01:30", "03:00", 1.0, False),
        ("02:00", "03:00", 1.0, True),
        ("03:30", "03:00", 0.1, True),  # late already
        ("12:00", "13:00", 9.0, True),  # off-peak
        ("01:30", "05:00", None, True),  # no pace: less than half of what is left is off-peak
        ("03:00", "06:00", None, False),
    ],
)
def test_peak_hours_are_bought_as_late_as_they_can_be(now: str, by: str, needed: float | None, is_open: bool) -> None:
    time = None if needed is None else needed * HOUR
    found = decide(TARIFF, GUARD, at(now), at(by), time, is_buying=False)
    assert isinstance(found, Open) == is_open
    if isinstance(found, Shut):
        assert "time enough to finish by" in found.because


def test_who_began_to_buy_goes_on_until_the_off_peak_time_suffices() -> None:
    more, less = timedelta(minutes=70), timedelta(minutes=50)
    assert isinstance(decide(TARIFF, GUARD, at("02:00"), at("05:00"), more, is_buying=True), Open)
    assert isinstance(decide(TARIFF, GUARD, at("02:00"), at("05:00"), less, is_buying=True), Shut)


STEP = 5 * LOOK_AGAIN


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 24 * 12), st.integers(1, 24 * 12), st.integers(0, 24 * 12))
def test_a_run_at_the_pace_it_was_seen_at_is_done_in_time_where_it_can_be(now: int, left: int, needed: int) -> None:
    """Played in steps of five minutes, of which a pace that is known exactly never loses more than one."""
    start = at("00:00", 24) + now * STEP
    by, work = start + left * STEP, min(needed, left) * STEP
    must = max(work - off_peak_between(TARIFF, GUARD, start, by), timedelta(0))
    instant, is_buying, bought = start, False, timedelta(0)
    while work > timedelta(0):
        found = decide(TARIFF, GUARD, instant, by, work, is_buying=is_buying)
        is_dear = isinstance(TARIFF.decide(instant, GUARD), Shut)
        is_buying = is_dear and isinstance(found, Open)
        if isinstance(found, Open):
            work -= STEP
            bought += STEP if is_dear else timedelta(0)
        instant += STEP
        assert instant <= by + 3 * STEP
    assert bought <= must + 3 * STEP  # windows begin and end between two steps


def test_a_pace_needs_documents_and_is_taken_for_a_quarter_slower() -> None:
    assert Pace().seen(0, HOUR).time_for(10) is None
    assert Pace().seen(40, HOUR).seen(40, HOUR).time_for(80) == 2.5 * HOUR
    assert Pace(1, 20 * 24 * HOUR).time_for(10**7) == timedelta(days=36_600)


def test_all_lanes_mean_the_same_day_also_those_that_come_after_it() -> None:
    asked = RunRequest(job="licences", finish_by="08:30+08:00").settled(at("00:00"))
    assert asked.due(at("00:31")) == asked.due(at("00:00")) == at("00:30")
    assert RunRequest(job="licences").settled(at("00:00")).due(at("00:00")) is None


async def test_a_lane_learns_the_pace_while_its_gate_is_open_and_tells_once_that_it_buys() -> None:
    clock, left, told = [at("00:00")], [100], list[int | None]()

    async def count_left() -> int:
        return left[0]

    async def tell(documents: int | None) -> None:
        told.append(documents)

    haste = Haste(TARIFF, GUARD, at("03:00"), lambda: clock[0], count_left, tell)
    is_open = True
    watch = asyncio.create_task(haste.watch(0.0, lambda: is_open))

    async def pass_time(to: str, now_left: int) -> None:
        clock[0], left[0] = at(to), now_left
        for _ in range(10):
            await asyncio.sleep(0)

    await pass_time("00:00", 100)
    await pass_time("00:30", 70)
    assert haste.pace == Pace(30, timedelta(minutes=30))
    is_open = False
    await pass_time("01:00", 70)
    await pass_time("01:30", 70)
    assert haste.pace == Pace(30, timedelta(minutes=30)), "while nothing may begin, no pace is seen"
    assert isinstance(haste.decide(at("01:45")), Open), "70 documents take up to 88 minutes, and 75 are left"
    for _ in range(10):
        await asyncio.sleep(0)
    assert told == [70]
    watch.cancel()


@pytest.mark.parametrize(
    ("written", "now", "meant"),
    [
        ("2026-12-01T08:30+08:00", "12:00", datetime(2026, 12, 1, 0, 30, tzinfo=UTC)),
        ("08:30+08:00", "00:00", datetime(2026, 11, 25, 0, 30, tzinfo=UTC)),
        ("08:30+08:00", "00:30", datetime(2026, 11, 26, 0, 30, tzinfo=UTC)),
        ("05:00Z", "12:00", datetime(2026, 11, 26, 5, tzinfo=UTC)),
    ],
)
def test_an_instant_is_itself_and_a_time_of_day_the_next_one(written: str, now: str, meant: datetime) -> None:
    assert FinishBy.parse(written).after(at(now)) == meant


@pytest.mark.parametrize(
    ("written", "why"), [("08:30", "no zone"), ("2026-12-01", "no zone"), ("soon", "not a time")]
)
def test_what_is_no_time_is_refused_with_how_to_write_it(written: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        FinishBy.parse(written)
