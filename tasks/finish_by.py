"""The pace of a run that is to be done by an instant, as a lane sees it, and what the lane's gate makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog

from schemas.finish_by import Pace, decide
from schemas.off_peak import Open, Shut, Tariff

log = structlog.get_logger("farthing.lanes")


@dataclass
class Haste:
    """Decides for a gate whether to wait for off-peak prices, given that the run is to be done `by` an instant.

    `count_left` says how many documents of the run have not ended, whichever lane works on them.
    """

    tariff: Tariff
    guard: timedelta
    by: datetime
    now: Callable[[], datetime]
    count_left: Callable[[], Awaitable[int]]
    #: Tells whoever reads the run's events that peak hours are bought from now on, with so many documents left.
    tell: Callable[[int | None], Awaitable[None]]
    pace: Pace = field(default_factory=Pace)
    left: int | None = None
    is_buying: bool = False

    def decide(self, instant: datetime) -> Open | Shut:
        """For `Gate.decide`. Raises UnknownPrice."""
        needed = None if self.left is None else self.pace.time_for(self.left)
        found = decide(self.tariff, self.guard, instant, self.by, needed, is_buying=self.is_buying)
        is_buying = isinstance(found, Open) and not isinstance(self.tariff.decide(instant, self.guard), Open)
        if is_buying and not self.is_buying:
            log.info("buys peak hours to be done in time", by=self.by.isoformat(), documents_left=self.left)
        self.is_buying = is_buying
        return found

    async def watch(self, every_s: float, is_open: Callable[[], bool]) -> None:
        """See how fast the run is while its gate is open; never returns. Raises Draining as `count_left` does."""
        seen: tuple[datetime, int] | None = None
        was_buying = False
        while True:
            self.left, at = await self.count_left(), self.now()
            if seen is not None and is_open() and at > seen[0]:
                self.pace = self.pace.seen(seen[1] - self.left, at - seen[0])
            seen = (at, self.left) if is_open() else None
            if self.is_buying and not was_buying:
                await self.tell(self.left)
            was_buying = self.is_buying
            await asyncio.sleep(every_s)
