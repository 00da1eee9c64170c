"""Ceilings: an operator's words for them, and each lane's share, which together are the ceiling."""

from __future__ import annotations

import re

import pytest

from schemas.ceilings import MOST_IN_FLIGHT, parse_limits, share, spell_ceilings

LADDER = ("flash", "pro")


@pytest.mark.parametrize("ceiling", [3, 4, 5, 16, 5000])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_the_shares_of_all_lanes_are_the_ceiling_and_differ_by_one_at_most(ceiling: int, lanes: int) -> None:
    shares = [share(ceiling, lanes, rank) for rank in range(lanes)]
    assert sum(shares) == ceiling
    assert max(shares) - min(shares) <= 1


def test_a_lane_that_does_not_know_its_rank_takes_what_everyone_may() -> None:
    assert share(8, 3) == min(share(8, 3, rank) for rank in range(3))


def test_no_lane_is_left_without_a_place() -> None:
    """It would keep its shards for ever, and nobody could end the run."""
    assert [share(2, 5, rank) for rank in range(5)] == [1] * 5


@pytest.mark.parametrize(
    ("given", "means"),
    [
        (["16"], {"flash": 16, "pro": 16}),
        (["1"], {"flash": 1, "pro": 1}),
        ([f"{MOST_IN_FLIGHT}"], {"flash": MOST_IN_FLIGHT, "pro": MOST_IN_FLIGHT}),
        (["pro=4"], {"pro": 4}),
        (["pro=4", "flash=64"], {"flash": 64, "pro": 4}),
    ],
)
def test_one_number_is_for_every_tier_and_a_named_tier_is_for_that_one(
    given: list[str], means: dict[str, int]
) -> None:
    assert parse_limits(given, LADDER) == means


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (["0"], "too few; write 1 to 5000"),
        (["5001"], "too many; write 1 to 5000"),
        (["-1"], "write 1 to 5000"),
        (["1.5"], "write 1 to 5000"),
        (["٣"], "write 1 to 5000"),
        (["9" * 5000], "write 1 to 5000"),
        (["flash="], "write 1 to 5000"),
        (["many"], "write 1 to 5000"),
        (["16", "4"], "or flash=16"),
        (["flash=16", "4"], "or flash=4"),
        (["flsh=4"], "'flsh' is not in the run's ladder, which is flash, pro"),
        (["pro=4", "pro=5"], "pro is given twice"),
    ],
)
def test_what_is_no_limit_is_refused_with_what_to_write(given: list[str], advice: str) -> None:
    with pytest.raises(ValueError, match=re.escape(advice)) as caught:
        parse_limits(given, LADDER)
    assert len(str(caught.value)) < 120


def test_ceilings_are_spelled_tier_by_tier() -> None:
    assert spell_ceilings({"flash": 64, "pro": 8}) == "64 flash, 8 pro"
