"""A fleet's lanes as two witnesses have them, and what follows: Prefect, which starts and shows, and the ledger.

Prefect does not learn that a machine is gone: it shows the lane at work for ever. The ledger does, by its heartbeat.
The ledger does not know of a lane that nobody has taken yet; Prefect does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

#: How long Prefect may show a lane at work of which the ledger has not heard yet, or any more, in seconds.
SILENT_S = 120.0


class Shown(StrEnum):
    """How far a lane is, by Prefect or a cluster: nobody has begun it, somebody has, or it is over."""

    WAITING = "waiting"
    WORKING = "working"
    OVER = "over"


class Kept(StrEnum):
    """How a lane stands in the ledger: not there yet, alive, gone in good order, or buried by others."""

    ABSENT = "absent"
    ALIVE = "alive"
    LEFT = "left"
    DIED = "died"


@dataclass
class Absence:
    """For how long nobody has been at work, of all lanes that are waited for together: at most `within_s` seconds."""

    within_s: float
    _since_s: float | None = None

    def begin(self) -> None:
        """Somebody else is waited for now: what was before, with nobody to look on, is no absence."""
        self._since_s = None

    def is_over(self, now_s: float, *, is_at_work: bool) -> bool:
        """Whether that is too long. Who looks on says whether a lane is at work now."""
        if is_at_work or self._since_s is None:
            self._since_s = now_s
        return now_s - self._since_s > self.within_s


@dataclass(frozen=True, slots=True)
class LaneSeen:
    """One lane; `silent_s` is for how many seconds it has been shown at work without being alive in the ledger."""

    number: int
    shown: Shown
    kept: Kept
    silent_s: float = 0.0

    @property
    def is_lost(self) -> bool:
        """Whether its machine is gone, so that Prefect has to be told."""
        if self.shown is not Shown.WORKING or self.kept is Kept.ALIVE:
            return False
        return self.kept is Kept.DIED or self.silent_s > SILENT_S


@dataclass(frozen=True, slots=True)
class FleetSeen:
    """All lanes, and whether the run has nothing to do for one that has yet to begin: it is over, or paused."""

    lanes: Sequence[LaneSeen]
    is_run_over: bool

    @property
    def lost(self) -> list[int]:
        return [lane.number for lane in self.lanes if lane.is_lost]

    @property
    def waiting(self) -> list[int]:
        return [lane.number for lane in self.lanes if lane.shown is Shown.WAITING]

    @property
    def is_at_work(self) -> bool:
        """Whether a lane works, or is on its way from a worker to the ledger."""
        return any(lane.shown is Shown.WORKING for lane in self.lanes)

    @property
    def late(self) -> list[int]:
        """Those whom nobody needs any more."""
        return self.waiting if self.is_run_over else []

    @property
    def is_waited_for(self) -> bool:
        """Whether a worker may yet come for what is left to do."""
        return bool(self.waiting) and not self.is_run_over
