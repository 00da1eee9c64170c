"""Where a process can be killed on purpose: before and after everything that becomes durable or leaves for the model.

`FARTHING_FAILPOINT=intend.after_commit:3` ends the process, as SIGKILL would, when it reaches that point for the
third time. The fault harness (tests/faults) walks through all of POINTS; nobody else sets it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

VARIABLE = "FARTHING_FAILPOINT"
#: What a shell reports of a process that SIGKILL ended.
KILLED = 137

#: Every transaction that writes: each has a point before its COMMIT and one after it.
STEPS = (
    "open_backfill",
    "open_run",
    "add_labels",
    "register_prices",
    "register_lane",
    "claim",
    "open_grant",
    "close_grants",
    "intend",
    "record",
    "finish",
    "freeze",
    "certify",
    "fail",
    "leave",
    "bury",
    "change_state",
    "change_limits",
    "change_cap",
    "note",
    "close_run",
    "settle",
    "change_backfill",
    "book_closings",
    "close_month",
)
#: An attempt that has its permit; whose reply has begun to come; whose reply is here and recorded nowhere.
ATTEMPT = ("send.before", "send.under_way", "send.after")
POINTS = (*(f"{step}.{side}_commit" for step in STEPS for side in ("before", "after")), *ATTEMPT)


@dataclass
class _Armed:
    """A point, and how many more times it may be reached."""

    point: str
    left: int


def reach(point: str) -> None:
    """Say that this point is reached. Costs a look at None unless a failpoint is set."""
    armed = _armed()
    if armed is None or armed.point != point:
        return
    armed.left -= 1
    if armed.left == 0:
        os._exit(KILLED)


@cache
def _armed() -> _Armed | None:
    """Read once, at the first point that is reached. Raises ValueError where it names no point."""
    said = os.environ.get(VARIABLE)
    if not said:
        return None
    point, _, hit = said.partition(":")
    if point not in POINTS:
        raise ValueError(f"{VARIABLE}: {point} is no failpoint; choose from {', '.join(POINTS)}")
    return _Armed(point, int(hit or 1))
