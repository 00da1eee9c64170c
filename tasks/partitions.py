"""The steps of a backfill as Prefect shows them: one task run for each partition, by its name.

On one machine a partition is worked on in a process of its own; elsewhere, by a lane as of any run there, which is
watched from here (tasks/fleet.py, tasks/crew.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractAsyncContextManager, ExitStack
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, cast
from uuid import UUID

import structlog
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.futures import PrefectConcurrentFuture
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner

from schemas.engines import Engine
from schemas.errors import FarthingError, Unforeseen
from schemas.fleets import Absence
from schemas.requests import BackfillRequest, RunRequest
from schemas.settings import Settings
from tasks import backfills, engines, enrichment
from tasks.backfills import BackfillWork, PartitionEnded, Plan, WorkerDied
from tasks.fleet import fleet_of
from tasks.lanes import DIED_ADVICE, LANE_DIED, Ended
from tasks.ledger.backfills import Backfill
from tasks.ledger.runs import Run
from tasks.logs import configure, follow_in_prefect
from tasks.steps import crew_of, fit_to_be_stored, ignore_interrupts

log = structlog.get_logger("farthing.partitions")

#: How often a process looks whether the one that started it is still there, and how long it may then take to drain.
PARENT_EVERY_S, DRAIN_WITHIN_S = 2.0, 60.0
#: Why a lane elsewhere did nothing, which whoever uses its machine can set right: what to do is in its advice.
UNFIT = frozenset({"lane_failed", "input"})


async def work_partitions(request: BackfillRequest, plan: Plan, backfill: Backfill) -> BackfillWork:
    """Work on what is due, each partition in another process than this one; returns what came of it."""
    settings = Settings()
    engine = request.engine(settings)
    async with get_client() as client:
        api = {PREFECT_API_URL: str(client.api_url)}  # else each process would start a server of its own
    async with backfills.coordinator_ledger(settings) as ledger:
        with ExitStack() as stack:
            stack.enter_context(temporary_settings(api))
            threads = stack.enter_context(ThreadPoolExecutor(request.parallel))
            runner = stack.enter_context(engines.started(engine, request.parallel, settings.cluster))
            due = [each.partition for each in plan.due]
            begin = partial(BackfillWork, ledger, settings, backfill, request, due)
            if engine is Engine.PROCESSES:
                work = begin(lambda: PoolWorker(_start_process(stack), threads))
            else:
                elsewhere = Elsewhere(settings, _engage(engine, runner, settings, threads))
                work = begin(lambda: elsewhere, hand_on=elsewhere.give_up)
            await work.run()
            work.excess = await backfills.find_excess(ledger, plan.job, backfill.backfill_id)
            return work


class Team(Protocol):
    """The lanes of a run that work elsewhere: a fleet or a crew."""

    async def watch(self) -> Sequence[Ended | Exception]:
        """Look on until none is at work or waited for; how each ended."""

    def give_up(self) -> None:
        """Have them stopped."""


#: Has the lane of a run work elsewhere while the block lasts.
Engage = Callable[[RunRequest, Run], AbstractAsyncContextManager[Team]]


def _engage(engine: Engine, runner: TaskRunner[Any] | None, settings: Settings, threads: Executor) -> Engage:
    absence = Absence(settings.workers_within_s)  # one for all: who waits behind another is not forgotten
    if runner is None:
        return partial(fleet_of, settings=settings, absence=absence)
    of_flow = copy_context()

    def submit(lane: Any, parameters: dict[str, Any]) -> Any:
        """As the flow: a task's context goes along, and that of a partition's task is fit for no other process."""
        return of_flow.run(runner.submit, lane, parameters)

    return partial(crew_of, engine, submit, settings=settings, threads=threads, absence=absence)


@dataclass
class Elsewhere:
    """Works on any number of partitions, each by a lane that is no process of this one. `teams` are at work now.

    It was asked so many times to have them stopped: a team that begins only now hears of that, too.
    """

    settings: Settings
    engage: Engage
    teams: list[Team] = field(default_factory=list)
    asks: int = 0

    def give_up(self) -> None:
        """Have all lanes stopped by whoever has them."""
        self.asks += 1
        for team in self.teams:
            team.give_up()

    async def work(self, request: RunRequest) -> PartitionEnded:
        """Have a run done, shown as a task run. Raises WorkerDied, and what the run raises."""
        name = request.partitions[0]

        @task(name="partition", task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
        async def partition() -> PartitionEnded:
            with fit_to_be_stored():
                found = await self.have_worked(request)
            if found is None:
                raise WorkerDied
            return found

        return await partition()

    async def have_worked(self, request: RunRequest) -> PartitionEnded | None:
        """What the partition came to. None: its lane died before, and another one goes on with it."""
        run = await enrichment.open_run(request, self.settings)
        async with enrichment.paused_if_cut_short(self.settings, run), self.engage(request, run) as team:
            self.teams.append(team)
            for _ in range(self.asks):
                team.give_up()
            try:
                (ended,) = await team.watch()
            finally:
                self.teams.remove(team)
            if isinstance(ended, FarthingError | Unforeseen):
                raise ended
        last = ended if isinstance(ended, Ended) else Ended(LANE_DIED, DIED_ADVICE)
        found = await backfills.end_partition(request, self.settings, run, last)
        if found.state == "done":
            return found
        if last.reason in UNFIT:
            return replace(found, state="failed", reason=last.advice)
        return None if last.reason == LANE_DIED else found


def _start_process(stack: ExitStack) -> ProcessPoolTaskRunner:
    """A process that outlives the others. A pool each: a pool that loses one process ends all of its others."""
    return stack.enter_context(
        ProcessPoolTaskRunner(max_workers=1, initializer=begin_process, initargs=(os.getpid(),))
    )


def begin_process(parent: int) -> None:
    """Leave Ctrl-C to the process that started this one, and end soon after it, whatever became of it."""
    ignore_interrupts()
    threading.Thread(target=_end_with, args=(parent,), name="farthing-parent", daemon=True).start()


def _end_with(parent: int) -> None:
    """Once the parent is gone: SIGTERM, by which a lane drains; again and again, since an idle pool would stay."""
    while True:
        time.sleep(PARENT_EVERY_S)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(DRAIN_WITHIN_S)


@dataclass(frozen=True, slots=True)
class PoolWorker:
    """One process of Prefect's; `threads` are where its replies are waited for."""

    runner: ProcessPoolTaskRunner
    threads: Executor

    async def work(self, request: RunRequest) -> PartitionEnded:
        """Do a run in the process, shown as a task run. Raises WorkerDied, and what the run raises."""
        given = {"request": request, "partition": request.partitions[0]}
        submitted: PrefectConcurrentFuture[Coroutine[Any, Any, PartitionEnded]] = self.runner.submit(
            work_partition, given
        )
        try:
            return cast(
                PartitionEnded, await asyncio.get_running_loop().run_in_executor(self.threads, submitted.result)
            )
        except BrokenProcessPool:
            await _show_crash(submitted.task_run_id)
            raise WorkerDied from None


async def _show_crash(task_run_id: UUID) -> None:
    """Say for a process that is gone how its task run ended; it would be shown as running for ever."""
    try:
        async with get_client() as client:
            await client.set_task_run_state(task_run_id, Crashed(message="its process died"), force=True)
    except Exception as error:  # Prefect only shows
        log.warning("prefect shows no crash", error=type(error).__name__)


@task(name="partition", task_run_name="{partition}", cache_policy=NO_CACHE, persist_result=False)
async def work_partition(request: RunRequest, partition: str) -> PartitionEnded:
    """Do the run of one partition, of which the task run has the name."""
    settings = Settings()
    configure(json_lines=settings.log_json)
    follow_in_prefect()
    with fit_to_be_stored():
        return await backfills.work_partition(request, settings)
