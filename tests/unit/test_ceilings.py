"""Ceilings: an operator's words for them, and each lane's share, which together are the ceiling."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from random import Random

import pytest

from schemas.ceilings import MOST_IN_FLIGHT, let_go, parse_limits, share, spell_ceilings, take

LADDER = ("flash", "pro")


@pytest.mark.parametrize("ceiling", [3, 4, 5, 16, 5000])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_the_shares_of_all_lanes_are_the_ceiling_and_differ_by_one_at_most(ceiling: int, lanes: int) -> None:
    shares = [share(ceiling, lanes, rank) for rank in range(lanes)]
    assert sum(shares) == ceiling
    assert max(shares) - min(shares) <= 1


def test_where_there_are_more_lanes_than_places_each_has_its_turn() -> None:
    """A lane without would keep its shards for ever, and nobody could end the run."""
    turns = [[share(2, 5, rank, turn) for rank in range(5)] for turn in range(7, 12)]
    assert [sum(shares) for shares in turns] == [2] * 5
    assert [sum(of_lane) for of_lane in zip(*turns, strict=True)] == [2] * 5


@dataclass
class Player:
    """A lane that begins and ends requests by chance. `held` is what it knows, `row` what the ledger has of it."""

    held: dict[str, int] = field(default_factory=lambda: {"flash": 0})
    row: dict[str, int] = field(default_factory=dict)
    share: int = 0
    in_flight: int = 0

    @property
    def allowed(self) -> int:
        return min(self.share, self.held["flash"])


@pytest.mark.parametrize("seed", range(50))
def test_whatever_lanes_come_go_and_hear_when_never_more_are_in_flight_than_the_ceiling(seed: int) -> None:
    """Each step is one lane's: any order, any share, however wrong, and the answer to any write may be lost."""
    chance = Random(seed)
    ceiling, lanes, sent = chance.randint(1, 9), [Player() for _ in range(3)], 0
    for _ in range(500):
        lane = chance.choice(lanes)
        others = [other.row for other in lanes if other is not lane]
        match chance.choice(["send", "send", "send", "reply", "hear", "beat", "hold", "hold unheard", "leave"]):
            case "send" if lane.in_flight < lane.allowed:
                lane.in_flight, sent = lane.in_flight + 1, sent + 1
            case "reply" if lane.in_flight:
                lane.in_flight -= 1
            case "hear":
                lane.share = chance.randint(0, 12)
            case "beat":
                lane.held = let_go(lane.held, {"flash": lane.allowed}, {"flash": lane.in_flight})
                lane.row = dict(lane.held)
            case "hold":
                lane.held = take({"flash": lane.share}, lane.held, others, {"flash": ceiling})
                lane.row = dict(lane.held)
            case "hold unheard":
                lane.row = take({"flash": lane.share}, lane.held, others, {"flash": ceiling})
            case "leave" if not lane.in_flight:
                lanes[lanes.index(lane)] = Player()
        assert sum(each.in_flight for each in lanes) <= ceiling
    assert sent > 3


def test_who_lets_go_makes_room_for_who_comes_and_both_get_their_share() -> None:
    first = let_go({"flash": 8}, {"flash": 4}, {"flash": 7})
    assert first == {"flash": 7}
    assert take({"flash": 4}, {"flash": 0}, [first], {"flash": 8}) == {"flash": 1}
    first = let_go(first, {"flash": 4}, {"flash": 3})
    assert take({"flash": 4}, {"flash": 1}, [first], {"flash": 8}) == {"flash": 4} == first


def test_a_lowered_ceiling_takes_nothing_away_that_is_in_flight() -> None:
    assert take({"flash": 1}, {"flash": 5}, [], {"flash": 2}) == {"flash": 5}


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
