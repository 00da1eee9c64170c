"""How many attempts may be in flight: an adaptive limit per tier, and the brakes of a whole lane.

The limit starts low, doubles each round trip until the provider objects (slow start), then grows by one a round
trip and falls by a third on objection, at most once a round trip (AIMD; Chiu and Jain, 1989). A ceiling that the
provider states is the whole account's: this lane's share of it is believed at once, and remembered. After a cut
below it one calm round trip leads back to it. After a longer calm while, whatever the limit, the slow start begins
again: an account that is topped up, and a provider that recovered, have their old ceiling within minutes. Where
nothing has changed that asks for as many objections as are sent until the first is back.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from schemas.attempts import Signal

SLOW_START = 16
DECREASE = 0.7
#: What was learned from objections is forgotten after so many round trips without another.
CALM_ROUND_TRIPS = 8
_OBJECTIONS = frozenset({Signal.RATE_LIMITED, Signal.UNAVAILABLE})
_DELIVERED = frozenset({Signal.ANSWERED, Signal.BLANK, Signal.TRUNCATED, Signal.REFUSED})


@dataclass
class Place:
    """One place in flight. It is left once: early with what came back, or at the end of its block without."""

    limiter: Limiter
    ticket: int
    is_left: bool = False

    @property
    def is_surplus(self) -> bool:
        """Whether there are more places than the ceiling allows now: whoever has not sent yet gives theirs back."""
        return self.limiter.in_flight > self.limiter.ceiling

    def leave(self, signal: Signal | None = None, ceiling: int | None = None) -> None:
        """Give the place back; a second time does nothing."""
        if not self.is_left:
            self.is_left = True
            self.limiter.release(self.ticket, signal, ceiling)


@dataclass
class Limiter:
    """The in-flight limit of one tier in one lane. `ceiling` is what the lane may have for now, which may be nothing.

    `lanes` is how many lanes share the account for now, and so the ceiling that the provider `_stated` last.
    """

    ceiling: int
    lanes: int = 1
    in_flight: int = 0
    _limit: float = field(init=False)
    _stated: float = math.inf
    _calm: int = 0
    _is_slow_start: bool = True
    _tickets: int = 0
    _cut_at: int = 0
    _is_open: bool = False
    _queue: deque[asyncio.Future[None]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._limit = float(min(SLOW_START, self.ceiling or SLOW_START))

    @property
    def limit(self) -> int:
        """Attempts that may be in flight now."""
        return min(max(1, int(self._limit)), self.ceiling)

    @property
    def is_wanted(self) -> bool:
        """Whether anybody has a place or waits for one."""
        return bool(self.in_flight or self._queue)

    @property
    def is_barred(self) -> bool:
        """Whether somebody waits and there is not one place."""
        return bool(self._queue) and not self.ceiling

    @property
    def _working_ceiling(self) -> float:
        return max(1.0, min(float(self.ceiling), self._stated / self.lanes))

    def allow(self, ceiling: int, lanes: int) -> None:
        """Another ceiling, and so many lanes, from now on.

        A higher ceiling is climbed to as at the start, unless the provider objects. What is in flight above a lower
        one is finished; only then is a place given again.
        """
        self.ceiling, self.lanes = ceiling, lanes
        if ceiling:
            self._limit = min(self._limit, self._working_ceiling)
        self._admit()

    def open(self) -> None:
        """Let in whoever waits or comes: the lane drains, so nobody is sent any more, and nobody has to wait."""
        self._is_open = True
        self._admit()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        """A place in flight for as long as the block lasts, or until it is left."""
        place = Place(self, await self.acquire())
        try:
            yield place
        finally:
            place.leave()

    async def acquire(self) -> int:
        """Wait for a place; returns a ticket to hand in with `release`. First come, first served."""
        if self._queue or not self._has_room:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # the place was given and is not wanted
                    self.in_flight -= 1
                    self._admit()
                raise
        else:
            self.in_flight += 1
        self._tickets += 1
        return self._tickets

    def release(self, ticket: int, signal: Signal | None = None, ceiling: int | None = None) -> None:
        """Give the place back, with what came of it (None: it was not used)."""
        self.in_flight -= 1
        before = self._limit
        if ceiling is not None:
            self._believe(ceiling)
        if signal in _OBJECTIONS:
            self._calm = 0
            if ticket > self._cut_at:
                self._is_slow_start = False
                self._cut_at = self._tickets  # whoever left before this cut says nothing about it
                if self._limit == before:  # else the stated ceiling was the cut
                    self._limit = max(1.0, self._limit * DECREASE)
        elif signal in _DELIVERED:
            self._grow()
        self._admit()

    def _believe(self, ceiling: int) -> None:
        """Take a ceiling that the provider stated for the account: this lane has its share of it."""
        self._is_slow_start = False
        self._stated = float(ceiling)
        self._limit = min(self._limit, self._working_ceiling)

    def _grow(self) -> None:
        if self.in_flight + 1 < self.limit / 2:
            return  # the limit is not what holds us back, so a success says nothing about it
        self._calm += 1
        if self._calm >= CALM_ROUND_TRIPS * self._limit:
            self._calm, self._stated, self._is_slow_start = 0, math.inf, True
        elif self._limit < self._working_ceiling < self.ceiling and self._calm >= self._limit:
            self._is_slow_start = True  # this lane's share is known: another, which doubted its own, took of it
        step = 1.0 if self._is_slow_start else 1.0 / self._limit
        self._limit = min(self._working_ceiling, self._limit + step)

    @property
    def _has_room(self) -> bool:
        return self._is_open or self.in_flight < self.limit

    def _admit(self) -> None:
        while self._queue and self._has_room:
            turn = self._queue.popleft()
            if not turn.done():
                self.in_flight += 1
                turn.set_result(None)
