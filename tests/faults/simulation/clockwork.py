"""An event loop in virtual time: nothing waits, the clock jumps to the next timer, and every run is the same.

There is no selector, no thread and no real clock in it. Tasks are hashed by their number, because sets of them are
walked through when a group is cancelled, and by address their order would be another one each time.
"""

from __future__ import annotations

import asyncio
from asyncio import base_events
from collections.abc import Coroutine
from itertools import count
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class Livelock(Exception):
    """The loop goes round and round, and nothing comes of it."""


class Deadlock(Exception):
    """Nothing is ready, and no timer will ever make it so."""


class NumberedTask(asyncio.Task[Any]):
    """A task whose place in a set does not depend on where it lies in memory."""

    number = 0

    def __hash__(self) -> int:
        return self.number


class Clockwork(base_events.BaseEventLoop):
    """The loop. `most_turns` is when a simulation counts as a livelock."""

    def __init__(self, most_turns: int = 400_000) -> None:
        super().__init__()
        self.instant = 0.0
        self.turns_left = most_turns
        self._selector = self
        self._tasks = count(1)
        self.set_task_factory(self._number)  # type: ignore[arg-type]  # typeshed wants it generic

    def time(self) -> float:
        return self.instant

    def select(self, timeout: float | None) -> list[Any]:
        """Stand in for a selector: what would be waited for has passed."""
        self.turns_left -= 1
        if self.turns_left < 0:
            raise Livelock(f"still busy at {self.instant:.1f} s")
        if timeout is None:
            raise Deadlock(f"all wait for ever at {self.instant:.1f} s")
        self.instant += timeout
        return []

    def _process_events(self, _events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        pass

    def _number(self, loop: Any, work: Coroutine[Any, Any, Any], **named: Any) -> NumberedTask:
        # A task is hashed while it is being made.
        number = next(self._tasks)
        NumberedTask.number = number
        task = NumberedTask(work, loop=loop, **named)
        task.number = number
        return task


def play(work: Coroutine[Any, Any, Answer]) -> Answer:
    """Run a coroutine to its end in virtual time. Raises Livelock or Deadlock where it has none."""
    with asyncio.Runner(loop_factory=Clockwork) as runner:
        return runner.run(work)
