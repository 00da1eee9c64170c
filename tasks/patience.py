"""Patience with Postgres: while it is away or full, whoever asks it waits and asks again, and says what for.

Whatever is asked through here must be safe to repeat: the answer to a COMMIT may be lost when the server goes. What
comes before anything is sent must also be safe to give up: a lane that drains does not wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from tasks.drains import rest
from tasks.ledger.connection import LedgerFull, PassingFailure

Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")


@dataclass
class Patience:
    """Asks until there is an answer. `trouble` says what keeps it from one, for people; None: nothing does.

    Once `draining` is set it asks one time and no more. Whoever has something to save waits without such an event.
    """

    draining: asyncio.Event = field(default_factory=asyncio.Event)
    trouble: str | None = None

    async def ask(
        self, question: Callable[Asked, Awaitable[Answer]], *arguments: Asked.args, **named: Asked.kwargs
    ) -> Answer:
        """The answer, however long it takes. Raises Draining, and what no patience helps against."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type((PassingFailure, LedgerFull)),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            before_sleep=self._remember_trouble,
            sleep=self._rest,
            reraise=True,
        )
        answer: Answer = await retrying(question, *arguments, **named)
        self.trouble = None
        return answer

    async def _rest(self, seconds: float) -> None:
        await rest(self.draining, seconds)

    def _remember_trouble(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        self.trouble = str(state.outcome.exception())
