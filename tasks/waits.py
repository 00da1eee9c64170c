"""How long an attempt waits before it is made again, by what the last one came to.

Windows grow exponentially and are drawn from in full ("full jitter"), so that a thousand attempts that failed
together do not come back together. A wait is not a permission: whether to retry, and whether the run's retry
budget allows it, is decided elsewhere.
"""

from __future__ import annotations

from random import Random, SystemRandom

from tenacity import AsyncRetrying, RetryCallState
from tenacity.wait import wait_exponential

from schemas.attempts import Reply, Signal

#: A Retry-After beyond this is not waited out: by then the breaker or the run's pause has better ideas.
RETRY_AFTER_LIMIT_S = 120.0


class FullJitter(wait_exponential):
    """tenacity's random exponential wait, drawn from a generator that is handed in."""

    def __init__(self, *, first: float, least: float, most: float, random: Random) -> None:
        super().__init__(multiplier=first, min=least, max=most)
        self._random = random

    def __call__(self, retry_state: RetryCallState) -> float:
        return self._random.uniform(self.min, super().__call__(retry_state))


class Waits:
    """The waits of one lane, by what the last attempt came to.

    `scale` stretches or shrinks every wait, Retry-After included, so that they follow a sandbox's clock; at 0
    nothing waits.
    """

    def __init__(self, *, scale: float = 1.0, random: Random | None = None) -> None:
        self._scale = scale
        self._random = random or SystemRandom()
        busy = FullJitter(first=4, least=1, most=60, random=self._random)
        down = FullJitter(first=4, least=2, most=120, random=self._random)
        lost = FullJitter(first=4, least=1, most=8, random=self._random)
        self._windows: dict[Signal, FullJitter] = {
            Signal.RATE_LIMITED: busy,
            Signal.UNAVAILABLE: down,
            Signal.NOT_SENT: down,
            Signal.INTERRUPTED: down,
            Signal.FAILED: lost,
            Signal.LOST: lost,
            Signal.MALFORMED: lost,
        }

    def seconds(self, reply: Reply, retry_no: int) -> float:
        """Seconds to wait before retry `retry_no` (1 is the first). 0 for what the provider's state did not cause."""
        window = self._windows.get(reply.signal)
        if window is None:
            return 0.0
        if reply.retry_after_s is not None:
            told = reply.retry_after_s + self._random.random()  # many are told the same second
            return self._scale * min(told, RETRY_AFTER_LIMIT_S)
        state = RetryCallState(AsyncRetrying(), None, (), {})
        state.attempt_number = retry_no
        return self._scale * window(state)
