"""The ledger as a witness: how the lanes of a run stand there, for whoever started them elsewhere and looks on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import structlog

from schemas.attempts import RunId
from schemas.errors import LedgerUnavailable
from schemas.fleets import Kept
from tasks.lanes import ADVICE, Ended
from tasks.ledger import leases, runs
from tasks.ledger.connection import Ledger

log = structlog.get_logger("farthing.witness")


@dataclass
class Witness:
    """The lanes of one run by what they are shown as, as the ledger had them at the last look that it answered."""

    ledger: Ledger
    run_id: RunId
    kept: dict[str, Kept] = field(default_factory=dict)
    #: Whether there is nothing to do for a lane that has yet to begin: all is done, or the run is paused.
    is_run_over: bool = False
    _state: str = "running"
    _judges_from_s: float = 0.0

    async def look(self) -> None:
        """Bury who died, as lanes do for one another: there may be none left. After an outage they may come back."""
        try:
            if time.monotonic() > self._judges_from_s:
                await leases.bury_dead(self.ledger, self.run_id)
            self.kept = await leases.find_shown(self.ledger, self.run_id)
            self._state = (await runs.find_run(self.ledger, self.run_id)).state
            is_running = self._state == "running"
            self.is_run_over = not is_running or await leases.has_ended(self.ledger, self.run_id)
        except LedgerUnavailable as error:
            log.warning("no look at the lanes", run=self.run_id, error=str(error))
            self._judges_from_s = time.monotonic() + leases.GRACE_S

    def of(self, shown_as: object) -> Kept:
        """How the lane stands that is shown as this."""
        return self.kept.get(str(shown_as), Kept.ABSENT)

    @property
    def unneeded(self) -> Ended:
        """How a lane ended that never began, since the run is over."""
        return Ended("done") if self._state == "running" else Ended(self._state, ADVICE.get(self._state, ""))
