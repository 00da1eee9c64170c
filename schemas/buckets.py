"""Buckets: the fixed steps that millions of rows are counted into, so that a chart of any run has a few dozen bars.

Costs are sorted into ten buckets a decade (the preferred numbers of ISO 3, rounded), instants into strides of a clock
or a calendar, and confidences into forty equal parts. Edges are exact; a value that equals one is above it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

#: The beginnings of the buckets of one decade, in hundredths.
_DECADE = (100, 125, 160, 200, 250, 315, 400, 500, 630, 800)
#: In pico units: below the first edge a cost is nothing, above the last some ten thousand dollars.
COST_EDGES = (1, *(10**power * each for power in range(1, 14) for each in _DECADE), 10**16)

#: How many parts confidence has, from 0 to 1: so that usual thresholds, like 0.85, are edges.
CONFIDENCES = 40

#: A chart over time has at most so many bars, and one or two more where it begins and ends within a stride.
MOST_STRIDES = 90
#: Each is a multiple of the one before it, so that what is stored by a short one can be shown by a longer one.
#: Postgres has the same (migration 0015).
_STRIDES = (
    *(timedelta(seconds=each) for each in (1, 5, 15, 30)),
    *(timedelta(minutes=each) for each in (1, 5, 15, 30)),
    *(timedelta(hours=each) for each in (1, 3, 6, 12)),
    *(timedelta(days=each) for each in (1, 7, 28, 364)),
)
#: A Monday, from which strides are counted: hours begin on the hour, days at midnight UTC, weeks on Mondays.
ORIGIN = datetime(2001, 1, 1, tzinfo=UTC)


def pick_stride(first: datetime, last: datetime) -> timedelta:
    """The shortest stride that is not too many from `first` to `last`; the longest where all are."""
    return next((each for each in _STRIDES if (last - first) <= each * MOST_STRIDES), _STRIDES[-1])


def list_strides(first: datetime, last: datetime, stride: timedelta) -> Iterator[datetime]:
    """The beginnings of all strides from the one that `first` is in to the one that `last` is in."""
    begins = ORIGIN + (first - ORIGIN) // stride * stride
    while begins <= last:
        yield begins
        begins += stride


def pick_ticks(most: int, at_most: int = 5) -> Sequence[int]:
    """Round numbers from 0 for an axis, evenly apart by 1, 2 or 5 times a power of ten; the last reaches `most`."""
    step = next(
        step
        for power in range(len(str(most)) + 1)
        for step in (10**power, 2 * 10**power, 5 * 10**power)
        if step * at_most >= most
    )
    return range(0, max(-(-most // step), 1) * step + 1, step)
