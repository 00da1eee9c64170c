"""What Prefect's automations hear of a run: alone responsible for telling Prefect of its events, each once.

Its source is the ledger, so that what another lane or terminal did is told, too, and what an earlier process told is
not told again. Prefect only shows: if its server is away, the run goes on and the log says what nobody heard.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import structlog
from prefect.client.orchestration import get_client
from prefect.events import emit_event

from schemas.announcements import (
    BEGINNINGS,
    KINDS,
    TOO_MANY_DEAD_LETTERS,
    Announcement,
    RunEvent,
    announcements,
    exceeds,
)
from schemas.attempts import RunId
from schemas.errors import LedgerUnavailable
from schemas.money import Currency, Money
from schemas.settings import Settings
from tasks.enrichment import lane_ledger
from tasks.ledger import backfills, runs, spend
from tasks.ledger.connection import Ledger
from tasks.ledger.leases import USUAL_TIMES
from tasks.ledger.runs import Run
from tasks.ledger.spend import Progress

log = structlog.get_logger("farthing.announcements")

EVERY_S = 5.0
#: A run that has ended does not hang on what is told of it.
LAST_LOOK_S = 10.0
#: How long Prefect's server may take to say that it is there.
HEALTH_S = 5.0


#: Names the runs that are told of, each with the event after which it is; None: after its last beginning.
Find = Callable[[Ledger], Awaitable[Mapping[RunId, int | None]]]
#: Takes events as `prefect_event` makes them; False: it could not.
Tell = Callable[[Sequence[dict[str, Any]]], Awaitable[bool]]


@asynccontextmanager
async def announced(run: Run, settings: Settings) -> AsyncIterator[None]:
    """Tell Prefect what happens to the run while the block lasts, and how it ended. Call it inside a flow."""

    async def find(_: Ledger) -> Mapping[RunId, int | None]:
        return {run.run_id: None}

    async with _announced(find, settings):
        yield


@asynccontextmanager
async def announced_backfill(backfill_id: int, settings: Settings) -> AsyncIterator[None]:
    """As `announced`, of each run of the backfill, from when the block begins."""
    since: int | None = None

    async def find(ledger: Ledger) -> Mapping[RunId, int | None]:
        nonlocal since
        if since is None:
            since = await backfills.find_last_event(ledger, backfill_id)
        return dict.fromkeys(await backfills.find_states(ledger, backfill_id), since)

    async with _announced(find, settings):
        yield


@asynccontextmanager
async def _announced(find: Find, settings: Settings) -> AsyncIterator[None]:
    over = asyncio.Event()
    telling = asyncio.create_task(_tell(find, settings, over))
    try:
        yield
    finally:
        over.set()
        try:
            await asyncio.wait([telling], timeout=LAST_LOOK_S)
        finally:
            telling.cancel()


async def _tell(find: Find, settings: Settings, over: asyncio.Event) -> None:
    """Look now and then, and once more when it is over."""
    try:
        async with lane_ledger(settings, USUAL_TIMES.answer_within_s, pool_size=1) as ledger:
            heralds: dict[RunId, Herald] = {}
            while not over.is_set():
                await _look(heralds, find, ledger)
                with suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), EVERY_S)
            await _look(heralds, find, ledger)
    except Exception as error:
        log.warning("prefect hears no more events of this flow", error=type(error).__name__)


async def _look(heralds: dict[RunId, Herald], find: Find, ledger: Ledger) -> None:
    try:
        for run_id, since in (await find(ledger)).items():
            if run_id not in heralds:
                heralds[run_id] = Herald(ledger, await runs.find_run(ledger, run_id), tell_prefect, since)
            if not heralds[run_id].is_done:
                await heralds[run_id].look()
    except LedgerUnavailable as error:
        log.warning("prefect hears no events for now", error=str(error))


@dataclass
class Herald:
    """Tells of one run. What had happened before this process began on it was for others to tell."""

    ledger: Ledger
    run: Run
    tell: Tell
    since: int | None = None
    _told: set[UUID] = field(default_factory=set)
    _has_looked: bool = False
    #: So many announcements wait for Prefect's server to come back.
    _untold: int = 0
    #: The run is done, and everything is told.
    is_done: bool = False

    async def look(self) -> None:
        """Tell what is new. Where Prefect is away, the next look has it; raises LedgerUnavailable."""
        progress = await spend.progress(self.ledger, self.run.run_id)
        found = announcements(await self._read_events(progress))
        await self._tell([each for each in found if each.identity(self.run.run_id) not in self._told], progress)

    async def _read_events(self, progress: Progress) -> Sequence[RunEvent]:
        """The run's events, with the one of too many dead letters, which whoever is first to see them notes."""
        key = (self.ledger, self.run.run_id)
        events = await spend.list_events(*key, (*KINDS, *BEGINNINGS))
        if not self._has_looked:
            begun = self.since
            if begun is None:
                begun = max(event.event_id for event in events if event.kind in BEGINNINGS)
            self._told = {each.identity(key[1]) for each in announcements(events) if each.event.event_id <= begun}
            self._has_looked = True
        is_noted = any(event.kind == TOO_MANY_DEAD_LETTERS for event in events)
        if is_noted or not exceeds(progress.dead_letters, progress.documents, self.run.tolerance):
            return events
        detail = {"dead_letters": progress.dead_letters, "tolerance": str(self.run.tolerance)}
        log.warning("more dead letters than the job tolerates", run=self.run.run_id, **detail)
        await runs.note(*key, TOO_MANY_DEAD_LETTERS, detail, key=TOO_MANY_DEAD_LETTERS)
        return await spend.list_events(*key, KINDS)

    async def _tell(self, fresh: Sequence[Announcement], progress: Progress) -> None:
        if fresh and await self.tell([prefect_event(each, progress) for each in fresh]):
            self._told.update(each.identity(progress.run) for each in fresh)
            self._untold = 0
            self.is_done = any(each.event.kind == "done" for each in fresh)
        elif len(fresh) != self._untold:
            names = sorted({each.name for each in fresh})
            log.warning("prefect's server is away and hears no events", run=progress.run, names=names)
            self._untold = len(fresh)


async def tell_prefect(events: Sequence[dict[str, Any]]) -> bool:
    """Hand these to Prefect's client, which sends them in a thread of its own. False: the server is away.

    It is asked first, since what the client cannot send holds up the end of this process for ten seconds each.
    """
    try:
        async with asyncio.timeout(HEALTH_S), get_client() as client:
            if await client.api_healthcheck() is not None:
                return False
    except Exception:
        return False
    return all(emit_event(**event) is not None for event in events)


def prefect_event(told: Announcement, progress: Progress) -> dict[str, Any]:
    """The arguments of Prefect's `emit_event`. Automations choose by the labels of `resource`, not by the payload."""
    currency = Currency(progress.currency)
    labels = {
        "prefect.resource.id": f"farthing.run.{progress.run}",
        "prefect.resource.name": f"run {progress.run} of {progress.job}",
        "farthing.job": progress.job,
        "farthing.simulated": str(progress.is_simulated).lower(),
    }
    job = {"prefect.resource.id": f"farthing.job.{progress.job}", "prefect.resource.role": "job"}
    payload = {
        "run": progress.run,
        "job": progress.job,
        "documents": progress.documents,
        "done": progress.done,
        "dead_letters": progress.dead_letters,
        "spent": str(Money(progress.cost_pico, currency)),
        "budget": str(Money(progress.budget_pico, currency)),
        **told.numbers,
    }
    because = {} if told.because is None else {"reason": told.because}
    return {
        "event": told.name,
        "id": told.identity(progress.run),
        "occurred": told.event.happened_at,
        "resource": labels | {f"farthing.{name}": word for name, word in because.items()},
        "related": [job],
        "payload": payload | because,
    }
