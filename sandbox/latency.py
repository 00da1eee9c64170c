"""How long an emulated model takes: queueing, time to first token, and tokens per second."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from sandbox.tariff import FLASH, PRO

#: Output tokens per second, drawn evenly between the two.
SPEED = {FLASH: (150.0, 300.0), PRO: (60.0, 120.0)}
#: Median seconds to the first token.
FIRST = {FLASH: 0.6, PRO: 1.2}


@dataclass(frozen=True, slots=True)
class Wait:
    """Real seconds in the queue (blank lines flow meanwhile) and at work."""

    queued: float
    working: float


@dataclass(frozen=True, slots=True)
class Pace:
    """What is drawn from. `scale` 0 answers at once; `reply_s` sets the median of a whole reply for benchmarks.

    `slow_share` of the replies take twenty times as long; `queue_s` is the mean wait before work begins.
    """

    scale: float = 1.0
    queue_s: float = 0.0
    reply_s: float | None = None
    slow_share: float = 0.0


class Latency:
    """Seeded draws of waits; the sequence depends on the order of requests, the answers never do."""

    def __init__(self, pace: Pace, seed: int) -> None:
        self.pace = pace
        self._random = random.Random(seed)

    def draw(self, model: str, output_tokens: int) -> Wait:
        pace = self.pace
        if not pace.scale:
            return Wait(0.0, 0.0)
        spread = math.exp(self._random.gauss(0.0, 0.35))
        if pace.reply_s is not None:
            work = pace.reply_s * spread
        else:
            work = FIRST[model] * spread + output_tokens / self._random.uniform(*SPEED[model])
        if self._random.random() < pace.slow_share:
            work *= 20
        queued = self._random.expovariate(1 / pace.queue_s) if pace.queue_s else 0.0
        return Wait(queued * pace.scale, work * pace.scale)
