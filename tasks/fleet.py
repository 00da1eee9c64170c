"""The fleet: lanes of a run that are deployment runs of Prefect's, each wherever a worker takes it.

The flow that opened the run starts them and looks on. It is not needed for the work: a lane goes on without it, and
when a machine dies the other lanes take its shards over, all by the ledger. What this adds is that Prefect is told of
a lane whose machine is gone, which it would show at work for ever, in a slot of its pool; and that lanes whom nobody
needs any more are taken back. Whoever starts the run again finds the lanes that are still there, and starts only
those that are missing, or that leave by a pause which is over now.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import structlog
from prefect import State
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, StateType, WorkPoolStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, Crashed, Scheduled

from schemas.errors import ConfigurationError, LedgerUnavailable
from schemas.fleets import Absence, FleetSeen, Kept, LaneSeen, Shown
from schemas.requests import LaneRequest, RunRequest
from schemas.settings import Settings
from tasks import enrichment
from tasks.final_states import lane_ended
from tasks.lanes import DIED_ADVICE, INTERRUPTED, LANE_DIED, Ended
from tasks.ledger import runs
from tasks.ledger.connection import Ledger
from tasks.ledger.leases import USUAL_TIMES
from tasks.ledger.runs import Run
from tasks.prefect_server import PREFECT_GONE, require_lasting_server
from tasks.witness import Witness

log = structlog.get_logger("farthing.fleet")

#: The flow and the deployment of a lane, as prefect.yaml has it.
LANE = "lane/lane"
EVERY_S = 2.0
#: What Prefect is told of a lane that it would show at work for ever.
GONE = "its machine or its process is gone: the ledger has not heard of it for long"


async def require_workers() -> None:
    """Raises ConfigurationError where no worker could ever take a lane."""
    require_lasting_server()
    async with get_client() as client:
        try:
            await client.read_deployment_by_name(LANE)
        except ObjectNotFound:
            raise ConfigurationError(
                f"lanes on workers need the deployment {LANE}: `prefect --no-prompt deploy --all`, from the root of "
                "Farthing's checkout"
            ) from None


async def work_on_workers(request: RunRequest, run: Run, settings: Settings) -> list[Ended]:
    """Have the run's lanes worked by Prefect's workers; returns when none is at work, and how each ended."""
    async with fleet_of(request, run, settings, Absence(settings.workers_within_s)) as fleet:
        with enrichment.pausing_on_signals(settings, run, fleet.give_up):
            return await fleet.watch()


@asynccontextmanager
async def fleet_of(request: RunRequest, run: Run, settings: Settings, absence: Absence) -> AsyncIterator[Fleet]:
    """The run's fleet, to be watched. Whoever is cancelled meanwhile leaves the run paused, and its lanes drain."""
    absence.begin()
    asked = await enrichment.ask_lanes(request, settings, run)
    async with get_client() as client, enrichment.lane_ledger(settings, USUAL_TIMES.answer_within_s) as ledger:
        try:
            yield Fleet(client, ledger, run, absence, asked)
        except asyncio.CancelledError:
            with suppress(LedgerUnavailable):
                await runs.change_state(ledger, run.run_id, "paused", runs.INTERRUPTED)
            raise


@dataclass
class Fleet:
    """The lanes of one run: those `asked` for, and their `flow_runs` by number, as Prefect showed them last."""

    client: PrefectClient
    ledger: Ledger
    run: Run
    absence: Absence
    asked: Collection[LaneRequest]
    flow_runs: dict[int, FlowRun] = field(default_factory=dict)
    #: What is known here to be over, though Prefect may be away and not have heard of it.
    _over: dict[int, Ended] = field(default_factory=dict)
    #: Since when a lane has been shown at work without being alive in the ledger.
    _silent_since_s: dict[int, float] = field(default_factory=dict)
    #: The ledger's side.
    _witness: Witness = field(init=False)
    _is_given_up: bool = False

    def __post_init__(self) -> None:
        self._witness = Witness(self.ledger, self.run.run_id)

    def give_up(self) -> None:
        """Have the lanes stopped by their workers: asked once, they have not left."""
        self._is_given_up = True

    async def start(self) -> None:
        """Start the lanes that are not there, if there is work. While Prefect is away each look tries again."""
        await self._witness.look()
        missing = [each for each in self.asked if each.number not in self.flow_runs or self._was_paused(each.number)]
        try:
            for each in [] if self._witness.is_run_over else missing:
                self.flow_runs[each.number] = await self._find_or_start(each)
        except Exception as error:
            log.warning("prefect does not start a lane", run=self.run.run_id, error=type(error).__name__)

    async def _find_or_start(self, asked: LaneRequest) -> FlowRun:
        """The last flow run of that lane if it is not over, else its one successor, whoever else starts that.

        Whoever started the run before may be gone with the lane's machine, and have told Prefect of neither.
        """
        tags = [f"farthing-{asked.mark}", f"lane-{asked.number}"]
        of_lane = FlowRunFilter(tags=FlowRunFilterTags(all_=tags))
        newest = FlowRunSort.EXPECTED_START_TIME_DESC
        found = await self.client.read_flow_runs(flow_run_filter=of_lane, sort=newest, limit=1)
        last = next((each for each in found if _may_go_on(_state(each))), None)
        kept = Kept.ABSENT if last is None else self._witness.of(last.id)
        if last is not None and kept in (Kept.ABSENT, Kept.ALIVE):
            return last
        if last is not None and kept is Kept.DIED:
            await self._show(last, Crashed(message=GONE))
        return await arun_deployment(
            LANE,
            client=self.client,
            parameters={"asked": asked.model_dump(mode="json")},
            timeout=0,
            tags=tags,
            idempotency_key=" ".join([*tags, "after", *(str(each.id) for each in found)]),
        )

    async def watch(self) -> list[Ended]:
        """Start them and look on until none is at work and none is waited for, whatever is away meanwhile."""
        while True:
            seen = await self._look()
            await self._tell(seen)
            if not seen.is_at_work and not seen.is_waited_for:
                return [self._ended(each.number) for each in self.asked]
            if self.absence.is_over(time.monotonic(), is_at_work=seen.is_at_work):
                return await self._leave_waiting(seen.waiting)
            await asyncio.sleep(EVERY_S)

    async def _look(self) -> FleetSeen:
        await self.start()
        await self._read_prefect()
        return FleetSeen([self._see(each.number) for each in self.asked], self._witness.is_run_over)

    async def _read_prefect(self) -> None:
        number_of = {flow_run.id: number for number, flow_run in self.flow_runs.items()}
        these = FlowRunFilter(id=FlowRunFilterId(any_=list(number_of)))
        try:
            for flow_run in await self.client.read_flow_runs(flow_run_filter=these):
                self.flow_runs[number_of[flow_run.id]] = flow_run
        except Exception as error:
            log.warning("prefect does not say how the lanes are", run=self.run.run_id, error=type(error).__name__)

    def _see(self, number: int) -> LaneSeen:
        flow_run, now_s = self.flow_runs.get(number), time.monotonic()
        shown = Shown.OVER if number in self._over else _shown(_state(flow_run))
        kept = Kept.ABSENT if flow_run is None else self._witness.of(flow_run.id)
        if shown is Shown.WAITING and kept is not Kept.ABSENT:
            shown = Shown.WORKING  # Prefect has been away since it began
        if self._was_paused(number) and not self._witness.is_run_over:
            shown = Shown.WAITING  # for its successor
        if shown is not Shown.WORKING or kept is Kept.ALIVE:
            self._silent_since_s.pop(number, None)
        silent_s = now_s - self._silent_since_s.setdefault(number, now_s) if shown is Shown.WORKING else 0.0
        return LaneSeen(number, shown, kept, silent_s)

    def _was_paused(self, number: int) -> bool:
        """Whether the lane obeyed a pause. Where the run goes on all the same, somebody started it again since."""
        state = _state(self.flow_runs.get(number))
        return number not in self._over and state.is_final() and lane_ended(state).reason == "paused"

    async def _tell(self, seen: FleetSeen) -> None:
        """Tell Prefect what follows from what was seen."""
        for number in seen.lost:
            await self._show(self.flow_runs.get(number), Crashed(message=GONE))
            self._over[number] = Ended(LANE_DIED, DIED_ADVICE)
        for number in seen.late:
            await self._show(self.flow_runs.get(number), Cancelled(message="the run needs no further lane"))
            self._over[number] = self._witness.unneeded
        if self._is_given_up:
            self._is_given_up = False
            for number, flow_run in self.flow_runs.items():
                if number not in self._over and not _state(flow_run).is_final():
                    await self._show(flow_run, Cancelling(message="farthing was interrupted"))

    async def _show(self, flow_run: FlowRun | None, state: State[None]) -> None:
        """Give the flow run that state, unless it is over or could not be started."""
        if flow_run is None:
            return
        try:
            await self.client.set_flow_run_state(flow_run.id, state)
        except Exception as error:  # Prefect only shows
            log.warning("prefect does not take a lane's state", lane=flow_run.name, error=type(error).__name__)

    def _ended(self, number: int) -> Ended:
        return self._over.get(number) or lane_ended(_state(self.flow_runs.get(number)))

    async def _leave_waiting(self, waiting: Collection[int]) -> list[Ended]:
        """Nobody has been at work for long: take back what no worker began, and say what to do."""
        ended = Ended("no_worker", await self._explain_absence())
        for number in waiting:
            await self._show(self.flow_runs.get(number), Cancelled(message="no worker took it in time"))
            self._over[number] = ended
        return [self._ended(each.number) for each in self.asked]

    async def _explain_absence(self) -> str:
        try:
            name = (await self.client.read_deployment_by_name(LANE)).work_pool_name or ""
            pool = await self.client.read_work_pool(name)
        except Exception:
            return PREFECT_GONE
        if pool.is_paused:
            do = f"the work pool {name} is paused: `prefect work-pool resume {name}`"
        elif pool.status is not WorkPoolStatus.READY:
            do = f"the work pool {name} has no worker: `prefect worker start --pool {name}` on each machine"
        else:
            do = f"the workers of the pool {name} are busy, or not allowed more: start more, or raise their limit"
        return f"no worker took a lane within {self.absence.within_s:g} s. {do}; then {INTERRUPTED}"


def _state(flow_run: FlowRun | None) -> State[Any]:
    return (flow_run.state if flow_run is not None else None) or Scheduled()


def _may_go_on(state: State[Any]) -> bool:
    """Whether a lane in this state may still work for whoever starts the run again."""
    return not state.is_final() and state.type is not StateType.CANCELLING


def _shown(state: State[Any]) -> Shown:
    if state.is_final():
        return Shown.OVER
    return Shown.WAITING if state.type in (StateType.SCHEDULED, StateType.PENDING) else Shown.WORKING
