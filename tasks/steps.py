"""The steps of a run as Prefect shows them: open, lanes and their shards, settle. Each unpacks, calls, returns."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.runtime import task_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner

from schemas.attempts import RunId
from schemas.engines import Engine
from schemas.errors import FarthingError, Unforeseen
from schemas.fleets import Absence
from schemas.requests import CompareRequest, LaneRequest, RunRequest
from schemas.settings import Settings
from tasks import comparisons, engines, enrichment, pilots
from tasks.comparisons import Entrant, Field
from tasks.crew import Crew, Future, await_lane
from tasks.fleet import require_workers, work_on_workers
from tasks.lanes import DIED_ADVICE, INTERRUPTED, LANE_DIED, Ended
from tasks.ledger import runs
from tasks.ledger.leases import USUAL_TIMES
from tasks.ledger.runs import Run
from tasks.logs import configure, follow_in_prefect
from tasks.prefect_server import PREFECT_GONE
from tasks.witness import Witness


@contextmanager
def fit_to_be_stored() -> Iterator[None]:
    """Prefect logs and stores what ends a task, with all that led to it: no word of that is anybody else's (G15)."""
    try:
        yield
    except (FarthingError, Unforeseen) as error:
        raise error from None
    except Exception as error:
        raise Unforeseen.of(error) from None


@task(name="open", cache_policy=NO_CACHE, persist_result=False)
async def open_run(request: RunRequest) -> Run:
    """Check everything, then resume or open the run."""
    settings = Settings()
    with fit_to_be_stored():
        await require_engine(request.engine(settings))
        return await enrichment.open_run(request, settings)


async def require_engine(engine: Engine) -> None:
    """Raises ConfigurationError where nothing could ever work there."""
    engines.require(engine)
    if engine is Engine.WORKERS:
        await require_workers()


async def work_lanes(request: RunRequest, run: Run) -> list[Ended]:
    """Work on the run in this process or, with more lanes or elsewhere, in that many others."""
    settings = Settings()
    match request.engine(settings):
        case Engine.PROCESSES if request.lanes == 1:
            return [await work_lane(request, run, 1)]
        case Engine.WORKERS:
            return await work_on_workers(request, run, settings)
        case engine:
            return await _work_in_tasks(engine, request, run, settings)


async def _work_in_tasks(engine: Engine, request: RunRequest, run: Run, settings: Settings) -> list[Ended]:
    async with get_client() as client:
        api = {PREFECT_API_URL: str(client.api_url)}  # else each process would start a server of its own
    with ExitStack() as stack:
        stack.enter_context(temporary_settings(api))
        threads = stack.enter_context(ThreadPoolExecutor(request.lanes))  # the loop's own are too few for 64
        runner = stack.enter_context(engines.started(engine, request.lanes, settings.cluster))
        if runner is None:
            ended = await _work_in_processes(stack, request, run, settings, threads)
        else:
            ended = await _work_in_cluster(engine, runner, request, run, settings, threads)
    failures = [end for end in ended if isinstance(end, Exception)]
    if len(failures) == len(ended):
        raise failures[0]
    return [_explain(end) if isinstance(end, Exception) else end for end in ended]


async def _work_in_processes(
    stack: ExitStack, request: RunRequest, run: Run, settings: Settings, threads: Executor
) -> Sequence[Ended | Exception]:
    with enrichment.pausing_on_signals(settings, run):
        lanes = [_start_process(stack, request, run, number) for number in range(1, request.lanes + 1)]
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(threads, await_lane, lane) for lane in lanes))


def _start_process(stack: ExitStack, request: RunRequest, run: Run, lane_no: int) -> Future:
    """A lane in a process of its own. A pool each: a pool that loses one process ends all of its others."""
    runner = stack.enter_context(ProcessPoolTaskRunner(max_workers=1, initializer=ignore_interrupts))
    return runner.submit(work_lane, {"request": request, "run": run, "lane_no": lane_no})


async def _work_in_cluster(
    engine: Engine, runner: TaskRunner[Any], request: RunRequest, run: Run, settings: Settings, threads: Executor
) -> Sequence[Ended | Exception]:
    absence = Absence(settings.workers_within_s)
    async with crew_of(engine, runner.submit, request, run, settings, threads, absence) as crew:
        with enrichment.pausing_on_signals(settings, run, crew.give_up):  # only now: Ray had put its own answer there
            return await crew.watch()


@asynccontextmanager
async def crew_of(
    engine: Engine,
    submit: Callable[..., Future],
    request: RunRequest,
    run: Run,
    settings: Settings,
    threads: Executor,
    absence: Absence,
) -> AsyncIterator[Crew]:
    """The run's crew in a cluster, to be watched. `submit` is the task runner's."""
    absence.begin()
    asked = await enrichment.ask_lanes(request, settings, run)
    async with enrichment.lane_ledger(settings, USUAL_TIMES.answer_within_s) as ledger:
        crew = Crew(engine, Witness(ledger, run.run_id), absence, threads)
        for each in asked:
            crew.add(each.number, submit(join_lane, {"asked": each}))
        yield crew


def _explain(failure: Exception) -> Ended:
    """What ended a lane while another one went on: an error of its own, or the death of its process."""
    if isinstance(failure, FarthingError | Unforeseen):
        return Ended("lane_failed", str(failure))
    return Ended(LANE_DIED, DIED_ADVICE)


def ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; only the one that started the lanes answers, by pausing the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@task(name="lane", task_run_name="lane-{lane_no}", cache_policy=NO_CACHE, persist_result=False)
async def work_lane(request: RunRequest, run: Run, lane_no: int) -> Ended:
    """Work on the run in this process until nothing is left, or something makes the lane drain."""
    settings = Settings()
    configure(json_lines=settings.log_json)
    follow_in_prefect()
    with fit_to_be_stored():
        return await enrichment.work_lane(request, settings, run, show_as_task_run)


@task(name="lane", task_run_name="lane-{asked.number}", cache_policy=NO_CACHE, persist_result=False)
async def join_lane(asked: LaneRequest) -> Ended:
    """As `work_lane`, wherever a cluster puts it, and again if the process is killed."""
    return await work_elsewhere(asked, task_run.id)


async def work_elsewhere(asked: LaneRequest, shown_as: str | None) -> Ended:
    """Work as a lane of a run that was opened on another machine; `shown_as` is its flow or task run."""
    settings = Settings()
    configure(json_lines=settings.log_json)
    follow_in_prefect()
    with fit_to_be_stored():
        return await enrichment.work_elsewhere(asked, settings, show_as_task_run, shown_as)


@task(name="settle", cache_policy=NO_CACHE, persist_result=False)
async def settle_run(run: Run, ended: list[Ended]) -> dict[str, Any]:
    """Finish the run if all its shards ended, else pause it; returns the outcome."""
    with fit_to_be_stored():
        settings = Settings()
        settled = await enrichment.settle_run(settings, run, ended)
        return outcome(settled, ended, await enrichment.find_excess(settings, settled))


async def recall_pilot(request: RunRequest) -> dict[str, Any] | None:
    """The outcome of the pilot that has asked these very documents, and is done. None: there is none."""
    settings = Settings()
    with fit_to_be_stored():
        run_id = await pilots.find_done(request, settings)
        if run_id is None:
            return None
        async with enrichment.lane_ledger(settings, USUAL_TIMES.once_within_s, pool_size=1) as ledger:
            run = await runs.find_run(ledger, run_id)
        return outcome(run, [], await enrichment.find_excess(settings, run))


async def draw_field(request: CompareRequest) -> Field:
    """Who is compared on which documents. Raises ConfigurationError with what is wrong, before anything is asked."""
    with fit_to_be_stored():
        return await comparisons.find_field(request, Settings())


async def cap_entrant(field: Field, entrant: Entrant) -> RunRequest:
    """What asks one of them, with what the others have left of the budget by now. Raises BudgetExhausted."""
    with fit_to_be_stored():
        return (await comparisons.look_again(field, Settings())).capped(entrant)


async def settle_unseen(run_id: int, settings: Settings) -> dict[str, Any]:
    """The outcome of a run whose Prefect server went away before it was told of one: what the ledger says."""
    ended = [Ended("prefect", PREFECT_GONE)]
    async with enrichment.lane_ledger(settings, USUAL_TIMES.once_within_s, pool_size=1) as ledger:
        run = await runs.find_run(ledger, RunId(run_id))
    settled = await enrichment.settle_run(settings, run, ended)
    return outcome(settled, ended, await enrichment.find_excess(settings, settled))


def outcome(run: Run, ended: list[Ended], excess: str | None) -> dict[str, Any]:
    """What the flow returns: plain values, since Prefect hands them on. `excess` is `enrichment.find_excess`'s."""
    advice = [end.advice for end in ended if end.advice and run.state != "done"]
    if run.state == "paused" and run.reason == runs.OPERATOR:
        advice = [f"`farthing pause` stopped this run: {INTERRUPTED}"]
    if run.state == "done" and excess:
        advice = [f"{excess}: `farthing audit {run.run_id}` says why"]
    return {
        "run_id": run.run_id,
        "state": run.state,
        "reason": run.reason,
        "advice": advice[0] if advice else "",
    }


async def show_as_task_run(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Await `work` inside a task run of that name. It takes no parameters: Prefect would hash and store them."""

    @task(name="shard", task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    async def shard() -> None:
        with fit_to_be_stored():
            await work()

    await shard()
