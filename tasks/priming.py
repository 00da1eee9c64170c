"""Priming: at each tier, real documents go one after the other until the shared prefix comes from the cache.

Two misses are normal: the first request stores its whole prompt, the second lets the provider find the common
prefix and store that, the third hits it (design: deepseek.md, "Prompt cache"). Building takes seconds. Sent all at
once, every request would pay the prefix in full.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from schemas.attempts import NOT_BILLED, UNKNOWN_BILLING, Reply

#: How a lane that primes a tier says so, before the tier's name.
PRIMING = "priming the prompt cache of"
#: Give up after so many: a cache that does not hit by then costs more to wait for than to go without.
MOST_ATTEMPTS = 8
#: After these the prompt may never have reached a model, so they say nothing about its cache.
_SAYS_NOTHING = NOT_BILLED | UNKNOWN_BILLING
#: The provider reports hits in multiples of this many tokens; a shorter prefix cannot hit.
UNIT_TOKENS = 128
#: English has 4.65 bytes per token; prose with more than this does not occur, so it bounds a prefix from below.
BYTES_PER_TOKEN_AT_MOST = 8


#: Waits so many seconds, or raises because the lane drains.
Rest = Callable[[float], Awaitable[object]]


@dataclass
class Primer:
    """The gate of one tier in one lane. `is_warm` once the prefix hit, or was given up on (`is_cold`).

    `attempts` counts those that were tried on the cache. While there are only others, documents still go one after
    the other; that this does not last is for the breaker (`schemas.brakes`) to see to.
    """

    prefix_bytes: int
    build_s: float
    is_warm: bool = False
    is_cold: bool = False
    attempts: int = 0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.is_warm = self.is_warm or self._is_too_short

    def cool(self) -> None:
        """After hours in which nothing was sent the provider may have dropped the prefix: prime it again."""
        self.is_warm, self.is_cold, self.attempts = self._is_too_short, False, 0

    @property
    def _is_too_short(self) -> bool:
        return self.prefix_bytes < UNIT_TOKENS * BYTES_PER_TOKEN_AT_MOST

    @property
    def least(self) -> int:
        """The fewest tokens that the whole prefix can come to, as the provider would report a hit of it."""
        return self.prefix_bytes // BYTES_PER_TOKEN_AT_MOST // UNIT_TOKENS * UNIT_TOKENS

    @property
    def is_priming(self) -> bool:
        """Whether a document is on its way to warm the tier, and the others wait for it."""
        return not self.is_warm and self._turn.locked()

    @asynccontextmanager
    async def turn(self, rest: Rest = asyncio.sleep) -> AsyncIterator[bool]:
        """Wait until the tier is warm, or for one's turn to prime it; yields whether this attempt primes."""
        if self.is_warm:
            yield False
            return
        async with self._turn:
            if not self.is_warm and self.attempts >= 2:
                await rest(self.build_s)  # a lane that drains does not: hundreds wait here, one after the other
            is_priming = not self.is_warm
            if is_priming:
                yield True
        if not is_priming:
            yield False

    def see(self, reply: Reply) -> None:
        """Take the reply to a priming attempt into account."""
        if reply.usage is None and reply.signal in _SAYS_NOTHING:
            return
        self.attempts += 1
        self.is_warm = reply.usage is not None and reply.usage.hit >= self.least
        if not self.is_warm and self.attempts >= MOST_ATTEMPTS:
            self.is_warm = self.is_cold = True
