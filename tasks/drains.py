"""Drains: what a lane that leaves does to the waits of what it has not begun: it ends them."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class Draining(Exception):
    """The lane begins nothing more; the document stays where it is, for whoever resumes the run."""


async def rest(draining: asyncio.Event, seconds: float) -> None:
    """Wait so long, but not once the lane drains. Raises Draining."""
    with suppress(TimeoutError):
        await asyncio.wait_for(draining.wait(), seconds)
    if draining.is_set():
        raise Draining
