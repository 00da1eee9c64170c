"""When DeepSeek's peak hours are. Nothing else here knows a clock, a weekend or a Chinese holiday.

The rule is on the provider's pricing page: "Monday through Friday, excluding Chinese public holidays". Weekends and
holidays were exempted later than the hours began, so each exemption has a date of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache

import chinese_calendar

from schemas.errors import UnknownPrice

_MIDNIGHT = time(tzinfo=UTC)
_DAY = timedelta(days=1)


@lru_cache(maxsize=4096)
def _is_day_off(day: date) -> bool:
    """Whether China is off work that day, weekends included. Raises UnknownPrice for a year not published yet."""
    try:
        return not chinese_calendar.is_workday(day)
    except NotImplementedError:
        raise UnknownPrice(
            f"peak hours are not known for {day}: the installed chinesecalendar has no Chinese public holidays of "
            f"{day.year}; update it with `pip install --upgrade chinesecalendar` (a year appears in the November "
            "before it), or write the year's days off into a price file of your own (README: Prices)"
        ) from None


@dataclass(frozen=True, slots=True)
class PeakHours:
    """A provider's peak hours. Windows are [start, end) in UTC; exemptions start on calendar days of `utc_offset`.

    `days_off` are the public holidays of the years that somebody wrote down; chinesecalendar knows the others.
    """

    since: datetime
    windows: tuple[tuple[time, time], ...]
    utc_offset: timedelta
    weekends_exempt_from: date
    holidays_exempt_from: date
    days_off: Mapping[int, frozenset[date]] = field(default_factory=dict)

    def is_peak(self, utc: datetime) -> bool:
        """Whether `utc` is inside a peak window.

        Raises UnknownPrice on every day whose holidays are not published, even on its evenings and weekends: a run
        that starts then would only be stopped at the next window.
        """
        if utc < self.since or not self._is_peak_day((utc + self.utc_offset).date()):
            return False
        clock = utc.time()
        return any(start <= clock < end for start, end in self.windows)

    def next_change(self, utc: datetime) -> datetime:
        """The first instant after `utc` at which peak begins or ends, or at which that is no longer known."""
        now = self.is_peak(utc)
        for edge in self._edges_after(utc):
            try:
                if self.is_peak(edge) != now:
                    return edge
            except UnknownPrice:
                return edge
        raise AssertionError("edges never end")

    def kinds_between(self, start: datetime, end: datetime) -> frozenset[bool]:
        """Which of peak (True) and off-peak (False) occur in [start, end]. Raises UnknownPrice as `is_peak` does."""
        seen = {self.is_peak(start), self.is_peak(end)}
        for edge in self._edges_after(start):
            if len(seen) == 2 or edge >= end:
                break
            seen.add(self.is_peak(edge))
        return frozenset(seen)

    def _is_peak_day(self, day: date) -> bool:
        if day >= self.holidays_exempt_from and self._is_holiday(day):
            return False
        return day.weekday() < 5 or day < self.weekends_exempt_from

    def _is_holiday(self, day: date) -> bool:
        written = self.days_off.get(day.year)
        return _is_day_off(day) if written is None else day in written

    def _edges_after(self, utc: datetime) -> Iterator[datetime]:
        """Every instant after `utc` at which peak may begin or end, in order: window edges and local midnights."""
        offsets = sorted(
            {_since_midnight(edge) for window in self.windows for edge in window} | {self._local_midnight}
        )
        midnight = datetime.combine(utc.date(), _MIDNIGHT)
        while True:
            yield from (edge for offset in offsets if (edge := midnight + offset) > utc)
            midnight += _DAY

    @property
    def _local_midnight(self) -> timedelta:
        return -self.utc_offset % _DAY


def _since_midnight(clock: time) -> timedelta:
    return timedelta(hours=clock.hour, minutes=clock.minute, seconds=clock.second)
