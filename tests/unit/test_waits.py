"""What a reply came to decides how long its retry waits."""

from __future__ import annotations

from datetime import UTC, datetime
from random import Random

import pytest

from schemas.attempts import Reply, Signal
from tasks.waits import Waits

NOW = datetime(2026, 11, 24, tzinfo=UTC)

WINDOWS = {
    Signal.RATE_LIMITED: (1, 4, 60),
    Signal.UNAVAILABLE: (2, 4, 120),
    Signal.NOT_SENT: (2, 4, 120),
    Signal.INTERRUPTED: (2, 4, 120),
    Signal.FAILED: (1, 4, 8),
    Signal.LOST: (1, 4, 8),
    Signal.MALFORMED: (1, 4, 8),
}


def reply(signal: Signal, retry_after_s: float | None = None) -> Reply:
    return Reply(signal, NOW, NOW, retry_after_s=retry_after_s)


class Edge(Random):
    """Draws the low or the high end of everything."""

    def __init__(self, share: float) -> None:
        self.share = share

    def random(self) -> float:
        return self.share


@pytest.mark.parametrize(("signal", "window"), WINDOWS.items())
def test_a_wait_is_drawn_from_a_window_that_doubles_up_to_its_limit(
    signal: Signal, window: tuple[float, float, float]
) -> None:
    least, first, most = window
    low, high = Waits(random=Edge(0.0)), Waits(random=Edge(1.0))
    for retry_no in (1, 2, 3, 10, 5000):
        assert low.seconds(reply(signal), retry_no) == least
        assert high.seconds(reply(signal), retry_no) == min(most, first * 2 ** (min(retry_no, 60) - 1))


@pytest.mark.parametrize("signal", sorted(set(Signal) - set(WINDOWS)))
def test_what_the_providers_state_did_not_cause_waits_for_nothing(signal: Signal) -> None:
    assert Waits(random=Edge(1.0)).seconds(reply(signal, 30.0), 1) == 0.0


@pytest.mark.parametrize(("told", "low", "high"), [(0.0, 0.0, 1.0), (30.0, 30.0, 31.0), (3600.0, 120.0, 120.0)])
def test_a_retry_after_is_honoured_within_bounds(told: float, low: float, high: float) -> None:
    assert Waits(random=Edge(0.0)).seconds(reply(Signal.RATE_LIMITED, told), 9) == low
    assert Waits(random=Edge(1.0)).seconds(reply(Signal.RATE_LIMITED, told), 9) == high


def test_replies_that_failed_together_do_not_return_together() -> None:
    waits = Waits(random=Random(5))
    drawn = [waits.seconds(reply(Signal.UNAVAILABLE), 6) for _ in range(1000)]
    assert len(set(drawn)) == 1000
    assert 55 < sum(drawn) / 1000 < 67  # the middle of 2 to 120


def test_every_wait_follows_the_scale() -> None:
    waited = [
        Waits(scale=scale, random=Edge(1.0)).seconds(reply(Signal.UNAVAILABLE, told), retry_no)
        for scale in (0.0, 0.01, 1.0)
        for told, retry_no in ((None, 3), (9.0, 1))
    ]
    assert waited == pytest.approx([0.0, 0.0, 0.16, 0.1, 16.0, 10.0])
