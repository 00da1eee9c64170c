"""The gate of a lane that works at off-peak prices: shut while peak hours are on or near, by the provider's clock.

What waits here holds no place in flight, no money and no turn to prime; heartbeats and leases go on without it. While
it is shut one document asks the provider for the time now and then, for nothing else tells a lane that sends nothing
that its clock was put right, or that this machine slept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import structlog

from schemas.errors import ConfigurationError, ProviderStopped
from schemas.off_peak import Open, Shut
from tasks.drains import rest, unless

log = structlog.get_logger("farthing.lanes")

#: How often a lane that waits asks for the time, in the provider's seconds; and in ours, whatever its scale.
LOOK_AGAIN_S, LOOK_AGAIN_LEAST_S = 60.0, 0.1


@dataclass
class Gate:
    """Shut from before each peak window until after it; `shut` says until when and why, None while it is open.

    `decide` raises UnknownPrice where nobody knows the hours, and so does whoever comes to the gate then.
    """

    decide: Callable[[datetime], Open | Shut]
    now: Callable[[], datetime]
    ask_time: Callable[[], Coroutine[Any, Any, None]]
    draining: asyncio.Event
    scale: float = 1.0
    shut: Shut | None = None
    _open: Open | None = None
    _watch: asyncio.Lock = field(default_factory=asyncio.Lock)

    def look(self) -> Shut | None:
        """Why nothing may begin now; None: it may. Costs two comparisons until the next change."""
        now = self.now()
        if self._open is not None and self._open.holds_at(now):
            return None
        found = self.decide(now)
        self._open, self.shut = (found, None) if isinstance(found, Open) else (None, found)
        return self.shut

    async def wait(self) -> bool:
        """Until the gate is open. True for the one document that saw it open, of all that waited. Raises Draining."""
        if self.look() is None:
            return False
        async with self._watch:
            await rest(self.draining, 0)  # each that waited has its turn, though the lane be on its way out
            shut = self.look()
            if shut is None:
                return False
            log.info("waits for off-peak prices", until=shut.until.isoformat())
            while shut is not None:
                await self._rest_until(shut)
                shut = self.look()
            log.info("waits no more")
            return True

    async def _rest_until(self, shut: Shut) -> None:
        left_s = (shut.until - self.now()).total_seconds()
        await rest(self.draining, min(left_s, max(LOOK_AGAIN_S * self.scale, LOOK_AGAIN_LEAST_S)))
        try:
            await unless(self.draining, self.ask_time())
        except (ProviderStopped, ConfigurationError) as error:  # the next attempt finds out; the clock is as it was
            log.warning("the provider does not tell the time", error=str(error))


def always(instant: datetime) -> Open:
    """For a lane that works at any hour."""
    return Open(instant, None)
