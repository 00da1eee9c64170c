"""By when a run is to be done, and whether it must pay peak prices to be: alone responsible for that decision.

Pure: what is left, the pace seen so far, the tariff and the instant, which is the provider's, are passed in. Peak
hours are bought only where the off-peak time left is too short for what is left, and as late as that allows: by then
the pace is better known. A run that began to buy goes on until the off-peak time suffices, lest it stop and start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, time, timedelta

from schemas.off_peak import Open, Shut, Tariff, spell

#: How long a decision holds while peak hours are bought; then there is more to judge by.
LOOK_AGAIN = timedelta(minutes=1)
_DAY = timedelta(days=1)
#: A run that would take longer takes for ever.
_LONGEST_S = 100 * 366 * 86_400


@dataclass(frozen=True, slots=True)
class Pace:
    """Documents that ended while attempts could begin, and for how long that was."""

    documents: int = 0
    worked: timedelta = timedelta(0)

    def seen(self, documents: int, worked: timedelta) -> Pace:
        return Pace(self.documents + documents, self.worked + worked)

    def time_for(self, documents: int) -> timedelta | None:
        """How long so many would take, and a quarter more for what nobody foresees. None: no pace is known."""
        if self.documents <= 0:
            return None
        seconds = -(-documents * 5 * (self.worked // timedelta(seconds=1)) // (4 * self.documents))
        return timedelta(seconds=min(seconds, _LONGEST_S))


def decide(
    tariff: Tariff, guard: timedelta, instant: datetime, by: datetime, needed: timedelta | None, *, is_buying: bool
) -> Open | Shut:
    """Whether an attempt may begin at `instant` in a run that needs `needed` more time, and is to be done `by`.

    Without a pace the run waits where at least half of the time left is off-peak. After `by` it waits no more. Raises
    UnknownPrice as `Tariff.decide` does.
    """
    found = tariff.decide(instant, guard)
    if isinstance(found, Open):
        return found
    cheap = off_peak_between(tariff, guard, found.until, by)
    if _must_buy(max(by - instant, timedelta(0)), cheap, needed, is_buying=is_buying):
        return Open(instant, instant + LOOK_AGAIN)
    return replace(found, because=f"{found.because}, and there is time enough to finish by {spell(by)}")


def _must_buy(left: timedelta, cheap: timedelta, needed: timedelta | None, *, is_buying: bool) -> bool:
    """Whether to work in a peak, with so much time left, off-peak time in it, and time needed."""
    if needed is None:
        return 2 * cheap < left or not left
    short, dear = needed - cheap, left - cheap
    return short > timedelta(0) and (is_buying or dear <= short + LOOK_AGAIN)


def off_peak_between(tariff: Tariff, guard: timedelta, start: datetime, end: datetime) -> timedelta:
    """For how long of [start, end) attempts that end within `guard` may begin at off-peak prices."""
    found, at = timedelta(0), start
    while at < end:
        match tariff.decide(at, guard):
            case Open(until=until):
                stop = end if until is None else min(until, end)
                found += stop - at
                at = stop
            case Shut(until=until):
                at = until
    return found


@dataclass(frozen=True, slots=True)
class FinishBy:
    """An instant, or a time of every day, each with its offset from UTC."""

    instant: datetime | None = None
    clock: time | None = None

    @classmethod
    def parse(cls, written: str) -> FinishBy:
        """From `2026-12-01T08:30+08:00` or `08:30+08:00`; `Z` is UTC. Raises ValueError in words for people."""
        for kind in (datetime, time):
            try:
                found = kind.fromisoformat(written)
            except ValueError:
                continue
            if found.tzinfo is None:
                clock = written if ":" in written else f"{written}T08:00"
                raise ValueError(f"{written!r} has no zone: write {clock}Z for UTC, or {clock}+08:00 for Beijing")
            return cls(instant=found) if isinstance(found, datetime) else cls(clock=found)
        raise ValueError(
            f"{written!r} is not a time: write it like 2026-12-01T08:30+08:00, or 08:30+08:00 for each day"
        )

    def after(self, instant: datetime) -> datetime:
        """The instant that is meant by somebody who asks at `instant`."""
        if self.instant is not None:
            return self.instant
        if self.clock is None:
            raise AssertionError("neither an instant nor a time of day")
        local = instant.astimezone(self.clock.tzinfo)
        due = datetime.combine(local.date(), self.clock)
        return due if due > instant else due + _DAY
