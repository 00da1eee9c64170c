"""Watching a lane's replies for what an operator must hear of: a primed or lost cache, a model that changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from uuid import uuid4

import structlog

from schemas.attempts import Reply
from schemas.errors import FarthingError
from schemas.jobs import Job
from schemas.money import Money
from schemas.pricing import PriceBook
from tasks.ledger import runs
from tasks.ledger.connection import Ledger
from tasks.ledger.runs import Run
from tasks.patience import Patience
from tasks.priming import UNIT_TOKENS, Primer

log = structlog.get_logger("farthing.watch")

#: Below this share of the expected hit tokens, over so many replies, the cache counts as lost.
LOST_RATE, SAMPLE = 0.8, 100
#: Events of one kind that a lane tells per tier. What comes after them is summed up when the lane leaves.
MOST_EVENTS = 20

#: Model and fingerprint, as a reply names them.
ServedBy = tuple[str, str | None]


@dataclass
class _Tally:
    """What a tier's replies showed: hit tokens against the prefix in the current sample, and who served them."""

    replies: int = 0
    hit: int = 0
    prefix_tokens: int = 0
    served_by: ServedBy | None = None
    #: Whoever served before: told of, and so not again.
    known: set[ServedBy] = field(default_factory=set)
    #: Replies by others, which came after the last event.
    by_others: int = 0
    losses_told: int = 0
    #: Replies and money of bad samples that were not told of yet.
    lost_replies: int = 0
    lost_pico: int = 0


@dataclass
class Watch:
    """The watch of one lane. What it sees becomes a log line and an event of the run.

    `close_s` is how many seconds a lane that leaves waits for events that are not in the ledger yet.
    """

    ledger: Ledger
    job: Job
    run: Run
    book: PriceBook
    now: Callable[[], datetime]
    close_s: float = 5.0
    _patience: Patience = field(default_factory=Patience)
    _tallies: dict[str, _Tally] = field(default_factory=dict)
    _telling: set[asyncio.Task[None]] = field(default_factory=set)

    def see(self, tier: str, reply: Reply, primer: Primer, *, is_priming: bool) -> None:
        """Take one reply into account; synchronous, since it is on every document's way."""
        tally = self._tallies.setdefault(tier, _Tally())
        self._see_model(tier, tally, reply)
        if is_priming:
            self._see_priming(tier, tally, reply, primer)
            return
        if reply.usage is None:
            return
        tally.replies += 1
        tally.hit += min(reply.usage.hit, tally.prefix_tokens)
        if tally.replies >= SAMPLE:
            self._judge_sample(tier, tally)

    async def close(self) -> None:
        """Wait until everything seen is in the ledger, but not for long: the log has it, and says what is missing."""
        for tier, tally in self._tallies.items():
            self._tell_rest(tier, tally)
        if self._telling:
            _, untold = await asyncio.wait(self._telling, timeout=self.close_s)
            for telling in untold:
                telling.cancel()
            await asyncio.gather(*untold, return_exceptions=True)

    def _see_model(self, tier: str, tally: _Tally, reply: Reply) -> None:
        if reply.served_model is None:
            return
        served_by = (reply.served_model, reply.fingerprint)
        if served_by not in tally.known:
            if len(tally.known) > MOST_EVENTS:
                tally.by_others += 1
            else:
                self._tell_served(tier, reply.served_model, {model for model, _ in tally.known})
                tally.known.add(served_by)
                if tally.served_by is not None:
                    self._tell("served_model_changed", {"tier": tier, "from": tally.served_by, "to": served_by})
        tally.served_by = served_by

    def _tell_served(self, tier: str, model: str, known: set[str]) -> None:
        """Tell a backfill, whose runs each have lanes of their own, who serves: once for each run, tier and model."""
        if self.run.backfill_id is not None and model not in known:
            self._tell("served_model", {"tier": tier, "model": model}, key=f"served_model {tier} {model}")

    def _see_priming(self, tier: str, tally: _Tally, reply: Reply, primer: Primer) -> None:
        """Tell how priming ended. What a cache that never hit is expected to hit is the least the prefix can be."""
        if primer.is_warm:
            hit = 0 if reply.usage is None else reply.usage.hit // UNIT_TOKENS * UNIT_TOKENS
            tally.prefix_tokens = max(hit, primer.least)
            kind = "cache_cold" if primer.is_cold else "primed"
            detail = {"tier": tier, "attempts": primer.attempts, "prefix_tokens": tally.prefix_tokens}
            self._tell(kind, detail | {"served_model": reply.served_model})  # by which a later lane's is compared

    def _judge_sample(self, tier: str, tally: _Tally) -> None:
        expected = tally.replies * tally.prefix_tokens
        if tally.hit < LOST_RATE * expected:
            price = self.book.at(self.job.tier(tier).model, self.run.currency, self.now())
            tally.lost_pico += (expected - tally.hit) * (price.miss_pico - price.hit_pico)
            tally.lost_replies += tally.replies
            if tally.losses_told < MOST_EVENTS:
                tally.losses_told += 1
                self._tell_loss(tier, tally)
        tally.replies = tally.hit = 0

    def _tell_loss(self, tier: str, tally: _Tally) -> None:
        lost = Money(tally.lost_pico, self.run.currency)
        detail = {"tier": tier, "replies": tally.lost_replies, "lost_pico": lost.pico, "lost": str(lost)}
        self._tell("cache_lost", detail)
        tally.lost_replies = tally.lost_pico = 0

    def _tell_rest(self, tier: str, tally: _Tally) -> None:
        """Sum up what came after the last event of its kind."""
        if tally.lost_replies:
            self._tell_loss(tier, tally)
        if tally.by_others:
            self._tell("served_model_changed", {"tier": tier, "replies_by_others": tally.by_others})
            tally.by_others = 0

    def _tell(self, kind: str, detail: dict[str, object], key: str | None = None) -> None:
        level = log.info if kind in ("primed", "served_model") else log.warning
        level(kind.replace("_", " "), run=self.run.run_id, **detail)
        event = (self.ledger, self.run.run_id, kind, detail)
        told = self._patience.ask(runs.note, *event, key=key or str(uuid4()))  # one key, however often it is asked
        telling = asyncio.get_running_loop().create_task(told)
        self._telling.add(telling)
        telling.add_done_callback(partial(self._end_telling, kind))

    def _end_telling(self, kind: str, telling: asyncio.Task[None]) -> None:
        self._telling.discard(telling)
        error = None if telling.cancelled() else telling.exception()
        if telling.cancelled() or error is not None:
            why = self._patience.trouble if error is None else _explain(error)
            log.error("event is not in the ledger", run=self.run.run_id, kind=kind, why=why)


def _explain(error: BaseException) -> str:
    """Our errors are safe to show (G15); of others, only the kind."""
    return str(error) if isinstance(error, FarthingError) else type(error).__name__
