"""Patience with Postgres: while it is away or full, whoever asks it waits and asks again, and says what for.

Whatever is asked through here must be safe to repeat: the answer to a COMMIT may be lost when the server goes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from tasks.ledger.connection import LedgerFull, PassingFailure

Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")


@dataclass
class Patience:
    """Asks until there is an answer. `trouble` says what keeps it from one, for people; None: nothing does."""

    trouble: str | None = None

    async def ask(
        self, question: Callable[Asked, Awaitable[Answer]], *arguments: Asked.args, **named: Asked.kwargs
    ) -> Answer:
        """The answer, however long it takes. Raises what no patience helps against."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type((PassingFailure, LedgerFull)),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            before_sleep=self._remember_trouble,
            reraise=True,
        )
        answer: Answer = await retrying(question, *arguments, **named)
        self.trouble = None
        return answer

    def _remember_trouble(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        self.trouble = str(state.outcome.exception())
