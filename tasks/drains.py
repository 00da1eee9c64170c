"""Drains: what a lane that leaves does to the waits of what it has not begun: it ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Draining(Exception):
    """The lane begins nothing more; the document stays where it is, for whoever resumes the run."""


async def rest(draining: asyncio.Event, seconds: float) -> None:
    """Wait so long, but not once the lane drains. Raises Draining."""
    with suppress(TimeoutError):
        await asyncio.wait_for(draining.wait(), seconds)
    if draining.is_set():
        raise Draining


async def unless(draining: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to, unless the lane drains first: then it is cancelled, and this raises Draining."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(draining.wait())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Draining
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
