"""Buckets: round, in order, without gaps, and few."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from schemas.buckets import COST_EDGES, MOST_STRIDES, list_strides, pick_stride, pick_ticks

AT = datetime(2026, 11, 30, 10, 17, 33, tzinfo=UTC)


def test_ten_cost_buckets_a_decade_are_alike() -> None:
    assert COST_EDGES[:12] == (1, 1_000, 1_250, 1_600, 2_000, 2_500, 3_150, 4_000, 5_000, 6_300, 8_000, 10_000)
    assert all(1.2 < high / low < 1.3 for low, high in pairwise(COST_EDGES[1:]))


@pytest.mark.parametrize(
    ("span", "stride"),
    [
        (timedelta(), timedelta(seconds=1)),
        (timedelta(seconds=91), timedelta(seconds=5)),
        (timedelta(minutes=30), timedelta(seconds=30)),
        (timedelta(hours=9), timedelta(minutes=15)),
        (timedelta(days=3), timedelta(hours=1)),
        (timedelta(days=400), timedelta(days=7)),
        (timedelta(days=3_000), timedelta(days=364)),
    ],
)
def test_strides_are_few_begin_on_round_times_and_hold_the_whole_span(span: timedelta, stride: timedelta) -> None:
    assert pick_stride(AT, AT + span) == stride
    begins = list(list_strides(AT, AT + span, stride))
    assert len(begins) <= MOST_STRIDES + 2
    assert begins[0] <= AT < begins[0] + stride
    assert begins[-1] <= AT + span < begins[-1] + stride
    assert all(later - earlier == stride for earlier, later in pairwise(begins))


def test_hours_begin_on_the_hour_days_at_midnight_and_weeks_on_mondays() -> None:
    assert next(list_strides(AT, AT, timedelta(hours=1))) == AT.replace(minute=0, second=0)
    assert next(list_strides(AT, AT, timedelta(days=1))) == datetime(2026, 11, 30, tzinfo=UTC)
    assert next(list_strides(AT, AT, timedelta(days=7))).weekday() == 0


@pytest.mark.parametrize(
    ("most", "ticks"),
    [
        (0, [0, 1]),
        (1, [0, 1]),
        (7, [0, 2, 4, 6, 8]),
        (10, [0, 2, 4, 6, 8, 10]),
        (1_104, [0, 500, 1_000, 1_500]),
        (2**63, [0, 2 * 10**18, 4 * 10**18, 6 * 10**18, 8 * 10**18, 10**19]),
    ],
)
def test_an_axis_has_a_few_round_ticks_that_reach_the_greatest_value(most: int, ticks: list[int]) -> None:
    assert list(pick_ticks(most)) == ticks
