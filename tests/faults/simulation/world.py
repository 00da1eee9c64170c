"""What everything in one simulation shares: its plan, its chance, its clock, and the model of the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random

from tests.faults.simulation.model import Model
from tests.faults.simulation.plan import Plan


@dataclass
class World:
    """What everything in one simulation shares. `problems` are what the simulation itself saw go wrong."""

    plan: Plan
    chance: Random
    model: Model
    clock: Callable[[], float]
    is_calm: bool = False
    problems: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    #: In a storm, until this instant, the provider refuses nearly everything.
    storm_until: float = 0.0

    def now(self) -> datetime:
        return self.plan.begins_at + timedelta(seconds=self.clock())

    def happens(self, share: float, what: str) -> bool:
        """Whether this fault strikes now."""
        if self.is_calm or self.chance.random() >= share:
            return False
        self.faults[what] += 1
        return True
